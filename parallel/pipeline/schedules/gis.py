"""Generalized interleaving and uniform repetition (PipeOffload, arXiv:2503.01328): less memory for chunks.

Interleaved 1F1B with three changes. The backward is split, and W runs right behind its I: the gradient on its
way back waits for no weight gradient. Then p-1-r slots are enough for it to come back to rank r, where
`interleaved` needs 2(p-1-r). And `group`, the g micro-batches that go through a chunk before the next chunk has
its turn, may be smaller than p. A rank then holds g(v-1) + p - r activations of a chunk: on rank 0, as much as
1F1B for g = p ("gis") and (v+1)/(2v) of that for g = p/2 ("gis-h").

Why g can be half of p, and no less. Let a slot take T = F + I + W, and rank r+1 begin a slot x later than rank r.
An output must be there in the same slot, x >= F, and a gradient one slot later, x <= T - I. An output comes around
to the first rank after g slots, a gradient to the last rank after g - (p-1):

    (p-1) x + F <= g T        (p-1) x >= (p-1-g) T + I

There is such an x if g T >= p max(F, I) and 2g >= p - 1 + (F + I)/T, and the second holds for g >= p/2. If the
first does too, the steady state has no bubble. If also W <= F + I, so that the warm-up passes into it without
one, the step of equal stages (T, F, I, W of one chunk, no transfer time) is longer than its work by

    (p-1)(F + I) + (v-1) ((p-g) F + max(0, p I - g (I + W)))

for every multiple m >= 2g of g. The second term is what each way around adds in warm-up and drain, where there is
less work to fill it with; for F = I = W and g = p/2 it is the (v-1) p/2 (F + I - W) of the paper. Any other m
runs too: the last group has holes then.

"uniform" repeats the way of one micro-batch every v slots, instead of in groups. On average a chunk then holds its
lifespan divided by v slots, all the time, and as the lifespan falls from 2g(v-1) + p slots in the first chunk to
p in the last, offloading the first half of the chunks leaves about a quarter of the memory (passes/offload.py).
"""

from __future__ import annotations

from parallel.pipeline.program import Program
from parallel.pipeline.schedules.looped import Slot, in_groups, looped
from parallel.pipeline.schedules.registry import Request, register, require

_SOURCE = "PipeOffload, arXiv:2503.01328"


@register(
    "gis",
    summary="interleaved with a split backward: 1F1B's memory, or less by `group`",
    source=_SOURCE,
    chunks=None,
    grouped=True,
)
def gis(request: Request) -> Program:
    """Groups of `group` micro-batches (None: p). Costs do not matter."""
    group = _group(request, request.ranks)
    return _split("gis", request, in_groups(group, request.chunks), (request.chunks - 1) * group)


@register("gis-h", summary="gis in groups of p/2: about half of the memory", source=_SOURCE, chunks=None, grouped=True)
def gis_half(request: Request) -> Program:
    """Groups of half as many micro-batches as ranks, rounded up. Costs do not matter."""
    half = -(-request.ranks // 2)
    require(
        request.group in (None, half),
        value=f"group={request.group}",
        rule=f"gis-h is gis in groups of half of ranks={request.ranks}, which is {half}",
        fix="leave group out, or choose gis",
    )
    return _split("gis-h", request, in_groups(half, request.chunks), (request.chunks - 1) * half)


@register(
    "uniform",
    summary="gis-h, evenly repeated: made for offloading activations",
    source=_SOURCE,
    chunks=None,
    grouped=True,
)
def uniform(request: Request) -> Program:
    """A micro-batch every v slots, at least `group` (None: p/2) from chunk to chunk. Costs do not matter."""
    chunks = request.chunks
    first = _block(_group(request, -(-request.ranks // 2)), chunks)
    return _split("uniform", request, lambda chunk, microbatch: first[chunk] + chunks * microbatch, first[-1])


def _split(name: str, request: Request, slot: Slot, last: int) -> Program:
    """A program whose first micro-batch reaches the last chunk in slot `last`."""
    return looped(name, request, slot, lambda rank: last + request.ranks - 1 - rank, split=True)


def _group(request: Request, default: int) -> int:
    least, most = -(-request.ranks // 2), request.ranks
    group = default if request.group is None else request.group
    require(
        least <= group <= most,
        value=f"group={group}",
        rule=f"must be between half of ranks={most} and all of them, {least} to {most}: the gradient needs the time",
        fix=f"set group to a number from {least} to {most}, or leave it out",
    )
    return group


def _block(group: int, chunks: int) -> list[int]:
    """The slots of micro-batch 0: at least `group` apart, and no two the same modulo `chunks`.

    Micro-batches follow each other every `chunks` slots, so the second is what keeps their passes apart.
    """
    slots = [0]
    taken = {0}
    while len(slots) < chunks:
        slot = slots[-1] + group
        while slot % chunks in taken:
            slot += 1
        taken.add(slot % chunks)
        slots.append(slot)
    return slots
