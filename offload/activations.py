"""Activations between a forward and its backward: counted, and moved to host memory and back (PipeOffload,
arXiv:2503.01328).

`keeper(stage, microbatch)` stands around a forward and takes what autograd saves into the store's hands. For
micro-batches that a program offloads, autograd then keeps handles. Four phases:

1. `offload` starts to copy every storage behind them to the host, once each, however many tensors view it.
2. `finish` waits for that and drops the storages. When it is called is part of the plan: memory must not depend on
   how fast a copy happens to be, nor may more of them be under way than were planned.
3. `reload` allocates storages on the device and starts to copy back.
4. The backward asks a handle for its tensor: it waits for the copy if need be and builds the view that was saved.
   As the graph frees its handles one by one, so it frees the storages.

What stays on the device: weights and tables (meter.py), and small tensors. What autograd does not save, the factors
of weight gradients that wait for their W, is reported to `hold`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from offload.host import HostPool, places, room
from offload.lanes import Copies, make_lane
from offload.meter import ActivationMeter


class _Piece:
    """A storage that a forward saved. It lives as long as some handle does."""

    __slots__ = ("__weakref__", "owner", "storage")

    def __init__(self, owner: _Kept, storage: torch.UntypedStorage) -> None:
        self.owner = owner
        self.storage: torch.UntypedStorage | None = storage


class _Handle(NamedTuple):
    """What autograd keeps in the place of a tensor."""

    piece: _Piece
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class _Kept:
    """What the forward of a micro-batch on a stage left, and where it is.

    Attributes:
        pieces: Those alive, by the address of the storage that was saved.
        moved: Those on the host, under way included, and where each lies in the buffers.
        buffers: On the host, in use.
        leaving, coming: What waits for the copy that is under way.
    """

    def __init__(self, stage: int, microbatch: int) -> None:
        self.stage, self.microbatch = stage, microbatch
        self.pieces: weakref.WeakValueDictionary[int, _Piece] = weakref.WeakValueDictionary()
        self.moved: list[tuple[_Piece, list[Tensor]]] = []
        self.buffers: list[Tensor] = []
        self.leaving: Callable[[], None] | None = None
        self.coming: Callable[[], None] | None = None

    def __str__(self) -> str:
        return f"micro-batch {self.microbatch} on stage {self.stage}"


class ActivationStore:
    """The activations of a rank.

    Args:
        device: Where they are made.
        lasting: Tensors that are no activations though autograd saves them: the weights.
        offloaded: (stage, micro-batch) of those that will be offloaded; everything else is counted only. May be
            replaced between two steps.
        smallest_bytes: Storages of fewer bytes stay on the device.

    Attributes:
        meter: Counts what is alive on the device.
        host: The buffers on the host.
        moved_bytes: Copied to the host so far.
    """

    def __init__(
        self,
        device: torch.device,
        lasting: Iterable[Tensor] = (),
        offloaded: Collection[tuple[int, int]] = (),
        smallest_bytes: int = 0,
    ) -> None:
        self.device, self.offloaded = device, frozenset(offloaded)
        self.smallest_bytes = max(1, smallest_bytes)  # there is nothing to copy of an empty one
        self.meter = ActivationMeter(lasting)
        self.host = HostPool(pinned=device.type == "cuda")
        self.moved_bytes = 0
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._forwards = 0
        self._out, self._back = make_lane(device), make_lane(device)

    def keeper(self, stage: int, microbatch: int) -> AbstractContextManager[Any]:
        """What stands around the forward of a micro-batch on a stage.

        Tensors that stay are kept detached: a node that saves its own output through a hook would keep itself alive,
        and a forward that never comes to its backward (post-validation repeats some) would stay in memory forever.
        """
        self._forwards += 1
        forward, meter = self._forwards, self.meter
        if (stage, microbatch) not in self.offloaded:

            def count(tensor: Tensor) -> Tensor:
                meter.save(tensor.untyped_storage(), stage, forward)
                return tensor.detach()

            return saved_tensors_hooks(count, _as_it_is)

        if (earlier := self._kept.get((stage, microbatch))) is not None:
            self._clear(earlier)  # it may never have come to its backward
        kept = self._kept[stage, microbatch] = _Kept(stage, microbatch)
        return saved_tensors_hooks(lambda tensor: self._pack(tensor, kept, forward), self._unpack)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are kept for weight gradients."""
        for tensor in tensors:
            self.meter.hold(tensor.untyped_storage())

    def offload(self, stage: int, microbatch: int) -> None:
        """Start to copy what a forward saved to the host."""
        kept = self._kept[stage, microbatch]
        pieces = [(piece, storage) for piece in kept.pieces.values() if (storage := piece.storage) is not None]
        sizes = [storage.nbytes() for _, storage in pieces]
        kept.buffers = self.host.take(room(sizes))
        copies: Copies = []
        for (piece, storage), views in zip(pieces, places(sizes, kept.buffers), strict=True):
            kept.moved.append((piece, views))
            copies += zip(views, _cut(storage, views, self.device), strict=True)
        self.moved_bytes += sum(sizes)
        kept.leaving = self._out.start(copies)

    def finish(self, stage: int, microbatch: int) -> None:
        """Wait until the copy to the host is done, and drop what was copied."""
        kept = self._kept[stage, microbatch]
        if kept.leaving is not None:
            kept.leaving()
            kept.leaving = None
            for piece, _ in kept.moved:
                piece.storage = None

    def reload(self, stage: int, microbatch: int) -> None:
        """Start to copy back what was offloaded."""
        self.finish(stage, microbatch)
        kept = self._kept[stage, microbatch]
        copies: Copies = []
        for piece, views in kept.moved:
            size = sum(view.numel() for view in views)
            piece.storage = torch.empty(size, dtype=torch.uint8, device=self.device).untyped_storage()
            self.meter.hold(piece.storage)
            copies += zip(_cut(piece.storage, views, self.device), views, strict=True)
        kept.coming = self._back.start(copies)

    def _pack(self, tensor: Tensor, kept: _Kept, forward: int) -> Tensor | _Handle:
        storage = tensor.untyped_storage()
        if not self.meter.save(storage, kept.stage, forward) or storage.nbytes() < self.smallest_bytes:
            return tensor.detach()
        piece = kept.pieces.get(storage._cdata)
        if piece is None:
            piece = kept.pieces[storage._cdata] = _Piece(kept, storage)
        return _Handle(piece, tensor.dtype, int(tensor.storage_offset()), tensor.size(), tensor.stride())

    def _unpack(self, saved: Tensor | _Handle) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        piece = saved.piece
        if piece.owner.coming is not None:
            self._clear(piece.owner)
        if piece.storage is None:
            raise RuntimeError(
                f"the activations of {piece.owner} are in host memory; the program must list their RELOAD before "
                "the backward"
            )
        empty = torch.empty(0, dtype=saved.dtype, device=self.device)
        return empty.set_(piece.storage, saved.offset, saved.size, saved.stride)

    def _clear(self, kept: _Kept) -> None:
        """Wait for the copies under way; then the buffers are free."""
        for wait in (kept.leaving, kept.coming):
            if wait is not None:
                wait()
        kept.leaving = kept.coming = None
        self.host.give_back(kept.buffers)
        kept.buffers, kept.moved = [], []


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _cut(storage: torch.UntypedStorage, views: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """The bytes of a storage in pieces as long as the views."""
    whole = torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (storage.nbytes(),), (1,))
    return torch.split(whole, [view.numel() for view in views])
