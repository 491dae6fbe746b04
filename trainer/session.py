"""A rank's session: from a process that the launcher started to an engine and its data, step by step.

    device -> dataset -> process group -> mesh -> engine -> resume

Everything that can be wrong with the user's input is found before the process group exists.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.layout import AXES
from parallel.mesh import Mesh, start_process_group
from trainer.build import build_engine
from trainer.checkpoint.start import starting_checkpoint
from trainer.checkpoint.store import load
from trainer.config.problems import ConfigError
from trainer.config.run import ResolvedRun, RunConfig
from trainer.data.batches import BatchPlan, MicroBatches
from trainer.data.build import ensure_dataset
from trainer.data.check import check_dataset
from trainer.data.dataset import Dataset
from trainer.data.order import ShuffledOrder
from trainer.engine import Engine
from trainer.environment import usable_cores
from trainer.metrics.passes import PassTimer
from trainer.run_directory import RunDirectory

_EVAL_SEED = 0
"""Evaluation reads the same held-out windows in every run, drawn over the whole split so that a few stand for it."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among the others, as its launcher says (torchrun's variables)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @staticmethod
    def from_environment() -> Place:
        """A process without a launcher is rank 0 of 1."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        return Place(
            rank, world, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
        )


@dataclass
class Session:
    """What a rank trains with, and where it stands in the run.

    Attributes:
        step: Steps done.
        cursor: Global samples consumed.
    """

    run: ResolvedRun
    place: Place
    device: torch.device
    directory: RunDirectory
    dataset: Dataset
    mesh: Mesh
    engine: Engine
    timer: PassTimer
    train_batches: MicroBatches
    eval_batches: MicroBatches
    eval_windows: int
    step: int = 0
    cursor: int = 0
    resumed_from: Path | None = None

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.place.rank == 0


def choose_device(config: RunConfig, place: Place) -> torch.device:
    """This rank's device; threads, torch's seed and determinism are set as the config says."""
    kind = config.run.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(config.run.threads or max(1, len(usable_cores()) // place.local_world_size))
    torch.manual_seed(config.run.seed)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if kind == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


@contextmanager
def open_session(run: ResolvedRun, place: Place) -> Iterator[Session]:
    """Build everything; the process group ends with the block.

    Raises:
        ConfigError: the dataset cannot be built or used.
    """
    config = run.config
    device = choose_device(config, place)
    directory = RunDirectory(Path(config.run.directory))
    checkpoint = starting_checkpoint(config)  # `resolve` has checked that it fits
    dataset = ensure_dataset(config.data)
    problems = check_dataset(config.data, config.model.vocab, config.train.sequence)
    if problems:
        raise ConfigError(problems)
    start_process_group(device.type, place.rank, place.world_size, config.run.timeout_seconds)
    try:
        mesh = Mesh(run.layout, device.type, config.comm.algorithm, config.run.timeout_seconds)
        timer = PassTimer(device)
        engine = build_engine(run, mesh, device, timer)
        session = _with_data(run, place, device, directory, dataset, mesh, engine, timer)
        if checkpoint is not None:
            manifest = load(engine, run, checkpoint)
            session.step, session.cursor, session.resumed_from = manifest.step, manifest.cursor, checkpoint
        yield session
        dist.barrier(mesh.channel(*AXES).group)
    finally:
        dist.destroy_process_group()


def _with_data(
    run: ResolvedRun,
    place: Place,
    device: torch.device,
    directory: RunDirectory,
    dataset: Dataset,
    mesh: Mesh,
    engine: Engine,
    timer: PassTimer,
) -> Session:
    config, batch = run.config, run.batch
    train, held_out = (dataset.split(name, config.train.sequence) for name in ("train", "eval"))
    plan = BatchPlan(batch.global_batch, batch.micro_batch, run.layout.data)
    data_rank = mesh.channel("data_shard", "data_replicate").index
    order = ShuffledOrder(train.windows, config.run.seed)
    return Session(
        run=run,
        place=place,
        device=device,
        directory=directory,
        dataset=dataset,
        mesh=mesh,
        engine=engine,
        timer=timer,
        train_batches=MicroBatches(train, order, plan, data_rank),
        eval_batches=MicroBatches(held_out, ShuffledOrder(held_out.windows, seed=_EVAL_SEED), plan, data_rank),
        eval_windows=held_out.windows,
    )
