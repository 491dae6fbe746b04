"""V-shaped schedules: each rank holds two parts of the model, and the way through them is a V.

    stage   0 1 2 3 4 5 6 7        rank 0 holds stages 0 and 7
    rank    0 1 2 3 3 2 1 0        rank 3 holds stages 3 and 4

A forward goes down the ranks and comes back up, its gradient goes down and up again. So the rank that begins a
micro-batch also ends it: rank r keeps stage r long and stage 2p-1-r briefly, on rank p-1 both are kept equally
long, and the sum is the same everywhere. With one part per rank the first rank keeps p times what the last
does.

A *building block* ("Pipeline Parallelism with Controllable Memory", arXiv:2405.15362) is the way of one
micro-batch: for each rank the time slots of its two forwards (F0 going down, F1 coming up) and its two input
gradients (I1 down, I0 up). The schedule repeats it every six slots, one slot for each of F, I and W of both
parts. That works if the four slots of a rank are different modulo 6; the two that are left are for W. The time
from F to W of a stage, in periods of six slots, is the number of its activations alive, so the slots that lie
between neighbouring ranks choose the memory. `steps` gives them for the way down and the way up, and `turns`
the slots added at rank p-1 between F0 and F1, at rank 0 between F1 and I1, and at rank p-1 between I1 and I0:

    F0 = down r
    F1 = F0[p-1] + 1 + turns[0] + up (p-1-r)
    I1 = F1[0]   + 1 + turns[1] + down r
    I0 = I1[p-1] + 1 + turns[2] + up (p-1-r)

F0 to I0 and F1 to I1 are together 2 (p-1) (down + up) + O(1) slots, on every rank.

A schedule is made of a block in three steps: repeat it for every micro-batch, which gives every rank an order
of F and I; *squeeze* that, running each pass as early as the order allows, which closes the gaps of the
beginning and the end; and *fill* the gaps that are left with W, as many as the peak of the block needs. The
last two are one run (`fill`), with the costs at hand. In the steady state nothing moves, so the squeezed order
holds no more than the block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.fill import Order, Pass, best_filling
from parallel.pipeline.schedules.registry import Request

PERIOD = 6
"""Slots in which a rank runs F, I and W of both its parts."""


class Block(NamedTuple):
    """A building block: for each rank the slots of F0, F1, I1 and I0, and after how many slots it repeats."""

    slots: tuple[tuple[int, int, int, int], ...]
    period: int

    @property
    def collides(self) -> bool:
        """Whether a rank would have to run two passes at a time."""
        return any(len({slot % self.period for slot in slots}) < len(slots) for slots in self.slots)


def placement(ranks: int) -> tuple[int, ...]:
    """The rank of each of 2p stages."""
    return tuple(range(ranks)) + tuple(reversed(range(ranks)))


def stages_of(rank: int, ranks: int) -> tuple[int, int]:
    """The part of a rank on the way down, and that on the way up."""
    return rank, 2 * ranks - 1 - rank


def v_program(name: str, request: Request, actions: Iterable[Iterable[Action]]) -> Program:
    """A program in V placement."""
    return Program(
        name=name,
        ranks=request.ranks,
        stages=request.stages,
        microbatches=request.microbatches,
        placement=placement(request.ranks),
        actions=tuple(map(tuple, actions)),
    )


def block(ranks: int, steps: tuple[int, int], turns: tuple[int, int, int], period: int = PERIOD) -> Block:
    """The building block of the formulas above."""
    (down, up), last = steps, ranks - 1
    slots = []
    for rank in range(ranks):
        f0 = down * rank
        f1 = down * last + 1 + turns[0] + up * (last - rank)
        i1 = (down + up) * last + 2 + turns[0] + turns[1] + down * rank
        i0 = (2 * down + up) * last + 3 + sum(turns) + up * (last - rank)
        slots.append((f0, f1, i1, i0))
    return Block(tuple(slots), period)


def repeat(of: Block, microbatches: int) -> Order:
    """The order of F and I when the block begins anew for every micro-batch."""
    order: list[list[Pass]] = []
    for rank, slots in enumerate(of.slots):
        lower, upper = stages_of(rank, len(of.slots))
        passes = zip(slots, ((Op.F, lower), (Op.F, upper), (Op.I, upper), (Op.I, lower)), strict=True)
        timed = [
            (slot + of.period * microbatch, (op, stage, microbatch))
            for slot, (op, stage) in passes
            for microbatch in range(microbatches)
        ]
        timed.sort(key=lambda pair: pair[0])
        order.append([each for _, each in timed])
    return order


def peak(of: Block) -> int:
    """The most activations alive on a rank while the block repeats and W take the free slots, oldest I first."""
    return max(_peak(slots, of.period) for slots in of.slots)


def _peak(slots: tuple[int, int, int, int], period: int) -> int:
    """By replaying one rank until as many micro-batches are under way as there ever are, and some more."""
    microbatches = slots[-1] // period + 2 * PERIOD
    busy = {slot + period * number: at for number in range(microbatches) for at, slot in enumerate(slots)}
    alive = most = due = 0
    for slot in range(period * microbatches):
        at = busy.get(slot)
        if at is None:
            if due:
                due, alive = due - 1, alive - 1
        elif at < 2:
            alive += 1
            most = max(most, alive)
        else:
            due += 1
    return most


def repeated(name: str, of: Block, request: Request) -> Program:
    """The program of a block: repeated, squeezed and filled with W under its own peak."""
    counted = replace(request.costs, activation=1.0, weight_activation=None)
    order = repeat(of, request.microbatches)
    found = best_filling([order], placement(request.ranks), counted, peak(of))
    assert found is not None, "with no W left, a rank holds less than in the repeated block"
    return v_program(name, request, found.actions)
