"""Who writes which rectangle of which full tensor: pure arithmetic over the flat space.

A checkpoint knows no ranks. It holds full tensors, each cut into rectangles, and any rank of any layout can say
which rectangles its owned ranges are made of. Reading, every holder reads all that it owns. Writing, the ranks
that own the same range divide it among themselves, so that all of them write at once and every element is
written exactly once. Padding and copies of tied weights are not written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from parallel.flat.rectangles import Rectangle, rectangles
from parallel.flat.space import ALIGNMENT, Range, Unit
from parallel.layout import Layout

CHUNK_ELEMENTS = 8 * 2**20
"""A written rectangle holds at most about so many elements (32 MiB in fp32): this bounds the memory that saving
and loading need, and what a reader of a part has to read in vain."""

_REPLICAS = ("context", "data_replicate")
"""Axes along which ranks hold the same weights whatever the ZeRO numbers are."""


@dataclass(frozen=True)
class Piece:
    """A rectangle of a full tensor within an owned range.

    Attributes:
        name: The parameter in the unsharded model.
        full_shape: Its shape there.
        offsets, sizes: The rectangle: first index and extent per dimension.
        local: The elements of the owned range that hold it, row-major, counted from the start of the range.
    """

    name: str
    full_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local: Range


@dataclass(frozen=True)
class Writer:
    """A rank's place among those that own the same ranges.

    Attributes:
        index, count: It writes share `index` of `count` of every range.
        tensor_index: Its place on the tensor axis, along which parameters that are not split are repeated.
    """

    index: int
    count: int
    tensor_index: int


def writer_of(layout: Layout, position: Mapping[str, int], optim: int) -> Writer:
    """The place of the rank at `position`, with the optimizer state spread over `optim` data-shard neighbours."""
    copies = layout.data_shard // optim
    index, count = position["data_shard"] // optim, copies
    for axis in _REPLICAS:
        index += position[axis] * count
        count *= layout.degree(axis)
    return Writer(index, count, position["tensor"])


def pieces_to_read(unit: Unit, owned: Range) -> list[Piece]:
    """Everything in the range `owned` of the unit but padding; copies of tied weights read the original."""
    return list(_pieces(unit, owned, owned))


def pieces_to_write(unit: Unit, owned: Range, writer: Writer, limit: int = CHUNK_ELEMENTS) -> list[Piece]:
    """This rank's part of what the owners of the range write, in rectangles of about `limit` elements at most."""
    kept = [
        slot
        for slot in unit.slots
        if slot.spec.tied_to is None and (slot.spec.shard_dim is not None or writer.tensor_index == 0)
    ]
    mine = Unit(unit.name, unit.stage, tuple(kept), unit.numel, unit.offset)
    part = _share(owned, writer.index, writer.count)
    return [block for piece in _pieces(mine, owned, part) for block in _blocks(piece, limit)]


def _share(owned: Range, index: int, count: int) -> Range:
    """Share `index` of `count` of a range: aligned, nearly equal, the last ones shorter or empty."""
    length = -(-owned.length // (count * ALIGNMENT)) * ALIGNMENT
    start = min(owned.stop, owned.start + index * length)
    return Range(start, min(owned.stop, start + length))


def _pieces(unit: Unit, owned: Range, part: Range) -> Iterator[Piece]:
    for slot in unit.slots:
        held = slot.range & part
        if held.length == 0:
            continue
        spec = slot.spec
        for rectangle in rectangles(spec, held.shift(-slot.range.start)):
            yield _piece(spec.tied_to or spec.name, spec.full_shape, rectangle, slot.range.start - owned.start)


def _piece(name: str, full_shape: tuple[int, ...], rectangle: Rectangle, shift: int) -> Piece:
    return Piece(name, full_shape, rectangle.offsets, rectangle.sizes, rectangle.local.shift(shift))


def _blocks(piece: Piece, limit: int) -> Iterator[Piece]:
    """The piece cut along its first dimension; a single row is never cut."""
    row = prod(piece.sizes[1:])
    step = max(1, limit // row)
    for first in range(0, piece.sizes[0], step):
        rows = min(step, piece.sizes[0] - first)
        start = piece.local.start + first * row
        yield Piece(
            piece.name,
            piece.full_shape,
            (piece.offsets[0] + first, *piece.offsets[1:]),
            (rows, *piece.sizes[1:]),
            Range(start, start + rows * row),
        )
