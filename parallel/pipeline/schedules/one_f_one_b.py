"""1F1B (PipeDream-Flush, arXiv:2006.09503; Megatron-LM, arXiv:2104.04473): each backward as early as can be.

    rank 0 | F0 F1 .  .  B0 -- F2 B1 -- .  B2 --
    rank 1 | .  F0 B0 -- F1 B1 -- F2 B2 -- .  .

Rank r of p first runs p-1-r forwards, which is how long the first gradient takes to come back to it; then it
alternates one forward and one backward; the backwards that are left drain the pipeline. The bubble rate is
GPipe's, (p-1)/(m+p-1) for equal stages, but rank r holds min(p-r, m) activations instead of m.
"""

from __future__ import annotations

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import Request, register


@register(
    "1f1b",
    summary="alternating forwards and backwards, p activations at most",
    source="PipeDream-Flush, arXiv:2006.09503; Megatron-LM, arXiv:2104.04473",
)
def one_f_one_b(request: Request) -> Program:
    """Warm-up, alternation, drain on every rank. Costs do not matter."""
    ranks, microbatches = request.ranks, request.microbatches
    return Program(
        name="1f1b",
        ranks=ranks,
        stages=ranks,
        microbatches=microbatches,
        placement=tuple(range(ranks)),
        actions=tuple(_rank(rank, ranks, microbatches) for rank in range(ranks)),
    )


def _rank(rank: int, ranks: int, microbatches: int) -> tuple[Action, ...]:
    warm_up = min(ranks - 1 - rank, microbatches)
    actions = [Action(Op.F, rank, microbatch) for microbatch in range(warm_up)]
    for microbatch in range(warm_up, microbatches):
        actions += [Action(Op.F, rank, microbatch), Action(Op.B, rank, microbatch - warm_up)]
    actions += [Action(Op.B, rank, microbatch) for microbatch in range(microbatches - warm_up, microbatches)]
    return tuple(actions)
