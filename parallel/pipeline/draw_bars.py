"""What drawings are made of: bars, on rows, and the colours of ops and chunks.

A bar is something that a lane of a rank did from one time to another. Simulated timelines become bars here;
measured ones can be made from the spans of a run, with the same names. So the SVG, the HTML page and the trace
draw both alike.

Rows are the lanes of each rank. On most lanes one thing happens at a time; where bars overlap (transfers that
only take time, see `simulate`) a lane gets as many rows as it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from parallel.pipeline.actions import PASS_OPS, Action, Lane, Op
from parallel.pipeline.program import Program
from parallel.pipeline.rules import prerequisites
from parallel.pipeline.simulate import Timeline

_ROUNDING = 1e-12  # of sums of times: what starts as another ends does not overlap it


class Wait(NamedTuple):
    """What a bar waited for: the number of another bar, and why, in words that complete "waits until ..."."""

    bar: int
    reason: str


@dataclass(frozen=True, slots=True)
class Bar:
    """Something done on a lane of a rank, from `start` to `end` in seconds; most names are those of actions."""

    rank: int
    lane: str
    name: str
    start: float
    end: float
    waits: tuple[Wait, ...] = ()
    details: Mapping[str, str | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawing:
    """A timeline with its heading.

    Attributes:
        title: one line.
        facts: short names with values, for the heading.
        bars: in any order.
        memory: for each rank, what it holds over time as (seconds, held from then on); empty: not drawn.
        memory_limit: for the curves.
    """

    title: str
    bars: Sequence[Bar]
    facts: Sequence[tuple[str, str]] = ()
    memory: Sequence[Sequence[tuple[float, float]]] = ()
    memory_limit: float | None = None


class Row(NamedTuple):
    """A line of a drawing: a lane of a rank, `more` counts its rows from 0."""

    rank: int
    lane: str
    more: int


def bars_of(timeline: Timeline) -> list[Bar]:
    """The bars of a simulation, those without length left out: they end what they wait for themselves."""
    program, spans = timeline.program, [span for listed in timeline.spans for span in listed]
    instant = {span.action for span in spans if span.end == span.start}
    drawn = [span for span in spans if span.action not in instant]
    numbers = {(span.rank, span.action): number for number, span in enumerate(drawn)}
    return [
        Bar(
            rank=span.rank,
            lane=str(span.lane),
            name=str(span.action),
            start=span.start,
            end=span.end,
            waits=tuple(
                Wait(numbers[rank, action], reason)
                for rank, action, reason in _causes(span.action, program, instant)
                if (rank, action) in numbers
            ),
        )
        for span in drawn
    ]


def rows_of(bars: Sequence[Bar]) -> tuple[list[Row], list[int]]:
    """The rows of a drawing from top to bottom, and the row of each bar."""
    ends: dict[tuple[int, str], list[float]] = {}  # of the last bar on each row of a lane
    places: list[tuple[int, str, int]] = [(0, "", 0)] * len(bars)
    for number in sorted(range(len(bars)), key=lambda number: (bars[number].start, bars[number].end)):
        bar = bars[number]
        taken = ends.setdefault((bar.rank, bar.lane), [])
        free = (row for row, end in enumerate(taken) if end <= bar.start + _ROUNDING * abs(bar.start))
        more = next(free, len(taken))
        taken[more : more + 1] = [bar.end]
        places[number] = (bar.rank, bar.lane, more)
    known = [str(lane) for lane in Lane]
    order = {lane: known.index(lane) if lane in known else len(known) for _, lane in ends}
    rows = sorted((Row(*place) for place in set(places)), key=lambda row: (row.rank, order[row.lane], *row[1:]))
    index = {row: number for number, row in enumerate(rows)}
    return rows, [index[Row(*place)] for place in places]


def action_of(bar: Bar) -> Action | None:
    """The action that a bar is named after, if it is one."""
    try:
        return Action.parse(bar.name)
    except ValueError:
        return None


def pass_lanes(bars: Sequence[Bar]) -> set[str]:
    """The lanes that passes run on, which drawings give more room."""
    return {bar.lane for bar in bars if (action := action_of(bar)) is not None and action.op in PASS_OPS}


def ops_of(bars: Sequence[Bar]) -> list[Op]:
    """The ops that are drawn, in the order of their definition."""
    found = {action.op for bar in bars if (action := action_of(bar)) is not None}
    return [op for op in Op if op in found]


def chunks_of(bars: Sequence[Bar]) -> dict[int, int]:
    """For each stage, which of the stages of its rank it is, counted from 0."""
    stages: dict[int, set[int]] = {}
    for bar in bars:
        action = action_of(bar)
        if action is not None:
            stages.setdefault(bar.rank, set()).add(action.stage)
    return {stage: chunk for of_rank in stages.values() for chunk, stage in enumerate(sorted(of_rank))}


# Hue and saturation in percent of what is drawn; lightness tells chunks apart.
_HUES: Mapping[Op, tuple[int, int]] = {
    Op.F: (214, 62),
    Op.B: (24, 66),
    Op.I: (36, 72),
    Op.W: (152, 42),
    Op.SEND_F: (206, 34),
    Op.RECV_F: (206, 34),
    Op.SEND_I: (8, 38),
    Op.RECV_I: (8, 38),
    Op.OFFLOAD: (282, 36),
    Op.RELOAD: (320, 40),
    Op.REDUCE: (250, 44),
    Op.SYNC: (262, 44),
    Op.UPDATE: (250, 44),
    Op.GATHER: (232, 36),
}
_OTHER = (212, 14)
_DARKEST, _LIGHTEST = 45.0, 72.0
DARK_TEXT_FROM = 60.0
"""Lightness in percent from which text on a fill is dark."""


_WORDS: Mapping[Op, str] = {
    Op.F: "forward",
    Op.B: "backward",
    Op.I: "input gradient",
    Op.W: "weight gradient",
    Op.SEND_F: "output sent",
    Op.RECV_F: "input received",
    Op.SEND_I: "input gradient sent",
    Op.RECV_I: "output gradient received",
}


def word_of(op: Op) -> str:
    """What an op does."""
    return _WORDS.get(op, op.lower().replace("_", " "))


def lightness_of(chunk: int, chunks: int) -> float:
    """In percent; the first chunk of a rank is the darkest."""
    return _DARKEST + (_LIGHTEST - _DARKEST) * chunk / max(chunks - 1, 1)


def fill_of(op: Op | None, chunk: int, chunks: int) -> str:
    """The colour of an op on one of the chunks of a rank."""
    hue, saturation = _OTHER if op is None else _HUES.get(op, _OTHER)
    return f"hsl({hue} {saturation}% {lightness_of(chunk, chunks):.4g}%)"


def _causes(action: Action, program: Program, instant: set[Action]) -> list[tuple[int, Action, str]]:
    """What an action waits for; in place of what takes no time, what that waits for."""
    found: dict[tuple[int, Action], str] = {}
    ahead = [(requirement, requirement.reason) for requirement in prerequisites(action, program)]
    while ahead:
        requirement, reason = ahead.pop()
        if requirement.action in instant:
            ahead += [(further, reason) for further in prerequisites(requirement.action, program)]
        else:
            found.setdefault((requirement.rank, requirement.action), reason)
    return [(rank, waited, reason) for (rank, waited), reason in found.items()]
