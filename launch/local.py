"""Ranks on this machine: torch's elastic agent starts them, this module minds them.

The agent does the rendezvous, hands every rank its place and restarts the group where asked. Around it:

- Each rank's output goes to its own log file; the console follows the ranks that were asked for
  (`launch.logs`).
- SIGINT, SIGTERM and SIGHUP reach the ranks as SIGTERM ("save and stop"), SIGUSR1 as itself ("save"). Ranks
  run in sessions of their own, so Ctrl-C in the terminal comes to the launcher alone. A second SIGINT kills.
- No rank stays behind. When one fails, the others get a few seconds and are killed; the same after the grace
  of a stop. If the launcher itself is killed, the kernel kills the ranks (`trainer.process.die_with_parent`).
- The rank that failed *first* is named. Its peers usually fail as well, a moment later, when their
  connections break, and which process ends first says nothing: what counts is when the error was recorded.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launch.logs import Console, rank_log
from trainer.environment import usable_cores
from trainer.process import LAUNCHER_PID

_POLL_SECONDS = 0.1
_SECONDS_AFTER_FAILURE = 5
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Both streams of a rank go to the end of one file, in the order written; the agent could only give each a
# file of its own, emptied at every start. SIGUSR1, which kills by default, is ignored until it is handled.
_RANK_SHELL = 'trap "" USR1; exec "$@" >>"$0/rank-$RANK.log" 2>&1'


def run_local(
    arguments: Sequence[str],
    ranks: int,
    log_directory: Path,
    log_ranks: Sequence[int] = (0,),
    *,
    module: str = "trainer",
    max_restarts: int = 0,
    grace_seconds: float = 60.0,
) -> int:
    """Run `python -m <module> <arguments>` on `ranks` processes of this machine, to their end.

    Logs go to `<log_directory>/rank-N.log`; `log_ranks` are also shown on the console. After a failure all
    ranks are started again, up to `max_restarts` times. `grace_seconds` is the time from a stop signal until
    ranks that have not ended are killed. Returns the exit code: 0, or that of the rank that failed first (128
    + n for signal n). Must be called from the main thread.
    """
    log_directory.mkdir(parents=True, exist_ok=True)
    _quiet_torch()
    with tempfile.TemporaryDirectory(prefix="atoll-") as errors:
        spec = _worker_spec(_rank_command(module, arguments, ranks, log_directory), ranks, max_restarts)
        agent = _Agent(spec, _ErrorFiles(Path(errors)), grace_seconds)
        try:
            with _signals_to(agent), Console(log_directory, log_ranks):
                agent.run()
        finally:
            agent.kill()
            spec.rdzv_handler.shutdown()
        failure = agent.first_failure()
        if failure is None:
            if agent.stopped_by is not None:
                _say(f"stopped by {agent.stopped_by.name}; all ranks ended cleanly")
            return 0
        why = f"stopped by {agent.stopped_by.name}: " if agent.stopped_by is not None else ""
        _say(f"{why}rank {failure.rank} {failure.message}; log: {rank_log(log_directory, failure.rank)}")
        return failure.exit_code


@dataclass(frozen=True)
class _Failure:
    """How a rank failed; `time` in seconds since the epoch, `exit_code` as a shell would give it."""

    rank: int
    time: float
    exit_code: int
    message: str


class _ErrorFiles(LogsSpecs):
    """Tells every rank the file in which torch's `record` leaves its exception; output is the shell's."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    @property
    def root_log_dir(self) -> str:
        return str(self._directory)

    def file(self, rank: int) -> Path:
        return self._directory / f"rank-{rank}.json"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        for rank, environment in envs.items():
            self.file(rank).unlink(missing_ok=True)
            environment["TORCHELASTIC_ERROR_FILE"] = str(self.file(rank))
        inherited = dict.fromkeys(envs, "")
        return LogsDest(inherited, inherited, {}, {}, {rank: str(self.file(rank)) for rank in envs})


class _Agent(LocalElasticAgent):
    """The elastic agent, with this launcher's way of passing signals, waiting and telling failures apart."""

    def __init__(self, spec: WorkerSpec, errors: _ErrorFiles, grace_seconds: float) -> None:
        super().__init__(spec, errors, shutdown_timeout=_SECONDS_AFTER_FAILURE)
        self.stopped_by: signal.Signals | None = None
        self._errors = errors
        self._grace_seconds = grace_seconds
        self._deadline = float("inf")
        self._starting = False
        self._seen_dead: dict[int, float] = {}

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal of the launcher on to the ranks."""
        received = signal.Signals(number)
        if received == self.stopped_by == signal.SIGINT:
            self.kill()
            return
        if received in _STOPPING:
            self._remaining_restarts = 0
            if self.stopped_by is None:
                self._deadline = time.monotonic() + self._grace_seconds
            self.stopped_by = received
        if not self._starting:
            self._send(signal.SIGTERM if received in _STOPPING else received)

    def kill(self) -> None:
        """Kill every rank, with all processes that it started."""
        for process in self._processes().values():
            # The group outlives its leader where a rank left children behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def first_failure(self) -> _Failure | None:
        """The earliest failure of the last attempt, None where every rank ended with 0."""
        ends = [self._failure(rank, process) for rank, process in self._processes().items()]
        return min((end for end in ends if end), key=lambda failure: failure.time, default=None)

    def _failure(self, rank: int, process: subprocess.Popen[bytes]) -> _Failure | None:
        code = process.wait(_SECONDS_AFTER_FAILURE)
        if code == 0:
            return None
        exit_code = 128 - code if code < 0 else code
        ending = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        file = self._errors.file(rank)
        if file.exists():
            # Python ends with 1 after an exception; a signal came later, to a rank that was slow to end.
            return _Failure(rank, file.stat().st_mtime, max(code, 1), f"failed: {_recorded_error(file)}")
        # A death is seen up to one poll late; ranks stopped after another's failure were never seen.
        return _Failure(rank, self._seen_dead.get(rank, time.time()) - _POLL_SECONDS, exit_code, ending)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._seen_dead.clear()
        self._starting = True
        started: dict[int, Any] = super()._start_workers(worker_group)
        self._starting = False
        if self.stopped_by is not None:  # it came before there was anybody to tell
            self._send(signal.SIGTERM)
        return started

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        failure = self.first_failure()
        if failure is not None:
            _say(f"rank {failure.rank} {failure.message}; starting all ranks again")
        super()._restart_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        processes = self._processes()
        codes = {rank: process.poll() for rank, process in processes.items()}
        ended = {rank: code for rank, code in codes.items() if code is not None}
        for rank in ended:
            self._seen_dead.setdefault(rank, time.time())
        if self.stopped_by is not None:
            if any(code < 0 or self._errors.file(rank).exists() for rank, code in ended.items()):
                # What the others want to save together can no longer be saved.
                self._deadline = min(self._deadline, time.monotonic() + _SECONDS_AFTER_FAILURE)
            if time.monotonic() > self._deadline:
                self.kill()
            elif len(ended) < len(processes):
                # The agent would not wait: to it, the first end with another code than 0 is the end of all.
                return RunResult(state=WorkerState.HEALTHY)
        elif any(ended.values()):
            assert self._pcontext is not None
            self._pcontext.close(signal.SIGTERM, timeout=_SECONDS_AFTER_FAILURE)
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _processes(self) -> dict[int, subprocess.Popen[bytes]]:
        if not isinstance(self._pcontext, SubprocessContext):
            return {}
        return {rank: handler.proc for rank, handler in self._pcontext.subprocess_handlers.items()}

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes().values():
            process.send_signal(number)


def _worker_spec(command: list[str], ranks: int, max_restarts: int) -> WorkerSpec:
    rendezvous = RendezvousParameters(
        backend="c10d",
        endpoint="127.0.0.1:0",  # the agent's store listens on a free port and serves the ranks as well
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr="127.0.0.1",
        is_host=True,
    )
    # The agent fills in templates such as ${local_rank}: what looks like one here is the user's.
    shell, *rest = [part.replace("$", "$$") for part in command]
    return WorkerSpec(
        role="atoll",
        local_world_size=ranks,
        entrypoint=shell,
        args=tuple(rest),
        rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=max_restarts,
        monitor_interval=_POLL_SECONDS,
        local_addr="127.0.0.1",
    )


def _rank_command(module: str, arguments: Sequence[str], ranks: int, log_directory: Path) -> list[str]:
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(usable_cores()) // ranks)))
    environment = {"ATOLL_LAUNCHER": "local", LAUNCHER_PID: str(os.getpid()), "OMP_NUM_THREADS": threads}
    settings = [f"{name}={value}" for name, value in environment.items()]
    python = [sys.executable, "-u", "-m", module, *arguments]
    return ["/bin/sh", "-c", _RANK_SHELL, str(log_directory.absolute()), "env", *settings, *python]


@contextlib.contextmanager
def _signals_to(agent: _Agent) -> Iterator[None]:
    # The agent's own handlers give up waiting when a second signal comes; it is left with one nobody sends.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    # What is ignored stays ignored: `nohup atoll train` outlives its terminal.
    heard = [number for number in (*_STOPPING, signal.SIGUSR1) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, agent.on_signal) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _recorded_error(file: Path) -> str:
    """Exception type and message as torch's `record` wrote them, on one line."""
    try:
        message = json.loads(file.read_text())["message"]
    except (json.JSONDecodeError, KeyError):
        return "its error record is damaged"  # killed while it was writing
    text = message["message"] if isinstance(message, dict) else str(message)
    line = " ".join(text.split())
    return line if len(line) <= 500 else line[:497] + "..."


def _quiet_torch() -> None:
    """The agent logs each signal and failure at length; this launcher says the same in one line."""
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def _say(text: str) -> None:
    print(f"atoll: {text}", file=sys.stderr, flush=True)
