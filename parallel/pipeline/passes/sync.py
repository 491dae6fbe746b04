"""Place the exchange of gradients between the copies of a model, as early as both copies have them.

A bidirectional schedule holds every part of the model on several ranks, and each copy sees only its share of the
micro-batches; the gradients of the copies must be summed. A copy finishes its parts one after the other, long
before the step ends for most of them, so the sums can hide behind the backwards that are left ("eager gradient
synchronization", BitPipe, arXiv:2410.19367).

Two ranks that exchange wait for each other, and a rank works its exchanges off one by one. If one had listed part
0 before part 7 and the other 7 before 0, both would wait for ever. So there is one order for the whole pipeline:
parts are sorted by the time at which the last copy has its gradient, in a simulation, and every rank lists its
SYNC in that order. The first SYNC in that order that has not run finds all those before it done, on every rank.

Within that order a SYNC is listed behind the last pass that its rank starts before that time, and behind the
REDUCE of its stage: earlier it would have to wait, and later there would be less to hide it.
"""

from __future__ import annotations

from collections.abc import Sequence

from parallel.pipeline.actions import PASS_OPS, TRANSFER_OPS, Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.program import Program, refuse
from parallel.pipeline.simulate import Span, simulate
from parallel.pipeline.verify import check

_COMPLETES = (Op.B, Op.W, Op.REDUCE)


def add_sync(program: Program, costs: Costs | None = None) -> Program:
    """The program with a SYNC of every stage that other ranks hold too; unchanged if the model is there once.

    Args:
        program: with its reductions, if it is to have any.
        costs: decide what is complete first; unit costs if None. Under any costs the program is free of deadlock.

    Raises:
        ValueError: the program already has SYNC, or per-stage costs are for another number of stages.
        ProgramError: the program does not come to its end.
    """
    refuse(program, [Op.SYNC], "add_sync")
    if program.replicas == 1:
        return program
    timeline = simulate(program, costs)
    if timeline.blocked:
        check(program)
    ready = [0.0] * program.depth
    for listed in timeline.spans:
        for span in listed:
            if span.action.op in _COMPLETES:
                part = program.part_of(span.action.stage)
                ready[part] = max(ready[part], span.end)
    order = sorted(range(program.depth), key=lambda part: (ready[part], part))
    turn = {part: number for number, part in enumerate(order)}
    placed: list[list[Action]] = []
    for rank, spans in enumerate(timeline.spans):
        stages = sorted(program.stages_of(rank), key=lambda stage: turn[program.part_of(stage)])
        placed.append(_with_syncs(spans, [(stage, ready[program.part_of(stage)]) for stage in stages]))
    return program.with_actions(placed)


def _with_syncs(spans: Sequence[Span], due: Sequence[tuple[int, float]]) -> list[Action]:
    """The actions of a rank with the SYNC of its stages, which come in this order and not before their times."""
    gaps: list[list[Action]] = [[] for _ in range(len(spans) + 1)]  # gaps[n] goes in front of action n
    gap = 0
    for stage, ready in due:
        gap = max(gap, _place(spans, stage, ready))
        gaps[gap].append(Action(Op.SYNC, stage))
    actions = list(gaps[0])
    for span, following in zip(spans, gaps[1:], strict=True):
        actions += [span.action, *following]
    return actions


def _place(spans: Sequence[Span], stage: int, ready: float) -> int:
    """In front of which action a SYNC belongs. Transfers that follow a pass go first: other ranks wait for those."""
    place = 0
    for number, (_, action, _, start, _) in enumerate(spans):
        if action.op is Op.UPDATE:
            break  # which waits for the SYNC
        own = action.stage == stage and action.op in _COMPLETES
        follows = place == number and action.op in TRANSFER_OPS
        if own or follows or (action.op in PASS_OPS and start < ready):
            place = number + 1
    return place
