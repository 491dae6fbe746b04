"""The one place where process groups are made: torch's DeviceMesh over the layout's axes.

The mesh is an object that is passed around; there are no module-level groups. It makes one group per axis and
one for each set of axes that some part reduces over, in the same order on every rank. With the `fake` back end
any rank of any world size is built in one process: nothing communicates, every shape is real.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from parallel.comm.channel import Channel
from parallel.layout import AXES, Layout

GROUPS: tuple[tuple[str, ...], ...] = (
    *((axis,) for axis in AXES),
    ("data_shard", "data_replicate"),
    ("tensor", "data_shard"),
    ("tensor", "pipeline"),
    ("tensor", "data_shard", "pipeline"),
    AXES,
)
"""The sets of axes that have a group: each axis, all data ranks, all ranks of a model copy, those of a sharded
copy, and all ranks."""


class Mesh:
    """This rank's place in the layout and its channel along any set of axes in `GROUPS`.

    Attributes:
        beside_pipeline: The pipeline axis once more, for messages that are not part of a program's transfers.
    """

    def __init__(
        self,
        layout: Layout,
        device_type: str,
        algorithm: Literal["auto", "native", "direct"] = "auto",
        timeout_seconds: float | None = None,
    ) -> None:
        """Make the groups of `layout` over an initialized default process group.

        Args:
            algorithm: Which collectives the channels use (parallel/comm/channel.py).
            timeout_seconds: How long an operation may wait for its peers; None: torch's default.

        Raises:
            ValueError: the process group has another size than the layout.
        """
        if dist.get_world_size() != layout.world_size:
            raise ValueError(f"{dist.get_world_size()} ranks were started for a layout of {layout.world_size}")
        self.layout: Layout = layout
        self.rank = dist.get_rank()
        self.position = layout.coordinates(self.rank)
        # DeviceMesh counts its last dimension fastest.
        shape = tuple(layout.degree(axis) for axis in reversed(AXES))
        self.device_mesh: DeviceMesh = init_device_mesh(device_type, shape, mesh_dim_names=tuple(reversed(AXES)))
        self._channels: dict[frozenset[str], Channel] = {}
        for axes in GROUPS:
            group = self._group(axes)
            if timeout_seconds is not None:
                # DeviceMesh gives its groups torch's half hour, whatever the default group was told.
                _set_pg_timeout(timedelta(seconds=timeout_seconds), group)
            self._channels[frozenset(axes)] = Channel(group, algorithm, timeout_seconds)
        # Pipeline ranks also meet once a step, about copies of weights and the global norm. Between two ranks messages
        # match by their order alone, so what belongs to another clock needs a group of its own.
        beside, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in layout.groups("pipeline")])
        if timeout_seconds is not None:
            _set_pg_timeout(timedelta(seconds=timeout_seconds), beside)
        self.beside_pipeline = Channel(beside, algorithm, timeout_seconds)

    def _group(self, axes: tuple[str, ...]) -> dist.ProcessGroup:
        if len(axes) == len(AXES):
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        if len(axes) == 1:
            return self.device_mesh.get_group(axes[0])
        names = tuple(axis for axis in reversed(AXES) if axis in axes)
        return self.device_mesh[names]._flatten("-".join(names)).get_group()

    def channel(self, *axes: str) -> Channel:
        """The channel over the ranks that differ along `axes` only."""
        return self._channels[frozenset(axes)]


def start_process_group(
    device_type: str, rank: int, world_size: int, timeout_seconds: float, *, fake: bool = False
) -> None:
    """Make the default process group: NCCL beside gloo on GPUs, gloo on CPUs, or one that only pretends."""
    if fake:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        return
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    store = HashStore() if world_size == 1 else None  # a single process needs no launcher to meet itself
    limit = timedelta(seconds=timeout_seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)


@dataclass(frozen=True)
class PaperChannel:
    """The size of a group and this rank's index in it, without a group: enough to know every shape."""

    size: int
    index: int


@dataclass(frozen=True)
class PaperMesh:
    """A rank's place in a layout, on paper: no process group, no other rank."""

    layout: Layout
    rank: int

    @property
    def position(self) -> dict[str, int]:
        return self.layout.coordinates(self.rank)

    def channel(self, *axes: str) -> PaperChannel:
        group = self.layout.group_of(self.rank, *axes)
        return PaperChannel(len(group), group.index(self.rank))
