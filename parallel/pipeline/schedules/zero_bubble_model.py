"""The order of F, I and W on every rank as a mixed-integer program: the best schedule with one stage a rank.

Micro-batches are alike, so on a rank each kind of pass may run in their order. What is left to decide is how the
three chains of a rank merge. A binary says whether pass n of a later kind (I is later than F, W than both) runs before
pass k of an earlier kind; for k <= n dependencies decide that it does not. Then, with E the end of a pass and all
times counted from the first F of rank 0:

    minimize T >= E(W, m-1) - start(F, 0) of every rank; a rank starts with its first F, as early as that can be
    E(F, k) >= E(F, k) of the rank before + transfer + F,   E(I, k) >= E(I, k) of the rank after + transfer + I
    two passes of a rank in the order the binary says, by two rows with a big M
    what is held at every F <= the limit, by counting

This is the program of the zero-bubble paper (arXiv:2401.10241, appendix G) without the binaries that only rename
micro-batches. Solvers prove little with big M alone, so there are three additions that exclude no better schedule:

- Windows. The known schedule's span bounds every pass from above, dependencies from below. They make each M as small
  as can be, and decide pairs for which only one order fits.
- Lane rows. Between the ends of two passes a rank works on all that lies between them: a sum over binaries, no M.
- Staircase rows. A binary can only go from 1 to 0 as n grows and k falls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.schedules.zero_bubble_heuristic import SLACK

KINDS = (Op.F, Op.I, Op.W)
PAIRS = ((Op.F, Op.I), (Op.F, Op.W), (Op.I, Op.W))  # (earlier kind, later kind)
_TOLERANCE = 1e-6
"""Of times in the model's unit, as solvers take it."""

@dataclass
class Rows:
    """Columns and rows as a solver takes them; row i is lower[i] <= sum over entries start[i]..start[i+1]."""

    column_lower: list[float] = field(default_factory=list)
    column_upper: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    start: list[int] = field(default_factory=lambda: [0])
    index: list[int] = field(default_factory=list)
    value: list[float] = field(default_factory=list)

    def column(self, lower: float, upper: float, whole: bool = False) -> int:
        self.column_lower.append(lower)
        self.column_upper.append(upper)
        self.whole.append(whole)
        return len(self.whole) - 1

    def at_least(self, terms: Iterable[tuple[int, float]], bound: float) -> None:
        """A row: the sum of the terms is `bound` or more."""
        merged: dict[int, float] = {}
        for column, factor in terms:
            merged[column] = merged.get(column, 0.0) + factor
        for column, factor in merged.items():
            if factor:
                self.index.append(column)
                self.value.append(factor)
        self.start.append(len(self.index))
        self.lower.append(bound)


@dataclass(frozen=True, slots=True)
class _Sum:
    """Columns with factors, plus a constant."""

    terms: list[tuple[int, float]]
    constant: float = 0.0


_NEVER = _Sum([])
_ALWAYS = _Sum([], 1.0)


class Model:
    """The program for one problem. Times are in units of `unit_seconds`.

    Args:
        limits: what each rank may hold, in the unit of `costs.activation`.
        span_seconds: of a known schedule; only schedules that are not longer are looked for.
        bound_seconds: no schedule is shorter than that.
    """

    def __init__(
        self, microbatches: int, costs: Costs, limits: Sequence[float], span_seconds: float, bound_seconds: float
    ) -> None:
        self.microbatches = microbatches
        self.limits = limits
        self.costs = costs
        self.unit_seconds = span_seconds / (3 * microbatches)
        self.ranks = range(len(limits))
        self.seconds = {
            (rank, op): costs.seconds(Action(op, rank, 0)) / self.unit_seconds for rank in self.ranks for op in KINDS
        }
        self.transfer = costs.transfer_seconds / self.unit_seconds
        self.heads = [0.0]  # when each rank starts
        for rank in self.ranks[:-1]:
            self.heads.append(self.heads[-1] + self.seconds[rank, Op.F] + self.transfer)
        self.horizon = span_seconds / self.unit_seconds + _TOLERANCE
        self.rows = Rows()
        self.total = self.rows.column(bound_seconds / self.unit_seconds - _TOLERANCE, self.horizon)
        self._windows()
        self.end = {key: self.rows.column(self.first_end[key], self.last_end[key]) for key in self.first_end}
        # For (rank, early, late, k, n) with n < k: the column, and 1 if `late n` runs before `early k`, else 0.
        self.binary: dict[tuple[int, Op, Op, int, int], int] = {}
        self.before: dict[tuple[int, Op, Op, int, int], _Sum] = {}
        for rank in self.ranks:
            for early, late in PAIRS:
                self._decide(rank, early, late)

    def build(self) -> Rows:
        """All rows."""
        for rank in self.ranks:
            self._dependencies(rank)
            for early, late in PAIRS:
                self._merge(rank, early, late)
            self._lane(rank)
            self._memory(rank)
        return self.rows

    def solution(self, orders: Sequence[Sequence[Action]], ends: Mapping[Action, float], span: float) -> list[float]:
        """The columns of a known schedule: its orders, the ends of its actions in seconds, and its span in seconds."""
        values = [0.0] * len(self.rows.whole)
        values[self.total] = span / self.unit_seconds
        for (rank, op, k), column in self.end.items():
            values[column] = ends[Action(op, rank, k)] / self.unit_seconds
        place = {action: number for listed in orders for number, action in enumerate(listed)}
        for (rank, early, late, k, n), column in self.binary.items():
            values[column] = float(place[Action(late, rank, n)] < place[Action(early, rank, k)])
        return values

    def orders(self, values: Sequence[float]) -> tuple[tuple[Action, ...], ...]:
        """The order of every rank that a solution means."""
        return tuple(self._order(rank, values) for rank in self.ranks)

    def _order(self, rank: int, values: Sequence[float]) -> tuple[Action, ...]:
        ahead = {(op, k): k for op in KINDS for k in range(self.microbatches)}  # passes before each
        for early, late in PAIRS:
            for k in range(self.microbatches):
                for n in range(self.microbatches):
                    key = (rank, early, late, k, n)
                    column = self.binary.get(key)
                    first = self.before.get(key, _NEVER).constant if column is None else values[column]
                    ahead[early, k] += round(first)
                    ahead[late, n] += 1 - round(first)
        ranked = sorted(ahead, key=lambda each: (ahead[each], KINDS.index(each[0])))
        return tuple(Action(op, rank, k) for op, k in ranked)

    # --- Windows -------------------------------------------------------------------------------------------------

    def _windows(self) -> None:
        """The earliest and the latest end of every pass in a schedule no longer than the horizon."""
        self.first_end: dict[tuple[int, Op, int], float] = {}
        self.last_end: dict[tuple[int, Op, int], float] = {}
        last = self.microbatches - 1
        for k in range(self.microbatches):
            for rank in self.ranks:
                before = self.first_end[rank - 1, Op.F, k] + self.transfer if rank else 0.0
                self._earliest(rank, Op.F, k, before)
            for rank in reversed(self.ranks):
                after = self.first_end[rank + 1, Op.I, k] + self.transfer if rank < self.ranks[-1] else 0.0
                # k+1 forwards and k other input gradients come first on the lane.
                lane = self.heads[rank] + (k + 1) * self.seconds[rank, Op.F] + k * self.seconds[rank, Op.I]
                self._earliest(rank, Op.I, k, max(after, lane, self.first_end[rank, Op.F, k]))
                lane += self.seconds[rank, Op.I] + k * self.seconds[rank, Op.W]
                self._earliest(rank, Op.W, k, max(lane, self.first_end[rank, Op.I, k]))
        for k in range(last, -1, -1):
            for rank in self.ranks:
                _, i, w = (self.seconds[rank, op] for op in KINDS)
                final = self.heads[rank] + self.horizon
                self.last_end[rank, Op.W, k] = final - (last - k) * w
                latest = final - (last - k) * i - (last - k + 1) * w
                if rank:
                    before = self.last_end[rank - 1, Op.I, k]
                    latest = min(latest, before - self.seconds[rank - 1, Op.I] - self.transfer)
                self.last_end[rank, Op.I, k] = latest
            for rank in reversed(self.ranks):
                f, i, w = (self.seconds[rank, op] for op in KINDS)
                latest = self.heads[rank] + self.horizon - (last - k) * f - (last - k + 1) * (i + w)
                latest = min(latest, self.last_end[rank, Op.I, k] - i)
                if rank < self.ranks[-1]:
                    after = self.last_end[rank + 1, Op.F, k]
                    latest = min(latest, after - self.seconds[rank + 1, Op.F] - self.transfer)
                self.last_end[rank, Op.F, k] = latest

    def _earliest(self, rank: int, op: Op, k: int, ready: float) -> None:
        if k:
            ready = max(ready, self.first_end[rank, op, k - 1])
        self.first_end[rank, op, k] = ready + self.seconds[rank, op]

    def _fits(self, rank: int, first: tuple[Op, int], second: tuple[Op, int]) -> bool:
        """Whether one pass can run before another within their windows."""
        earliest = self.first_end[(rank, *first)] + self.seconds[rank, second[0]]
        return earliest <= self.last_end[(rank, *second)] + _TOLERANCE

    def _decide(self, rank: int, early: Op, late: Op) -> None:
        """A binary for every pair of passes that neither memory nor windows decide."""
        # If `late n` has not run by the end of `early k`, so much is held: `most` for micro-batch k, and `each` or more
        # for every one from n on.
        whole, kept = self.costs.activation_of(rank), self.costs.weight_activation_of(rank)
        most, each = {
            (Op.F, Op.I): (whole, whole),
            (Op.F, Op.W): (whole, min(whole, kept)),
            (Op.I, Op.W): (max(whole, kept), kept),
        }[early, late]
        room = int((self.limits[rank] * (1 + SLACK) - most) / each) if each else self.microbatches
        for k in range(self.microbatches):
            for n in range(k):
                key = (rank, early, late, k, n)
                if k - n > room or not self._fits(rank, (early, k), (late, n)):
                    self.before[key] = _ALWAYS
                elif not self._fits(rank, (late, n), (early, k)):
                    self.before[key] = _NEVER
                else:
                    self.binary[key] = self.rows.column(0.0, 1.0, whole=True)
                    self.before[key] = _Sum([(self.binary[key], 1.0)])

    # --- Rows ----------------------------------------------------------------------------------------------------

    def _dependencies(self, rank: int) -> None:
        for k in range(self.microbatches):
            self._after((rank, Op.F, k), (rank, Op.I, k))
            self._after((rank, Op.I, k), (rank, Op.W, k))
            if rank:
                self._after((rank - 1, Op.F, k), (rank, Op.F, k), self.transfer)
                self._after((rank, Op.I, k), (rank - 1, Op.I, k), self.transfer)
        final = self.end[rank, Op.W, self.microbatches - 1]
        self.rows.at_least([(self.total, 1.0), (final, -1.0)], -self.heads[rank])

    def _after(self, first: tuple[int, Op, int], second: tuple[int, Op, int], delay: float = 0.0) -> None:
        rank, op, _ = second
        self.rows.at_least([(self.end[second], 1.0), (self.end[first], -1.0)], self.seconds[rank, op] + delay)

    def _merge(self, rank: int, early: Op, late: Op) -> None:
        """The passes of two kinds in the order that their binaries say, and the binaries as a staircase."""
        for k in range(self.microbatches):
            for n in range(k):
                here = self.before[rank, early, late, k, n]
                nearer = self.before.get((rank, early, late, k, n + 1))  # None: dependencies decide
                later = self.before.get((rank, early, late, k + 1, n))
                column = self.binary.get((rank, early, late, k, n))
                if column is not None:
                    self._either(rank, (early, k), (late, n), column)
                elif here is _ALWAYS and nearer is not _ALWAYS:
                    self._after((rank, late, n), (rank, early, k))
                elif here is _NEVER and later is not _NEVER:
                    self._after((rank, early, k), (rank, late, n))
                if nearer is not None:
                    self._larger(here, nearer)
                if later is not None:
                    self._larger(later, here)

    def _either(self, rank: int, early: tuple[Op, int], late: tuple[Op, int], column: int) -> None:
        """`late` before `early` if the column is 1, else after it: E(second) - E(first) >= seconds(second) - M."""
        for first, second, sign in ((late, early, 1.0), (early, late, -1.0)):
            seconds = self.seconds[rank, second[0]]
            big = self.last_end[(rank, *first)] - (self.first_end[(rank, *second)] - seconds)
            if big > 0:
                terms = [(self.end[(rank, *second)], 1.0), (self.end[(rank, *first)], -1.0), (column, -sign * big)]
                self.rows.at_least(terms, seconds - (big if sign > 0 else 0.0))

    def _larger(self, one: _Sum, other: _Sum) -> None:
        """A row, unless it holds anyway: `one` is at least `other`."""
        if (one.terms and other is not _NEVER) or (other.terms and one is not _ALWAYS):
            terms = [*one.terms, *((column, -factor) for column, factor in other.terms)]
            self.rows.at_least(terms, other.constant - one.constant)

    def _count(self, rank: int, op: Op, at: tuple[Op, int]) -> _Sum:
        """How many passes of kind `op` run before the pass `at`, itself not counted."""
        kind, k = at
        if op is kind:
            return _Sum([], k)
        terms: list[tuple[int, float]] = []
        constant = 0.0
        for other in range(self.microbatches):
            if KINDS.index(kind) < KINDS.index(op):
                each = self.before.get((rank, kind, op, k, other), _NEVER)
                terms += each.terms
                constant += each.constant
            else:
                each = self.before.get((rank, op, kind, other, k), _NEVER)
                terms += ((column, -factor) for column, factor in each.terms)
                constant += 1 - each.constant
        return _Sum(terms, constant)

    def _lane(self, rank: int) -> None:
        """From one pass to a later one, the rank works on everything between them."""
        counts = {
            (kind, k): [self._count(rank, op, (kind, k)) for op in KINDS]
            for kind in KINDS
            for k in range(self.microbatches)
        }
        for kind in KINDS:
            for k in range(self.microbatches):
                if k:
                    self._between(rank, (kind, k - 1), (kind, k), counts)
                if kind is not Op.F:
                    self._between(rank, (KINDS[KINDS.index(kind) - 1], k), (kind, k), counts)
            if kind is not Op.F:
                self._between(rank, (Op.F, 0), (kind, 0), counts)

    def _between(
        self, rank: int, first: tuple[Op, int], second: tuple[Op, int], counts: Mapping[tuple[Op, int], list[_Sum]]
    ) -> None:
        """E(second) - E(first) is at least the work that runs before `second` and not before `first`."""
        terms = [(self.end[(rank, *second)], 1.0), (self.end[(rank, *first)], -1.0)]
        bound = self.seconds[rank, second[0]] - self.seconds[rank, first[0]]
        for op, upto, since in zip(KINDS, counts[second], counts[first], strict=True):
            seconds = self.seconds[rank, op]
            terms += [(column, -factor * seconds) for column, factor in upto.terms]
            terms += [(column, factor * seconds) for column, factor in since.terms]
            bound += seconds * (upto.constant - since.constant)
        self.rows.at_least(terms, bound)

    def _memory(self, rank: int) -> None:
        """What is held while an F runs, and while an I runs where W keeps more than F."""
        whole, kept, limit = self.costs.activation_of(rank), self.costs.weight_activation_of(rank), self.limits[rank]
        if not limit:
            return
        for k in range(self.microbatches):
            inputs, weights = (self._count(rank, op, (Op.F, k)) for op in (Op.I, Op.W))
            # whole * (k + 1 - inputs) + kept * (inputs - weights) <= limit
            terms = [(column, factor * (whole - kept) / limit) for column, factor in inputs.terms]
            terms += [(column, factor * kept / limit) for column, factor in weights.terms]
            held = whole * (k + 1 - inputs.constant) + kept * (inputs.constant - weights.constant)
            self.rows.at_least(terms, held / limit - 1)
            if kept > whole:
                forwards, weights = (self._count(rank, op, (Op.I, k)) for op in (Op.F, Op.W))
                terms = [(column, -factor * whole / limit) for column, factor in forwards.terms]
                terms += [(column, factor * kept / limit) for column, factor in weights.terms]
                held = whole * (forwards.constant - k - 1) + kept * (k + 1 - weights.constant)
                self.rows.at_least(terms, held / limit - 1)


def lower_bound(microbatches: int, costs: Costs, limits: Sequence[float]) -> float:
    """Seconds that no schedule with one stage a rank falls below, by adding up what has to happen one after the other.

    For the span of rank r: its own work; and, for every rank s from r on, the way of the first micro-batch from r to
    s, all F and I of s together with the W's that memory forces before its last I, the way of the last gradient back
    to r, and one W.
    """
    ranks = range(len(limits))
    seconds = [[costs.seconds(Action(op, rank, 0)) for op in KINDS] for rank in ranks]
    bound = 0.0
    for rank in ranks:
        bound = max(bound, microbatches * sum(seconds[rank]))
        way = 0.0
        for other in ranks[rank:]:
            f, i, w = seconds[other]
            forced = _forced_weights(microbatches, other, costs, limits[other])
            bound = max(bound, way + microbatches * (f + i) + forced * w + seconds[rank][2])
            way += f + i + 2 * costs.transfer_seconds
    return bound


def _forced_weights(microbatches: int, stage: int, costs: Costs, limit: float) -> int:
    """How many W's must run before the last F: while it runs, its activation and what is left of others are held."""
    whole = costs.activation_of(stage)
    least = min(whole, costs.weight_activation_of(stage))
    room = int((limit * (1 + SLACK) - whole) / least) if least else microbatches
    return max(microbatches - 1 - room, 0)
