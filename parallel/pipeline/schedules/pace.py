"""List scheduling at a given pace: every rank takes, of the passes that can start, the one that is due first.

A pace gives each pass the time slot in which a regular pattern would run it. The pattern need not fit the costs
at hand, and its beginning and end are full of holes. So the ranks are run on paper with the costs at hand, and
each takes the pass with the smallest slot among those whose input is there. In the steady state that is the
pattern; at the beginning and at the end it is whatever there is to do.

A memory limit must not lock the ranks up. If one has spent all its room on parts of the model that come early in
a micro-batch's way, or on one copy of the model, then the late ones, which have to run before any room becomes
free, find none. So room for one activation of every stage of the rank is kept for that stage alone. Then the
oldest micro-batch of a copy can always go on: what has the place of a stage on its way is older still, and done.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.program import Program

Slot = Callable[[Op, int, int], int]
"""The slot of an op of a stage for the n-th micro-batch of its copy of the model."""


def paced(shape: Program, slot: Slot, costs: Costs, limit: float) -> Program:
    """The shape with F and B of all its stages, each stage's in the order of the micro-batches.

    Args:
        shape: ranks, placement, micro-batches and copies; its actions do not matter.
        slot: the pace.
        costs: seconds, and what activations weigh.
        limit: the most activations alive on a rank, in the unit of `costs.activation`; at least as much as one of
            each of its stages weigh together.
    """
    return shape.with_actions(_Pacer(shape, slot, costs, limit).run())


class _Pacer:
    """One run on paper. Lists are indexed by rank or by stage; `done` counts what has begun."""

    def __init__(self, shape: Program, slot: Slot, costs: Costs, limit: float) -> None:
        self.shape = shape
        self.slot = slot
        self.limit = limit + 1e-9
        self.transfer_seconds = costs.transfer_seconds
        self.seconds = {
            (op, stage): costs.seconds(Action(op, stage, 0)) for op in (Op.F, Op.B) for stage in range(shape.stages)
        }
        self.weight = [costs.activation_of(stage) for stage in range(shape.stages)]
        self.done = dict.fromkeys(self.seconds, 0)
        self.ended: dict[tuple[Op, int, int], float] = {}
        self.stages = [shape.stages_of(rank) for rank in range(shape.ranks)]
        self.free = [0.0] * shape.ranks  # when the rank is done with what it has begun
        self.held = [0.0] * shape.ranks
        self.listed: list[list[Action]] = [[] for _ in range(shape.ranks)]
        self.turns = [(0.0, rank) for rank in range(shape.ranks)]  # when a rank may find something to do

    def run(self) -> list[list[Action]]:
        """The list of every rank."""
        while self.turns:
            now, rank = heapq.heappop(self.turns)
            if self.free[rank] <= now and (chosen := self._choose(rank, now)) is not None:
                self._begin(rank, now, *chosen)
        return self.listed

    def _choose(self, rank: int, now: float) -> tuple[Op, int] | None:
        """The op and stage whose next pass is due first among those that can start."""
        first: tuple[int, Op, int] | None = None
        for stage in self.stages[rank]:
            for op in (Op.F, Op.B):
                number = self.done[op, stage]
                if number < len(self.shape.microbatches_of(stage)) and self._can_start(rank, op, stage, number, now):
                    slot = self.slot(op, stage, number)
                    if first is None or slot < first[0]:
                        first = slot, op, stage
        return None if first is None else first[1:]

    def _can_start(self, rank: int, op: Op, stage: int, number: int, now: float) -> bool:
        if op is Op.F and not self._has_room(rank, stage):
            return False
        before, after = self.shape.before(stage), self.shape.after(stage)
        if op is Op.F:
            source = None if before is None else (op, before, number)
        else:
            source = (Op.F, stage, number) if after is None else (op, after, number)
        if source is None:
            return True
        ended = self.ended.get(source)
        apart = self.shape.placement[source[1]] != rank
        return ended is not None and ended + (self.transfer_seconds if apart else 0.0) <= now

    def _has_room(self, rank: int, stage: int) -> bool:
        if not self._alive(stage):
            return True  # the place that is kept for it
        kept = sum(self.weight[each] for each in self.stages[rank] if not self._alive(each))
        return self.held[rank] + kept + self.weight[stage] <= self.limit

    def _alive(self, stage: int) -> int:
        return self.done[Op.F, stage] - self.done[Op.B, stage]

    def _begin(self, rank: int, now: float, op: Op, stage: int) -> None:
        number = self.done[op, stage]
        end = now + self.seconds[op, stage]
        self.done[op, stage] += 1
        self.held[rank] += self.weight[stage] if op is Op.F else -self.weight[stage]
        self.free[rank] = self.ended[op, stage, number] = end
        self.listed[rank].append(Action(op, stage, self.shape.microbatches_of(stage)[number]))
        heapq.heappush(self.turns, (end, rank))
        reader = self.shape.after(stage) if op is Op.F else self.shape.before(stage)
        if reader is not None and self.shape.placement[reader] != rank:
            heapq.heappush(self.turns, (end + self.transfer_seconds, self.shape.placement[reader]))
