"""Which units of the decoder each pipeline stage gets, and what they cost."""

from __future__ import annotations

from parallel.pipeline.partition import partition_by_cost
from trainer.models.config import ModelConfig


def unit_names(model: ModelConfig) -> tuple[str, ...]:
    """The chain of units in the order of the forward pass."""
    return ("embed", *(f"blocks.{index}" for index in range(model.layers)), "head")


def unit_parameters(model: ModelConfig) -> dict[str, int]:
    """Matrix elements of each unit (norm vectors are left out; a tied head counts none of its own)."""
    head_dim = model.head_dim
    attention = model.hidden * head_dim * (2 * model.heads + 2 * model.key_value_heads)
    feed_forward = model.hidden * model.feed_forward * (3 if model.activation == "swiglu" else 2)
    table = model.vocab * model.hidden
    sizes = dict.fromkeys(unit_names(model), attention + feed_forward)
    sizes["embed"], sizes["head"] = table, 0 if model.tied_embeddings else table
    return sizes


def unit_flops(model: ModelConfig, sequence: int) -> dict[str, float]:
    """FLOPs of each unit per token, forward and backward, without recomputation.

    A matrix of n elements costs 6 n (2 forward, 4 backward); attention scores and their use cost 12 s h per token
    and block, of which the causal mask needs half. An embedding row is read, not multiplied.
    """
    sizes = unit_parameters(model)
    attention = 6.0 * sequence * model.heads * model.head_dim
    flops = {name: 6.0 * size + attention for name, size in sizes.items()}
    flops["embed"], flops["head"] = 0.0, 6.0 * model.vocab * model.hidden
    return flops


def stage_units(
    model: ModelConfig, sequence: int, stages: int, blocks_per_stage: tuple[int, ...] | None = None
) -> tuple[tuple[str, ...], ...]:
    """The units of each stage: as asked for, or balanced by FLOPs, the head's included."""
    names = unit_names(model)
    if blocks_per_stage is not None:
        counts = list(blocks_per_stage)
        counts[0] += 1
        counts[-1] += 1
        starts = [sum(counts[:index]) for index in range(stages)]
        return tuple(names[start : start + count] for start, count in zip(starts, counts, strict=True))
    flops = unit_flops(model, sequence)
    parts = partition_by_cost([flops[name] for name in names], stages)
    return tuple(names[part.start : part.stop] for part in parts)
