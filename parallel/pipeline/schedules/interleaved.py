"""Interleaved 1F1B (Megatron-LM, arXiv:2104.04473): several chunks a rank make the bubble as many times smaller.

    rank 0, stages 0 and 2 | 0F0 0F1 2F0 2F1 0F2 ... 2B0 --- 0F3 2B1 --- 2F2 0B0 ---
    rank 1, stages 1 and 3 | ... 1F0 1F1 3F0 3B0 --- 3F1 3B1 --- 1F2 1B0 --- 1F3 3F2

Micro-batches go in groups of p, one for each rank that the way around passes: when the last of the group has
left the first rank, the first is back for the next chunk. Rank r runs (v-1)p + 2(p-1-r) forwards ahead of its
first pair of a forward and a backward: 2(p-1-r) slots is how long the first gradient takes to come back to it
from the last rank. So it holds p(v-1) + 2(p-r) - 1 activations of a chunk, on rank 0 up to (v+1)/v of what
1F1B holds there. With equal stages, and T = F + B of one chunk, the step takes (p-1) T longer than its work.

One backward is moved. While the first micro-batches wind through the warm-up, every way around exposes p
transfers of c seconds on the last rank, and so do the backwards of the drain: with the order of Megatron-LM the
step is 2(pv - 1) c longer. The last time, the last rank runs out of work just before the last micro-batch is
back. So the last backward through chunk 0 in the group before is left until then: it fills the wait, 2(pv - 1) c
- p c is left, and this is the cost that the zero-bubble paper (arXiv:2401.10241, Table 5, "1F1B-I") gives for
this schedule. The fullest rank is the first, and it has no forwards left by then: its peak is the same. With
m = p there is no group before, and nothing is moved.
"""

from __future__ import annotations

from collections.abc import Sequence

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.looped import in_groups, looped
from parallel.pipeline.schedules.registry import Request, register, require


@register(
    "interleaved",
    summary="1F1B over several chunks a rank, a bubble as many times smaller",
    source="Megatron-LM, arXiv:2104.04473",
    chunks=None,
)
def interleaved(request: Request) -> Program:
    """Warm-up, alternation, drain on every rank; the order of `1f1b` for one chunk. Costs do not matter."""
    ranks, chunks, microbatches = request.ranks, request.chunks, request.microbatches
    if chunks == 1:
        return looped("interleaved", request, in_groups(1, 1), lambda rank: ranks - 1 - rank)
    above = -(-microbatches // ranks) * ranks
    below = f"{above - ranks} or " if above > ranks else ""
    require(
        microbatches % ranks == 0,
        value=f"microbatches={microbatches}",
        rule=f"interleaved sends micro-batches around in groups of ranks={ranks}, they must fill the last group",
        fix=f"set microbatches to {below}{above}, or choose gis, uniform or breadth-first, which take any number",
    )
    slot = in_groups(ranks, chunks)
    program = looped("interleaved", request, slot, lambda rank: (chunks - 1) * ranks + 2 * (ranks - 1 - rank))
    if ranks == 1 or microbatches == ranks:
        return program
    return program.with_actions(_fill_the_last_wait(listed, ranks, microbatches) for listed in program.actions)


def _fill_the_last_wait(listed: Sequence[Action], ranks: int, microbatches: int) -> list[Action]:
    """The last backward through chunk 0 in the last group but one, moved to right before those of the last group."""
    stage = min(action.stage for action in listed)
    actions = list(listed)
    moved = Action(Op.B, stage, microbatches - ranks - 1)
    actions.remove(moved)
    actions.insert(actions.index(Action(Op.B, stage, microbatches - ranks)), moved)
    return actions
