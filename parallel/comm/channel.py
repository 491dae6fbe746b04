"""One group of ranks and the collectives over it, in three visible phases.

Every operation here is a generator of works: calling it launches the first phase, each `yield` hands out what
must arrive before the next phase can start, and the end of the generator is the end of the operation. A caller
that has compute to hide the traffic behind keeps a `Pending` and advances it when it comes by; one that has
none calls `finish` at once.

Two algorithms serve a collective. `native` is the back end's own. `direct` exchanges shares pairwise and sums
them in rank order: every element is summed in the same order whatever the buffer it lies in, so ZeRO stages and
bucket borders cannot change a bit of the result. On gloo it is also faster: its reduce-scatter runs at half the
rate of its all-reduce, and point-to-point messages beat both (benchmarks/comm.py measures it). On NCCL the
native algorithms use the links between several devices at once and win.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.memory import flat_zeros


class Waitable(Protocol):
    """Something under way, such as torch's Work."""

    def wait(self) -> object: ...


_LARGE_BYTES = 1 << 18
"""From here on, starting a send on gloo takes longer than handing it to another thread."""

_TAG = 0
"""Messages between two ranks of a group match by their order."""

Steps = Generator[list[Waitable], None, None]
"""Phases of an operation: what is yielded must be waited for before the generator goes on."""


class Pending:
    """An operation under way. The first phase is launched by the constructor."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._works: list[Waitable] | None = next(steps, None)

    @property
    def done(self) -> bool:
        return self._works is None

    def advance(self) -> None:
        """Wait for the phase under way and launch the next one."""
        if self._works is not None:
            for work in self._works:
                work.wait()
            self._works = next(self._steps, None)

    def finish(self) -> None:
        """Carry the operation to its end."""
        while not self.done:
            self.advance()


class Channel:
    """Collectives over one process group. A group of one rank communicates nothing and is no special case."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        algorithm: Literal["auto", "native", "direct"] = "auto",
        timeout_seconds: float | None = None,
    ) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.index = dist.get_rank(group)
        backend = dist.get_backend(group)  # of a group for several kinds of devices: "cpu:gloo,cuda:nccl"
        self._gloo = backend == "gloo"
        bounded = "gloo" in backend and timeout_seconds is not None
        self._timeout = timedelta(seconds=timeout_seconds or 0.0) if bounded else None
        if algorithm == "auto":
            algorithm = "direct" if self._gloo else "native"
        self.algorithm = algorithm
        self._scratch: list[Tensor] = []
        self._sender: ThreadPoolExecutor | None = None

    def share(self, buffer: Tensor, index: int) -> Tensor:
        """Share `index` of `size` equal shares of a flat buffer."""
        length = buffer.numel() // self.size
        return buffer[index * length : (index + 1) * length]

    def reduce_scatter(self, buffer: Tensor) -> Steps:
        """Sum `buffer`, shape (size * n,), over the group into the own share; the other shares are left undefined."""
        if self.size == 1:
            return
        own = self.share(buffer, self.index)
        if self.algorithm == "native":
            summed = torch.empty_like(own)
            yield [self._work(dist.reduce_scatter_tensor(summed, buffer, group=self.group, async_op=True), buffer)]
            own.copy_(summed)
            return
        arrived = self._take(own, self.size - 1)
        peers = self._peers()
        works = [self.receive(arrived[slot], peer) for slot, peer in enumerate(peers)]
        yield works + [self.send(self.share(buffer, peer), peer) for peer in peers]
        _sum_in_rank_order(own, self.index, {peer: arrived[slot] for slot, peer in enumerate(peers)})
        self._scratch.append(arrived)

    def all_gather(self, buffer: Tensor) -> Steps:
        """Fill `buffer`, shape (size * n,), with the shares of all ranks; each contributes its own in place."""
        if self.size == 1:
            return
        own = self.share(buffer, self.index)
        if self.algorithm == "native":
            work = dist.all_gather_into_tensor(buffer, own.clone(), group=self.group, async_op=True)
            yield [self._work(work, buffer)]
            return
        peers = self._peers()
        works = [self.receive(self.share(buffer, peer), peer) for peer in peers]
        yield works + [self.send(own, peer) for peer in peers]

    def all_reduce(self, buffer: Tensor) -> Steps:
        """Sum a flat `buffer` over the group, in place."""
        if self.size == 1:
            return
        if self.algorithm == "native" or buffer.numel() % self.size:
            yield [self._work(dist.all_reduce(buffer, group=self.group, async_op=True), buffer)]
            return
        yield from self.reduce_scatter(buffer)
        yield from self.all_gather(buffer)

    def send(self, tensor: Tensor, peer: int) -> Waitable:
        """Start to send a contiguous tensor to rank `peer` of the group; it may not change until the work ends."""
        if self._sender is not None:  # in line with those that wait there
            return _Handed(self._sender.submit(self._send, tensor, peer))
        return self._send(tensor, peer)

    def _send(self, tensor: Tensor, peer: int) -> Waitable:
        return self._work(self.group.send([tensor], peer, _TAG), tensor)

    def receive(self, tensor: Tensor, peer: int) -> Waitable:
        """Start to receive into a contiguous tensor from rank `peer` of the group."""
        return self._work(self.group.recv([tensor], peer, _TAG), tensor)

    def transfer(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> list[Waitable]:
        """Start transfers that may proceed together: (tensor, peer) each; one work per send, then one per receive.

        On NCCL they are one batch, so that two ranks that both send first do not wait for each other, and all
        transfers of this kind take the same communicator, which single sends and receives would not. On gloo every
        message proceeds by itself; but a send first copies what the socket takes, a millisecond for 4 MB, so a thread
        starts those that are large, and from then on all, which keeps them in order.
        """
        if self._gloo:
            if self._sender is None and any(tensor.nbytes >= _LARGE_BYTES for tensor, _ in sends):
                self._sender = ThreadPoolExecutor(1, "send")
            return [self.send(*each) for each in sends] + [self.receive(*each) for each in receives]
        operations = [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer) for tensor, peer in sends]
        operations += [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer) for tensor, peer in receives]
        works = dist.batch_isend_irecv(operations)
        # A coalesced batch has one work for all; a back end without coalescing has one each.
        pairs = enumerate([*sends, *receives])
        return [self._work(works[min(index, len(works) - 1)], tensor) for index, (tensor, _) in pairs]

    def _work(self, work: dist.Work | None, tensor: Tensor) -> Waitable:
        assert work is not None, "an asynchronous operation on a group that this rank belongs to returns its work"
        return work if self._timeout is None or tensor.is_cuda else _Bounded(work, self._timeout)

    def _peers(self) -> list[int]:
        # Each rank starts with its next neighbour, so that no rank is everybody's first target.
        return [(self.index + step) % self.size for step in range(1, self.size)]

    def _take(self, like: Tensor, rows: int) -> Tensor:
        """A scratch tensor of shape (rows, like.numel()): reused, because fresh pages cost as much as the copy."""
        for position, tensor in enumerate(self._scratch):
            if tensor.shape == (rows, like.numel()) and tensor.dtype == like.dtype:
                return self._scratch.pop(position)
        return flat_zeros(rows * like.numel(), like.dtype, like.device).view(rows, -1)


def _sum_in_rank_order(own: Tensor, index: int, arrived: dict[int, Tensor]) -> None:
    """own = arrived[0] + ... + own + ... + arrived[last], in this order."""
    below = [arrived[peer] for peer in sorted(arrived) if peer < index]
    if below:
        total = below[0]
        for share in below[1:]:
            total += share
        torch.add(total, own, out=own)
    for peer in sorted(arrived):
        if peer > index:
            own += arrived[peer]


class _Bounded:
    """A work whose wait ends with an error when its peers do not come.

    Gloo's point-to-point works know no time-out but one that is given with the wait. NCCL's must not be given one:
    its waits would then block the host, and its watchdog bounds them anyway.
    """

    def __init__(self, work: dist.Work, timeout: timedelta) -> None:
        self._work, self._timeout = work, timeout

    def wait(self) -> bool:
        return bool(self._work.wait(self._timeout))


class _Handed:
    """A work that another thread starts."""

    def __init__(self, started: Future[Waitable]) -> None:
        self._started = started

    def wait(self) -> object:
        return self._started.result().wait()
