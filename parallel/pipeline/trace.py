"""Bars as a trace in Chrome's JSON format, which https://ui.perfetto.dev and chrome://tracing open.

A rank is a process, a row of its lanes a thread. Arrows lead from what a bar of another rank waited for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from parallel.pipeline.draw_bars import Bar, rows_of

_MICROSECONDS = 1e6


def chrome_trace(bars: Sequence[Bar]) -> str:
    """The trace as text; times count from the first bar."""
    return json.dumps({"traceEvents": list(_events(bars)), "displayTimeUnit": "ms"})


def _events(bars: Sequence[Bar]) -> Iterator[dict[str, Any]]:
    begin = min((bar.start for bar in bars), default=0.0)
    rows, row_of = rows_of(bars)
    for rank in dict.fromkeys(row.rank for row in rows):
        yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}}
    threads = [row.lane + (f" {row.more + 1}" if row.more else "") for row in rows]
    flow = 0
    for bar, row in zip(bars, row_of, strict=True):
        where = {"pid": bar.rank, "tid": threads[row]}
        yield {
            "ph": "X",
            **where,
            "name": bar.name,
            "cat": bar.lane,
            "ts": (bar.start - begin) * _MICROSECONDS,
            "dur": (bar.end - bar.start) * _MICROSECONDS,
            "args": dict(bar.details) | {bars[wait.bar].name: wait.reason for wait in bar.waits},
        }
        for wait in bar.waits:
            source = bars[wait.bar]
            if source.rank != bar.rank:
                flow += 1
                arrow = {"cat": "waits", "name": wait.reason, "id": flow}
                # Inside the bar that it leaves: at its very end the next one begins.
                leaves = source.start + 0.999 * (source.end - source.start) - begin
                from_where = {"pid": source.rank, "tid": threads[row_of[wait.bar]]}
                yield {"ph": "s", **from_where, **arrow, "ts": leaves * _MICROSECONDS}
                yield {"ph": "f", "bp": "e", **where, **arrow, "ts": (bar.start - begin) * _MICROSECONDS}
