"""V-Half ("Pipeline Parallelism with Controllable Memory", arXiv:2405.15362): half of 1F1B's activations.

    rank 0 | F0 .  .  .  .  .  .  F1 I1 .  .  .  .  .  .  .  I0
    rank 1 | .  .  F0 .  .  .  F1 .  .  .  I1 .  .  .  .  I0 .
    rank 2 | .  .  .  .  F0 F1 .  .  .  .  .  .  I1 .  I0 .  .

The block of `v_shape` with two slots between neighbours on the way down and one on the way up. On a rank,
F0 - F1 and I1 - I0 then differ by 3r and a constant, so they are kept apart modulo 3; F0 - I1 and F1 - I0
differ by 3p and a constant. One slot at the last turn does for an odd p; for an even one there are three at
the first turn and four at the last. W take the slots that are free: counting them out, a rank holds at most

    p + 1 chunk activations for odd p, p + 2 for even p       (1F1B with the same model: 2p on rank 0)

whatever the costs are. Its W fill the gaps (`fill`). With F = I = W, no transfer time and m >= 2p the step is
3(p-1) - 1 passes longer than the work of a rank for odd p > 1, 3(p-1) - 2 for even p > 2, 1F1B's 6(p-1): half.
"""

from __future__ import annotations

from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import Request, register
from parallel.pipeline.schedules.v_shape import Block, block, repeated


def v_half_block(ranks: int) -> Block:
    """The block of two slots down and one up."""
    return block(ranks, (2, 1), (0, 0, 1) if ranks % 2 else (3, 0, 4))


@register(
    "v-half",
    summary="V-shaped, half of 1F1B's activations",
    source="Pipeline Parallelism with Controllable Memory, arXiv:2405.15362",
    chunks=(2,),
)
def v_half(request: Request) -> Program:
    """The repeated block, squeezed and filled with W under its own peak."""
    return repeated("v-half", v_half_block(request.ranks), request)
