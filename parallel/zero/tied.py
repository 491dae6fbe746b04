"""Weights that two pipeline stages hold: a tied embedding on the first, its copy under the head on the last."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.comm.channel import Channel


class TiedGradient:
    """Sums the reduced gradient of a tied unit over its two stages.

    The unit is laid out alike on both, so both ranks own the same range of the same weights: they exchange their
    reduced shares and add them. A sum of two is the same in either order, so both make bitwise the same update and
    the copies stay equal without ever being sent.

    Args:
        channel: The pipeline axis.
        owned: This rank's reduced share of the tied unit; None on ranks that hold no copy.
    """

    def __init__(self, channel: Channel, owned: Tensor | None) -> None:
        self.channel, self.owned = channel, owned if channel.size > 1 else None
        self.peer = channel.size - 1 if channel.index == 0 else 0

    def sum(self) -> None:
        """Exchange and add; nothing to do on ranks without a copy."""
        if self.owned is None:
            return
        arrived = torch.empty_like(self.owned)
        works = [self.channel.receive(arrived, self.peer), self.channel.send(self.owned.clone(), self.peer)]
        for work in works:
            work.wait()
        self.owned.add_(arrived)
