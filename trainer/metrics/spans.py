"""Spans of a few steps: what each rank did and waited for, merged into one Chrome/Perfetto trace.

On a CPU a span is what the clock says around an action. On a GPU an action only launches work, so a pair of
events is recorded in the stream and read when the steps are over: the span is when the work really ran.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.pipeline.actions import Action
from trainer.files import replace_text


@dataclass(frozen=True)
class Span:
    """One action, or the wait before it: times in seconds since the epoch."""

    name: str
    kind: str
    lane: str
    step: int
    start: float
    end: float


class SpanRecorder:
    """The executor's observer: records while it is on, costs nothing while it is off."""

    def __init__(self, device: torch.device) -> None:
        self.on = False
        self.step = 0
        self._cuda = device.type == "cuda"
        self._spans: list[Span] = []
        self._events: list[tuple[str, str, str, int, torch.cuda.Event, torch.cuda.Event]] = []
        self._base: tuple[float, torch.cuda.Event] | None = None

    def __call__(self, kind: str, action: Action) -> AbstractContextManager[None]:
        if not self.on:
            return nullcontext()
        return self._record_events(kind, action) if self._cuda else self._record_clock(kind, action)

    @contextmanager
    def _record_clock(self, kind: str, action: Action) -> Iterator[None]:
        start = time.time()
        yield
        self._spans.append(Span(str(action), kind, action.lane, self.step, start, time.time()))

    @contextmanager
    def _record_events(self, kind: str, action: Action) -> Iterator[None]:
        if self._base is None:
            torch.cuda.synchronize()
            base = torch.cuda.Event(enable_timing=True)
            base.record()
            self._base = time.time(), base
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((str(action), kind, action.lane, self.step, start, end))

    def spans(self) -> list[Span]:
        """Everything recorded so far, on the host."""
        if self._base is not None:
            torch.cuda.synchronize()
            begin, base = self._base
            for name, kind, lane, step, start, end in self._events:
                first, last = (begin + base.elapsed_time(event) / 1e3 for event in (start, end))
                self._spans.append(Span(name, kind, lane, step, first, last))
            self._events.clear()
        return self._spans


def write_trace(path: Path, spans: list[Span], group: dist.ProcessGroup) -> None:
    """Gather the spans of all ranks and write one trace; every rank must call it."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    gathered: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(spans, gathered, group=group, group_dst=0)
    if gathered is not None:
        replace_text(path, json.dumps({"traceEvents": list(_events(gathered)), "displayTimeUnit": "ms"}))


def _events(ranks: list[list[Span]]) -> Iterator[dict[str, Any]]:
    begin = min((span.start for spans in ranks for span in spans), default=0.0)
    for rank, spans in enumerate(ranks):
        yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}}
        for span in spans:
            yield {
                "ph": "X",
                "pid": rank,
                "tid": f"{span.lane} {'waits' if span.kind == 'wait' else 'runs'}",
                "name": span.name if span.kind == "run" else f"wait for {span.name}",
                "cat": span.lane,
                "ts": (span.start - begin) * 1e6,
                "dur": (span.end - span.start) * 1e6,
                "args": {"step": span.step},
            }
