"""The flat space: the parameters of a rank's stages in one contiguous range, cut into units.

A unit (a transformer block, the embedding, the head) is the grain of everything that moves: a gradient
reduction, a gather, a fetch from a slower tier. Each parameter has a slot in its unit; decayed parameters come
first and the others behind them, so that the weight-decay groups of any owned range are two slices. Units are
padded so that they split evenly over any number of neighbours that the layout may ask for. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm, prod

ALIGNMENT = 16
"""Elements that slots and shares are aligned to: 64 bytes in fp32, a cache line and a vector register."""


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter as a rank holds it.

    Attributes:
        name: Full name in the unsharded model.
        shape: Shape on this rank.
        full_shape: Shape in the unsharded model.
        shard_dim: The dimension that tensor parallelism splits; None: whole on every tensor rank.
        shard_index: Which share of `shard_dim` this rank holds.
        decay: Whether weight decay applies.
        tied_to: Name of the parameter whose weights this one repeats on another stage (a tied head); only the
            original is saved and counted.
    """

    name: str
    shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    shard_dim: int | None = None
    shard_index: int = 0
    decay: bool = True
    tied_to: str | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Range:
    """Elements start (included) to stop (excluded)."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return max(0, self.stop - self.start)

    def __and__(self, other: Range) -> Range:
        start = max(self.start, other.start)
        return Range(start, max(start, min(self.stop, other.stop)))

    def shift(self, offset: int) -> Range:
        return Range(self.start + offset, self.stop + offset)


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in its unit."""

    spec: ParameterSpec
    range: Range


@dataclass(frozen=True)
class Unit:
    """A run of parameters that move together.

    Attributes:
        name: What the unit is called: "embed", "blocks.3", "head".
        stage: The pipeline stage it belongs to.
        slots: Parameters and their ranges within the unit, decayed ones first.
        numel: Elements with padding.
        offset: First element within the rank's flat space.
    """

    name: str
    stage: int
    slots: tuple[Slot, ...]
    numel: int
    offset: int

    @property
    def range(self) -> Range:
        return Range(self.offset, self.offset + self.numel)

    @property
    def decayed(self) -> Range:
        """The leading range within the unit that weight decay applies to."""
        return Range(0, max((slot.range.stop for slot in self.slots if slot.spec.decay), default=0))

    def share(self, index: int, count: int) -> Range:
        """Share `index` of `count` equal shares of the unit.

        Raises:
            ValueError: `count` does not divide the padded unit.
        """
        length, rest = divmod(self.numel, count)
        if rest:
            raise ValueError(f"unit {self.name!r} of {self.numel} elements cannot be split into {count} equal shares")
        return Range(index * length, (index + 1) * length)


@dataclass(frozen=True)
class FlatSpace:
    """All units of one rank, one behind the other."""

    units: tuple[Unit, ...]

    @property
    def numel(self) -> int:
        return sum(unit.numel for unit in self.units)

    @property
    def parameters(self) -> int:
        """Elements without padding."""
        return sum(slot.spec.numel for unit in self.units for slot in unit.slots)


def build_space(units: Sequence[tuple[str, int, Sequence[ParameterSpec]]], splits: Sequence[int] = (1,)) -> FlatSpace:
    """Lay out units (name, stage, parameters) one behind the other.

    Args:
        units: In the order in which the forward pass uses them.
        splits: Every number of neighbours that a unit must divide by; each share stays aligned.
    """
    multiple = ALIGNMENT * lcm(*splits)
    laid, offset = [], 0
    for name, stage, specs in units:
        slots, end = [], 0
        for spec in sorted(specs, key=lambda spec: not spec.decay):
            slots.append(Slot(spec, Range(end, end + spec.numel)))
            end = _round_up(end + spec.numel, ALIGNMENT)
        numel = max(multiple, _round_up(end, multiple))
        laid.append(Unit(name, stage, tuple(slots), numel, offset))
        offset += numel
    return FlatSpace(tuple(laid))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
