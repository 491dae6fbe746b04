"""How many bytes of activations are alive on the device: exact, by storage.

Everything that holds activations reports them once: forwards what autograd saves, weight gradients the factors that
they wait with. A storage counts once however many tensors view it, from then until it is freed, which a weak
reference tells. What outlives a pass does not count: weights are named beforehand, and a storage that two forwards
of one stage save is a table (rotary angles).

Not counted are temporary tensors within a pass, those that recomputation makes inside a backward, and what is on
its way to another rank.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor


class _Counted:
    """A storage that is alive."""

    __slots__ = ("bytes", "forward", "reference", "stage")

    def __init__(self, reference: weakref.ref[torch.UntypedStorage], size: int, stage: int, forward: int) -> None:
        self.reference, self.bytes, self.stage, self.forward = reference, size, stage, forward


class ActivationMeter:
    """Counts the storages that are reported to it.

    Args:
        lasting: Tensors whose storages are no activations, weights above all.
    """

    def __init__(self, lasting: Iterable[Tensor] = ()) -> None:
        self._lasting = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in lasting)}
        self._counted: dict[int, _Counted] = {}
        # A storage may be freed on any thread, at any moment: what is freed queues here until somebody counts.
        self._freed: deque[int] = deque()
        self._alive = self._peak = 0

    def save(self, storage: torch.UntypedStorage, stage: int, forward: int) -> bool:
        """Count a storage that the `forward`-th forward pass, on `stage`, keeps; False if it outlives the pass."""
        address = storage._cdata
        if address in self._lasting:
            return False
        self._settle()
        known = self._counted.get(address)
        if known is None:
            self._add(storage, stage, forward)
            return True
        if known.stage == stage and known.forward != forward:
            self._alive -= known.bytes
            known.bytes = 0
        return known.bytes > 0

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that anybody else keeps."""
        if storage._cdata not in self._lasting:
            self._settle()
            if storage._cdata not in self._counted:
                self._add(storage, -1, -1)

    @property
    def alive_bytes(self) -> int:
        """Alive now."""
        self._settle()
        return self._alive

    def take_peak(self) -> int:
        """The most that was alive at a time since the last call."""
        self._settle()
        peak, self._peak = self._peak, self._alive
        return peak

    def _add(self, storage: torch.UntypedStorage, stage: int, forward: int) -> None:
        address, freed = storage._cdata, self._freed
        reference = weakref.ref(storage, lambda _: freed.append(address))
        size = storage.nbytes()
        self._counted[address] = _Counted(reference, size, stage, forward)
        self._alive += size
        self._peak = max(self._peak, self._alive)

    def _settle(self) -> None:
        """Before anything is added: an address may belong to another storage by now."""
        while self._freed:
            self._alive -= self._counted.pop(self._freed.popleft()).bytes
