"""Gradients of the flat space: written by layers, reduced unit by unit behind the rest of the backward.

With k_grads = 1 a unit keeps one fp32 buffer for the whole step: micro-batches add into it, and it is reduced
once, when the last micro-batch has written its last gradient. With k_grads > 1 a unit owns only its share: every
micro-batch writes into a staging buffer, which is reduced into the share and handed to the next unit.

A reduction is a generator of phases (parallel/comm/channel.py). They are started and advanced in the order in
which units become ready, which is the same on all ranks of a stage, so collectives match without any
coordination: whenever a unit becomes ready, older reductions move one phase on and the new one is launched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from itertools import chain

import torch
from torch import Tensor

from parallel.comm.channel import Channel, Pending, Steps
from parallel.flat.space import FlatSpace, Range, Slot, Unit
from parallel.memory import flat_zeros
from parallel.zero.config import ThreeNumbers

UnitLayout = tuple[int, tuple[Range, ...]]
"""A unit's elements and where its slots are; what is between and behind the slots is padding, always zero."""


class DataChannels:
    """The channels over ranks that hold the same weights: sharded, replicated, and both together."""

    def __init__(self, shard: Channel, replicate: Channel, both: Channel) -> None:
        self.shard, self.replicate, self.both = shard, replicate, both


class _ParameterGradient:
    """The gradient slot of one parameter (see parallel/gradients.py)."""

    def __init__(self, unit: UnitGradients, slot: Slot) -> None:
        self.unit, self.slot = unit, slot
        self.fresh = True

    def accumulate(self, write: Callable[[Tensor, bool], None]) -> None:
        buffer = self.unit.writable()
        view = buffer[self.slot.range.start : self.slot.range.stop].view(self.slot.spec.shape)
        write(view, self.fresh)
        self.fresh = False
        self.unit.contributed()


class UnitGradients:
    """The gradients of one unit through a step.

    Attributes:
        writers: Per stage, how many contributions each of its backward passes makes. A tied weight whose embedding
            and head are on different stages of this rank has two writers.
    """

    def __init__(self, unit: Unit, store: GradientStore) -> None:
        self.unit, self.store = unit, store
        self.layout: UnitLayout = (unit.numel, tuple(slot.range for slot in unit.slots))
        self.slots = {slot.spec.name: _ParameterGradient(self, slot) for slot in unit.slots}
        self.writers = {unit.stage: len(unit.slots)}
        self.buffer: Tensor | None = None
        self.accumulated = False
        own = unit.share(store.share_index, store.numbers.optim)
        self.owned_range: Range = own
        if store.numbers.grads == 1:
            self.buffer = flat_zeros(unit.numel, torch.float32, store.device)
            self.owned = self.buffer[own.start : own.stop]
        else:
            self.owned = flat_zeros(own.length, torch.float32, store.device)
        self._due = 0  # contributions until the gradient is complete: of the step, or of this backward pass
        self._passes = 0  # backward passes of the step that are to come, this one included
        self._open: set[int] = set()  # writers that are not through with the step

    def writable(self) -> Tensor:
        """The buffer that this micro-batch's gradients are written to, shape (unit.numel,)."""
        if self.buffer is None:
            self.buffer = self.store.take_staging(self.layout)
            self._expect_fresh()
        return self.buffer

    def begin_step(self) -> None:
        """Nothing of this step has been written."""
        self.accumulated = False
        self._expect_fresh()
        passes = self.store.passes
        self._open = set(self.writers)
        self._passes = sum(passes[stage] for stage in self.writers)
        self._due = sum(passes[stage] * count for stage, count in self.writers.items())

    def begin_pass(self, stage: int) -> None:
        """A backward pass of a writer begins."""
        if self.store.numbers.grads > 1:
            self._due = self.writers[stage]

    def contributed(self) -> None:
        """One more parameter gradient has arrived."""
        self._due -= 1
        if self._due == 0:
            self._complete()

    def end_pass(self) -> None:
        """The backward pass is over: with shares, parameters that took no part in it are complete, too."""
        if self.store.numbers.grads > 1:
            if self._due > 0:
                self._complete()
            self._passes -= 1

    def close(self, stage: int) -> None:
        """A writer is through with the step: as `end_pass`, for gradients that are kept whole."""
        self._open.discard(stage)
        if self.store.numbers.grads == 1 and not self._open and self._due > 0:
            self._complete()

    def _complete(self) -> None:
        """Every gradient is there: reduce."""
        self._due = 0
        buffer = self.writable()
        for slot in self.slots.values():
            if slot.fresh:  # nothing was written there
                buffer[slot.slot.range.start : slot.slot.range.stop].zero_()
        if self.store.numbers.grads > 1:
            self.buffer = None  # the next micro-batch writes elsewhere while this one is reduced
        self.store.launch(self._reduce(buffer, last=self.store.numbers.grads == 1 or self._passes == 1))

    def _expect_fresh(self) -> None:
        for slot in self.slots.values():
            slot.fresh = True

    def _reduce(self, buffer: Tensor, last: bool) -> Steps:
        data, numbers = self.store.data, self.store.numbers
        if numbers.optim == 1:
            yield from data.both.all_reduce(buffer)
            return
        yield from data.shard.reduce_scatter(buffer)
        if numbers.grads > 1:
            share = data.shard.share(buffer, data.shard.index)
            if self.accumulated:
                self.owned.add_(share)
            else:
                self.owned.copy_(share)
            self.accumulated = True
            self.store.return_staging(self.layout, buffer)
        if last:
            yield from data.replicate.all_reduce(self.owned)


class GradientStore:
    """All gradients of a rank.

    Args:
        passes: Per stage of this rank, its backward passes of a step (micro-batches).
    """

    def __init__(
        self,
        space: FlatSpace,
        numbers: ThreeNumbers,
        data: DataChannels,
        device: torch.device,
        passes: Mapping[int, int],
    ) -> None:
        self.numbers, self.data, self.device, self.passes = numbers, data, device, dict(passes)
        self.share_index = data.shard.index if numbers.optim > 1 else 0
        self._staging: dict[UnitLayout, list[Tensor]] = {}
        self._under_way: deque[Pending] = deque()
        self.units = {unit.name: UnitGradients(unit, self) for unit in space.units}

    def slot(self, unit: str, parameter: str) -> _ParameterGradient:
        """The slot of a parameter."""
        return self.units[unit].slots[parameter]

    def add_writer(self, unit: str, stage: int) -> None:
        """One parameter of `unit` is used by one more layer, on `stage`."""
        writers = self.units[unit].writers
        writers[stage] = writers.get(stage, 0) + 1

    def written_by(self, stage: int) -> list[UnitGradients]:
        """The units that backward passes of `stage` write to."""
        return [unit for unit in self.units.values() if stage in unit.writers]

    def begin_step(self) -> None:
        """Forget the previous step's gradients (nothing is zeroed: first writes overwrite)."""
        for unit in self.units.values():
            unit.begin_step()

    def begin_backward(self, stage: int) -> None:
        """A backward pass of `stage` is about to write weight gradients."""
        for unit in self.written_by(stage):
            unit.begin_pass(stage)

    def end_backward(self, stage: int) -> None:
        """It has written all of them."""
        for unit in self.written_by(stage):
            unit.end_pass()

    def close(self, stage: int) -> None:
        """`stage` is through with the step."""
        for unit in self.written_by(stage):
            unit.close(stage)
        self.advance()

    def launch(self, steps: Steps) -> None:
        """Start a reduction, after those under way have moved on by a phase."""
        self.advance()
        self._under_way.append(Pending(steps))

    def advance(self) -> None:
        """Move every reduction under way on by a phase."""
        for pending in self._under_way:
            pending.advance()
        while self._under_way and self._under_way[0].done:
            self._under_way.popleft()

    def finish(self) -> None:
        """Wait until every launched reduction has arrived."""
        while self._under_way:
            self._under_way.popleft().finish()

    def take_staging(self, layout: UnitLayout) -> Tensor:
        """A staging buffer for a unit of this layout; the oldest reduction is finished first if two are under way.

        Only units of one layout share buffers: where a slot of one unit is padding of another, its gradients would
        be taken for the other's.
        """
        while len(self._under_way) >= 2:
            self._under_way.popleft().finish()
        free = self._staging.get(layout)
        if free:
            return free.pop(0)
        return flat_zeros(layout[0], torch.float32, self.device)

    def return_staging(self, layout: UnitLayout, buffer: Tensor) -> None:
        """Give a staging buffer back."""
        self._staging.setdefault(layout, []).append(buffer)

    def memory_bytes(self) -> int:
        """Bytes held now: owned shares, whole buffers and staging."""
        held = {}
        for unit in self.units.values():
            for tensor in (unit.buffer, unit.owned):
                if tensor is not None:
                    held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        for tensor in chain.from_iterable(self._staging.values()):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(held.values())
