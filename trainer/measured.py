"""Costs of the passes from what a run has measured, and the program that follows from them. Pure: no torch.

Each rank gives the median time of its F, I, W and B on each part of the model. Ranks that run the same part (data and
tensor neighbours, copies of a bidirectional schedule) are joined by the median again. Where the backward is not split
there is only B; it is divided in the ratio that the sizes give (trainer/costs.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import CSV
from parallel.pipeline.simulate import simulate
from trainer.config.run import ResolvedRun
from trainer.costs import derived_costs
from trainer.program import build_program

Medians = Mapping[tuple[Op, int], float]
"""Seconds of an op on a part of the model."""


@dataclass(frozen=True)
class Measured:
    """What one rank has measured.

    Attributes:
        passes: Median seconds of each op on each part of the model.
        transfers: Median seconds of a transfer to each pipeline neighbour that this rank timed.
        steps: Span and busy seconds of each step.
    """

    passes: Medians
    transfers: tuple[float, ...]
    steps: tuple[tuple[float, float], ...]


def is_split(ranks: Sequence[Measured]) -> bool:
    """Whether the two halves of the backward were measured, not only the whole."""
    return any(op is Op.W for rank in ranks for op, _ in rank.passes)


def measured_costs(ranks: Sequence[Measured], parts: int, derived: Costs) -> Costs:
    """The costs that all ranks together have measured; what was not (weights of activations, ...) is as derived."""

    def joined(op: Op, part: int) -> float | None:
        found = [rank.passes[op, part] for rank in ranks if (op, part) in rank.passes]
        return median(found) if found else None

    forward, inputs, weights = [], [], []
    for part in range(parts):
        f, i, w, b = (joined(op, part) for op in (Op.F, Op.I, Op.W, Op.B))
        if i is None or w is None:
            assert b is not None, f"part {part} of the model has had a backward"
            wanted = [derived.seconds(Action(op, part, 0)) for op in (Op.I, Op.W)]
            i = b * wanted[0] / sum(wanted) if sum(wanted) else 0.0
            w = b - i
        assert f is not None, f"part {part} of the model has had a forward"
        forward.append(f)
        inputs.append(i)
        weights.append(w)
    transfers = [seconds for rank in ranks for seconds in rank.transfers]
    return replace(
        derived,
        forward_seconds=tuple(forward),
        input_gradient_seconds=tuple(inputs),
        weight_gradient_seconds=tuple(weights),
        transfer_seconds=fmean(transfers) if transfers else 0.0,
    )


def planned_again(run: ResolvedRun, program: Program, costs: Costs) -> Program:
    """The run's schedule for these costs, or the program as it is where that is no faster."""
    if run.config.parallel.pipeline.schedule.startswith(CSV):
        return program  # whatever stands in the file by now, the run has begun with this
    again = build_program(run, costs)
    assert again.placement == program.placement, "a schedule places its stages whatever they cost"
    return again if longest_span(again, costs) < longest_span(program, costs) else program


def longest_span(program: Program, costs: Costs) -> float:
    """Simulated seconds from the first to the last pass of the rank that takes longest."""
    timeline = simulate(program, costs)
    return max(map(timeline.span_seconds, range(program.ranks)))


def predicted_bubble_rate(run: ResolvedRun, program: Program, costs: Costs | None = None) -> float:
    """The simulated bubble of a program, with costs derived from the sizes if there are none."""
    return simulate(program, costs or derived_costs(run)).bubble_rate


def as_option(costs: Costs) -> str:
    """The costs as `atoll schedule --costs` takes them."""
    lists = {"f": costs.forward_seconds, "i": costs.input_gradient_seconds, "w": costs.weight_gradient_seconds}
    texts = [
        f"{key}=" + ":".join(f"{seconds:.9g}" for seconds in (value if isinstance(value, tuple) else (value,)))
        for key, value in lists.items()
    ]
    return ",".join([*texts, f"comm={costs.transfer_seconds:.9g}"])


def as_object(costs: Costs) -> dict[str, Any]:
    """The measured costs as plain values."""
    return {
        "forward_seconds": costs.forward_seconds,
        "input_gradient_seconds": costs.input_gradient_seconds,
        "weight_gradient_seconds": costs.weight_gradient_seconds,
        "transfer_seconds": costs.transfer_seconds,
        "option": as_option(costs),
    }
