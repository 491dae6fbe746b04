"""Where the weight gradients go: W passes fill the gaps that an order of F and I leaves.

A split schedule is decided by the order of its forwards and input gradients; a W waits for nothing but its I
and nobody waits for a W, so it may run wherever its rank has nothing else to do. Given the order of F and I of
every rank, this module runs them on paper, each as early as it can, and puts in front of a pass

1. as many W as the memory limit demands before an F, then
2. those that fit into the gap until the pass can start, then
3. possibly one that does not fit: the rank does not idle, but the pass is late. That is worth it on a rank
   whose idle time decides how long the step takes, and costs where another rank waits for the pass. As in the
   heuristic of the zero-bubble paper (arXiv:2401.10241, section 3.1), it is done where the gap would make the
   rank the most loaded so far, idle time and work taken together.

Which passes a W may delay is a small grid that `best_filling` tries. The W of a rank run in the order of its
I. The order of F and I stays as it is whatever the costs are: what comes out is as free of deadlock as the
order was, and keeps to the limit.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.costs import Costs

Pass = tuple[Op, int, int]
"""F or I, its stage and its micro-batch."""

Order = Sequence[Sequence[Pass]]
"""For each rank, its F and I in order."""

_ROUNDING = 1e-9  # of sums of seconds and of activations

# The passes that a W may delay, as alternatives.
_DELAYED: tuple[Collection[Op], ...] = ((), (Op.I,), (Op.F,), (Op.F, Op.I))


@dataclass(frozen=True, slots=True)
class Filling:
    """An order with its W.

    Attributes:
        actions: F, I and W of each rank, in order.
        span_seconds: from the start of a rank's first pass to the end of its last, on the rank with the longest.
        end_seconds: when the last rank ends.
        full: whether some rank works all the time, so that no filling of any order is shorter.
    """

    actions: tuple[tuple[Action, ...], ...]
    span_seconds: float
    end_seconds: float
    full: bool


def best_filling(orders: Iterable[Order], placement: Sequence[int], costs: Costs, limit: float) -> Filling | None:
    """The filling with the shortest span (then, the earliest end); None if the limit forbids all orders.

    Args:
        orders: alternatives; of equally short fillings the first is taken.
        placement: the rank of each stage. The model is there once.
        costs: seconds, and what activations weigh.
        limit: the most activations alive on a rank at a time, in the unit of `costs.activation`.
    """
    best: Filling | None = None
    for order in orders:
        for delayed in _DELAYED:
            found = fill(order, placement, costs, limit, delayed)
            if found is None:
                break  # which passes are late does not matter to the limit
            if best is None or (found.span_seconds, found.end_seconds) < (best.span_seconds, best.end_seconds):
                best = found
            if best.full:
                return best
    return best


def fill(
    order: Order, placement: Sequence[int], costs: Costs, limit: float, delayed: Collection[Op] = ()
) -> Filling | None:
    """One filling, in which a W may delay passes of the ops `delayed`; None if the limit forbids it."""
    filler = _Filler(order, placement, costs, limit, delayed)
    return filler.filling() if filler.run() else None


class _Filler:
    """One run on paper. Lists are indexed by rank, those of costs by stage."""

    def __init__(
        self, order: Order, placement: Sequence[int], costs: Costs, limit: float, delayed: Collection[Op]
    ) -> None:
        stages, ranks = range(len(placement)), range(len(order))
        self.order = order
        self.placement = placement
        self.limit = limit + _ROUNDING
        self.delayed = delayed
        self.transfer_seconds = costs.transfer_seconds
        self.seconds = {op: [costs.seconds(Action(op, stage, 0)) for stage in stages] for op in (Op.F, Op.I, Op.W)}
        self.whole = [costs.activation_of(stage) for stage in stages]
        self.kept = [costs.weight_activation_of(stage) for stage in stages]
        self.work = [math.fsum(self._work(op, stage) for op, stage, _ in listed) for listed in order]
        self.cell = [0 for _ in ranks]  # of the next pass in the order
        self.free = [0.0 for _ in ranks]  # when everything listed so far has ended
        self.start = [math.nan for _ in ranks]  # of the first pass
        self.idle = [0.0 for _ in ranks]  # since then
        self.held = [0.0 for _ in ranks]  # activations alive
        self.due: list[deque[tuple[int, int]]] = [deque() for _ in ranks]  # stage and micro-batch of W to come
        self.actions: list[list[Action]] = [[] for _ in ranks]
        self.ended: dict[Pass, float] = {}
        self.awaited: dict[Pass, int] = {}  # by which rank
        self.most_loaded = max(self.work)  # work and idle time so far of the most loaded rank

    def _work(self, op: Op, stage: int) -> float:
        return self.seconds[op][stage] + (self.seconds[Op.W][stage] if op is Op.I else 0.0)

    def run(self) -> bool:
        """Whether the limit allows it. The rank that is free first has its turn, so that loads can be compared."""
        turns = [(0.0, rank) for rank in range(len(self.order))]
        while turns:
            _, rank = heapq.heappop(turns)
            if self.cell[rank] == len(self.order[rank]):
                while self.due[rank]:
                    self._list_weight_gradient(rank)
                continue
            following = self.order[rank][self.cell[rank]]
            source = self._source(following)
            if source is not None and source not in self.ended:
                self.awaited[source] = rank
                continue
            if not self._list(rank, following, source):
                return False
            heapq.heappush(turns, (self.free[rank], rank))
            if following in self.awaited:
                waiting = self.awaited.pop(following)
                heapq.heappush(turns, (self.free[waiting], waiting))
        assert not self.awaited, "an order of F and I in which passes wait for each other"
        return True

    def filling(self) -> Filling:
        """What came of it."""
        spans = [free - start for free, start in zip(self.free, self.start, strict=True)]
        full = max(spans) <= max(self.work) + _ROUNDING
        return Filling(tuple(map(tuple, self.actions)), max(spans), max(self.free), full)

    def _source(self, following: Pass) -> Pass | None:
        """The pass whose output a pass reads; None for the model's input."""
        op, stage, microbatch = following
        if op is Op.F:
            return (Op.F, stage - 1, microbatch) if stage else None
        return (Op.I, stage + 1, microbatch) if stage + 1 < len(self.placement) else (Op.F, stage, microbatch)

    def _list(self, rank: int, following: Pass, source: Pass | None) -> bool:
        """Add the W that go in front of a pass, and the pass. False if the limit forbids it."""
        op, stage, microbatch = following
        arrival = 0.0
        if source is not None:
            arrival = self.ended[source] + (self.transfer_seconds if self.placement[source[1]] != rank else 0.0)
        while self.due[rank] and self._in_front(rank, op, stage, arrival):
            self._list_weight_gradient(rank)
        if op is Op.F:
            self.held[rank] += self.whole[stage]
            if self.held[rank] > self.limit:
                return False
        else:
            self.held[rank] += self.kept[stage] - self.whole[stage]
            self.due[rank].append((stage, microbatch))
        begin = max(self.free[rank], arrival)
        if math.isnan(self.start[rank]):
            self.start[rank] = begin
        else:
            self.idle[rank] += begin - self.free[rank]
            self.most_loaded = max(self.most_loaded, self.work[rank] + self.idle[rank])
        self.free[rank] = self.ended[following] = begin + self.seconds[op][stage]
        self.actions[rank].append(Action(op, stage, microbatch))
        self.cell[rank] += 1
        return True

    def _in_front(self, rank: int, op: Op, stage: int, arrival: float) -> bool:
        """Whether the next W goes in front of a pass whose input arrives then."""
        if op is Op.F and self.held[rank] + self.whole[stage] > self.limit:
            return True
        gap = arrival - self.free[rank]
        if gap <= _ROUNDING:
            return False
        if gap >= self.seconds[Op.W][self.due[rank][0][0]] - _ROUNDING:
            return True
        return op in self.delayed and self.work[rank] + self.idle[rank] + gap > self.most_loaded + _ROUNDING

    def _list_weight_gradient(self, rank: int) -> None:
        stage, microbatch = self.due[rank].popleft()
        self.held[rank] -= self.kept[stage]
        self.free[rank] += self.seconds[Op.W][stage]
        self.actions[rank].append(Action(Op.W, stage, microbatch))
