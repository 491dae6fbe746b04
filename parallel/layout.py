"""Where every rank stands on every parallel axis: pure rank arithmetic.

Axes are ordered from the fastest links to the slowest, and rank numbers count them in that order (the first
axis varies fastest), so that the axis that communicates most often sits on the fastest level of the topology:

=============== =================================================== ==============================
axis            what it communicates                                how often
=============== =================================================== ==============================
tensor          activations, blocking, inside every block           several times a micro-batch and layer
context         keys and values, or heads                           every attention, can hide behind it
data_shard      gradients and parameters of each unit               once a step, or once a micro-batch
pipeline        activations at stage borders only                   twice a micro-batch, small, can hide
data_replicate  gradients of the owned ranges only (1 / data_shard) once a step, small
island          outer gradients                                     once in many steps
=============== =================================================== ==============================

data_shard stands before pipeline because a ZeRO group moves whole models where a stage border moves one
activation; data_replicate stands behind it because it moves only what a shard owns. No axis is optional: an
axis of degree 1 has groups of one rank, and nothing treats it apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

AXES: tuple[str, ...] = ("tensor", "context", "data_shard", "pipeline", "data_replicate", "island")
"""All axes, fastest level first."""

DATA_AXES: tuple[str, ...] = ("data_shard", "data_replicate")
"""The axes along which ranks hold the same weights and see different samples."""


@dataclass(frozen=True)
class Layout:
    """The degree of every axis. The world size is their product."""

    tensor: int = 1
    context: int = 1
    data_shard: int = 1
    pipeline: int = 1
    data_replicate: int = 1
    island: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.degree(axis) < 1:
                raise ValueError(f"layout axis {axis!r} has degree {self.degree(axis)}; a degree is at least 1")

    def degree(self, *axes: str) -> int:
        """The product of the degrees of `axes`."""
        return prod(int(getattr(self, axis)) for axis in axes)

    @property
    def world_size(self) -> int:
        return self.degree(*AXES)

    @property
    def data(self) -> int:
        """How many ways a global batch is divided: data_shard x data_replicate."""
        return self.degree(*DATA_AXES)

    def coordinates(self, rank: int) -> dict[str, int]:
        """The position of `rank` on every axis."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the layout's {self.world_size} ranks")
        position = {}
        for axis in AXES:
            rank, position[axis] = divmod(rank, self.degree(axis))
        return position

    def rank_at(self, **position: int) -> int:
        """The inverse of `coordinates`; axes that are not named are at 0."""
        rank, stride = 0, 1
        for axis in AXES:
            index = position.pop(axis, 0)
            if not 0 <= index < self.degree(axis):
                raise ValueError(f"position {index} is outside axis {axis!r} of degree {self.degree(axis)}")
            rank += index * stride
            stride *= self.degree(axis)
        if position:
            raise ValueError(f"unknown axes {sorted(position)}; the axes are {', '.join(AXES)}")
        return rank

    def group_of(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The ranks that differ from `rank` along `axes` only, in rank order (so fastest axis first)."""
        here = self.coordinates(rank)
        ranges = [range(self.degree(axis)) if axis in axes else (here[axis],) for axis in AXES]
        return tuple(sorted(self.rank_at(**dict(zip(AXES, point, strict=True))) for point in product(*ranges)))

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """All groups along `axes`: a partition of the ranks, ordered by their first rank."""
        seen: set[int] = set()
        groups = []
        for rank in range(self.world_size):
            if rank not in seen:
                group = self.group_of(rank, *axes)
                seen.update(group)
                groups.append(group)
        return tuple(groups)

    def describe(self) -> str:
        """The degrees that are not 1, in words: "tensor 2 x pipeline 2"; "1 rank" when all are 1."""
        named = [f"{axis.replace('_', '-')} {self.degree(axis)}" for axis in AXES if self.degree(axis) > 1]
        return " x ".join(named) or "1 rank"
