"""V-Min ("Pipeline Parallelism with Controllable Memory", arXiv:2405.15362): a third of 1F1B's activations.

    rank 0 | F0 .  .  .  .  .  .  F1 I1 .  .  .  .  .  .  I0
    rank 1 | .  F0 .  .  .  .  F1 .  .  I1 .  .  .  .  I0 .
    rank 2 | .  .  F0 .  .  F1 .  .  .  .  I1 .  .  I0 .  .
    rank 3 | .  .  .  F0 F1 .  .  .  .  .  .  I1 I0 .  .  .

The block of `v_shape` with as few slots as there can be: one between neighbours, all the way, so that a
micro-batch is through in 4p slots. F0 and I1 of a rank are 2p slots apart, and so are F1 and I0; where p is a
multiple of 3, they would run into those of the next micro-batches, and two slots are added at rank p-1 both
times. F0 and F1, and likewise the others, differ by an odd number and never meet. Every rank holds 4p + O(1)
slots' worth of activations, W take the slots that are free: counting them out, a rank holds at most

    2 ceil((p + 2) / 3) chunk activations                     (1F1B with the same model: 2p on rank 0)

whatever the costs are. Its W fill the gaps (`fill`). With F = I = W, no transfer time and m >= 2p the step is
4(p-1) - 1 passes longer than the work of a rank (p > 1), 1F1B's 6(p-1): two thirds. Where F, I and W differ,
every micro-batch may wait a little: one that is under way blocks the only place for the next.
"""

from __future__ import annotations

from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import Request, register
from parallel.pipeline.schedules.v_shape import PERIOD, Block, block, repeated


def v_min_block(ranks: int, period: int = PERIOD) -> Block:
    """The block of one slot between neighbours; any even period will do, a longer one holds less."""
    return block(ranks, (1, 1), (2, 0, 2) if 2 * ranks % period == 0 else (0, 0, 0), period)


@register(
    "v-min",
    summary="V-shaped, a third of 1F1B's activations",
    source="Pipeline Parallelism with Controllable Memory, arXiv:2405.15362",
    chunks=(2,),
)
def v_min(request: Request) -> Program:
    """The repeated block, squeezed and filled with W under its own peak."""
    return repeated("v-min", v_min_block(request.ranks), request)
