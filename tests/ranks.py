"""Run a function on several ranks of a gloo process group, each in its own process.

The processes are forked from a server that has imported torch once, so a group of ranks starts in a fraction of a
second. A rank's output goes to a file of its own; when a rank fails, dies or does not end in time, that, the
traceback and (for ranks that hang) the stack are in the error that the test sees, and no process is left behind.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_PRELOADED = ["torch", "torch.distributed.checkpoint", "trainer.checkpoint.store", "trainer.build"]
_GRACE_SECONDS = 5.0  # how long the other ranks may take to tell what the failure of one did to them
_LOG_LINES = 30


class RanksFailed(AssertionError):
    """Some rank raised, died or hung; `reasons` tells what happened to which rank, first failure first."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__("\n\n".join(f"rank {rank} {reason}" for rank, reason in reasons.items()))
        self.reasons = reasons


@dataclass
class _Rank:
    """One process and how to hear from it."""

    index: int
    process: BaseProcess
    connection: Connection
    log: Path

    def tail(self) -> str:
        """The end of what it printed."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "".join(f"\n    | {line}" for line in lines[-_LOG_LINES:])


def run_ranks(world_size: int, function: Callable[..., T], *arguments: Any, timeout_seconds: float = 120.0) -> list[T]:
    """`function(*arguments)` on `world_size` ranks with torch on one thread each; their results in rank order.

    The default process group is up when the function is called; `torch.distributed.get_rank()` tells the ranks
    apart. The function, its arguments and its results must be picklable; functions are found by name.

    Raises:
        RanksFailed: a rank raised, died, or did not end within the time limit.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    task = pickle.dumps((function, arguments))
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        ranks = []
        try:
            for index in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                log = Path(name) / f"rank-{index}.log"
                process = context.Process(
                    target=_main, args=(index, world_size, name, log, task, theirs, timeout_seconds), daemon=True
                )
                process.start()
                theirs.close()
                ranks.append(_Rank(index, process, ours, log))
            return _collect(ranks, timeout_seconds)
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()
                rank.connection.close()


def _collect(ranks: Sequence[_Rank], timeout_seconds: float) -> list[Any]:
    """The results of all ranks, as they come."""
    results: dict[int, Any] = {}
    reasons: dict[int, str] = {}
    pending = {rank.connection: rank for rank in ranks}
    deadline = time.monotonic() + timeout_seconds
    while pending:
        arrived = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not arrived:
            break
        for connection in arrived:
            assert isinstance(connection, Connection)
            rank = pending.pop(connection)
            try:
                succeeded, content = pickle.loads(connection.recv_bytes())
            except EOFError:
                rank.process.join()
                succeeded, content = False, _ending(rank.process.exitcode)
            if succeeded:
                results[rank.index] = content
            else:
                reasons[rank.index] = content + rank.tail()
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    for rank in pending.values():
        reasons[rank.index] = f"did not end{_stack(rank)}"
    if reasons:
        raise RanksFailed(reasons)
    return [results[rank.index] for rank in ranks]


def _stack(rank: _Rank) -> str:
    """Where a hanging rank stands."""
    if rank.process.pid is not None:
        os.kill(rank.process.pid, signal.SIGUSR1)
        time.sleep(0.2)
    return rank.tail()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code} and no result"


def _main(
    rank: int, world_size: int, directory: str, log: Path, task: bytes, connection: Connection, timeout_seconds: float
) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    with log.open("w", buffering=1) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        faulthandler.enable(output)
        faulthandler.register(signal.SIGUSR1, output)
        torch.set_num_threads(1)
        try:
            meeting_point = f"file://{directory}/store"  # a free port would be somebody else's a moment later
            limit = timedelta(seconds=timeout_seconds)
            dist.init_process_group("gloo", meeting_point, rank=rank, world_size=world_size, timeout=limit)
            function, arguments = pickle.loads(task)
            message = pickle.dumps((True, function(*arguments)))
            dist.barrier()  # nobody closes a connection that a slower rank still uses
            dist.destroy_process_group()
        except BaseException:  # noqa: BLE001 - the test that waits for this rank raises it
            message = pickle.dumps((False, f"raised\n{traceback.format_exc().rstrip()}"))
        connection.send_bytes(message)
