"""Spans of a few steps: what each rank did and waited for, merged into one Chrome/Perfetto trace.

They are what the rank's timer recorded (trainer/metrics/passes.py), on the clock that all ranks share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.pipeline.draw_bars import Bar
from parallel.pipeline.trace import chrome_trace
from trainer.files import replace_text
from trainer.metrics.passes import PassTimer


@dataclass(frozen=True)
class Span:
    """One action, or the wait before it: times in seconds since the epoch."""

    name: str
    kind: str
    lane: str
    step: int
    start: float
    end: float


def spans_of(timer: PassTimer) -> list[Span]:
    """The spans of the step that the timer recorded last."""
    return [
        Span(str(action), interval.kind, action.lane, timer.step, timer.began + start, timer.began + end)
        for interval in timer.read()
        for action, start, end in interval.shares()
    ]


def write_trace(path: Path, spans: list[Span], group: dist.ProcessGroup) -> None:
    """Gather the spans of all ranks and write one trace; every rank must call it."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    gathered: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(spans, gathered, group=group, group_dst=0)
    if gathered is not None:
        replace_text(path, chrome_trace(list(_bars(gathered))))


def _bars(ranks: list[list[Span]]) -> Iterator[Bar]:
    """What runs and what waits, on rows of their own."""
    for rank, spans in enumerate(ranks):
        for span in spans:
            waits = span.kind == "wait"
            yield Bar(
                rank=rank,
                lane=f"{span.lane} {'waits' if waits else 'runs'}",
                name=f"wait for {span.name}" if waits else span.name,
                start=span.start,
                end=span.end,
                details={"step": span.step},
            )
