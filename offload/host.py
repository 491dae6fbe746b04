"""Host memory for copies: buffers of power-of-two sizes, kept and used again.

What one forward saved is put into at most three buffers (PipeOffload, arXiv:2503.01328), each of a power of two:
page-locked memory is handed out in such sizes anyway, and few sizes means that a buffer that comes back fits the
next forward. Three waste less than a quarter. No more is ever allocated of a size than is in use at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PAGE = 4096
_ALIGNMENT = 64
MOST_BUFFERS = 3


def buffer_sizes(total_bytes: int) -> list[int]:
    """At most three powers of two, descending, that hold `total_bytes` together; at least a page each."""
    left = -(-total_bytes // _PAGE)
    sizes: list[int] = []
    while left > 0:
        size = 1 << (left.bit_length() - 1)
        if len(sizes) == MOST_BUFFERS - 1 and size < left:
            size *= 2
        sizes.append(size)
        left -= size
    while len(sizes) > 1 and sizes[-1] >= sizes[-2]:
        sizes[-2:] = [2 * sizes[-2]]
    return [size * _PAGE for size in sizes]


def places(sizes: Sequence[int], buffers: Sequence[Tensor]) -> list[list[Tensor]]:
    """Views of the buffers for things of these sizes, one behind the other; what meets the end of a buffer is cut."""
    found: list[list[Tensor]] = []
    number = start = 0
    for size in sizes:
        views: list[Tensor] = []
        while size > 0:
            if start == buffers[number].numel():
                number, start = number + 1, 0
            length = min(size, buffers[number].numel() - start)
            views.append(buffers[number][start : start + length])
            start += -(-length // _ALIGNMENT) * _ALIGNMENT
            size -= length
        found.append(views)
    return found


def room(sizes: Sequence[int]) -> int:
    """Bytes that `places` needs for things of these sizes."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


class HostPool:
    """Buffers on the host, page-locked where copies between them and the device would otherwise not overlap.

    Attributes:
        allocated_bytes: In all buffers, those in use included.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self.allocated_bytes = 0
        self._free: dict[int, list[Tensor]] = {}

    def take(self, total_bytes: int) -> list[Tensor]:
        """Buffers that hold so many bytes together."""
        buffers = []
        for size in buffer_sizes(total_bytes):
            free = self._free.setdefault(size, [])
            if not free:
                free.append(torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned))
                self.allocated_bytes += size
            buffers.append(free.pop())
        return buffers

    def give_back(self, buffers: Sequence[Tensor]) -> None:
        """Nothing reads or writes them any more."""
        for buffer in buffers:
            self._free[buffer.numel()].append(buffer)
