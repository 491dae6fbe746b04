"""A step with and without the barrier before its updates (optimizer.validation), on stages that sleep.

Four pipeline ranks on gloo train a small decoder with real optimizer steps; F, I and W of every stage sleep for 20 ms
besides, so that two cores suffice. A schedule whose ranks do the same work in different windows of time (zb-h2) can
begin a step on the first rank while the last one still ends the step before: then a step takes as long as the work of
a rank. With the barrier it takes the makespan of the program, which is the bar's comparison: the time that a step
takes, as a share of the simulated makespan. Every guess is right here, as in a run whose norm is not clipped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installation

from benchmarks import common

RANKS, MICROBATCHES, PASS_SECONDS = 4, 8, 0.02
SCHEDULES = ("1f1b", "zb-h1", "zb-h2", "zb-2p", "zb-v")
WARM_UP_STEPS = 2
BAR = 0.92
"""Without the barrier zb-h2 may take 1 - (p-1)/(3m+p-1) = 0.89 of its makespan; 0.03 are left to the runtime."""


def sleeping(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """The function, and a sleep behind it."""

    def run(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        time.sleep(seconds)
        return result

    return run


def measure(schedule: str, validation: str, steps: int) -> common.Row:
    """One rank's part of a turn."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from parallel.mesh import Mesh, start_process_group
    from parallel.pipeline.costs import Costs
    from parallel.pipeline.simulate import simulate
    from trainer.build import build_engine
    from trainer.config.run import BatchSizes, ResolvedRun, RunConfig
    from trainer.program import build_program

    torch.set_num_threads(1)
    start_process_group("cpu", int(os.environ["RANK"]), RANKS, timeout_seconds=120.0)
    config = RunConfig.model_validate(
        {
            "run": {"directory": "runs/benchmark", "device": "cpu"},
            "model": {"vocab": 64, "hidden": 32, "layers": 6, "heads": 2, "ffn_hidden": 32},
            "data": {"path": "none: the tokens are random"},
            "train": {"steps": 100, "sequence": 8, "micro_batch": 1, "gradient_accumulation": MICROBATCHES},
            "optimizer": {"validation": validation, "grad_clip": 1e6},
            "parallel": {"pipeline": {"stages": RANKS, "schedule": schedule}},
        }
    )
    layout = config.parallel.layout(RANKS)
    batch = BatchSizes.solve(config.train, layout.data)
    assert isinstance(batch, BatchSizes), batch
    run = ResolvedRun(config, layout, batch)
    engine = build_engine(run, Mesh(layout, "cpu"), torch.device("cpu"))
    # The model's parts cost different amounts, the sleeping stages the same: that is what is planned for.
    seconds = (PASS_SECONDS,) * run.parts
    costs = Costs(seconds, seconds, seconds)
    program = build_program(run, costs)
    engine.adopt(program, costs)
    for stage in engine.train_executor.stages.values():
        stage.forward = sleeping(stage.forward, PASS_SECONDS)  # type: ignore[method-assign]
        stage.backward = sleeping(stage.backward, 2 * PASS_SECONDS)  # type: ignore[method-assign]
        stage.input_gradient = sleeping(stage.input_gradient, PASS_SECONDS)  # type: ignore[method-assign]
        one = stage.weight_gradient

        def several(microbatches: list[int], one: Callable[..., Any] = one) -> None:
            one(microbatches)
            time.sleep(PASS_SECONDS * len(microbatches))

        stage.weight_gradient = several  # type: ignore[method-assign,assignment]
    random = np.random.default_rng(1)
    tokens = [random.integers(0, 64, (1, 9)) for _ in range(MICROBATCHES)]
    start, waiting, losses = 0.0, [], []
    for step in range(WARM_UP_STEPS + steps):
        if step == WARM_UP_STEPS:
            start = time.perf_counter()
        waiting.append(engine.launch(tokens, 1e-3))
        if validation == "before" or len(waiting) > 1:
            losses.append(waiting.pop(0).result().loss)
    seconds = (time.perf_counter() - start) / steps
    engine.finish()
    losses += [each.result().loss for each in waiting]
    dist.barrier()
    dist.destroy_process_group()
    return {
        "step_seconds": seconds,
        "makespan_seconds": simulate(program, costs).makespan_seconds,
        "losses": losses,
        "rollbacks": getattr(engine.step, "rollbacks", 0),
    }


def turn(schedule: str, validation: str, steps: int) -> common.Row:
    """One turn of all ranks."""
    arguments = [str(Path(__file__).resolve()), "--measure", schedule, validation, "--steps", str(steps)]
    ranks = common.run_ranks(arguments, RANKS)
    return {**ranks[0], "step_seconds": max(rank["step_seconds"] for rank in ranks)}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All schedules with and without the barrier, by turns."""
    rows, bars = [], []
    contestants = [f"{schedule} {when}" for schedule in SCHEDULES for when in ("before", "after")]
    turns: dict[str, list[common.Row]] = {name: [] for name in contestants}
    for number, name in common.turns(contestants, options.rounds):
        common.say(options, f"round {number + 1} of {options.rounds}: {name}")
        turns[name].append(turn(*name.split(), options.steps))
    for schedule in SCHEDULES:
        before, after = turns[f"{schedule} before"], turns[f"{schedule} after"]
        if any(one["losses"] != other["losses"] for one, other in zip(before, after, strict=True)):
            raise RuntimeError(f"{schedule}: the losses differ, so the times compare nothing")
        ratios = [one["step_seconds"] / other["step_seconds"] for one, other in zip(after, before, strict=True)]
        rows.append(
            {
                "name": schedule,
                "makespan_seconds": common.significant(before[0]["makespan_seconds"]),
                "work_seconds": 3 * PASS_SECONDS * MICROBATCHES * (2 if schedule == "zb-v" else 1),
                "with_barrier_seconds": common.spread(each["step_seconds"] for each in before),
                "without_barrier_seconds": common.spread(each["step_seconds"] for each in after),
                "ratio": common.spread(ratios),
                "rollbacks": after[0]["rollbacks"],
            }
        )
        if schedule == "zb-h2":
            value = common.significant(statistics.median(ratios))
            bars.append(common.bar("zb-h2: a step without the barrier / with it", value, BAR, "lower"))
    return common.report("post_validation", rows, bars)


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contestant")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a turn")
    parser.add_argument("--measure", nargs=2, metavar=("SCHEDULE", "WHEN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.steps)))
        return 0
    return common.publish(compare(options), options)


if __name__ == "__main__":
    sys.exit(main())
