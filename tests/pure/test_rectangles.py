"""Ranges as rectangles: every element of every full tensor exactly once, at every layout."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.flat.rectangles import rectangles
from parallel.flat.space import ParameterSpec, Range, Unit, build_space
from parallel.layout import AXES, Layout
from trainer.checkpoint.pieces import Piece, pieces_to_read, pieces_to_write, writer_of

SHAPES = st.one_of(st.tuples(st.integers(1, 30)), st.tuples(st.integers(1, 9), st.integers(1, 9)))


def box(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def full_tensor(shape: tuple[int, ...], salt: int = 0) -> np.ndarray:
    return np.arange(1, 1 + prod(shape)).reshape(shape) + 1000 * salt


def shard_of(full: np.ndarray, spec: ParameterSpec) -> np.ndarray:
    if spec.shard_dim is None:
        return full
    length = spec.shape[spec.shard_dim]
    return full.take(range(spec.shard_index * length, (spec.shard_index + 1) * length), axis=spec.shard_dim)


@st.composite
def sharded(draw: st.DrawFn) -> ParameterSpec:
    shape, count = draw(SHAPES), draw(st.integers(1, 4))
    dim = draw(st.sampled_from([None, *range(len(shape))]))
    full = tuple(size * count if axis == dim else size for axis, size in enumerate(shape))
    return ParameterSpec("p", shape, full, dim, draw(st.integers(0, count - 1)) if dim is not None else 0)


@given(sharded(), st.data())
def test_a_range_is_at_most_three_rectangles_that_hold_its_elements_in_order(
    spec: ParameterSpec, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, spec.numel))
    part = Range(start, data.draw(st.integers(start, spec.numel)))
    full = full_tensor(spec.full_shape)
    found = rectangles(spec, part)
    assert len(found) <= 3
    read = [full[box(each.offsets, each.sizes)].ravel() for each in found]
    assert np.concatenate([np.empty(0), *read]).tolist() == shard_of(full, spec).ravel()[start : part.stop].tolist()
    position = part.start
    for each in found:
        assert each.local == Range(position, position + prod(each.sizes))
        position = each.local.stop
    assert position == part.stop


def test_ranges_outside_and_tensors_of_three_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"range 4\.\.7 lies outside 'p' of 6 elements"):
        rectangles(ParameterSpec("p", (2, 3), (2, 3)), Range(4, 7))
    with pytest.raises(ValueError, match="only vectors and matrices"):
        rectangles(ParameterSpec("p", (2, 3, 1), (2, 3, 1)), Range(0, 6))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    layout = Layout(
        tensor=draw(st.sampled_from([1, 2, 3])),
        context=draw(st.sampled_from([1, 2])),
        data_shard=draw(st.sampled_from([1, 2, 4])),
        pipeline=draw(st.sampled_from([1, 2])),
        data_replicate=draw(st.sampled_from([1, 3])),
    )
    optim = draw(st.sampled_from([count for count in (1, 2, 4) if layout.data_shard % count == 0]))
    return layout, optim


@st.composite
def parameters(draw: st.DrawFn) -> list[tuple[tuple[int, ...], int | None]]:
    """Full shapes that divide by 2 and 3 along their sharded dimension."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(SHAPES)
        dim = draw(st.sampled_from([None, *range(len(shape))]))
        found.append((tuple(6 * size if axis == dim else size for axis, size in enumerate(shape)), dim))
    return found


def units_of(
    parameters: list[tuple[tuple[int, ...], int | None]], layout: Layout, position: dict[str, int]
) -> list[Unit]:
    """A rank's units: one of its stage's own, and on the last of two stages a copy of the first stage's."""
    stage = position["pipeline"]

    def specs(owner: int, copied: bool) -> list[ParameterSpec]:
        made = []
        for index, (full, dim) in enumerate(parameters):
            name = f"{owner}.{index}"
            shape = tuple(size // layout.tensor if axis == dim else size for axis, size in enumerate(full))
            shard = position["tensor"] if dim is not None else 0
            tied = name if copied else None
            made.append(ParameterSpec(name, shape, full, dim, shard, len(shape) > 1, tied))
        return made

    units = [("own", stage, specs(stage, False))]
    if stage > 0:
        units.append(("copy", stage, specs(0, True)))
    return list(build_space(units, splits=(layout.data_shard,)).units)


def local_values(unit: Unit) -> np.ndarray:
    """The unit's elements, -1 where it is padding."""
    flat = np.full(unit.numel, -1)
    for slot in unit.slots:
        owner, index = map(int, slot.spec.name.split("."))
        full = full_tensor(slot.spec.full_shape, salt=10 * owner + index)
        flat[slot.range.start : slot.range.stop] = shard_of(full, slot.spec).ravel()
    return flat


def value_of(piece: Piece) -> np.ndarray:
    owner, index = map(int, piece.name.split("."))
    return full_tensor(piece.full_shape, salt=10 * owner + index)[box(piece.offsets, piece.sizes)]


@given(layouts(), parameters(), st.integers(1, 40))
def test_all_ranks_together_write_every_element_exactly_once(
    layout_and_optim: tuple[Layout, int], parameters: list[tuple[tuple[int, ...], int | None]], limit: int
) -> None:
    layout, optim = layout_and_optim
    written = {
        f"{stage}.{index}": np.zeros(full, dtype=int)
        for stage, (index, (full, _)) in product(range(layout.pipeline), enumerate(parameters))
    }
    for rank in range(layout.world_size):
        position = layout.coordinates(rank)
        writer = writer_of(layout, position, optim)
        for unit in units_of(parameters, layout, position):
            owned = unit.share(position["data_shard"] % optim, optim)
            values = local_values(unit)[owned.start : owned.stop]
            for piece in pieces_to_write(unit, owned, writer, limit):
                assert prod(piece.sizes) <= max(limit, prod(piece.full_shape[1:]))
                assert values[piece.local.start : piece.local.stop].tolist() == value_of(piece).ravel().tolist()
                written[piece.name][box(piece.offsets, piece.sizes)] += 1
    assert all((count == 1).all() for count in written.values())


@given(layouts(), parameters())
def test_every_owner_reads_all_of_its_range_but_padding(
    layout_and_optim: tuple[Layout, int], parameters: list[tuple[tuple[int, ...], int | None]]
) -> None:
    layout, optim = layout_and_optim
    for rank in range(layout.world_size):
        position = layout.coordinates(rank)
        for unit in units_of(parameters, layout, position):
            owned = unit.share(position["data_shard"] % optim, optim)
            read = np.full(owned.length, -1)
            for piece in pieces_to_read(unit, owned):
                target = read[piece.local.start : piece.local.stop]
                assert (target == -1).all(), "no element is read twice"
                target[:] = value_of(piece).ravel()
            assert read.tolist() == local_values(unit)[owned.start : owned.stop].tolist()


@given(layouts())
def test_ranks_that_own_the_same_range_have_different_shares_of_it(layout_and_optim: tuple[Layout, int]) -> None:
    layout, optim = layout_and_optim
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        position = layout.coordinates(rank)
        writer = writer_of(layout, position, optim)
        same = tuple(position[axis] for axis in AXES if axis in ("tensor", "pipeline", "island"))
        groups.setdefault((*same, position["data_shard"] % optim), []).append(writer.index)
        assert writer.count == layout.data * layout.context // optim
    assert all(sorted(indices) == list(range(len(indices))) for indices in groups.values())
