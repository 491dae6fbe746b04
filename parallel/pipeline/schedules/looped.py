"""Programs in loop placement, written as slots: what the schedules with several chunks a rank have in common.

The model is wound around the ranks: stage s is on rank s mod p, so rank r holds the chunks r, r + p, r + 2p and
so on, and an output leaves the last rank for the first p stages later. Each rank counts slots. A slot holds at
most one forward and, behind it, one backward. A schedule is then two things:

- `slot(chunk, microbatch)`: the slot of a forward, the same number on every rank. The backward goes through the
  chunks the other way round: that of chunk c takes the slot of the forward of chunk v-1-c, and
- `lag(rank)` slots later: as many slots as the first gradient takes to come back, or more.

When a slot begins is no part of it: a pass runs as soon as its rank reaches it and its input is there. Stages
are visited in the order of their micro-batches as long as `slot` grows with the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import Request

Slot = Callable[[int, int], int]


def in_groups(group: int, chunks: int) -> Slot:
    """Slots without holes, `group` micro-batches through a chunk before the next chunk has its turn.

    If the micro-batches do not fill the last group, its missing ones leave holes.
    """

    def slot(chunk: int, microbatch: int) -> int:
        return microbatch // group * group * chunks + chunk * group + microbatch % group

    return slot


def looped(name: str, request: Request, slot: Slot, lag: Callable[[int], int], *, split: bool = False) -> Program:
    """The program with these slots; with `split`, each backward is an I and right behind it its W."""
    ranks, stages = request.ranks, request.stages
    return Program(
        name=name,
        ranks=ranks,
        stages=stages,
        microbatches=request.microbatches,
        placement=tuple(stage % ranks for stage in range(stages)),
        actions=tuple(tuple(_rank(rank, request, slot, lag(rank), split)) for rank in range(ranks)),
    )


def _rank(rank: int, request: Request, slot: Slot, lag: int, split: bool) -> Iterator[Action]:
    last = request.chunks - 1
    work: list[tuple[int, bool, int, int]] = []  # (slot, whether backward, chunk, micro-batch); forwards go first
    for chunk in range(request.chunks):
        for microbatch in range(request.microbatches):
            number = slot(chunk, microbatch)
            work += [(number, False, chunk, microbatch), (number + lag, True, last - chunk, microbatch)]
    work.sort()
    for _, backward, chunk, microbatch in work:
        stage = chunk * request.ranks + rank
        if not backward:
            yield Action(Op.F, stage, microbatch)
        elif split:
            yield Action(Op.I, stage, microbatch)
            yield Action(Op.W, stage, microbatch)
        else:
            yield Action(Op.B, stage, microbatch)
