"""A timeline as an SVG picture: a row a rank, thin rows for its other lanes, time from left to right.

A bar's colour is its op, its shade the chunk (which of the stages of its rank), the number in it the micro-batch,
where there is room; the tooltip has its name and times. The picture is light or dark as the reader's browser asks.
It has a fixed width, so the bars of long programs are thin: the HTML page (`draw_html`) zooms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from parallel.pipeline.actions import PASS_OPS
from parallel.pipeline.draw_bars import (
    DARK_TEXT_FROM,
    Bar,
    Drawing,
    Row,
    action_of,
    chunks_of,
    fill_of,
    lightness_of,
    ops_of,
    pass_lanes,
    rows_of,
    word_of,
)

_WIDTH, _MARGIN, _LABELS = 1200, 16, 58
_LEFT = _MARGIN + _LABELS
_HEAD, _THICK, _THIN, _GAP, _AXIS = 56, 24, 9, 7, 34
_DIGIT = 6.6  # room for a digit of a bar's number

_STYLE = """
  text { font: 11px ui-sans-serif, system-ui, Helvetica, Arial, sans-serif; fill: #333b44 }
  .title { font-size: 15px; font-weight: 600 }
  .note, .side, .tick { fill: #66707b } .side { text-anchor: end } .tick { text-anchor: middle }
  .thin { font-size: 9px }
  .page { fill: #ffffff } .number { text-anchor: middle; fill: #ffffff } .dark { fill: #1d2731 }
  .idle { fill: #8b949e; fill-opacity: .14 } .line { stroke: #8b949e; stroke-opacity: .4 }
  @media (prefers-color-scheme: dark) {
    text { fill: #d5dbe1 } .note, .side, .tick { fill: #98a2ad } .page { fill: #12171c }
    .number { fill: #ffffff } .dark { fill: #1d2731 }
  }
"""


def draw_svg(drawing: Drawing) -> str:
    """The picture as the text of an SVG file."""
    bars = drawing.bars
    rows, row_of = rows_of(bars)
    thick = pass_lanes(bars)
    tops, bottom = _layout(rows, thick)
    begin = min((bar.start for bar in bars), default=0.0)
    span = (max((bar.end for bar in bars), default=1.0) - begin) or 1.0
    scale = (_WIDTH - _MARGIN - _LEFT) / span

    def x(seconds: float) -> float:
        return _LEFT + (seconds - begin) * scale

    facts = "  \u00b7  ".join(f"{name} {value}" for name, value in drawing.facts)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + _AXIS}" role="img">',
        f"<title>{escape(drawing.title)}</title>",
        f"<style>{_STYLE}</style>",
        '<rect class="page" width="100%" height="100%"/>',
        f'<text class="title" x="{_MARGIN}" y="24">{escape(drawing.title)}</text>',
        f'<text class="note" x="{_MARGIN}" y="42">{escape(facts)}</text>',
        *_legend(bars),
        *_axis(begin, span, x, bottom),
    ]
    for row, top in zip(rows, tops, strict=True):
        lines += _row(row, top, row.lane in thick)
    lines += _bars(bars, [(tops[row], rows[row].lane in thick) for row in row_of], x)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _layout(rows: Sequence[Row], thick: set[str]) -> tuple[list[int], int]:
    """The upper edge of each row, and the lower one of the last."""
    tops: list[int] = []
    y = _HEAD
    for number, row in enumerate(rows):
        if number and row.rank != rows[number - 1].rank:
            y += _GAP
        tops.append(y)
        y += (_THICK if row.lane in thick else _THIN) + 2
    return tops, y


def _row(row: Row, top: int, thick: bool) -> Iterator[str]:
    if thick and not row.more:
        yield f'<text class="side" x="{_LEFT - 8}" y="{top + 16}">rank {row.rank}</text>'
    elif not row.more:
        name = escape(row.lane.replace("_", " "))
        yield f'<text class="side thin" x="{_LEFT - 8}" y="{top + 8}">{name}</text>'
    width, height = _WIDTH - _MARGIN - _LEFT, _THICK if thick else _THIN
    yield f'<rect class="idle" x="{_LEFT}" y="{top}" width="{width}" height="{height}"/>'


def _bars(bars: Sequence[Bar], places: Sequence[tuple[int, bool]], x: Callable[[float], float]) -> Iterator[str]:
    chunks = chunks_of(bars)
    of_rank = 1 + max(chunks.values(), default=0)
    for bar, (top, thick) in zip(bars, places, strict=True):
        action, left, width = action_of(bar), x(bar.start), x(bar.end) - x(bar.start)
        chunk = chunks[action.stage] if action else 0
        fill = fill_of(action.op if action else None, chunk, of_rank)
        room = width - min(1.0, width / 4)  # a line of background between bars
        size = f'width="{room:.2f}" height="{_THICK if thick else _THIN}" rx="{min(2.0, room / 4):.2g}"'
        tip = f"<title>{escape(bar.name)}: {bar.start:.6g} to {bar.end:.6g}</title>"
        yield f'<rect x="{left:.2f}" y="{top}" {size} style="fill:{fill}">{tip}</rect>'
        if thick and action and action.microbatch is not None:
            number = str(action.microbatch)
            if room >= _DIGIT * len(number) + 2:
                dark = " dark" if lightness_of(chunk, of_rank) >= DARK_TEXT_FROM else ""
                yield f'<text class="number{dark}" x="{left + room / 2:.2f}" y="{top + 16}">{number}</text>'


def _legend(bars: Sequence[Bar]) -> Iterator[str]:
    """Ops from the right, with a box for each chunk."""
    chunks = chunks_of(bars)
    of_rank = 1 + max(chunks.values(), default=0)
    x = _WIDTH - _MARGIN
    for op in reversed(ops_of(bars)):
        word = word_of(op)
        x -= round(6 * len(word))
        yield f'<text class="note" x="{x}" y="24">{word}</text>'
        x -= 4
        for chunk in reversed(range(of_rank if op in PASS_OPS else 1)):
            x -= 12
            yield f'<rect x="{x}" y="14" width="11" height="11" rx="2" style="fill:{fill_of(op, chunk, of_rank)}"/>'
        x -= 12
    if of_rank > 1:
        yield (
            f'<text class="note" style="text-anchor:end" x="{_WIDTH - _MARGIN}" y="42">'
            f"shades: the {of_rank} stages of a rank, in order</text>"
        )


def _axis(begin: float, span: float, x: Callable[[float], float], bottom: int) -> Iterator[str]:
    """About ten round times."""
    power = 10.0 ** math.floor(math.log10(span / 10))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 12)
    for number in range(math.floor(span / step * (1 + 1e-12)) + 1):
        at = x(begin + number * step)
        yield f'<path class="line" d="M{at:.2f} {_HEAD - 4}V{bottom + 4}"/>'
        yield f'<text class="tick" x="{at:.2f}" y="{bottom + 18}">{number * step:.6g}</text>'
