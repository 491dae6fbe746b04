"""Memory for flat buffers.

A flat buffer is walked from end to end several times a step. On a CPU it is put on huge pages where the kernel has
them: 512 times fewer page faults at the start, and fewer address translations ever after. Elsewhere, and for small
buffers, it is an ordinary tensor.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2**21


def flat_zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `numel` zeros, shape (numel,)."""
    size = numel * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only
    if device.type != "cpu" or size < _HUGE_PAGE_BYTES or advice is None:
        return torch.zeros(numel, dtype=dtype, device=device)
    # The tensor keeps the mapping alive; untouched pages cost nothing.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(advice)
    except OSError:
        return torch.zeros(numel, dtype=dtype, device=device)  # a kernel that was built without huge pages
    return torch.frombuffer(pages, dtype=dtype, count=numel)
