"""BitPipe (arXiv:2410.19367): two V-shaped pipelines through the same ranks, in opposite directions.

    copy 0 ("down"), stages 0..2p-1     rank 0 1 2 3 3 2 1 0        (p = 4)
    copy 1 ("up"), stages 2p..4p-1      rank 3 2 1 0 0 1 2 3

Every rank holds four stages, two of each copy, and the copies take half of the micro-batches each. While one
pipeline fills from above, the other fills from below: a rank waits for its first work at most half as long. The
price is twice the weights, and an exchange of gradients between the copies (`passes/sync.py`). Backwards are
whole, B.

The published order is made of units of p micro-batches. In a unit each copy starts a micro-batch every two
passes, and each pass takes one slot. The slots of the n-th micro-batch of a copy,

    forward of part s     slot s + 2n
    backward of part s    slot 2p-1-s + 2n         n = 0 .. p/2 - 1

give the order of the unit's forwards and, apart from them, of its backwards; no two are in one slot. Of the forwards,
3p/2 + min(r, p-1-r) are the warm-up. Then forwards and backwards alternate; between two units, where the
forwards of one have run out and those of the next have to fill the pipeline again, stand some backwards and then
some forwards in a row. A rank holds at most 2p chunk activations, as many as under 1F1B.

With B = 2F and no transfer time, a unit waits 2(p-2) F: that is the published rate (p-2)/(3m + p-2) for m = p.
Every further unit waits p-2 F more at its seam. So there is a second order, which has no seams (`pace`): every pass
has three slots, F + B, so that a micro-batch of a copy that starts every 12 slots is in

    forward of part s     slot 3s + 12n
    backward of part s    slots 12p-5-3s + 12n and the next

and the up copy 6 slots later where p is a multiple of 4. The eight passes of a rank then fill the 12 slots:
forwards those that are multiples of 3, backwards those between. Whatever the number of micro-batches, a
rank waits less than 5p/2 F, if it may hold 5p/2 chunk activations: between 1F1B's 2p and interleaved 1F1B's 3p-1.

The order with the shorter step for the costs at hand is taken. A memory limit takes the place of 5p/2; it can be
as low as the four activations of a rank's stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.pace import paced
from parallel.pipeline.schedules.registry import Request, register, require
from parallel.pipeline.schedules.v_shape import placement
from parallel.pipeline.simulate import Timeline, peak_activations, simulate


@register(
    "bitpipe",
    summary="two V-shaped pipelines in opposite directions, the weights twice",
    source="BitPipe, arXiv:2410.19367",
    chunks=(2,),
    limited=True,
)
def bitpipe(request: Request) -> Program:
    """The shorter one of the published order and the seamless one, of those that the memory limit allows."""
    ranks, microbatches, costs, limit = request.ranks, request.microbatches, request.costs, request.memory_limit
    require(
        ranks % 2 == 0,
        value=f"ranks={ranks}",
        rule="bitpipe lets the two directions meet between two ranks, so their number must be even",
        fix=f"set it to {ranks + 1}, or choose another schedule",
    )
    nearest = max(ranks, microbatches - microbatches % ranks)
    require(
        microbatches % ranks == 0,
        value=f"microbatches={microbatches}",
        rule=f"bitpipe runs them in units of ranks={ranks}, so they must be a multiple of that",
        fix=f"set them to {nearest} or {nearest + ranks}",
    )
    if limit is None:
        costs, limit = replace(costs, activation=1.0, weight_activation=None), 2.5 * ranks
    down = placement(ranks)
    up = tuple(ranks - 1 - rank for rank in down)
    shape = Program("bitpipe", ranks, 4 * ranks, microbatches, down + up, ((),) * ranks, replicas=2)
    _require_room(shape, costs, limit)
    published = shape.with_actions(_published(rank, shape) for rank in range(ranks))
    fits = all(peak_activations(published, rank, costs)[0] <= limit for rank in range(ranks))
    seamless = paced(shape, _Pace(ranks), costs, limit)
    if fits and _length(simulate(published, costs)) <= _length(simulate(seamless, costs)):
        return published
    return seamless


def _length(timeline: Timeline) -> tuple[float, float]:
    longest = max(map(timeline.span_seconds, range(timeline.program.ranks)))
    return round(longest, 9), timeline.makespan_seconds


def _require_room(shape: Program, costs: Costs, limit: float) -> None:
    for rank in range(shape.ranks):
        least = sum(costs.activation_of(stage) for stage in shape.stages_of(rank))
        require(
            least <= limit,
            value=f"memory_limit={limit:g}",
            rule=f"rank {rank} has to hold an activation of each of its four stages, {least:g} together",
            fix=f"set it to {least:g} or more, or cut the model into more ranks",
        )


class _Pace:
    """The slots of the seamless order."""

    def __init__(self, ranks: int) -> None:
        self.depth = 2 * ranks
        self.late = 6 if ranks % 4 == 0 else 0

    def __call__(self, op: Op, stage: int, number: int) -> int:
        copy, part = divmod(stage, self.depth)
        slot = 3 * part if op is Op.F else 3 * (2 * self.depth - part) - 5
        return slot + 12 * number + copy * self.late


def _published(rank: int, shape: Program) -> list[Action]:
    """The units of the published order, and how one passes into the next."""
    ranks = shape.ranks
    units, size = shape.microbatches // ranks, 2 * ranks
    forwards = iter(_in_units(Op.F, rank, shape))
    backwards = iter(_in_units(Op.B, rank, shape))
    warm_up = 3 * ranks // 2 + min(rank, ranks - 1 - rank)
    paired = size - warm_up  # forwards of a unit that are not warm-up
    seam = warm_up - paired + 1
    actions = list(islice(forwards, warm_up))
    for unit in range(units):
        actions += _pairs(forwards, backwards, paired)
        if unit + 1 < units:
            actions += islice(backwards, seam)
            actions += _pairs(forwards, backwards, paired - 1)
            actions += islice(forwards, seam)
    return [*actions, *backwards]


def _pairs(forwards: Iterator[Action], backwards: Iterator[Action], count: int) -> Iterator[Action]:
    """Forwards and backwards in turn. What is taken from the lists is taken as the result is read."""
    for _ in range(count):
        yield next(forwards)
        yield next(backwards)


def _in_units(op: Op, rank: int, shape: Program) -> Iterator[Action]:
    """The forwards or the backwards of a rank, unit by unit, each in the order of the slots."""
    ranks, depth = shape.ranks, shape.depth
    for unit in range(shape.microbatches // ranks):
        slots: list[tuple[int, Action]] = []
        for stage in shape.stages_of(rank):
            part = shape.part_of(stage)
            ahead = part if op is Op.F else depth - 1 - part
            for number in range(ranks // 2):
                microbatch = shape.microbatches_of(stage)[unit * ranks // 2 + number]
                slots.append((ahead + 2 * number, Action(op, stage, microbatch)))
        yield from (action for _, action in sorted(slots))
