"""Levels of the machine: how many ranks each reaches, and over which one a group communicates."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.layout import AXES, Layout
from parallel.topology import Level, LevelConfig, Topology, TopologyConfig

topologies = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(
    lambda sizes: Topology(tuple(Level(f"level-{index}", size) for index, size in enumerate(sizes)))
)


@given(topologies)
def test_reach_is_the_product_of_the_sizes_so_far(topology: Topology) -> None:
    sizes = [level.size for level in topology.levels]
    assert [topology.reach(index) for index in range(len(sizes))] == [
        prod(sizes[: index + 1]) for index in range(len(sizes))
    ]
    assert topology.world_size == prod(sizes)


@given(topologies, st.data())
def test_level_of_is_the_fastest_level_that_joins_the_ranks(topology: Topology, data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.integers(0, topology.world_size - 1), min_size=1, max_size=5))
    level = topology.level_of(ranks)
    assert len({rank // topology.reach(level) for rank in ranks}) == 1
    if level:
        assert len({rank // topology.reach(level - 1) for rank in ranks}) > 1


@given(st.builds(Layout, **{axis: st.integers(1, 3) for axis in AXES}))
def test_a_faster_axis_never_communicates_over_a_slower_level(layout: Layout) -> None:
    """What the order of the axes is for: with one level per axis, each axis stays within its own."""
    topology = Topology(tuple(Level(axis, layout.degree(axis)) for axis in AXES))
    for number, axis in enumerate(AXES):
        for group in layout.groups(axis):
            assert topology.level_of(group) <= number


def test_nodes_of_a_cluster() -> None:
    topology = Topology.uniform(ranks_per_node=8, nodes=4)
    assert [(level.name, level.size) for level in topology.levels] == [("node", 8), ("world", 4)]
    assert topology.world_size == 32
    assert topology.level_of([0]) == 0
    assert topology.level_of([0, 7]) == 0
    assert topology.level_of([7, 8]) == 1
    assert [level.name for level in Topology.uniform(8, 1).levels] == ["node"]


def test_configured_levels_win_over_the_launchers() -> None:
    package = LevelConfig(name="package", size=2, bandwidth_bytes_per_second=4e11, latency_seconds=1e-6)
    node = LevelConfig(name="node", size=4)
    topology = Topology.from_config(TopologyConfig(levels=(package, node)), ranks_per_node=8, nodes=1)
    assert topology.levels == (Level("package", 2, 4e11, 1e-6), Level("node", 4))
    assert Topology.from_config(TopologyConfig(), ranks_per_node=3, nodes=2) == Topology.uniform(3, 2)


def test_what_a_topology_refuses() -> None:
    with pytest.raises(ValueError, match="at least one level"):
        Topology(())
    with pytest.raises(ValueError, match=r"level 'node' has size 0"):
        Topology((Level("node", 0),))
    with pytest.raises(ValueError, match=r"ranks \[0, 8\] are not all within the 8 ranks"):
        Topology.uniform(8, 1).level_of([0, 8])
