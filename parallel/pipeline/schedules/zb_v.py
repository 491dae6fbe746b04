"""ZB-V (zero-bubble paper, arXiv:2401.10241, section 6): no bubble with the activation memory of 1F1B.

    rank 0 | F0 F0 F0 F0 F0 F0 F0 F1 I1 W1 F1 I1 W1 F1 I1 W1 F1 I1 W1 F0 I0 W0 F1 I1 W1 ...
    rank 3 | .  .  .  F0 F1 F0 F1 F0 F1 F0 F1 I1 W1 F0 I0 W0 F1 I1 W1 ...

(p = 4; 0 is the part on the way down, 1 that on the way up). Phases of the published order on rank r of p:

1. 2(p-r) - 1 F0, as many as run until the first F1 can; then r pairs F1 F0.
2. p - r groups F1 I1 W1; the last one ends as the first I0 can begin.
3. In turn F0 I0 W0 and F1 I1 W1, until the forwards are done.
4. Input gradients first, since other ranks wait for them: r pairs I0 I1, then p - r times I0 W0. W end the step.

With F = I = W and no transfer time no rank ever waits if m >= 2p - 1; fewer micro-batches run as the first ones
of so many. A rank holds at most 2p chunk activations: p of those that 1F1B counts, on every rank.

For other costs the paper's authors search. So do we: the published order of F and I, and its near relative, the
V-shaped block of the same memory (`v_shape`), get their W by `fill` for the costs at hand; the published order
as it stands is what they have to beat. A memory limit decides which orders come into question:

- above 2p, as many F0 as it allows run ahead of the published order. They fill the time until the first I0,
  which transfers and slow input gradients prolong.
- below, the blocks of V-Half, with F0 ahead likewise, and V-Min, and as a last resort V-Min's with a longer
  period. The longest has one micro-batch in the pipeline at a time, which is two chunk activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.fill import Filling, Order, Pass, best_filling
from parallel.pipeline.schedules.registry import Request, register, require
from parallel.pipeline.schedules.v_half import v_half_block
from parallel.pipeline.schedules.v_min import v_min_block
from parallel.pipeline.schedules.v_shape import PERIOD, block, peak, repeat, stages_of, v_program
from parallel.pipeline.simulate import peak_activations, simulate


@register(
    "zb-v",
    summary="V-shaped, no bubble for F = I = W, with 1F1B's activations",
    source="Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 6",
    chunks=(2,),
    limited=True,
)
def zb_v(request: Request) -> Program:
    """The published order, or a shorter one under the same memory limit."""
    ranks, costs, limit = range(request.ranks), request.costs, request.memory_limit
    if limit is None:
        costs, limit = replace(costs, activation=1.0, weight_activation=None), 2.0 * request.ranks
    _require_room(request, costs, limit)
    published = v_program("zb-v", request, (_published(rank, request) for rank in ranks))
    fits = all(peak_activations(published, rank, costs)[0] <= limit for rank in ranks)
    timeline = simulate(published, costs)
    if fits and timeline.bubble_rate == 0:
        return published
    found = _search(request, costs, limit, published)
    span_seconds = max(map(timeline.span_seconds, ranks))
    if fits and (span_seconds, timeline.makespan_seconds) <= (found.span_seconds, found.end_seconds):
        return published
    return v_program("zb-v", request, found.actions)


def _require_room(request: Request, costs: Costs, limit: float) -> None:
    """Whatever the order, the gradient of a micro-batch comes to a rank that holds both its parts of it."""
    for rank in range(request.ranks):
        least = sum(costs.activation_of(stage) for stage in stages_of(rank, request.ranks))
        require(
            least <= limit,
            value=f"memory_limit={limit:g}",
            rule=f"rank {rank} has to hold the activations of both its parts for one micro-batch, {least:g}",
            fix=f"set it to {least:g} or more, or cut the model into more ranks",
        )


def _published(rank: int, request: Request) -> list[Action]:
    """The order of the paper: the phases of the module's docstring, for 2p - 1 micro-batches at least."""
    ranks = request.ranks
    lower, upper = stages_of(rank, ranks)
    f0, i0, w0 = ((op, lower) for op in (Op.F, Op.I, Op.W))
    f1, i1, w1 = ((op, upper) for op in (Op.F, Op.I, Op.W))
    rest = max(request.microbatches, 2 * ranks - 1) - ranks
    begun = 2 * ranks - 1 - rank  # F0 of phase 1
    passes = [f0] * (2 * (ranks - rank) - 1) + [f1, f0] * rank + [f1, i1, w1] * (ranks - rank)
    for number in range(rest):
        passes += [f0] if begun + number < rest + ranks else []
        passes += [i0, w0, f1, i1, w1]
    passes += [i0, i1] * rank + [i0, w0] * (ranks - rank) + [w1] * rank + [w0] * rank
    counts = dict.fromkeys((f0, i0, w0, f1, i1, w1), 0)
    actions: list[Action] = []
    for op, stage in passes:
        if counts[op, stage] < request.microbatches:
            actions.append(Action(op, stage, counts[op, stage]))
        counts[op, stage] += 1
    return actions


def _search(request: Request, costs: Costs, limit: float, published: Program) -> Filling:
    """The shortest filling that the limit allows."""
    ranks, microbatches = request.ranks, request.microbatches
    order: Order = [
        [(action.op, action.stage, action.microbatch or 0) for action in listed if action.op is not Op.W]
        for listed in published.actions
    ]
    largest = max(costs.activation_of(stage) for stage in range(request.stages))
    room = int(limit / largest) if largest else request.stages * microbatches  # activations of any stage
    for alternatives in _alternatives(order, room, ranks, microbatches):
        found = best_filling(alternatives, published.placement, costs, limit)
        if found is not None:
            return found
    raise AssertionError("one micro-batch at a time fits into every limit with room for both parts")


def _alternatives(published: Order, room: int, ranks: int, microbatches: int) -> Iterator[Iterator[Order]]:
    """Orders to choose from, each group for less memory than the one before."""

    def ahead(order: Order, needs: int) -> Iterator[Order]:
        if room > needs:
            yield _ahead(order, min(room - needs, microbatches))
        yield order

    def large() -> Iterator[Order]:
        yield from ahead(published, 2 * ranks)
        yield repeat(block(ranks, (4, 2), (0, 0, 0)), microbatches)

    def small() -> Iterator[Order]:
        half = v_half_block(ranks)
        yield from ahead(repeat(half, microbatches), peak(half))
        yield repeat(v_min_block(ranks), microbatches)

    yield large()
    yield small()
    for period in range(PERIOD + 2, 4 * ranks + 2 * PERIOD, 2):
        yield iter([repeat(v_min_block(ranks, period), microbatches)])


def _ahead(order: Order, count: int) -> list[list[Pass]]:
    """The order with every F0 where the one `count` micro-batches before was, and those of the first ones in front."""
    moved: list[list[Pass]] = []
    for rank, listed in enumerate(order):
        lower = [each for each in listed if each[:2] == (Op.F, rank)]
        following = iter(lower[count:])
        passes = lower[:count]
        for each in listed:
            passes += islice(following, 1) if each[:2] == (Op.F, rank) else [each]
        moved.append(passes)
    return moved
