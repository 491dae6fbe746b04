"""What a run starts from; asked before there are processes, so no torch."""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoint.directory import find_latest
from trainer.config.run import RunConfig
from trainer.run_directory import RunDirectory


def starting_checkpoint(config: RunConfig) -> Path | None:
    """The newest checkpoint of the run's own directory, else the one it was told to load, else none.

    Whether it fits the config is what `check_compatible` tells.
    """
    own = find_latest(RunDirectory(Path(config.run.directory)).checkpoints) if config.checkpoint.resume else None
    return own or (Path(config.checkpoint.load) if config.checkpoint.load else None)
