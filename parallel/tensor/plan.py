"""Applies tensor parallelism to a plain model from outside, as a plan says.

A plan maps patterns of module names to styles. The first matching pattern decides; a module that none matches
stays as it is and is whole on every rank.

============== ========================================================================================
style          what it does
============== ========================================================================================
enter          the module's input is whole; its gradient is summed over the group (start of a block half)
column         nn.Linear with its outputs split
enter-column   both: a column-parallel product that is a block half of its own (the head)
row            nn.Linear with its inputs split, output summed
vocabulary     nn.Embedding with its rows split
partial        nn.RMSNorm over split heads: weight whole, gradient summed
============== ========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from parallel.comm.channel import Channel
from parallel.flat.space import ParameterSpec
from parallel.gradients import WeightGradients
from parallel.tensor.functions import enter
from parallel.tensor.layers import ColumnLinear, PartialNorm, RowLinear, VocabularyEmbedding

Plan = Mapping[str, str]
_REPLACE: dict[str, tuple[type[nn.Module], Callable[[Any, Channel, WeightGradients], nn.Module]]] = {
    "column": (nn.Linear, ColumnLinear),
    "enter-column": (nn.Linear, ColumnLinear),
    "row": (nn.Linear, RowLinear),
    "vocabulary": (nn.Embedding, VocabularyEmbedding),
    "partial": (nn.RMSNorm, PartialNorm),
}
STYLES: tuple[str, ...] = ("enter", *_REPLACE)


def apply_plan(name: str, module: nn.Module, plan: Plan, channel: Channel, gradients: WeightGradients) -> nn.Module:
    """Make `module`, called `name` in the model, parallel; returns it (or what takes its place).

    Raises:
        ValueError: an unknown style, or a module that the style does not fit.
    """
    for child_name, child in list(module.named_children()):
        full = f"{name}.{child_name}"
        setattr(module, child_name, apply_plan(full, child, plan, channel, gradients))
    style = next((style for pattern, style in plan.items() if fnmatchcase(name, pattern)), None)
    if style is None:
        return module
    if style not in STYLES:
        raise ValueError(
            f"module {name!r}: unknown tensor-parallel style {style!r}; the styles are {', '.join(STYLES)}"
        )
    if style in _REPLACE:
        expected, replace = _REPLACE[style]
        if not isinstance(module, expected) or getattr(module, "bias", None) is not None:
            what = f"{type(module).__name__}{' with a bias' if getattr(module, 'bias', None) is not None else ''}"
            raise ValueError(
                f"module {name!r}: style {style!r} needs a plain {expected.__name__} without bias, not {what}"
            )
        module = replace(module, channel, gradients)
    if style.startswith("enter"):

        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return enter(arguments[0], channel, gradients), *arguments[1:]

        module.register_forward_pre_hook(before)
    return module


def parameter_specs(name: str, module: nn.Module, channel: Channel) -> list[ParameterSpec]:
    """How each parameter of a parallel `module` lies in the full model. Matrices decay, vectors do not."""
    specs = []
    for local, parameter in module.named_parameters():
        owner = module.get_submodule(local.rpartition(".")[0])
        shape = tuple(parameter.shape)
        full = list(shape)
        shard_dim: int | None = getattr(owner, "shard_dim", None)
        if shard_dim is not None:
            full[shard_dim] *= channel.size
        specs.append(
            ParameterSpec(
                name=f"{name}.{local}",
                shape=shape,
                full_shape=tuple(full),
                shard_dim=shard_dim,
                shard_index=channel.index if shard_dim is not None else 0,
                decay=len(shape) > 1,
            )
        )
    return specs
