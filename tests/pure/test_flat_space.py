"""The flat space: every parameter has its place, and every cut is a partition."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.flat.space import ALIGNMENT, FlatSpace, ParameterSpec, Range, build_space

SHAPES = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
UNITS = st.lists(st.lists(st.tuples(SHAPES, st.booleans()), min_size=1, max_size=5), min_size=1, max_size=4)
SPLITS = st.lists(st.integers(1, 12), min_size=1, max_size=3)


def space_of(units: list[list[tuple[tuple[int, ...], bool]]], splits: list[int]) -> FlatSpace:
    laid = [
        (
            f"unit{number}",
            0,
            [
                ParameterSpec(f"unit{number}.p{index}", shape, shape, decay=decay)
                for index, (shape, decay) in enumerate(specs)
            ],
        )
        for number, specs in enumerate(units)
    ]
    return build_space(laid, splits)


@given(UNITS, SPLITS)
def test_units_follow_one_another_and_slots_never_overlap(
    units: list[list[tuple[tuple[int, ...], bool]]], splits: list[int]
) -> None:
    space = space_of(units, splits)
    end = 0
    for unit, specs in zip(space.units, units, strict=True):
        assert unit.range.start == end
        end = unit.range.stop
        inside = 0
        for slot in unit.slots:
            assert slot.range.start >= inside
            assert slot.range.start % ALIGNMENT == 0
            assert slot.range.length == slot.spec.numel
            inside = slot.range.stop
        assert inside <= unit.numel
        assert {slot.spec.name for slot in unit.slots} == {f"{unit.name}.p{index}" for index in range(len(specs))}
    assert space.numel == end
    assert space.parameters == sum(slot.spec.numel for unit in space.units for slot in unit.slots)


@given(UNITS, SPLITS)
def test_decayed_parameters_are_one_leading_range(
    units: list[list[tuple[tuple[int, ...], bool]]], splits: list[int]
) -> None:
    for unit in space_of(units, splits).units:
        for slot in unit.slots:
            held = slot.range & unit.decayed
            assert held.length == (slot.range.length if slot.spec.decay else 0)


@given(UNITS, SPLITS)
def test_shares_partition_a_unit_and_are_aligned(
    units: list[list[tuple[tuple[int, ...], bool]]], splits: list[int]
) -> None:
    for unit in space_of(units, splits).units:
        for count in splits:
            shares = [unit.share(index, count) for index in range(count)]
            assert shares[0].start == 0
            assert shares[-1].stop == unit.numel
            assert all(left.stop == right.start for left, right in pairwise(shares))
            assert {share.length for share in shares} == {unit.numel // count}
            assert all(share.start % ALIGNMENT == 0 for share in shares)


def test_a_unit_without_parameters_still_splits() -> None:
    (unit,) = build_space([("empty", 0, [])], splits=(4,)).units
    assert unit.numel == 4 * ALIGNMENT
    assert unit.decayed.length == 0


def test_a_unit_refuses_shares_that_it_was_not_padded_for() -> None:
    (unit,) = space_of([[((3, 5), True)]], [2]).units
    with pytest.raises(ValueError, match="'unit0' of 32 elements cannot be split into 3"):
        unit.share(0, 3)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(-20, 20))
def test_range_intersection_is_set_intersection(a: int, b: int, c: int, d: int, offset: int) -> None:
    left, right = Range(a, max(a, b)), Range(c, max(c, d))
    both = left & right
    assert set(range(both.start, both.stop)) == set(range(left.start, left.stop)) & set(range(right.start, right.stop))
    assert both.length == len(range(both.start, both.stop))
    moved = both.shift(offset)
    assert (moved.start, moved.stop) == (both.start + offset, both.stop + offset)
