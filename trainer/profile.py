"""A run measures what its passes cost, and plans its schedule again with that.

    first step          warms up
    next N steps        every pass is timed (trainer/metrics/passes.py, which is on anyway)
    behind them         transfers are timed, all ranks tell what they measured, one rank plans, all take its program

Stages stay where they are and every stage goes through its micro-batches in the same order, so no weight moves and
no loss changes by a bit: only what a rank does in the meantime does. The program is planned once and sent as text: a
search that is limited by time would not find the same twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm.channel import Channel
from parallel.layout import AXES
from parallel.mesh import Mesh
from parallel.pipeline.actions import Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.program import Program
from parallel.pipeline.verify import check
from trainer.config.run import ResolvedRun
from trainer.costs import derived_costs
from trainer.engine import Engine
from trainer.environment import describe
from trainer.files import replace_text
from trainer.measured import (
    Measured,
    as_object,
    is_split,
    measured_costs,
    planned_again,
    predicted_bubble_rate,
)
from trainer.metrics.passes import PassTimer, bubble_rate, passes_of, span_and_busy

_ROUND_TRIPS, _WARM_UP = 12, 4
_HARDWARE = ("platform", "cpu", "devices", "packages")


class Profile:
    """Times the passes of a few steps behind the first one; `after` is called behind every step.

    Args:
        timer: The observer of the engine's executors.
        first_step: The step that warms up.
        file: Where rank 0 writes the costs.

    Attributes:
        predicted: Simulated bubble rate of the engine's program, with the measured costs once there are any.
        predicted_before: That of the step before the last one, which is what has been measured by then.
        costs: What was measured.
    """

    def __init__(self, run: ResolvedRun, engine: Engine, timer: PassTimer, first_step: int, file: Path) -> None:
        self.run, self.engine, self.timer, self.file = run, engine, timer, file
        self.steps = range(first_step + 1, first_step + 1 + run.config.parallel.pipeline.profile.steps)
        self.costs: Costs | None = None
        self.predicted = self.predicted_before = predicted_bubble_rate(run, engine.train_program)
        self._seconds: dict[tuple[Op, int], list[float]] = {}
        self._times: list[tuple[float, float]] = []

    def after(self, step: int) -> None:
        """A step is over. Every rank calls this at the same point of the run."""
        self.predicted_before = self.predicted
        if step not in self.steps:
            return
        self._note()
        if step == self.steps[-1]:
            self._conclude()

    def _note(self) -> None:
        """Keep the times of the step that has just ended."""
        intervals = self.timer.read()
        self._times.append(span_and_busy(intervals))
        for interval in passes_of(intervals):
            for action, start, end in interval.shares():
                part = self.engine.train_program.part_of(action.stage)
                self._seconds.setdefault((action.op, part), []).append(end - start)

    def _conclude(self) -> None:
        engine, pipeline = self.engine, self.engine.mesh.channel("pipeline")
        old = engine.train_program
        own = Measured(
            passes={key: median(seconds) for key, seconds in self._seconds.items()},
            transfers=tuple(time_transfers(old, pipeline, engine.train_executor.activation)),
            steps=tuple(self._times),
        )
        world = engine.mesh.channel(*AXES).group
        ranks: list[Measured] = [own] * dist.get_world_size(world)
        dist.all_gather_object(ranks, own, group=world)
        costs = self.costs = measured_costs(ranks, old.depth, derived_costs(self.run))
        before = self.predicted_before = self.predicted = predicted_bubble_rate(self.run, old, costs)
        if self.run.config.parallel.pipeline.profile.replan:
            again = shared(engine.mesh, lambda: planned_again(self.run, old, costs))
            if again != old:
                engine.adopt(again, costs)
                self.predicted = predicted_bubble_rate(self.run, again, costs)
        measured = median(bubble_rate(times) or 0.0 for times in zip(*(rank.steps for rank in ranks), strict=True))
        if engine.mesh.rank == 0:
            planned = engine.train_program != old
            self._write(costs, is_split(ranks), before, measured, self.predicted if planned else None)
            how = "planned again from" if planned else "kept with"
            then = f" -> {self.predicted:.1%}" if planned else ""
            name = self.run.config.parallel.pipeline.schedule
            print(
                f"schedule {name} {how} measured costs: predicted bubble {before:.1%}{then}, measured {measured:.1%}",
                flush=True,
            )

    def _write(self, costs: Costs, split: bool, before: float, measured: float, again: float | None) -> None:
        """The costs and where they come from."""
        found: dict[str, Any] = {
            "schedule": self.run.config.parallel.pipeline.schedule,
            "layout": self.run.layout.describe(),
            "microbatches": self.engine.train_program.microbatches,
            "steps": [self.steps[0], self.steps[-1]],
            **as_object(costs),
            "backward": "measured in halves" if split else "measured whole, divided in the ratio of the FLOPs",
            "bubble_rate": {"measured": measured, "predicted": before, "predicted_again": again},
            "hardware": {key: value for key, value in describe().items() if key in _HARDWARE},
        }
        replace_text(self.file, json.dumps(found, indent=1) + "\n")


def shared(mesh: Mesh, plan: Callable[[], Program]) -> Program:
    """The program that rank 0 plans, on all ranks."""
    told: list[str | Exception] = [""]
    if mesh.rank == 0:
        try:
            told = [plan().to_csv()]
        except Exception as error:  # noqa: BLE001 - raised below, here and on the ranks that wait for the program
            told = [error]
    dist.broadcast_object_list(told, group=mesh.channel(*AXES).group, group_src=0)
    if isinstance(told[0], Exception):
        raise RuntimeError("rank 0 could not plan the program") from told[0]
    program = Program.from_csv(told[0])
    check(program)
    return program


def time_transfers(program: Program, channel: Channel, activation: Tensor) -> list[float]:
    """Seconds that a stage border takes to each rank behind this one that it has a border with: half a round trip.

    Pairs take their turns in one order on all ranks, and within a step nothing else uses the channel.
    """
    placement, after = program.placement, program.after
    borders = [(placement[stage], placement[end]) for stage in range(program.stages) if (end := after(stage))]
    found = []
    for low, high in sorted({(min(pair), max(pair)) for pair in borders if pair[0] != pair[1]}):
        if channel.index == low:
            found.append(median(_round_trips(channel, high, activation, starts=True)) / 2)
        elif channel.index == high:
            _round_trips(channel, low, activation, starts=False)
    return found


def _round_trips(channel: Channel, peer: int, activation: Tensor, *, starts: bool) -> Sequence[float]:
    """Seconds of each; the first ones, which make the connection, are left out."""
    message, arrived = torch.zeros_like(activation), torch.empty_like(activation)
    seconds = []
    for _ in range(_ROUND_TRIPS):
        begin = time.perf_counter()
        for sends in (starts, not starts):
            for work in channel.transfer(*(([(message, peer)], []) if sends else ([], [(arrived, peer)]))):
                work.wait()
            if activation.device.type == "cuda":
                torch.cuda.synchronize(activation.device)
        seconds.append(time.perf_counter() - begin)
    return seconds[_WARM_UP:]
