"""Tensor parallelism as three autograd functions (Megatron-LM, arXiv:1909.08053, section 3).

A column-parallel product needs its input whole and leaves its output split; a row-parallel one takes a split
input and sums its output over the group. Between them only two communications remain per block half: the sum in
the forward of the row-parallel product, and the sum of the input gradient where a block half was entered. The
latter is launched first and hidden behind the weight gradients that wait at that moment.

Shapes: B batch, S sequence, I inputs, O outputs (of this rank), T tokens, V vocabulary rows of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from parallel.comm.channel import Channel, Pending
from parallel.gradients import WeightGradients, multiply_into, slot_of


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, channel: Channel, gradients: WeightGradients) -> Tensor:
        ctx.channel, ctx.gradients = channel, gradients
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        if ctx.channel.size > 1:
            # Autograd may hand the same tensor to several consumers: sum into our own copy.
            dx = dx.clone(memory_format=torch.contiguous_format)
        pending = Pending(ctx.channel.all_reduce(dx.view(-1)))
        ctx.gradients.drain()
        pending.finish()
        return dx, None, None


def enter(x: Tensor, channel: Channel, gradients: WeightGradients) -> Tensor:
    """Identity whose gradient is summed over the group, behind the weight gradients that wait in `gradients`."""
    entered: Tensor = _Enter.apply(x, channel, gradients)  # type: ignore[no-untyped-call]
    return entered


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BSI: Tensor, weight_OI: Tensor, gradients: WeightGradients, leave: Channel | None
    ) -> Tensor:
        ctx.save_for_backward(x_BSI, weight_OI)
        # Saved tensors come back as other objects under recomputation: the slot is looked up here.
        ctx.slot, ctx.gradients = slot_of(weight_OI), gradients
        y_BSO = functional.linear(x_BSI, weight_OI)
        if leave is not None:
            Pending(leave.all_reduce(y_BSO.view(-1))).finish()
        return y_BSO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSO: Tensor) -> tuple[Tensor | None, None, None, None]:
        x_BSI, weight_OI = ctx.saved_tensors
        dy_TO, x_TI = dy_BSO.reshape(-1, dy_BSO.shape[-1]), x_BSI.reshape(-1, x_BSI.shape[-1])
        dx_BSI = torch.mm(dy_TO, weight_OI).view(x_BSI.shape) if ctx.needs_input_grad[0] else None
        slot = ctx.slot
        ctx.gradients.submit(
            lambda: slot.accumulate(lambda view, fresh: multiply_into(view, dy_TO, x_TI, fresh)), dy_TO, x_TI
        )
        return dx_BSI, None, None, None


def linear(x_BSI: Tensor, weight_OI: Tensor, gradients: WeightGradients, leave: Channel | None = None) -> Tensor:
    """x W^T, shape (B, S, O); summed over `leave` if given (row-parallel).

    The weight needs a gradient slot (`parallel.gradients.attach_slot`): its gradient is written there, through
    `gradients`, and never becomes a tensor of its own.
    """
    y_BSO: Tensor = _Linear.apply(x_BSI, weight_OI, gradients, leave)  # type: ignore[no-untyped-call]
    return y_BSO


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens_BS: Tensor, weight_VH: Tensor, start: int, channel: Channel, gradients: WeightGradients
    ) -> Tensor:
        local_T = tokens_BS.reshape(-1) - start
        elsewhere_T = (local_T < 0) | (local_T >= weight_VH.shape[0])
        x_TH = functional.embedding(local_T.masked_fill(elsewhere_T, 0), weight_VH)
        x_TH.masked_fill_(elsewhere_T[:, None], 0)
        Pending(channel.all_reduce(x_TH.view(-1))).finish()
        local_T = local_T.masked_fill(elsewhere_T, -1)
        ctx.save_for_backward(local_T)
        ctx.slot, ctx.gradients = slot_of(weight_VH), gradients
        return x_TH.view(*tokens_BS.shape, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_BSH: Tensor) -> tuple[None, None, None, None, None]:
        (local_T,) = ctx.saved_tensors
        slot = ctx.slot
        dx_TH = dx_BSH.reshape(local_T.shape[0], -1)

        def write(view_VH: Tensor, fresh: bool) -> None:
            if fresh:
                view_VH.zero_()
            here_T = local_T >= 0
            view_VH.index_add_(0, local_T[here_T], dx_TH[here_T].to(view_VH.dtype))

        ctx.gradients.submit(lambda: slot.accumulate(write), dx_TH, local_T)
        return None, None, None, None, None


def embedding(tokens_BS: Tensor, weight_VH: Tensor, start: int, channel: Channel, gradients: WeightGradients) -> Tensor:
    """Rows of a vocabulary-parallel embedding, shape (B, S, H); this rank holds rows start .. start + V."""
    x_BSH: Tensor = _Embedding.apply(tokens_BS, weight_VH, start, channel, gradients)  # type: ignore[no-untyped-call]
    return x_BSH


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, start: int, channel: Channel) -> Tensor:
        local_T = targets_T - start
        here_T = (local_T >= 0) & (local_T < logits_TV.shape[1])
        local_T = local_T.masked_fill(~here_T, 0)
        probabilities_TV = torch.softmax(logits_TV, dim=1, dtype=torch.float32)
        # The log-sum-exp follows from any entry and its probability; those of the largest cannot underflow.
        normalizer_T = logits_TV.amax(dim=1) - probabilities_TV.amax(dim=1).log()
        # One small message per rank instead of three reductions: its log-sum-exp and its target logits.
        parts = normalizer_T.new_empty((channel.size, 2, targets_T.shape[0]))
        parts[channel.index, 0] = normalizer_T
        parts[channel.index, 1] = logits_TV.gather(1, local_T[:, None])[:, 0].masked_fill(~here_T, 0)
        Pending(channel.all_gather(parts.view(-1))).finish()
        total_T = torch.logsumexp(parts[:, 0], dim=0)
        ctx.save_for_backward(probabilities_TV, (normalizer_T - total_T).exp(), local_T, here_T)
        ctx.dtype = logits_TV.dtype
        return (total_T - parts[:, 1].sum(dim=0)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities_TV, share_T, local_T, here_T = ctx.saved_tensors
        # softmax over the whole vocabulary - one-hot, in the memory of the local softmax, which nothing reads again.
        dlogits_TV = probabilities_TV.mul_((share_T * scale)[:, None])
        dlogits_TV.scatter_add_(1, local_T[:, None], (-scale * here_T)[:, None])
        return dlogits_TV.to(ctx.dtype), None, None, None


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, start: int, channel: Channel) -> Tensor:
    """Sum over tokens of the cross entropy in nats, over a vocabulary that is split over the group.

    Args:
        logits_TV: This rank's columns start .. start + V.
        targets_T: Token ids in the whole vocabulary.
    """
    loss: Tensor = _CrossEntropy.apply(logits_TV, targets_T, start, channel)  # type: ignore[no-untyped-call]
    return loss
