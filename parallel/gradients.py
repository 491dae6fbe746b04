"""Where weight gradients go, and when they are computed.

A gradient slot is a place in the flat gradient space. Layers that compute their own weight gradient write it
there directly (the first micro-batch overwrites, the others add, inside the matrix product), so that no
gradient tensor is ever allocated, zeroed or copied. Everything else goes through autograd and a hook.

A weight gradient is needed by nobody until the reduction, while the input gradient is what the layer below
waits for. So layers do not compute it on the spot: they submit it to the stage's `WeightGradients`, which may run
it at once, hold it until there is communication to hide (tensor parallelism), or keep it for a later action.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn


class GradientSlot(Protocol):
    """The place of one parameter's gradient."""

    def accumulate(self, write: Callable[[Tensor, bool], None]) -> None:
        """Call `write(view, fresh)`: `view` has the parameter's shape in fp32; if `fresh` its content is undefined
        and must be overwritten, else added to. Counts as one contribution of this backward pass."""
        ...


def slot_of(parameter: Tensor) -> GradientSlot:
    """The slot that `attach_slot` gave the parameter."""
    slot: GradientSlot = parameter.gradient_slot  # type: ignore[attr-defined]
    return slot


def attach_slot(parameter: nn.Parameter, slot: GradientSlot) -> None:
    """Send every gradient of `parameter` to `slot`, whichever way it comes."""
    parameter.gradient_slot = slot  # type: ignore[attr-defined]

    def move(parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return  # the layer writes to the slot itself; autograd calls the hook all the same
        slot.accumulate(lambda view, fresh: add_into(view, gradient, fresh))
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(move)


def add_into(view: Tensor, gradient: Tensor, fresh: bool) -> None:
    """view = gradient, or view += gradient."""
    if fresh:
        view.copy_(gradient)
    else:
        view.add_(gradient)


def multiply_into(view: Tensor, left_NM: Tensor, right_NK: Tensor, fresh: bool) -> None:
    """view_MK (fp32) = left^T right, or += left^T right, in one matrix product.

    In bf16 on a GPU the product accumulates and leaves in fp32; on a CPU it is rounded to bf16 once per
    micro-batch before it is added, because no kernel there writes fp32.
    """
    transposed = left_NM.t()
    if left_NM.dtype == view.dtype:
        if fresh:
            torch.mm(transposed, right_NK, out=view)
        else:
            view.addmm_(transposed, right_NK)
    elif view.is_cuda:
        add_into(view, torch.mm(transposed, right_NK, out_dtype=view.dtype), fresh)
    else:
        add_into(view, torch.mm(transposed, right_NK), fresh)


class WeightGradients:
    """Weight-gradient work of a stage that waits for its moment, oldest first.

    Attributes:
        hold: False: run at once. True: keep until `drain`.
    """

    def __init__(self, *, hold: bool = False) -> None:
        self.hold = hold
        self._waiting: deque[Callable[[], None]] = deque()

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` now, or keep it."""
        if self.hold:
            self._waiting.append(work)
        else:
            work()

    def drain(self) -> None:
        """Run everything that waits."""
        while self._waiting:
            self._waiting.popleft()()
