"""GPipe (Huang et al., arXiv:1811.06965): all forwards, then all backwards.

    rank 0 | F0 F1 F2 .  .  .  B0 -- B1 -- B2 --
    rank 1 | .  F0 F1 F2 B0 -- B1 -- B2 -- .  .

Bubble rate (p-1)/(m+p-1) for equal stages; every micro-batch's activations are alive at once. The backwards
run in the order of the forwards, not in reverse: gradients then accumulate in the same order as under 1F1B,
and the results of both are equal bit for bit. The bubble is the same either way.
"""

from __future__ import annotations

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import Request, register


@register("gpipe", summary="all forwards, then all backwards", source="GPipe, arXiv:1811.06965")
def gpipe(request: Request) -> Program:
    """Every rank runs F 0..m-1, then B 0..m-1. Costs do not matter."""
    ranks, microbatches = request.ranks, request.microbatches
    return Program(
        name="gpipe",
        ranks=ranks,
        stages=ranks,
        microbatches=microbatches,
        placement=tuple(range(ranks)),
        actions=tuple(
            tuple(Action(op, rank, microbatch) for op in (Op.F, Op.B) for microbatch in range(microbatches))
            for rank in range(ranks)
        ),
    )
