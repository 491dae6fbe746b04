"""What copies run on, beside the compute: a stream on a GPU, a thread on a CPU. One lane, one copy at a time.

Order makes copies safe. On a GPU a copy begins behind everything that is in the compute stream when it is started,
and `wait` makes the compute stream, not the host, wait for its end. Memory is allocated and freed by the compute
stream alone, so it needs no record of other streams, and what is freed when is the program's order and not luck.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

Copies = list[tuple[Tensor, Tensor]]
"""(to, from), both of the same size and type."""


class Lane(Protocol):
    """Starts copies in order."""

    def start(self, copies: Copies) -> Callable[[], None]:
        """Start them and take the list. What is returned waits until all are done; before, no tensor may be dropped."""
        ...


class ThreadLane:
    """Copies by a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copies")

    def start(self, copies: Copies) -> Callable[[], None]:
        return self._thread.submit(_copy, copies).result


class StreamLane:
    """Copies in a stream of its own. The host side must be page-locked."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(self, copies: Copies) -> Callable[[], None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            _copy(copies)
        done = self._stream.record_event()
        return lambda: torch.cuda.current_stream(self._stream.device).wait_event(done)


def make_lane(device: torch.device) -> Lane:
    """A lane for copies between the host and `device`."""
    return StreamLane(device) if device.type == "cuda" else ThreadLane()


def _copy(copies: Copies) -> None:
    """In order; the list is empty afterwards, so that no tensor lives on in a thread that has done its work."""
    copies.reverse()
    while copies:
        to, origin = copies.pop()
        to.copy_(origin, non_blocking=True)
