"""A pipeline stage on a rank: a chain of units, and the micro-batches that are under way in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from parallel.gradients import WeightGradients


class GradientSink(Protocol):
    """Who is told about backward passes: the owner of the gradient slots."""

    def begin_backward(self, stage: int, last: bool) -> None:
        """A backward pass begins; `last` says that it is the stage's last one of the step."""
        ...

    def end_backward(self, stage: int) -> None:
        """Every gradient of the backward pass has been written."""
        ...


class Stage:
    """Runs forward and backward passes of one stage and keeps what the backward needs in between.

    Args:
        index: The stage's number.
        units: Names and modules in forward order.
        loss: On the last stage, maps (output, targets) to the micro-batch's loss, a scalar.
        gradients: The stage's queue of weight-gradient work.
        sink: Told about backward passes.
        before_unit: Called with a unit's name before its forward (to await its weights).
    """

    def __init__(
        self,
        index: int,
        units: Sequence[tuple[str, nn.Module]],
        loss: Callable[[Tensor, Tensor], Tensor] | None,
        gradients: WeightGradients,
        sink: GradientSink,
        before_unit: Callable[[str], None],
    ) -> None:
        self.index, self.units, self.loss = index, tuple(units), loss
        self.gradients, self.sink, self.before_unit = gradients, sink, before_unit
        self._under_way: dict[int, tuple[Tensor, Tensor]] = {}
        self._backwards = 0

    def forward(self, microbatch: int, x: Tensor, targets: Tensor | None, *, train: bool) -> Tensor:
        """Output of the stage for a micro-batch, or its loss on the last stage.

        Args:
            x: Tokens (B, S) on the first stage, hidden states (B, S, H) elsewhere.
            targets: (B, S) on the last stage.
            train: Keep what the backward will need.
        """
        if train and x.is_floating_point():
            x.requires_grad_()
        with torch.set_grad_enabled(train):
            output = x
            for name, module in self.units:
                self.before_unit(name)
                output = module(output)
            if self.loss is not None:
                assert targets is not None, "the last stage needs targets"
                output = self.loss(output, targets)
        if train:
            self._under_way[microbatch] = (x, output)
        return output.detach()

    def backward(self, microbatch: int, gradient: Tensor | None, total: int) -> Tensor | None:
        """Gradient of the stage's input; weight gradients go to their slots.

        Args:
            gradient: Gradient of the output; None on the last stage, whose output is the loss.
            total: Backward passes of a step, to know which one is the last.
        """
        x, output = self._under_way.pop(microbatch)
        self._backwards += 1
        self.sink.begin_backward(self.index, last=self._backwards == total)
        torch.autograd.backward(output, gradient)
        self.gradients.drain()
        self.sink.end_backward(self.index)
        if self._backwards == total:
            self._backwards = 0
        return x.grad

    def abandon(self) -> None:
        """Forget the micro-batches under way (after an error)."""
        self._under_way.clear()
        self._backwards = 0
