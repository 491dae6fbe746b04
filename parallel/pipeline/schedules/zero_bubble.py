"""ZB-H1 and ZB-H2, the two handcrafted zero-bubble schedules (arXiv:2401.10241, section 2; memory: Table 2).

    zb-h1  rank 0 | F0 F1 .  I0 W0 F2 I1 W1 F3 I2 W2 I3 W3
           rank 1 | .  F0 I0 F1 I1 W0 F2 I2 W1 F3 I3 W2 W3

    zb-h2  rank 0 | F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3 .
           rank 1 | .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

Only I is on the way from the last rank back to the first, so W may wait. Both schedules have three phases on a rank:
warm-up forwards; then pairs of one F and one I; then the I's that are left. From the pair on that uses up the rank's
*lag*, a W follows every I, `lag` micro-batches behind it; the W's of the lag end the step.

Counting ranks from the end of the pipeline (d = p-1 for rank 0), zb-h1 starts with d forwards and zb-h2 with 2d. A
later rank has fewer micro-batches between F and I, and its lag - one W for every rank before it in zb-h1, two in
zb-h2 - fills the memory that rank 0 takes for its forwards. What the last rank holds back is what its I's arrive
earlier at rank 0; so with F, I, W the seconds of each, and free transfers,

    zb-h1: the bubble is (p-1)(F + I - W), rank r holds at most p-r whole activations and r that wait for their W;
    zb-h2: the bubble is (p-1)(F + I - 2W), rank r holds at most 2(p-r)-1 and 2r.
"""

from __future__ import annotations

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import Request, register

_SOURCE = "Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 2"


@register("zb-h1", summary="1f1b with W in the place of bubbles, p activations on every rank", source=_SOURCE)
def zb_h1(request: Request) -> Program:
    """One micro-batch of lead and of lag for each neighbour. Costs do not matter."""
    return _handcrafted("zb-h1", request, pace=1)


@register("zb-h2", summary="twice the warm-up of 1f1b and no bubble, 2p-1 activations on every rank", source=_SOURCE)
def zb_h2(request: Request) -> Program:
    """Two micro-batches of lead and of lag for each neighbour. Costs do not matter."""
    return _handcrafted("zb-h2", request, pace=2)


def _handcrafted(name: str, request: Request, pace: int) -> Program:
    ranks = request.ranks
    return Program(
        name=name,
        ranks=ranks,
        stages=ranks,
        microbatches=request.microbatches,
        placement=tuple(range(ranks)),
        actions=tuple(
            _rank(rank, request.microbatches, warm_up=pace * (ranks - 1 - rank), lag=pace * rank)
            for rank in range(ranks)
        ),
    )


def _rank(rank: int, microbatches: int, warm_up: int, lag: int) -> tuple[Action, ...]:
    warm_up, lag = min(warm_up, microbatches), min(lag, microbatches)
    actions = [Action(Op.F, rank, microbatch) for microbatch in range(warm_up)]
    for microbatch in range(microbatches):
        if warm_up + microbatch < microbatches:
            actions.append(Action(Op.F, rank, warm_up + microbatch))
        actions.append(Action(Op.I, rank, microbatch))
        if microbatch >= lag:
            actions.append(Action(Op.W, rank, microbatch - lag))
    actions += [Action(Op.W, rank, microbatch) for microbatch in range(microbatches - lag, microbatches)]
    return tuple(actions)
