"""When each pass of a step began and ended on this rank, and the bubble that follows from it.

The timer is the executor's observer and is always on: a clock read at either end of a pass. On a GPU a pass only
launches work, so an event is recorded in the stream instead and read before the next step begins, when the host has
waited for the loss anyway. For a few steps it also takes the waits and everything that is not a pass, for a trace
(trainer/metrics/spans.py).

Actions that run as one (the last weight-gradient halves of a stage) are one interval with several actions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import NamedTuple

import torch

from parallel.pipeline.actions import PASS_OPS, Action

_NOTHING = nullcontext()


class Interval(NamedTuple):
    """What ran, or what was waited for, from `start` to `end` in seconds since the beginning of the step."""

    kind: str
    actions: tuple[Action, ...]
    start: float
    end: float

    def shares(self) -> Iterator[tuple[Action, float, float]]:
        """Each action with its start and end; those that ran as one share the time evenly."""
        each = (self.end - self.start) / len(self.actions)
        for place, action in enumerate(self.actions):
            yield action, self.start + place * each, self.start + (place + 1) * each


class PassTimer:
    """The executor's observer.

    Attributes:
        step: The step that is recorded, or was recorded last.
        began: When that step began, in seconds since the epoch.
    """

    def __init__(self, device: torch.device) -> None:
        self.step = 0
        self.began = 0.0
        self._clock = _EventClock() if device.type == "cuda" else _HostClock()
        self._recording = self._everything = False
        self._actions: list[Action] = []  # of what runs now
        self._depth = 0
        self._marks: list[tuple[str, tuple[Action, ...], int, int]] = []

    def begin(self, step: int, *, everything: bool = False) -> None:
        """A step begins; `everything`: waits and other actions are recorded as well as passes."""
        self.step, self._everything, self._recording = step, everything, True
        self._actions, self._depth, self._marks = [], 0, []
        self.began = time.time()
        self._clock.restart()

    def end(self) -> None:
        """The step is over: nothing is recorded until the next one begins."""
        self._recording = False

    def read(self) -> list[Interval]:
        """What was recorded of the step, in the order of the ends; waits for the device if it is not through."""
        moments = self._clock.seconds()
        return [Interval(kind, actions, moments[start], moments[end]) for kind, actions, start, end in self._marks]

    def __call__(self, kind: str, action: Action) -> AbstractContextManager[None]:
        if self._recording and (self._everything or (kind == "run" and action.op in PASS_OPS)):
            return _Observed(self, kind, action)
        return _NOTHING

    def enter(self, action: Action) -> None:
        """An action begins, within another one or by itself."""
        if not self._depth:
            self._start = self._clock.mark()
        self._depth += 1
        self._actions.append(action)

    def leave(self, kind: str) -> None:
        """It ends; with the outermost one, all do."""
        self._depth -= 1
        if not self._depth:
            self._marks.append((kind, tuple(self._actions), self._start, self._clock.mark()))
            self._actions.clear()


class _Observed:
    """One action under observation."""

    __slots__ = ("_action", "_kind", "_timer")

    def __init__(self, timer: PassTimer, kind: str, action: Action) -> None:
        self._timer, self._kind, self._action = timer, kind, action

    def __enter__(self) -> None:
        self._timer.enter(self._action)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.leave(self._kind)


class _HostClock:
    """Moments of the host, numbered from the restart."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._moments: list[float] = []
        self._origin = 0.0

    def restart(self) -> None:
        self._moments.clear()
        self._origin = self._now()

    def mark(self) -> int:
        """The number of this moment."""
        self._moments.append(self._now())
        return len(self._moments) - 1

    def seconds(self) -> list[float]:
        """All moments, from the restart on."""
        return [moment - self._origin for moment in self._moments]


class _EventClock:
    """Moments of the device: events in the current stream, which are made once and recorded again in every step."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []
        self._used = 0

    def restart(self) -> None:
        self._used = 0
        self.mark()

    def mark(self) -> int:
        if self._used == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[self._used].record()
        self._used += 1
        return self._used - 2  # the first is the restart

    def seconds(self) -> list[float]:
        if not self._used:
            return []  # no step has begun
        origin, *events = self._events[: self._used]
        if events:
            events[-1].synchronize()  # the stream is in order: the last one is behind all others
        return [origin.elapsed_time(event) / 1e3 for event in events]


def passes_of(intervals: Sequence[Interval]) -> list[Interval]:
    """Those in which passes ran."""
    return [each for each in intervals if each.kind == "run" and each.actions[0].op in PASS_OPS]


def span_and_busy(intervals: Sequence[Interval]) -> tuple[float, float]:
    """Seconds from the start of the first pass of a rank to the end of its last, and those in which passes ran."""
    passes = passes_of(intervals)
    if not passes:
        return 0.0, 0.0
    return passes[-1].end - passes[0].start, sum(each.end - each.start for each in passes)


def bubble_rate(ranks: Iterable[Sequence[float]]) -> float | None:
    """(span - busy) / span of the rank with the longest span, as `Timeline.bubble_rate`; None if no pass ran.

    Args:
        ranks: span and busy of each rank, in seconds.
    """
    span, busy = max(ranks, key=lambda rank: rank[0])
    return float((span - busy) / span) if span else None
