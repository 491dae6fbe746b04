"""Which units of the decoder each pipeline stage gets, and what they cost."""

from __future__ import annotations

from parallel.pipeline.partition import partition_by_cost
from trainer.models.config import ModelConfig


def unit_names(model: ModelConfig) -> tuple[str, ...]:
    """The chain of units in the order of the forward pass."""
    return ("embed", *(f"blocks.{index}" for index in range(model.layers)), "head")


def feed_forward_elements(model: ModelConfig) -> int:
    """Matrix elements of a block's feed-forward."""
    return model.hidden * model.feed_forward * (3 if model.activation == "swiglu" else 2)


def unit_parameters(model: ModelConfig) -> dict[str, int]:
    """Matrix elements of each unit (norm vectors are left out; a tied head counts none of its own)."""
    head_dim = model.head_dim
    attention = model.hidden * head_dim * (2 * model.heads + 2 * model.key_value_heads)
    table = model.vocab * model.hidden
    sizes = dict.fromkeys(unit_names(model), attention + feed_forward_elements(model))
    sizes["embed"], sizes["head"] = table, 0 if model.tied_embeddings else table
    return sizes


def unit_products(model: ModelConfig) -> dict[str, int]:
    """Matrix elements that each unit multiplies a token with: an embedding row is read, a tied head multiplies."""
    return {**unit_parameters(model), "embed": 0, "head": model.vocab * model.hidden}


def unit_flops(model: ModelConfig, sequence: int) -> dict[str, float]:
    """FLOPs of each unit per token, forward and backward, without recomputation.

    A matrix of n elements costs 6 n (2 forward, 4 backward); attention scores and their use cost 12 s h per token
    and block, of which the causal mask needs half.
    """
    attention = 6.0 * sequence * model.heads * model.head_dim
    products = unit_products(model).items()
    return {name: 6.0 * size + (attention if name.startswith("blocks.") else 0.0) for name, size in products}


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
