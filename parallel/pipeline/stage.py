"""A pipeline stage on a rank: a chain of units, and the micro-batches that are under way in it.

The backward of a micro-batch runs whole (B) or in two halves (I, W). Between forward and backward the graph alone
holds what the backward needs: the output leaves with its transfer and only the place in the graph is kept, and the
input enters the graph through a node that keeps nothing of it. So what `autograd` saved is all the memory that a
micro-batch under way takes, and whatever moves saved tensors (recomputation, offload) moves all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from parallel.gradients import WeightGradients


class GradientSink(Protocol):
    """Who is told about backward passes: the owner of the gradient slots."""

    def begin_backward(self, stage: int) -> None:
        """Weight gradients of a micro-batch are about to be written."""
        ...

    def end_backward(self, stage: int) -> None:
        """All of them are."""
        ...


Keeper = Callable[[int, int], AbstractContextManager[Any]]
"""Called as keeper(stage, microbatch) around a forward: may take what autograd saves into its own hands."""


def keep_nothing(stage: int, microbatch: int) -> AbstractContextManager[None]:
    """The keeper that leaves everything to autograd."""
    return nullcontext()


class _Border(torch.autograd.Function):
    """Identity at the start of a stage. Its backward catches the input gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, caught: list[Tensor]) -> Tensor:
        ctx.caught = caught
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[None, None, None]:
        ctx.caught.append(dx)
        return None, None, None


class Stage:
    """Runs forward and backward passes of one stage and keeps what the backward needs in between.

    Args:
        index: The stage's number in the program.
        units: Names and modules in forward order.
        loss: On a last stage, maps (output, targets) to the micro-batch's loss, a scalar.
        gradients: The stage's queue of weight-gradient work.
        sink: Told about backward passes.
        before_unit: Called with a unit's name before its forward (to await its weights).
        keeper: Called around every forward that will have a backward.
    """

    def __init__(
        self,
        index: int,
        units: Sequence[tuple[str, nn.Module]],
        loss: Callable[[Tensor, Tensor], Tensor] | None,
        gradients: WeightGradients,
        sink: GradientSink,
        before_unit: Callable[[str], None],
        keeper: Keeper = keep_nothing,
    ) -> None:
        self.index, self.units, self.loss = index, tuple(units), loss
        self.gradients, self.sink, self.before_unit, self.keeper = gradients, sink, before_unit, keeper
        self._anchor = torch.empty(0, requires_grad=True)
        self._under_way: dict[int, tuple[GradientEdge, list[Tensor], Tensor | None]] = {}

    def forward(self, microbatch: int, x: Tensor, targets: Tensor | None, *, train: bool) -> Tensor:
        """Output of the stage for a micro-batch, or its loss on a last stage.

        Args:
            x: Tokens (B, S) on a first stage, hidden states (B, S, H) elsewhere.
            targets: (B, S) on a last stage.
            train: Keep what the backward will need.
        """
        caught: list[Tensor] = []
        with torch.set_grad_enabled(train), self.keeper(self.index, microbatch) if train else nullcontext():
            output: Tensor = x
            if train and x.is_floating_point():
                output = _Border.apply(self._anchor, x, caught)  # type: ignore[no-untyped-call]
            for name, module in self.units:
                self.before_unit(name)
                output = module(output)
            if self.loss is not None:
                assert targets is not None, "the last stage needs targets"
                output = self.loss(output, targets)
        if train:
            start = torch.ones_like(output) if self.loss is not None else None
            self._under_way[microbatch] = (get_gradient_edge(output), caught, start)
        return output.detach()

    def backward(self, microbatch: int, gradient: Tensor | None) -> Tensor | None:
        """B: the gradient of the stage's input; weight gradients go to their slots.

        Args:
            gradient: Gradient of the output; None on a last stage, whose output is the loss.
        """
        self.sink.begin_backward(self.index)
        dx = self._propagate(microbatch, gradient)
        self.gradients.drain()
        self.sink.end_backward(self.index)
        return dx

    def input_gradient(self, microbatch: int, gradient: Tensor | None) -> Tensor | None:
        """I: the gradient of the stage's input; the weight gradients wait for `weight_gradient`."""
        with self.gradients.keep(microbatch):
            return self._propagate(microbatch, gradient)

    def weight_gradient(self, microbatches: Sequence[int]) -> None:
        """W of one micro-batch, or of the last several together: weight gradients go to their slots."""
        self.sink.begin_backward(self.index)
        self.gradients.run(microbatches)
        self.sink.end_backward(self.index)

    def _propagate(self, microbatch: int, gradient: Tensor | None) -> Tensor | None:
        edge, caught, start = self._under_way.pop(microbatch)
        torch.autograd.backward(edge, gradient if start is None else start)
        return caught[0] if caught else None

    def abandon(self) -> None:
        """Forget the micro-batches under way (after an error)."""
        self._under_way.clear()
        self.gradients.abandon()
