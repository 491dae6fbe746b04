"""Rank arithmetic of the layout: where a rank stands, who its neighbours are, and what a config says about it."""

from __future__ import annotations

from itertools import combinations
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.config import ParallelConfig, PipelineConfig
from parallel.layout import AXES, DATA_AXES, Layout
from parallel.mesh import GROUPS

layouts = st.builds(Layout, **{axis: st.integers(1, 3) for axis in AXES}).filter(lambda layout: layout.world_size <= 72)
axis_sets = st.sets(st.sampled_from(AXES), min_size=1).map(tuple)


@given(layouts)
def test_coordinates_and_rank_at_are_inverse(layout: Layout) -> None:
    positions = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert [layout.rank_at(**position) for position in positions] == list(range(layout.world_size))
    assert len({tuple(position.values()) for position in positions}) == layout.world_size
    assert all(0 <= position[axis] < layout.degree(axis) for position in positions for axis in AXES)


@given(layouts)
def test_the_first_axis_varies_fastest(layout: Layout) -> None:
    """The next rank along an axis is as far away as all faster axes together are large."""
    for number, axis in enumerate(AXES):
        if layout.degree(axis) > 1:
            assert layout.rank_at(**{axis: 1}) == prod(layout.degree(faster) for faster in AXES[:number])


@given(layouts, axis_sets)
def test_groups_partition_the_ranks(layout: Layout, axes: tuple[str, ...]) -> None:
    groups = layout.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    for group in groups:
        assert len(group) == layout.degree(*axes)
        assert list(group) == sorted(group)
        assert all(layout.group_of(rank, *axes) == group for rank in group)


@given(layouts, axis_sets)
def test_members_of_a_group_differ_along_its_axes_only(layout: Layout, axes: tuple[str, ...]) -> None:
    others = [axis for axis in AXES if axis not in axes]
    for group in layout.groups(*axes):
        for one, other in combinations([layout.coordinates(rank) for rank in group], 2):
            assert all(one[axis] == other[axis] for axis in others)
            assert any(one[axis] != other[axis] for axis in axes)


@given(layouts)
def test_groups_of_all_axes_and_of_none(layout: Layout) -> None:
    assert layout.groups(*AXES) == (tuple(range(layout.world_size)),)
    assert layout.groups() == tuple((rank,) for rank in range(layout.world_size))


@given(layouts)
def test_neighbours_on_a_faster_axis_are_nearer(layout: Layout) -> None:
    """The order of the axes is the order of how far their groups spread - the reason for the order."""
    spreads = [max(group[-1] - group[0] for group in layout.groups(axis)) for axis in AXES]
    spreads = [spread for spread in spreads if spread]
    assert spreads == sorted(spreads)


def test_the_axes_and_their_order() -> None:
    assert AXES == ("tensor", "context", "data_shard", "pipeline", "data_replicate", "island")
    assert Layout(data_shard=2, data_replicate=3, tensor=5).data == 6
    assert {"data_shard", "data_replicate"} == set(DATA_AXES)


def test_a_layout_written_out() -> None:
    layout = Layout(tensor=2, data_shard=2, pipeline=2)
    assert layout.coordinates(5) == {
        "tensor": 1,
        "context": 0,
        "data_shard": 0,
        "pipeline": 1,
        "data_replicate": 0,
        "island": 0,
    }
    assert layout.groups("tensor") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.groups("data_shard") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.groups("pipeline") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert layout.group_of(3, "tensor", "pipeline") == (2, 3, 6, 7)
    assert layout.describe() == "tensor 2 x data-shard 2 x pipeline 2"
    assert Layout().describe() == "1 rank"


def test_every_group_of_the_mesh_names_known_axes_once() -> None:
    assert len({frozenset(axes) for axes in GROUPS}) == len(GROUPS)
    assert all(set(axes) <= set(AXES) and len(set(axes)) == len(axes) for axes in GROUPS)


def test_what_a_layout_refuses() -> None:
    with pytest.raises(ValueError, match=r"axis 'pipeline' has degree 0"):
        Layout(pipeline=0)
    layout = Layout(tensor=2)
    with pytest.raises(ValueError, match=r"rank 2 is outside the layout's 2 ranks"):
        layout.coordinates(2)
    with pytest.raises(ValueError, match=r"rank -1 is outside"):
        layout.coordinates(-1)
    with pytest.raises(ValueError, match=r"position 1 is outside axis 'pipeline' of degree 1"):
        layout.rank_at(pipeline=1)
    with pytest.raises(ValueError, match=r"unknown axes \['piepline'\]"):
        layout.rank_at(piepline=0)


@given(tensor=st.integers(1, 4), stages=st.integers(1, 4), replicate=st.integers(1, 3), shard=st.integers(1, 5))
def test_auto_takes_the_ranks_that_are_left(tensor: int, stages: int, replicate: int, shard: int) -> None:
    pipeline = PipelineConfig(stages=stages)
    auto = ParallelConfig(tensor=tensor, pipeline=pipeline, data_replicate=replicate)
    world = tensor * stages * replicate * shard
    layout = auto.layout(world)
    assert layout == Layout(tensor=tensor, data_shard=shard, pipeline=stages, data_replicate=replicate)
    assert layout.world_size == world
    given = auto.model_copy(update={"data_shard": shard})
    assert given.layout(world) == layout
    assert given.fixed_degree() == world
    for wrong in (world + 1, 2 * world):
        with pytest.raises(ValueError, match=f"the degrees multiply to {world}, not to {wrong}"):
            given.layout(wrong)


@pytest.mark.parametrize("world", [1, 5, 6, 7])
def test_auto_refuses_ranks_that_do_not_divide(world: int) -> None:
    config = ParallelConfig(tensor=2, pipeline=PipelineConfig(stages=2))
    with pytest.raises(ValueError, match=f"{world} ranks cannot be divided by 4"):
        config.layout(world)
