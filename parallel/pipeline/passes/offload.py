"""Send activations to host memory between their forward and their backward (PipeOffload, arXiv:2503.01328).

What a stage holds is in proportion to how long it holds it, the time from a forward to its backward. So where
only a part of the stages can be offloaded, those with the longest lifespan are: half of the stages then take
away about three quarters of the memory, if micro-batches follow each other evenly (schedule "uniform").

1. Simulate the program: when each forward ends and its backward begins.
2. On every rank, choose the stages with the longest lifespans.
3. Cut the time of the rank into slots, each long enough for a copy, by turns for a RELOAD and for an OFFLOAD: one
   copy engine serves both, and neither keeps the other waiting. From right to left, each RELOAD takes the latest
   free slot before its backward; from left to right, each OFFLOAD the earliest free one after its forward. Where
   there is nothing of the other kind to copy, in warm-up and drain, its slots are taken too. A micro-batch that
   finds no two slots with time in between stays on the device. If the copies are slower than the passes, that
   happens as often as it has to, all along the step.
4. List each copy behind the passes that have ended when it is to begin. So it begins then or before, no pass
   waits longer than it did without copies, and the step takes as long as before.

The backward that waits for the RELOAD is B or I; what W reads after I has come back with it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from parallel.pipeline.actions import PASS_OPS, Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.program import Program, refuse
from parallel.pipeline.simulate import Span, simulate
from parallel.pipeline.verify import check

_SLACK = 1e-9
"""Of a slot, or of the step: what rounding may add to times that are equal."""


class Life(NamedTuple):
    """The time in which an activation is not read: between its forward and its backward."""

    stage: int
    microbatch: int
    start: float  # when the forward ends
    end: float  # when the backward starts
    first: int  # passes of the rank up to the forward, itself included
    last: int  # passes of the rank before the backward


class Copies(NamedTuple):
    """When an activation leaves and comes back: an OFFLOAD at the start of its slot, a RELOAD at the end of its."""

    life: Life
    offload: float
    reload: float


def offload_activations(program: Program, costs: Costs | None = None, *, fraction: float = 1.0) -> Program:
    """The program with OFFLOAD and RELOAD of what there is time for.

    Args:
        costs: how long passes and copies take; unit costs and free copies if None.
        fraction: of the stages of each rank, rounded up; the longest-lived are offloaded.

    Raises:
        ValueError: the program already has copies, a fraction that is not in (0, 1], or costs for another number
            of stages.
        ProgramError: the program does not come to its end.
    """
    refuse(program, [Op.OFFLOAD, Op.RELOAD], "offload_activations")
    timeline = simulate(program, costs)
    if timeline.blocked:
        check(program)
    lists = []
    for listed, spans in zip(program.actions, timeline.spans, strict=True):
        passes = [span for span in spans if span.action.op in PASS_OPS]
        lists.append(list(_woven(listed, _places(plan_copies(passes, timeline.costs, fraction), passes))))
    return program.with_actions(lists)


def plan_copies(passes: Sequence[Span], costs: Costs, fraction: float) -> list[Copies]:
    """When the copies of one rank begin, from its passes; in the order of the forwards."""
    if not 0 < fraction <= 1:
        raise ValueError(f"offload_activations: fraction={fraction} must be above 0 and at most 1")
    lives = _lives(passes)
    chosen = _longest_lived(lives, fraction)
    if not chosen:
        return []
    lives = [life for life in lives if life.stage in chosen]
    seconds = max(costs.seconds(Action(op, stage, 0)) for op in (Op.OFFLOAD, Op.RELOAD) for stage in chosen)
    if not seconds:
        return [Copies(life, life.start, life.end) for life in lives if life.start < life.end]
    # To be content with nothing in between at first lets more activations leave, or takes slots for nothing.
    choices = [_slots(lives, seconds, least) for least in (0, 1)]
    found = max(choices, key=lambda slots: sum(back - out for out, back in slots.values()))
    origin = lives[0].start
    plan: list[Copies] = []
    for life in lives:
        if life in found:
            out, back = found[life]
            late = origin + (back + 1) * seconds - costs.seconds(Action(Op.RELOAD, life.stage, life.microbatch))
            plan.append(Copies(life, origin + out * seconds, late))
    return plan


def _lives(passes: Sequence[Span]) -> list[Life]:
    forwards = {
        (span.action.stage, span.action.microbatch): number
        for number, span in enumerate(passes)
        if span.action.op is Op.F
    }
    lives: list[Life] = []
    for last, span in enumerate(passes):
        stage, microbatch = span.action.stage, span.action.microbatch
        if span.action.op in (Op.B, Op.I) and microbatch is not None:
            first = forwards[stage, microbatch]
            lives.append(Life(stage, microbatch, passes[first].end, span.start, first + 1, last))
    return sorted(lives, key=lambda life: life.first)


def _longest_lived(lives: Sequence[Life], fraction: float) -> set[int]:
    """This part of the stages, by the mean of their lifespans; of equal ones the first stages."""
    spans: dict[int, list[float]] = {}
    for life in lives:
        spans.setdefault(life.stage, []).append(life.end - life.start)
    means = {stage: math.fsum(seconds) / len(seconds) for stage, seconds in spans.items()}
    count = math.ceil(fraction * len(means) - _SLACK)
    return set(sorted(means, key=lambda stage: (-means[stage], stage))[:count])


def _slots(lives: Sequence[Life], seconds: float, least: int) -> dict[Life, tuple[int, int]]:
    """Where each activation leaves and comes back, if it does; even slots are for OFFLOAD, odd ones for RELOAD.

    Slot k begins k times `seconds` after the end of the first forward. `least` slots have to lie between OFFLOAD
    and RELOAD before the RELOADs move to their final, later slots; at least one has to afterwards.
    """

    def earliest(life: Life) -> int:
        return math.ceil((life.start - lives[0].start) / seconds - _SLACK)

    def latest(life: Life) -> int:
        return math.floor((life.end - lives[0].start) / seconds + _SLACK) - 1

    planned: dict[Life, int] = {}
    right_to_left = sorted(lives, key=lambda life: -life.last)
    free = latest(right_to_left[0])
    for life in right_to_left:
        slot = min(latest(life), free)
        slot -= slot % 2 == 0
        if earliest(life) < slot:  # else it takes no slot away from others
            planned[life] = slot
            free = slot - 1
    reserved = set(planned.values())
    leaves: dict[Life, int] = {}
    free = 0
    for life in (life for life in lives if life in planned):
        slot = max(earliest(life), free)
        while slot in reserved:
            slot += 1
        if slot + least < planned[life]:
            leaves[life] = slot
            free = slot + 1
        else:
            reserved.discard(planned[life])
    # RELOADs once more: what stays has made room, and so have slots for OFFLOAD that none took.
    used = set(leaves.values())
    found: dict[Life, tuple[int, int]] = {}
    free = latest(right_to_left[0])
    for life in (life for life in right_to_left if life in leaves):
        slot = min(latest(life), free)
        while slot in used:
            slot -= 1
        free = slot - 1
        if leaves[life] + 1 < slot:  # else it would come back as soon as it is gone
            found[life] = leaves[life], slot
    return found


def _places(plan: Sequence[Copies], passes: Sequence[Span]) -> dict[int, list[Action]]:
    """The copies to be listed behind so many passes, in the order of their slots."""
    ends = [span.end for span in passes]
    slack = _SLACK * ends[-1] if ends else 0.0
    timed: list[tuple[int, float, bool, Action]] = []
    for life, offload, reload in plan:
        for op, begins in ((Op.OFFLOAD, offload), (Op.RELOAD, reload)):
            behind = min(max(bisect_right(ends, begins + slack), life.first), life.last)
            timed.append((behind, begins, op is Op.RELOAD, Action(op, life.stage, life.microbatch)))
    places: dict[int, list[Action]] = {}
    for behind, _, _, action in sorted(timed):
        places.setdefault(behind, []).append(action)
    return places


def _woven(listed: Sequence[Action], places: dict[int, list[Action]]) -> Iterator[Action]:
    """The copies right before the next pass: other ranks wait for the transfers in between, nobody for the copies."""
    behind = 0
    for action in listed:
        if action.op in PASS_OPS:
            yield from places.get(behind, ())
            behind += 1
        yield action
