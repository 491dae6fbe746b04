"""One rank of a run: `python -m trainer FILES... [KEY=VALUE...]`, alone or under torchrun or `atoll train`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import record

from parallel.pipeline.render import render_grid
from trainer.config.overrides import split_arguments
from trainer.config.problems import ConfigError
from trainer.config.rules import resolve
from trainer.config.run import load_config
from trainer.environment import describe
from trainer.loop import Loop
from trainer.process import die_with_parent
from trainer.program import numbers_of, units_of_parts
from trainer.session import Place, Session, open_session
from trainer.signals import Signals

_SECONDS_FOR_THE_FIRST = 20.0
"""How long the first rank of a machine may take to find what the others have found; it may still be importing."""


@record
def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the arguments say; a refused configuration is printed once per machine and ends with code 2."""
    die_with_parent()
    signals = Signals()
    place = Place.from_environment()
    try:
        files, overrides = split_arguments(list(sys.argv[1:] if arguments is None else arguments))
        run = resolve(load_config(files, overrides), place.world_size)
        with open_session(run, place) as session:
            if session.is_main:
                session.directory.open(run.values(), describe(files), session.step)
                print(introduction(session), flush=True)
            loop = Loop(session, signals)
            loop.run()
            if session.is_main:
                print(conclusion(session, loop), flush=True)
    except ConfigError as error:
        refuse(error, place, signals)


def refuse(error: ConfigError, place: Place, signals: Signals) -> NoReturn:
    """Print what is wrong once per machine and end with code 2.

    A launcher stops all ranks as soon as one has ended, so the others let the first one speak before they end. It
    will be silent where only they are in trouble; then they speak for themselves.
    """
    deadline = time.monotonic() + _SECONDS_FOR_THE_FIRST
    while place.local_rank != 0 and not signals.stop and time.monotonic() < deadline:
        time.sleep(0.05)
    if place.local_rank == 0 or not signals.stop:
        print(error, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not an exception for the launcher to report: everything has been said.
    os._exit(2)


def introduction(session: Session) -> str:
    """What is about to run, in a few lines."""
    run, config, numbers = session.run, session.config, numbers_of(session.run)
    batch, layout = run.batch, run.layout
    manifest = session.dataset.manifest
    lines = [
        f"run        {session.directory.path}",
        f"layout     {layout.describe()}; ZeRO: gradients over {numbers.grads}, optimizer state over {numbers.optim}",
        f"device     {session.device.type}, {config.train.precision}",
        f"batch      {batch.global_batch} samples = micro-batch {batch.micro_batch} x accumulation "
        f"{batch.gradient_accumulation} x data ranks {layout.data}; {config.train.sequence} tokens each",
        f"data       {session.dataset.directory}: {manifest.train.tokens:,} tokens to train on, "
        f"{manifest.eval.tokens:,} held out",
        *(f"stage {index}    {_span_of(names)}" for index, names in enumerate(units_of_parts(run))),
    ]
    if layout.pipeline > 1:
        lines += ["program", render_grid(session.engine.train_program)]
    if session.resumed_from is not None:
        lines.append(f"resumed    {session.resumed_from} (step {session.step}, sample {session.cursor:,})")
    return "\n".join(lines)


def conclusion(session: Session, loop: Loop) -> str:
    """Where the run ended."""
    total = session.config.train.steps
    if loop.stopped and session.step < total:
        return f"stopped at step {session.step} of {total}; the same command goes on from there"
    return f"done: step {session.step} of {total}; everything is in {session.directory.path}"


def _span_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} units)"


if __name__ == "__main__":
    main()
