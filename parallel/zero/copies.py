"""Units that two pipeline ranks hold: a tied embedding and its head, or the copies of a bidirectional schedule."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from parallel.comm.channel import Channel, Pending, Steps
from parallel.zero.gradients import GradientStore


class CopiedGradients:
    """Sums the reduced gradient of a copied unit over its two ranks.

    The unit is laid out alike on both, so both own the same range of the same weights: they exchange their reduced
    shares and add them. A sum of two is the same in either order, so both make bitwise the same update and the
    copies stay equal without ever being sent.

    Args:
        channel: The pipeline axis, beside the transfers of programs.
        store: This rank's gradients.
        peers: The index on the pipeline axis of the rank with the other copy, per unit that has one.
    """

    def __init__(self, channel: Channel, store: GradientStore, peers: Mapping[str, int]) -> None:
        self.channel, self.store, self.peers = channel, store, peers
        self._open: dict[str, set[int]] = {}
        self._under_way: list[Pending] = []

    def begin_step(self) -> None:
        """No copy has been summed in this step."""
        self._open = {name: set(self.store.units[name].writers) for name in self.peers}

    def sync(self, stage: int) -> None:
        """`SYNC`: launch the exchange of the units of which `stage` was the last writer to be complete.

        Both ranks list their SYNCs in one order, so the exchanges match without any coordination.
        """
        for name, peer in self.peers.items():
            if stage in self._open[name]:
                self._open[name].discard(stage)
                if not self._open[name]:
                    self.store.finish()
                    self._under_way.append(Pending(self._exchange(name, peer)))

    def finish(self) -> None:
        """Sum what no SYNC has summed (the program of a tied model has none), and wait for all of it."""
        self.store.finish()
        for name, peer in self.peers.items():
            if self._open[name]:
                self._open[name].clear()
                self._under_way.append(Pending(self._exchange(name, peer)))
        for pending in self._under_way:
            pending.finish()
        self._under_way.clear()

    def _exchange(self, name: str, peer: int) -> Steps:
        owned = self.store.units[name].owned
        arrived = torch.empty_like(owned)
        yield self.channel.transfer([(owned, peer)], [(arrived, peer)])
        owned.add_(arrived)
