"""The machine as a list of levels, fastest first.

A level says how many members of the level below it joins, and how fast its links are. Level 0 joins single
devices, level 1 joins level-0 groups, and so on; the product of the sizes is the number of devices. Whatever
places something (a parallel axis, a ZeRO shard, an island) asks the topology how far apart two ranks are.
Pure arithmetic: no torch, no devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field


class LevelConfig(BaseModel):
    """One level of the topology as a user writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="What the level is called in reports: package, node, rack, island, world.")
    size: int = Field(ge=1, description="How many members of the level below are joined at this level.")
    bandwidth_bytes_per_second: float | None = Field(
        default=None, gt=0, description="Bandwidth of one member's link at this level, bytes/s; null: not known."
    )
    latency_seconds: float | None = Field(
        default=None, ge=0, description="Latency of a small message at this level, seconds; null: not known."
    )


class TopologyConfig(BaseModel):
    """The levels of the cluster, fastest first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    levels: tuple[LevelConfig, ...] | None = Field(
        default=None,
        description="Levels from fastest to slowest; null: one level per node and one that joins the nodes, "
        "from what the launcher says.",
    )


@dataclass(frozen=True)
class Level:
    """One level: `size` members of the level below, joined by links of this bandwidth and latency."""

    name: str
    size: int
    bandwidth_bytes_per_second: float | None = None
    latency_seconds: float | None = None


@dataclass(frozen=True)
class Topology:
    """Levels from fastest (index 0) to slowest. Ranks are numbered so that neighbours share fast levels."""

    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("a topology needs at least one level")
        for level in self.levels:
            if level.size < 1:
                raise ValueError(f"topology level {level.name!r} has size {level.size}; a size is at least 1")

    @property
    def world_size(self) -> int:
        """The number of devices that the levels describe together."""
        return self.reach(len(self.levels) - 1)

    def reach(self, level: int) -> int:
        """How many consecutive ranks are joined at or below `level`."""
        ranks = 1
        for entry in self.levels[: level + 1]:
            ranks *= entry.size
        return ranks

    def level_of(self, ranks: Sequence[int]) -> int:
        """The index of the fastest level that joins all of `ranks` (the level their group communicates over)."""
        for index in range(len(self.levels)):
            reach = self.reach(index)
            if len({rank // reach for rank in ranks}) == 1:
                return index
        raise ValueError(f"ranks {list(ranks)} are not all within the {self.world_size} ranks of the topology")

    @staticmethod
    def uniform(ranks_per_node: int, nodes: int) -> Topology:
        """Nodes of equal size with unknown link speeds: what a launcher's environment alone can tell."""
        levels = [Level("node", ranks_per_node)]
        if nodes > 1:
            levels.append(Level("world", nodes))
        return Topology(tuple(levels))

    @staticmethod
    def from_config(config: TopologyConfig, ranks_per_node: int, nodes: int) -> Topology:
        """The configured levels, or the launcher's view where none are configured."""
        if config.levels is None:
            return Topology.uniform(ranks_per_node, nodes)
        return Topology(tuple(Level(**level.model_dump()) for level in config.levels))
