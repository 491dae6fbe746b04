"""The optimizer over owned ranges: master weights and moments of a share of every unit, and the way back.

Each rank updates share `index` of every unit in fp32, writes the result into its share of the flat parameters
and gathers the other shares from its neighbours; with k_optim = 1 the share is the unit and there is nothing to
gather. In fp32 compute the master weights *are* the share of the flat parameters. Clipping and the skipping of
non-finite steps are arguments of the update kernel, so the gradients are read once and nobody waits for a norm on
the host. Gathers are launched unit by unit, and each is awaited by the first forward that needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from parallel.comm.channel import Channel, Pending
from parallel.flat.buffers import FlatParameters
from parallel.flat.space import Range, Unit
from parallel.memory import flat_zeros
from parallel.zero.gradients import GradientStore


class UpdateKernel(Protocol):
    """One optimizer step over flat fp32 ranges, in place."""

    def __call__(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        first_moments: list[Tensor],
        second_moments: list[Tensor],
        steps: list[Tensor],
        *,
        lr: float,
        decay: bool,
        divisor: Tensor,
        skip: Tensor,
    ) -> None:
        """Update; gradients are divided by `divisor`; nothing happens (not even a step count) where `skip` is 1."""
        ...


@dataclass
class OwnedRange:
    """The share of a unit whose optimizer state lives on this rank.

    Attributes:
        unit: The unit.
        range: The share, within the unit.
        master: fp32 weights, shape (range.length,).
        first_moment, second_moment: AdamW moments, same shape.
        steps: Update counts of the decayed and of the other part, as the kernel wants them.
        gradient: The reduced fp32 gradient, same shape.
    """

    unit: Unit
    range: Range
    master: Tensor
    first_moment: Tensor
    second_moment: Tensor
    steps: tuple[Tensor, Tensor]
    gradient: Tensor

    def parts(self) -> list[tuple[bool, slice]]:
        """The share as slices of one weight-decay group each: (decayed, slice)."""
        border = self.unit.decayed & self.range
        split = border.length
        pieces = [(True, slice(0, split)), (False, slice(split, self.range.length))]
        return [(decay, piece) for decay, piece in pieces if piece.stop > piece.start]


class ShardedOptimizer:
    """Optimizer state of a rank and the steps that use it."""

    def __init__(self, parameters: FlatParameters, gradients: GradientStore, kernel: UpdateKernel) -> None:
        self.parameters, self.gradients, self.kernel = parameters, gradients, kernel
        self.shard: Channel = gradients.data.shard
        self.sharded = gradients.numbers.optim > 1
        device = parameters.buffer.device
        lengths = [unit.owned.numel() for unit in gradients.units.values()]
        self.first_moment = flat_zeros(sum(lengths), torch.float32, device)
        self.second_moment = flat_zeros(sum(lengths), torch.float32, device)
        full_precision = parameters.buffer.dtype == torch.float32
        self.master = None if full_precision else flat_zeros(sum(lengths), torch.float32, device)
        self.ranges: dict[str, OwnedRange] = {}
        self._gathers: dict[str, Pending] = {}
        self._saved: list[Tensor] | None = None
        start = 0
        for name, unit in gradients.units.items():
            piece = slice(start, start + unit.owned.numel())
            start = piece.stop
            self.ranges[name] = OwnedRange(
                unit=unit.unit,
                range=unit.owned_range,
                master=self._own_parameters(unit.unit) if self.master is None else self.master[piece],
                first_moment=self.first_moment[piece],
                second_moment=self.second_moment[piece],
                steps=(torch.zeros((), device=device), torch.zeros((), device=device)),
                gradient=unit.owned,
            )

    def _own_parameters(self, unit: Unit) -> Tensor:
        own = unit.share(self.gradients.share_index, self.gradients.numbers.optim)
        return self.parameters.unit(unit)[own.start : own.stop]

    def adopt_parameters(self) -> None:
        """Take the flat parameters as the master weights (after initialization)."""
        for owned in self.ranges.values():
            owned.master.copy_(self._own_parameters(owned.unit))

    def publish_masters(self) -> None:
        """Make the flat parameters, everywhere, what the master weights say (after a load)."""
        for name in self.ranges:
            self._publish(name)
        self.finish_gathers()

    def norm_squared(self, counted: dict[str, list[Range]]) -> Tensor:
        """Sum of squares of the owned gradients, fp64, shape ().

        Args:
            counted: Per unit the ranges (within the unit) that this rank counts; an element that several ranks
                hold must be counted by one of them.
        """
        pieces = []
        for name, owned in self.ranges.items():
            for part in counted[name]:
                piece = (part & owned.range).shift(-owned.range.start)
                if piece.length:
                    pieces.append(owned.gradient[piece.start : piece.stop])
        if not pieces:
            return torch.zeros((), dtype=torch.float64, device=self.first_moment.device)
        return torch.stack([_sum_of_squares(piece) for piece in pieces]).sum()

    def update(self, stage: int, lr: float, divisor: Tensor, skip: Tensor) -> None:
        """Update the owned ranges of every unit of `stage`."""
        for owned in self.ranges.values():
            if owned.unit.stage != stage:
                continue
            for decay, piece in owned.parts():
                self.kernel(
                    [owned.master[piece]],
                    [owned.gradient[piece]],
                    [owned.first_moment[piece]],
                    [owned.second_moment[piece]],
                    [owned.steps[0 if decay else 1]],
                    lr=lr,
                    decay=decay,
                    divisor=divisor,
                    skip=skip,
                )

    def save(self) -> None:
        """Remember the state as it is, for `restore`: one copy of the owned ranges, made anew over the last one."""
        state = self._state()
        if self._saved is None:
            self._saved = [torch.empty_like(tensor) for tensor in state]
        for saved, tensor in zip(self._saved, state, strict=True):
            saved.copy_(tensor)

    def restore(self) -> None:
        """Go back to what `save` remembered, bit for bit; the flat parameters follow with the next gather."""
        assert self._saved is not None, "something was saved"
        for saved, tensor in zip(self._saved, self._state(), strict=True):
            tensor.copy_(saved)

    def _state(self) -> list[Tensor]:
        """Everything that an update changes."""
        owned = self.ranges.values()
        masters = [each.master for each in owned] if self.master is None else [self.master]
        return [self.first_moment, self.second_moment, *masters, *(step for each in owned for step in each.steps)]

    def gather(self, stage: int) -> None:
        """Write the updated ranges of `stage` into the flat parameters and launch the gathers of its units."""
        for name, owned in self.ranges.items():
            if owned.unit.stage == stage:
                self._publish(name)

    def _publish(self, name: str) -> None:
        self.finish_gather(name)
        owned = self.ranges[name]
        if self.master is not None:
            self._own_parameters(owned.unit).copy_(owned.master)
        if self.sharded:
            self._gathers[name] = Pending(self.shard.all_gather(self.parameters.unit(owned.unit)))

    def finish_gather(self, name: str) -> None:
        """Wait until the unit's updated weights are whole on this rank."""
        pending = self._gathers.pop(name, None)
        if pending is not None:
            pending.finish()

    def finish_gathers(self) -> None:
        for name in list(self._gathers):
            self.finish_gather(name)

    def set_step_count(self, count: int) -> None:
        """Set the number of updates made so far (after a load)."""
        for owned in self.ranges.values():
            for step in owned.steps:
                step.fill_(count)

    def step_count(self) -> int:
        """The number of updates made so far, skipped steps not counted."""
        return max((int(step) for owned in self.ranges.values() for step in owned.steps), default=0)

    def state_bytes(self) -> int:
        """Bytes of moments and separate master weights."""
        tensors = [self.first_moment, self.second_moment, *([] if self.master is None else [self.master])]
        return sum(tensor.nbytes for tensor in tensors)


def _sum_of_squares(x: Tensor, row: int = 2048) -> Tensor:
    """Sum of x squared, shape (), fp64: rows in fp32, which is exact enough at that length, their sum in fp64.

    One fp32 accumulator over millions of elements would be off in the fifth digit.
    """
    whole = x.numel() // row * row
    rows: Tensor = torch.linalg.vector_norm(x[:whole].view(-1, row), dim=1).double().square().sum()
    rest: Tensor = torch.linalg.vector_norm(x[whole:]).double().square()
    return rows + rest
