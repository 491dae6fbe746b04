"""A program run on paper: when every action starts and ends, or where the program gets stuck.

An action starts when its lane reaches it and all it waits for (`rules`) has ended. So the times are longest
paths in a graph of actions, and one pass over that graph in topological order finds them. Actions that the
pass cannot reach wait for each other in a circle, or for something the program does not list: a deadlock.

What a transfer does to its lane is a choice (`Sends`):

- `latency`: a transfer takes `transfer_seconds` from the moment its producer ends. The p2p lane never delays
  it; lane order only matters for deadlocks, as in `buffered`. The published bubble rates imply this
  (zero-bubble paper, arXiv:2401.10241, Table 5).
- `buffered`: a send leaves at once, a receive holds the lane until its data is there.
- `rendezvous`: a send also holds its lane until the other rank has come to the matching receive, as on one
  communication stream a pair of ranks. What runs so, runs on every back end.
- `blocking`: transfers have no lane of their own. A send holds the compute lane for `transfer_seconds`, a
  receive until its data is there: communication without any overlap. Receives must be listed late
  (`pair_transfers(..., late=True)`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from parallel.pipeline.actions import LANE_OF, PASS_OPS, SEND_OPS, TRANSFER_OPS, Action, Lane, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.program import Program
from parallel.pipeline.rules import IN_TURN, Requirement, Source, needed, prerequisites, receive_of, sources


class Sends(StrEnum):
    """How transfers use their lane; see the module's docstring."""

    LATENCY = "latency"
    BUFFERED = "buffered"
    RENDEZVOUS = "rendezvous"
    BLOCKING = "blocking"


class Span(NamedTuple):
    """One action that ran, from `start` to `end` in seconds from the start of the step."""

    rank: int
    action: Action
    lane: Lane
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Blocked:
    """A lane that got stuck: the action at its head and what that still waits for."""

    rank: int
    lane: Lane
    action: Action
    waits_for: tuple[Requirement, ...]

    def __str__(self) -> str:
        reasons = " and ".join(str(requirement) for requirement in self.waits_for)
        return f"rank {self.rank}, lane {self.lane}: {self.action} waits for {reasons}"


@dataclass(frozen=True)
class Timeline:
    """The outcome of a simulation.

    Attributes:
        program: what ran.
        costs: how long its actions took.
        spans: for each rank, its actions that ran, in the order in which the rank lists them.
        order: the same spans in one order in which a single process could run everything.
        blocked: the stuck lanes, empty if the program ran to its end.
    """

    program: Program
    costs: Costs
    spans: tuple[tuple[Span, ...], ...]
    order: tuple[Span, ...]
    blocked: tuple[Blocked, ...]

    @cached_property
    def makespan_seconds(self) -> float:
        """From the start of the step to the end of its last action. ValueError after a deadlock."""
        self._require_end()
        return max((span.end for listed in self.spans for span in listed), default=0.0)

    def busy_seconds(self, rank: int) -> float:
        """How long the rank works on F, B, I and W."""
        return math.fsum(span.end - span.start for span in self.spans[rank] if span.action.op in PASS_OPS)

    def span_seconds(self, rank: int) -> float:
        """From the start of the rank's first F, B, I or W to the end of its last; 0 if it has none."""
        work = [span for span in self.spans[rank] if span.action.op in PASS_OPS]
        return work[-1].end - work[0].start if work else 0.0

    @cached_property
    def bubble_rate(self) -> float:
        """(span - busy) / span of the rank with the longest span. ValueError after a deadlock."""
        self._require_end()
        longest = max(range(self.program.ranks), key=self.span_seconds)
        span = self.span_seconds(longest)
        return (span - self.busy_seconds(longest)) / span if span else 0.0

    def memory(self, rank: int) -> list[tuple[float, float]]:
        """Activations alive on a rank over time: (seconds, what is held from then on), in the unit of the costs.

        An activation is there from the start of its F to the end of its B or W (between I and W only what W
        reads), and not between the end of its OFFLOAD and the start of its RELOAD.
        """
        changes: list[tuple[float, float]] = []
        for span in self.spans[rank]:
            whole = self.costs.activation_of(span.action.stage)
            kept = self.costs.weight_activation_of(span.action.stage)
            match span.action.op:
                case Op.F | Op.RELOAD:
                    changes.append((span.start, whole))
                case Op.B | Op.OFFLOAD:
                    changes.append((span.end, -whole))
                case Op.I:
                    changes.append((span.end, kept - whole))
                case Op.W:
                    changes.append((span.end, -kept))
        changes.sort()  # at one moment, what goes makes room for what comes
        held, steps = 0.0, []
        for seconds, change in changes:
            held += change
            steps.append((seconds, held))
        return steps

    @cached_property
    def peak_activations(self) -> tuple[float, ...]:
        """For each rank, the most that is alive at a time, in the unit of `costs.activation` (default: a count)."""
        peaks = (max((held for _, held in self.memory(rank)), default=0.0) for rank in range(self.program.ranks))
        return tuple(round(peak, 9) for peak in peaks)

    def _require_end(self) -> None:
        if self.blocked:
            raise ValueError(f"program {self.program.name!r} never ends: {self.blocked[0]}")


def simulate(program: Program, costs: Costs | None = None, *, sends: Sends = Sends.LATENCY) -> Timeline:
    """Run the program on paper, with unit costs if none are given. A deadlock shows in `Timeline.blocked`.

    Raises:
        ValueError: per-stage costs for another number of stages.
    """
    costs = costs or Costs()
    costs.require_stages(program.depth)
    return _Run(program, costs, Sends(sends)).timeline()


def peak_activations(
    program: Program, rank: int, costs: Costs | None = None
) -> tuple[float, Action | None]:
    """The most activations alive on a rank at a time, and the forward that first reaches that many.

    One activation is that of one micro-batch on one stage, of the weight that `costs` give it (default: 1). It
    lives from its F to its B, or to its W where the backward is split: W reads the layer inputs. The order of
    the compute lane alone decides; activations that are offloaded count as alive.
    """
    costs = costs or Costs()
    alive = peak = 0.0
    at: Action | None = None
    for action in program.actions[rank]:
        if action.op is Op.F:
            alive += costs.activation_of(action.stage)
        elif action.op is Op.B:
            alive -= costs.activation_of(action.stage)
        elif action.op is Op.I:
            alive -= costs.activation_of(action.stage) - costs.weight_activation_of(action.stage)
        elif action.op is Op.W:
            alive -= costs.weight_activation_of(action.stage)
        if alive > peak:
            peak, at = alive, action
    return round(peak, 9), at


class _Run:
    """One longest-path pass. Actions are numbered rank by rank; all lists are indexed by that number."""

    def __init__(self, program: Program, costs: Costs, sends: Sends) -> None:
        self.program = program
        self.costs = costs
        self.sends = sends
        self.actions = [action for listed in program.actions for action in listed]
        self.ranks = [rank for rank, listed in enumerate(program.actions) for _ in listed]
        self.lane_of = dict(LANE_OF)
        if sends is Sends.BLOCKING:
            self.lane_of |= dict.fromkeys(TRANSFER_OPS, Lane.COMPUTE)
        # Where a requirement is met: at the first listing by its rank.
        self.first: list[dict[tuple[Op, int, int | None], int]] = [{} for _ in range(program.ranks)]
        self.behind: list[int | None] = []  # the action before it on its lane
        self.turn: dict[int, int] = {}  # for a copy that waits for its turn, the pass before it
        last: dict[tuple[int, Lane], int] = {}
        passed: dict[int, int] = {}
        for number, (rank, action) in enumerate(zip(self.ranks, self.actions, strict=True)):
            self.first[rank].setdefault((action.op, action.stage, action.microbatch), number)
            lane = (rank, self.lane_of[action.op])
            self.behind.append(last.get(lane))
            last[lane] = number
            if action.op in PASS_OPS:
                passed[rank] = number
            elif action.op in IN_TURN and rank in passed:
                self.turn[number] = passed[rank]
        self.waiting = [0] * len(self.actions)  # for how many edges; -1 once it has run
        self.followers: list[list[tuple[int, float]]] = [[] for _ in self.actions]  # (number, delay)
        self.start = [0.0] * len(self.actions)
        self.end = [0.0] * len(self.actions)

    def timeline(self) -> Timeline:
        self._connect()
        order = self._pass()
        spans: list[list[Span]] = [[] for _ in range(self.program.ranks)]
        ran: dict[int, Span] = {}
        for number in sorted(order):
            rank, action = self.ranks[number], self.actions[number]
            ran[number] = Span(rank, action, self.lane_of[action.op], self.start[number], self.end[number])
            spans[rank].append(ran[number])
        return Timeline(
            program=self.program,
            costs=self.costs,
            spans=tuple(map(tuple, spans)),
            order=tuple(ran[number] for number in order),
            blocked=self._blocked(),
        )

    def _connect(self) -> None:
        """Edges: lane order, the rules, and the meeting of sends and receives."""
        program, rendezvous = self.program, self.sends is Sends.RENDEZVOUS
        compiled: dict[tuple[Op, int, int], Sequence[tuple[Source, float]]] = {}
        for number, action in enumerate(self.actions):
            op, stage, microbatch = action.op, action.stage, action.microbatch
            before = self.behind[number]
            if before is not None:
                untimed = self.sends is Sends.LATENCY and self.lane_of[op] is Lane.P2P
                self._edge(before, number, -math.inf if untimed else 0.0)
            if number in self.turn:
                self._edge(self.turn[number], number, 0.0)
            key = (op, stage, self.ranks[number])
            if key not in compiled:
                found = sources(op, stage, program)
                compiled[key] = [(source, self._delay(source, number)) for source in found]
            for source, delay in compiled[key]:
                first = self.first[source.rank]
                for wanted, of in needed(source, microbatch, program):
                    self._edge(first.get((wanted, source.stage, of)), number, delay)
            if rendezvous and op in SEND_OPS and (meeting := receive_of(action, program)) is not None:
                receive = self._number(meeting)
                ahead = None if receive is None else self.behind[receive]
                if receive is None or ahead is not None:
                    self._edge(ahead, number, 0.0)

    def _number(self, requirement: Requirement) -> int | None:
        action = requirement.action
        return self.first[requirement.rank].get((action.op, action.stage, action.microbatch))

    def _edge(self, before: int | None, after: int, delay: float) -> None:
        """`after` starts `delay` after the end of `before` at the earliest; never, if nothing is before."""
        self.waiting[after] += 1
        if before is not None:
            self.followers[before].append((after, delay))

    def _delay(self, source: Source, number: int) -> float:
        """Seconds between the end of what is waited for and the earliest start."""
        needs = source.rule.needs[0]
        if needs in PASS_OPS:
            # A pass that waits for one of another rank: a transfer that has not been placed as actions yet.
            apart = source.rank != self.ranks[number] and self.actions[number].op in PASS_OPS
            return self.costs.transfer_seconds if apart else 0.0
        meets = self.sends is Sends.RENDEZVOUS and needs in SEND_OPS
        return -self.costs.transfer_seconds if meets else 0.0  # a send and its receive are one event

    def _seconds(self, action: Action) -> float:
        if action.op in SEND_OPS and self.sends in (Sends.RENDEZVOUS, Sends.BLOCKING):
            return self.costs.transfer_seconds
        if action.op in TRANSFER_OPS and self.sends is Sends.BLOCKING:
            return 0.0  # the wait for the send is all
        return self.costs.seconds(action)

    def _pass(self) -> list[int]:
        """Start and end of every action that can run, and the order in which they were found."""
        seconds: dict[tuple[Op, int], float] = {}
        order = [number for number, waiting in enumerate(self.waiting) if not waiting]
        start, ended, waits = self.start, self.end, self.waiting
        for number in order:  # grows on the way; first come, first served: what depends on less comes first
            waits[number] = -1
            action = self.actions[number]
            taken = seconds.get((action.op, action.stage))
            if taken is None:
                taken = seconds[action.op, action.stage] = self._seconds(action)
            end = ended[number] = start[number] + taken
            for after, delay in self.followers[number]:
                if end + delay > start[after]:
                    start[after] = end + delay
                waits[after] -= 1
                if not waits[after]:
                    order.append(after)
        return order

    def _blocked(self) -> tuple[Blocked, ...]:
        """The first action of each lane that did not run; everything behind it waits for its turn."""
        return tuple(
            Blocked(self.ranks[number], self.lane_of[action.op], action, self._unmet(number))
            for number, action in enumerate(self.actions)
            if not self._ran(number) and ((before := self.behind[number]) is None or self._ran(before))
        )

    def _unmet(self, number: int) -> tuple[Requirement, ...]:
        """What keeps the head of a stuck lane from running."""
        action = self.actions[number]
        unmet: list[Requirement] = []
        for requirement in prerequisites(action, self.program):
            needs = self._number(requirement)
            if needs is None:
                unmet.append(_because(requirement, f"rank {requirement.rank} does not list it"))
            elif not self._ran(needs):
                unmet.append(requirement)
        turn = self.turn.get(number)
        if turn is not None and not self._ran(turn):
            unmet.append(Requirement(self.ranks[turn], self.actions[turn], "it is listed before the copy"))
        meets = self.sends is Sends.RENDEZVOUS and action.op in SEND_OPS
        if meets and (meeting := receive_of(action, self.program)) is not None:
            receive = self._number(meeting)
            if receive is None:
                unmet.append(_because(meeting, f"rank {meeting.rank} does not list it"))
            elif (ahead := self.behind[receive]) is not None and not self._ran(ahead):
                unmet.append(_because(meeting, f"{self.actions[ahead]} is before it"))
        return tuple(unmet)

    def _ran(self, number: int) -> bool:
        return self.waiting[number] < 0


def _because(requirement: Requirement, more: str) -> Requirement:
    return requirement._replace(reason=f"{requirement.reason}; {more}")
