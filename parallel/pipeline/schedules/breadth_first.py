"""Breadth-first: all micro-batches through a chunk before the next chunk, forwards as well as backwards.

    rank 0, stages 0 and 2 | 0F0 0F1 2F0 2F1 ... ... 2B0 --- 2B1 --- 0B0 --- 0B1 ---
    rank 1, stages 1 and 3 | ... 1F0 1F1 3F0 3F1 3B0 --- 3B1 --- 1B0 --- 1B1 ---

Each rank comes to a chunk once forwards and once backwards: collected weights and offloaded state of a chunk
are needed in one piece, and its gradient is complete while the backward of all chunks before it is still to
come. Gradients are summed in the order of the micro-batches. The price is that everything is alive at the turn:
m v activations on each rank.

With equal stages of T = F + B seconds the step takes (p-1) T longer than its work, as long as m >= p; with
fewer micro-batches every way around adds p - m passes more, (p-1) T + (v-1)(p-m) T in all.

Sources: layered gradient accumulation and modular pipeline parallelism (arXiv:2106.02679); breadth-first
pipeline parallelism (arXiv:2211.05953).
"""

from __future__ import annotations

from parallel.pipeline.program import Program
from parallel.pipeline.schedules.looped import in_groups, looped
from parallel.pipeline.schedules.registry import Request, register


@register(
    "breadth-first",
    summary="all micro-batches through a chunk before the next chunk",
    source="layered gradient accumulation, arXiv:2106.02679; breadth-first pipelines, arXiv:2211.05953",
    chunks=None,
)
def breadth_first(request: Request) -> Program:
    """One group of all micro-batches, and all forwards before the first backward. Costs do not matter."""
    everything = request.chunks * request.microbatches
    slot = in_groups(request.microbatches, request.chunks)
    return looped("breadth-first", request, slot, lambda _: everything)
