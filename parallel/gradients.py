"""Where weight gradients go, and when they are computed.

A gradient slot is a place in the flat gradient space. Layers that compute their own weight gradient write it
there directly (the first micro-batch overwrites, the others add, inside the matrix product), so that no
gradient tensor is ever allocated, zeroed or copied. Everything else goes through autograd and a hook.

A weight gradient is needed by nobody until the reduction, while the input gradient is what the layer below
waits for. So layers do not compute it on the spot: they submit it to the stage's `WeightGradients`, which may run
it at once, hold it until there is communication to hide (tensor parallelism), or keep it for a later action. The
last is all that a split backward is: I is a backward pass that keeps this work, W runs it. What autograd saved is
freed by I; W holds the two factors of each product, and frees them one by one. Gradients that autograd computes
itself (norm weights) are kept as tensors. Nothing runs twice, recomputation included.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


def attach_slot(parameter: nn.Parameter, slot: GradientSlot, gradients: WeightGradients) -> None:
    """Send every gradient of `parameter` to `slot`, whichever way it comes, through its stage's `gradients`."""
    parameter.gradient_slot = slot  # type: ignore[attr-defined]

    def move(parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return  # the layer writes to the slot itself; autograd calls the hook all the same
        gradients.submit(lambda: slot.accumulate(lambda view, fresh: add_into(view, gradient, fresh)), gradient)
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


Work = Callable[[], None]


class WeightGradients:
    """Weight-gradient work of a stage that waits for its moment, oldest first.

    Args:
        hold: Within a whole backward pass - False: run at once. True: hold until `drain`.

    Attributes:
        on_keep: Told about the tensors that are kept for a later W.
    """

    def __init__(self, *, hold: bool = False) -> None:
        self.hold = hold
        self.on_keep: Callable[[Sequence[Tensor]], None] | None = None
        self._waiting: deque[Work] = deque()
        self._kept: dict[int, deque[Work]] = {}
        self._keeping: deque[Work] | None = None

    def submit(self, work: Work, *factors: Tensor) -> None:
        """Run `work`, which reads `factors`, now or when its moment comes."""
        if self._keeping is not None:
            self._keeping.append(work)
            if self.on_keep is not None:
                self.on_keep(factors)
        elif self.hold:
            self._waiting.append(work)
        else:
            work()

    @torch.no_grad()
    def drain(self) -> None:
        """Run what is held; what is kept for a W stays."""
        while self._waiting:
            self._waiting.popleft()()

    @contextmanager
    def keep(self, microbatch: int) -> Iterator[None]:
        """Keep everything that is submitted within, for `run`."""
        self._keeping = self._kept[microbatch] = deque()
        try:
            yield
        finally:
            self._keeping = None

    @torch.no_grad()
    def run(self, microbatches: Sequence[int]) -> None:
        """Run what was kept for these micro-batches.

        Several are run product by product, and micro-batch by micro-batch within each: the gradient of the first
        parameter is complete, and its reduction under way, while the others are still being computed
        (zero-bubble paper, arXiv:2401.10241, appendix A).
        """
        kept = [self._kept.pop(microbatch) for microbatch in microbatches]
        while any(kept):
            for queue in kept:
                if queue:
                    queue.popleft()()

    def abandon(self) -> None:
        """Forget everything (after an error)."""
        self._waiting.clear()
        self._kept.clear()
