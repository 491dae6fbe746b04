"""The modules that a plan puts in the place of plain ones; each keeps its parameter's name and says how it is split.

`shard_dim` is the dimension of `weight` that the group divides; None means that every rank holds it whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel.comm.channel import Channel
from parallel.gradients import WeightGradients
from parallel.tensor.functions import embedding, enter, linear


class ColumnLinear(nn.Module):
    """Outputs split over the group: weight (O / tensor, I). The input must have been entered."""

    shard_dim = 0

    def __init__(self, plain: nn.Linear, channel: Channel, gradients: WeightGradients) -> None:
        super().__init__()
        self.weight = _shard(plain.weight, self.shard_dim, channel)
        self.gradients = gradients

    def forward(self, x_BSI: Tensor) -> Tensor:
        return linear(x_BSI, self.weight, self.gradients)


class RowLinear(nn.Module):
    """Inputs split over the group: weight (O, I / tensor). The output is summed over the group."""

    shard_dim = 1

    def __init__(self, plain: nn.Linear, channel: Channel, gradients: WeightGradients) -> None:
        super().__init__()
        self.weight = _shard(plain.weight, self.shard_dim, channel)
        self.channel, self.gradients = channel, gradients

    def forward(self, x_BSI: Tensor) -> Tensor:
        return linear(x_BSI, self.weight, self.gradients, self.channel)


class VocabularyEmbedding(nn.Module):
    """Vocabulary rows split over the group: weight (V / tensor, H)."""

    shard_dim = 0

    def __init__(self, plain: nn.Embedding, channel: Channel, gradients: WeightGradients) -> None:
        super().__init__()
        self.weight = _shard(plain.weight, self.shard_dim, channel)
        self.channel, self.gradients = channel, gradients

    def forward(self, tokens_BS: Tensor) -> Tensor:
        start = self.weight.shape[0] * self.channel.index
        return embedding(tokens_BS, self.weight, start, self.channel, self.gradients)


class PartialNorm(nn.Module):
    """A norm whose weight is whole on every rank but sees only this rank's heads: its gradient is summed."""

    shard_dim = None

    def __init__(self, plain: nn.RMSNorm, channel: Channel, gradients: WeightGradients) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(plain.weight))
        self.shape, self.epsilon = plain.normalized_shape, plain.eps
        self.channel, self.gradients = channel, gradients

    def forward(self, x: Tensor) -> Tensor:
        weight = enter(self.weight, self.channel, self.gradients)
        return functional.rms_norm(x, self.shape, weight, self.epsilon)


def _shard(weight: Tensor, dim: int, channel: Channel) -> nn.Parameter:
    shape = list(weight.shape)
    shape[dim], rest = divmod(shape[dim], channel.size)
    if rest:
        raise ValueError(
            f"dimension {dim} of a weight of shape {tuple(weight.shape)} cannot be split {channel.size} ways"
        )
    return nn.Parameter(weight.new_empty(shape))
