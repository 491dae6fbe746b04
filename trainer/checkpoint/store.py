"""Saving and loading the whole state of a run: weights, optimizer moments, update count and data cursor.

The full tensors `model.*`, `first_moment.*` and `second_moment.*` are fp32 and know no layout, so what was saved
by any number of ranks in any arrangement is loaded by any other. See pieces.py for who writes what, planner.py
and storage.py for how torch's distributed checkpoint carries it, directory.py for how a checkpoint appears.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from parallel.flat.space import Range, Unit
from parallel.layout import AXES
from parallel.zero.optimizer import OwnedRange
from trainer.checkpoint.directory import find_latest, remove, step_path
from trainer.checkpoint.manifest import STATES, CheckpointManifest, check_compatible, read_manifest
from trainer.checkpoint.pieces import Piece, pieces_to_read, pieces_to_write, writer_of
from trainer.checkpoint.planner import Chunk, RectangleLoadPlanner, RectangleSavePlanner
from trainer.checkpoint.storage import CheckpointReader, CheckpointWriter
from trainer.config.problems import ConfigError
from trainer.config.run import ResolvedRun
from trainer.engine import Engine

__all__ = ["CheckpointError", "check_compatible", "find_latest", "load", "read_manifest", "save"]

T = TypeVar("T")
_SHOWN_RANKS = 8


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; raised on every rank, whichever one failed."""


def save(engine: Engine, run: ResolvedRun, directory: Path, step: int, cursor: int, keep: int | None) -> Path:
    """Write the checkpoint of `step` into `directory` and make it the latest; every rank calls this together.

    Args:
        directory: The directory of all checkpoints of the run, on a file system that all ranks share.
        cursor: Global samples consumed.
        keep: How many of the newest checkpoints stay, this one included; None: all.

    Returns:
        Where it lies.

    Raises:
        CheckpointError: some rank could not write its part; earlier checkpoints are untouched.
    """
    numbers = engine.optimizer.gradients.numbers
    manifest = CheckpointManifest(
        step=step,
        cursor=cursor,
        updates=engine.optimizer.step_count(),
        precision=run.config.train.precision,
        model=run.config.model.model_dump(mode="json"),
        layout={axis: run.layout.degree(axis) for axis in AXES},
        zero={"params": numbers.params, "grads": numbers.grads, "optim": numbers.optim},
        versions=_versions(),
        saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    path, rank = step_path(directory, step), engine.mesh.rank
    writer = CheckpointWriter(directory, manifest, rank, keep)
    planner = RectangleSavePlanner(_chunks_to_write(engine))
    try:
        state_dict_saver.save({}, storage_writer=writer, planner=planner, process_group=_world(engine))
    except CheckpointException as failure:
        if rank == 0 and writer.partial.exists():
            remove(writer.partial)  # it may be what fills the disk
        raise _failed(f"cannot save checkpoint {path}; earlier ones are untouched", _reasons(failure)) from failure
    return path


def load(engine: Engine, run: ResolvedRun, path: Path) -> CheckpointManifest:
    """Fill the engine from the checkpoint in directory `path`; every rank calls this together.

    Returns:
        The manifest: where the run stands.

    Raises:
        CheckpointError: the checkpoint is of another model, or some rank could not read its part. The engine's
            state is then undefined.
    """
    group = _world(engine)
    what = f"cannot load checkpoint {path}"
    manifest, reader = _on_all_ranks(group, what, lambda: _open(run, path))
    engine.finish()  # a gather under way would overwrite what is read
    planner = RectangleLoadPlanner(_chunks_to_read(engine))
    try:
        state_dict_loader.load({}, storage_reader=reader, planner=planner, process_group=group)
    except CheckpointException as failure:
        raise _failed(what, _reasons(failure)) from failure
    engine.optimizer.publish_masters()
    engine.optimizer.set_step_count(manifest.updates)
    return manifest


def _open(run: ResolvedRun, path: Path) -> tuple[CheckpointManifest, CheckpointReader]:
    problems = check_compatible(path, run.config)
    if problems:
        raise ConfigError(problems)
    manifest = read_manifest(path)
    return manifest, CheckpointReader(path, manifest)


def _chunks_to_write(engine: Engine) -> list[Chunk]:
    mesh, optim = engine.mesh, engine.optimizer.gradients.numbers.optim
    writer = writer_of(mesh.layout, mesh.position, optim)
    return _chunks(engine, lambda unit, owned: pieces_to_write(unit, owned, writer))


def _chunks_to_read(engine: Engine) -> list[Chunk]:
    return _chunks(engine, pieces_to_read)


def _chunks(engine: Engine, pieces: Callable[[Unit, Range], list[Piece]]) -> list[Chunk]:
    """The pieces of every owned range in all three states."""
    found = []
    for owned in engine.optimizer.ranges.values():
        buffers = _buffers(owned)
        for piece in pieces(owned.unit, owned.range):
            for state in STATES:
                data = buffers[state][piece.local.start : piece.local.stop].view(piece.sizes)
                found.append(Chunk(f"{state}.{piece.name}", piece.full_shape, piece.offsets, data))
    return found


def _buffers(owned: OwnedRange) -> dict[str, Tensor]:
    return {"model": owned.master, "first_moment": owned.first_moment, "second_moment": owned.second_moment}


def _world(engine: Engine) -> dist.ProcessGroup:
    return engine.mesh.channel(*AXES).group


def _on_all_ranks(group: dist.ProcessGroup, what: str, action: Callable[[], T]) -> T:
    """The result of `action`; if it fails on any rank, all raise, so that none waits for the one that failed."""
    result: list[T] = []
    reason: Exception | None = None
    try:
        result.append(action())
    except Exception as error:  # noqa: BLE001 - whatever it is, it is raised below, here and on all other ranks
        reason = error
    told: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, _told(reason) if reason else None, group=group)
    reasons = {rank: text for rank, text in enumerate(told) if text is not None}
    if reasons:
        raise _failed(what, reasons) from reason
    return result[0]


def _reasons(failure: CheckpointException) -> dict[int, str]:
    """What DCP says went wrong, per rank."""
    return {rank: _told(error) for rank, (error, _) in sorted(failure.failures.items())}


def _told(error: BaseException) -> str:
    """An error in words; the types that speak for themselves are not named."""
    return str(error) if isinstance(error, OSError | ValueError | ConfigError) else f"{type(error).__name__}: {error}"


def _failed(what: str, reasons: dict[int, str]) -> CheckpointError:
    """One error for what happened on several ranks; equal reasons are told once."""
    ranks_of: dict[str, list[int]] = {}
    for rank, reason in reasons.items():
        ranks_of.setdefault(reason, []).append(rank)
    lines = [f"{what}:"]
    for reason, ranks in ranks_of.items():
        more = f" and {len(ranks) - _SHOWN_RANKS} more" if len(ranks) > _SHOWN_RANKS else ""
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:_SHOWN_RANKS]))}{more}"
        lines.append(f"  {who}: {reason}".replace("\n", "\n    "))
    return CheckpointError("\n".join(lines))


def _versions() -> dict[str, str]:
    """What wrote the checkpoint."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["atoll"] = importlib.metadata.version("atoll")
    except importlib.metadata.PackageNotFoundError:
        found["atoll"] = "run from its source"
    return found
