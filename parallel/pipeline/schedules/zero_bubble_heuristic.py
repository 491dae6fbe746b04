"""The zero-bubble heuristic: forwards, backward halves and W's one after the other, each where it costs least.

It keeps a clock per rank while it writes the program, so that it can see every wait before it happens. Phases:

1. Warm-up. Every rank runs the first forward, and as many more as its memory and the time until the first gradient
   allow, each rank at least one more than the rank after it.
2. Rounds. In each of the m-1 rounds every rank gets at most one more F, then exactly one more I. A rank that would
   have to wait fills the time with W's that it still owes, and so does one that has no memory for an F.
3. The W's that are left.

Three choices have no best answer for all costs. They are made once for a whole program, and whoever calls tries all
eight combinations (`Choices`). The rule behind two of them: the step is as long as its busiest rank, so a rank may
wait as long as the rank that has waited most without making anything worse.

Source: "Zero Bubble Pipeline Parallelism" (arXiv:2401.10241), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.costs import Costs

SLACK = 1e-9
"""Relative: sums of the same numbers in another order are equal."""


class Choices(NamedTuple):
    """What the heuristic cannot know to be better.

    Attributes:
        delay_first: the warm-up may run a forward that makes the first I late, rather than wait for that I.
        hold_forwards: leave an F for the next round if it would make the next I late.
        fill_always: fill a wait with a W that is longer than the wait even if waiting would cost nothing.
    """

    delay_first: bool
    hold_forwards: bool
    fill_always: bool


def all_choices() -> Iterator[Choices]:
    """All combinations."""
    return (Choices(*flags) for flags in product((False, True), repeat=3))


@dataclass(frozen=True, slots=True)
class Plan:
    """A finished order of passes.

    Attributes:
        actions: one list a rank.
        span_seconds: of the rank with the longest span, from its first start to its last end.
        peak: the most that a rank holds, in the unit of `Costs.activation`.
    """

    actions: tuple[tuple[Action, ...], ...]
    span_seconds: float
    peak: float

    def better_than(self, other: Plan) -> bool:
        """Faster, or as fast and with less memory."""
        if not math.isclose(self.span_seconds, other.span_seconds, rel_tol=SLACK):
            return self.span_seconds < other.span_seconds
        return self.peak < other.peak


def plan(microbatches: int, costs: Costs, limits: Sequence[float]) -> Plan:
    """The best plan that the heuristic finds.

    Args:
        limits: the most that each rank may hold, in the unit of `costs.activation`; there is one stage a rank, so
            its length is the number of stages. Each must be at least `least_memory` of its stage.
    """
    best: Plan | None = None
    for choices in all_choices():
        found = _Planner(microbatches, costs, limits, choices).plan()
        if best is None or found.better_than(best):
            best = found
    assert best is not None, "there are eight combinations"
    return best


def least_memory(stage: int, costs: Costs) -> float:
    """What one micro-batch of a stage needs at a time, which is enough for any number of them one by one."""
    return max(costs.activation_of(stage), costs.weight_activation_of(stage))


class _Rank:
    """What one rank has done so far. Each kind of pass runs in the order of micro-batches."""

    def __init__(self, stage: int, costs: Costs, limit: float) -> None:
        self.stage = stage
        self.seconds = {op: costs.seconds(Action(op, stage, 0)) for op in (Op.F, Op.I, Op.W)}
        self.whole = costs.activation_of(stage)
        self.kept = costs.weight_activation_of(stage)
        self.limit = limit * (1 + SLACK)
        self.forwards = self.inputs = self.weights = 0  # done
        self.free = 0.0  # when it can start its next pass
        self.waited = 0.0  # since its first forward
        self.peak = 0.0
        self.start = 0.0
        self.forward_ends: list[float] = []
        self.input_ends: list[float] = []
        self.order: list[Action] = []

    @property
    def owed(self) -> int:
        """W's that could run now."""
        return self.inputs - self.weights

    def held_with(self, op: Op | None = None, paid: int = 0) -> float:
        """What it holds, after one more `op` and `paid` more W's."""
        whole = self.forwards - self.inputs + (op is Op.F) - (op is Op.I)
        return whole * self.whole + (self.owed - paid + (op is Op.I)) * self.kept

    def run(self, op: Op, ready: float = 0.0) -> None:
        """The next pass of that kind, whose input is there from `ready` on."""
        begin = max(self.free, ready)
        if self.order:
            self.waited += begin - self.free
        else:
            self.start = begin
        self.free = begin + self.seconds[op]
        if op is Op.F:
            self.order.append(Action(op, self.stage, self.forwards))
            self.forwards += 1
            self.forward_ends.append(self.free)
        elif op is Op.I:
            self.order.append(Action(op, self.stage, self.inputs))
            self.inputs += 1
            self.input_ends.append(self.free)
        else:
            self.order.append(Action(op, self.stage, self.weights))
            self.weights += 1
        self.peak = max(self.peak, self.held_with())


class _Planner:
    """One run of the heuristic."""

    def __init__(self, microbatches: int, costs: Costs, limits: Sequence[float], choices: Choices) -> None:
        self.microbatches = microbatches
        self.transfer = costs.transfer_seconds
        self.choices = choices
        self.ranks = [_Rank(stage, costs, limit) for stage, limit in enumerate(limits)]
        self.most_waited = 0.0

    def plan(self) -> Plan:
        self._warm_up()
        for _ in range(1, self.microbatches):
            self._forwards()
            self._backwards()
        for rank in self.ranks:
            while rank.owed:
                rank.run(Op.W)
        return Plan(
            actions=tuple(tuple(rank.order) for rank in self.ranks),
            span_seconds=max(rank.free - rank.start for rank in self.ranks),
            peak=max(rank.peak for rank in self.ranks),
        )

    def _warm_up(self) -> None:
        for rank in self.ranks:
            self._run(rank, Op.F)
        # How many more fit on each rank before the first gradient comes back to it, last rank first.
        more = [0] * len(self.ranks)
        gradient = self.ranks[-1].free + self.ranks[-1].seconds[Op.I]
        for rank in reversed(self.ranks[:-1]):
            arrival, clock = gradient + self.transfer, rank.free
            for _ in range(self._capacity(rank) - 1):
                late = clock >= arrival if self.choices.delay_first else clock + rank.seconds[Op.F] > arrival
                if late:
                    break
                clock += rank.seconds[Op.F]
                more[rank.stage] += 1
            gradient = max(clock, arrival) + rank.seconds[Op.I]
        for before, rank in zip(self.ranks, self.ranks[1:], strict=False):
            # All micro-batches on both ranks is the one case in which a rank need not be ahead.
            ahead = 1 if more[before.stage] < self.microbatches - 1 else 0
            more[rank.stage] = min(more[rank.stage], max(more[before.stage] - ahead, 0))
        for rank in self.ranks:
            for _ in range(more[rank.stage]):
                self._run(rank, Op.F)
        for rank in reversed(self.ranks):
            self._run(rank, Op.I)

    def _capacity(self, rank: _Rank) -> int:
        """Micro-batches that it may hold between F and I."""
        each = max(rank.whole, rank.kept)
        return min(self.microbatches, int(rank.limit / each)) if each else self.microbatches

    def _forwards(self) -> None:
        """One more F on a row of ranks that ends with the last one that has any left."""
        first = len(self.ranks)
        for rank in reversed(self.ranks):
            if rank.forwards == self.microbatches or self._holds_forward(rank):
                break
            first = rank.stage
        for rank in self.ranks[first:]:
            self._make_room(rank, Op.F)
            self._fill(rank, self._ready(rank, Op.F))
            self._run(rank, Op.F)

    def _holds_forward(self, rank: _Rank) -> bool:
        """Whether the next F is better left for the next round: the rank after can do without, the next I cannot."""
        if not self.choices.hold_forwards or rank is self.ranks[-1]:
            return False
        after = self.ranks[rank.stage + 1]
        if rank.forwards < after.forwards + 2:
            return False
        gradient = after.free + after.seconds[Op.F] + after.seconds[Op.I] + self.transfer
        if rank.free >= gradient:
            return True
        paid = 0
        while rank.held_with(Op.F, paid) > rank.limit and paid < rank.owed:
            paid += 1
        if rank.free + paid * rank.seconds[Op.W] + rank.seconds[Op.F] <= gradient:
            return False
        return gradient - rank.free <= self.most_waited - rank.waited

    def _backwards(self) -> None:
        """One more I on every rank."""
        for rank in reversed(self.ranks):
            self._make_room(rank, Op.I)
            self._fill(rank, self._ready(rank, Op.I))
            self._run(rank, Op.I)

    def _make_room(self, rank: _Rank, op: Op) -> None:
        """W's until the memory for the pass is there. `_capacity` sees to it that there are enough of them."""
        while rank.held_with(op) > rank.limit:
            assert rank.owed, f"rank {rank.stage} holds {rank.held_with()} and owes no W"
            self._run(rank, Op.W)

    def _fill(self, rank: _Rank, ready: float) -> None:
        """W's in the time until `ready`; one that ends later only if waiting is worse, or by choice."""
        while rank.owed and rank.free + rank.seconds[Op.W] <= ready:
            self._run(rank, Op.W)
        wait = ready - rank.free
        if rank.owed and wait > 0 and (self.choices.fill_always or wait > self.most_waited - rank.waited):
            self._run(rank, Op.W)

    def _ready(self, rank: _Rank, op: Op) -> float:
        """When the input of the next pass is there."""
        if op is Op.F and rank.stage > 0:
            return self.ranks[rank.stage - 1].forward_ends[rank.forwards] + self.transfer
        if op is Op.I and rank.stage + 1 < len(self.ranks):
            return self.ranks[rank.stage + 1].input_ends[rank.inputs] + self.transfer
        return 0.0

    def _run(self, rank: _Rank, op: Op) -> None:
        rank.run(op, self._ready(rank, op))
        self.most_waited = max(self.most_waited, rank.waited)
