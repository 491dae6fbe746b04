"""The flat space in memory: one parameter buffer whose views are the modules' parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from parallel.flat.space import FlatSpace, Unit
from parallel.memory import flat_zeros


class FlatParameters:
    """The weights of a rank in one contiguous buffer.

    `attach` makes each parameter of the units' modules a view of its slot, so that a gather or an update of a
    range is seen by the module without a copy.
    """

    def __init__(self, space: FlatSpace, dtype: torch.dtype, device: torch.device) -> None:
        self.space = space
        self.buffer = flat_zeros(space.numel, dtype, device)
        self.parameters: dict[str, nn.Parameter] = {}

    def unit(self, unit: Unit) -> Tensor:
        """The unit's elements, padding included: shape (unit.numel,)."""
        return self.buffer[unit.range.start : unit.range.stop]

    def attach(self, modules: Mapping[str, nn.Module]) -> None:
        """Replace the parameters of `modules` (one module per unit name, on any device) by views of the buffer.

        The values are those of the buffer: zeros until somebody fills it.

        Raises:
            ValueError: a parameter's shape is not the one that the space was built for.
        """
        for unit in self.space.units:
            buffer = self.unit(unit)
            for slot in unit.slots:
                path, _, leaf = slot.spec.name.removeprefix(f"{unit.name}.").rpartition(".")
                owner = modules[unit.name].get_submodule(path)
                shape = tuple(getattr(owner, leaf).shape)
                if shape != slot.spec.shape:
                    raise ValueError(f"parameter {slot.spec.name!r} has shape {shape}, its slot {slot.spec.shape}")
                view = buffer[slot.range.start : slot.range.stop].view(shape)
                # `.data` has a version counter of its own: a gather into one unit must not look to autograd like a
                # change of all others. That no unit changes between its forward and backward is the program's order.
                parameter = nn.Parameter(view.data)
                setattr(owner, leaf, parameter)
                self.parameters[slot.spec.name] = parameter
