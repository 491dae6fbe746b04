"""A timeline as one HTML page that needs nothing else: no network, no other file.

    draw_html.html         the page, with places for title, data and script
    draw_html.js           draws the rows on a canvas
    draw_html_pointer.js   explains what the pointer is on, moves and zooms
    this module            puts the data of a drawing into the page

Pointing at a bar tells the action, its times and what it waited for (last of which decided its start), and shows
the way of its micro-batch through the pipeline; pointing at a gap tells why the rank is idle. Memory curves lie
beneath the rows of each rank.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from parallel.pipeline.actions import PASS_OPS
from parallel.pipeline.draw_bars import (
    DARK_TEXT_FROM,
    Drawing,
    chunks_of,
    fill_of,
    ops_of,
    pass_lanes,
    rows_of,
    word_of,
)

_DIGITS = 9  # of times; more than anybody reads, fewer than floats have


def draw_html(drawing: Drawing) -> str:
    """The text of the page."""
    parts = {
        "title": escape(drawing.title),
        # In a script element only "<" could end the element, and in JSON it stands in strings only.
        "data": json.dumps(_data(drawing), separators=(",", ":")).replace("<", "\\u003c"),
        "script": _beside("draw_html.js") + _beside("draw_html_pointer.js"),
    }
    page = _beside("draw_html.html")
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text)
    return page


def _data(drawing: Drawing) -> dict[str, Any]:
    """What draw_html.js reads."""
    rows, row_of = rows_of(drawing.bars)
    thick = pass_lanes(drawing.bars)
    chunks = chunks_of(drawing.bars)
    of_rank = 1 + max(chunks.values(), default=0)
    ops = ops_of(drawing.bars)
    reasons = dict.fromkeys(wait.reason for bar in drawing.bars for wait in bar.waits)
    numbers = {reason: number for number, reason in enumerate(reasons)}
    return {
        "facts": list(drawing.facts),
        "rows": [[row.rank, row.lane, row.more, row.lane in thick] for row in rows],
        "bars": [
            [row, bar.name, _short(bar.start), _short(bar.end), [[other, numbers[why]] for other, why in bar.waits]]
            for bar, row in zip(drawing.bars, row_of, strict=True)
        ],
        "reasons": list(reasons),
        "chunks": chunks,
        "fills": {op: [fill_of(op, chunk, of_rank) for chunk in range(of_rank if op in PASS_OPS else 1)] for op in ops},
        "words": {op: word_of(op) for op in ops},
        "plain": fill_of(None, 0, 1),
        "dark_text_from": DARK_TEXT_FROM,
        "memory": [[[_short(seconds), _short(held)] for seconds, held in curve] for curve in drawing.memory],
        "limit": drawing.memory_limit,
    }


def _short(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
