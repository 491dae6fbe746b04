"""What the passes of a unit leave in memory for later ones, in bytes per token, from the shapes alone. Pure: no torch
unless it has to be asked for a GPU. The formulas are explained, and summed up, in trainer/memory.py."""

from __future__ import annotations

from trainer.config.run import ResolvedRun

FP32_BYTES = 4


def element_bytes(run: ResolvedRun) -> int:
    """Bytes of a weight or activation in compute."""
    return 2 if run.config.train.precision == "bf16" else FP32_BYTES


def uses_gpu(run: ResolvedRun) -> bool:
    """Whether the run computes on GPUs, as far as this machine can tell."""
    device = run.config.run.device
    if device != "auto":
        return device == "cuda"
    import torch

    return torch.cuda.is_available()


def activation_bytes(run: ResolvedRun, unit: str) -> int:
    """Bytes per token that the forward of `unit` keeps for its backward on one tensor rank."""
    model, tensor, size = run.config.model, run.layout.tensor, element_bytes(run)
    norm = model.hidden * (2 * size if uses_gpu(run) else 2 * FP32_BYTES + size)
    if unit == "embed":
        return 8  # the token ids
    if unit == "head":
        return norm + model.vocab // tensor * FP32_BYTES
    if run.config.train.recompute == "full":
        return model.hidden * size
    heads = model.head_dim * (2 * model.heads + 2 * model.key_value_heads) // tensor
    feed_forward = (4 if model.activation == "swiglu" else 2) * model.feed_forward // tensor
    return 2 * norm + (heads + (feed_forward if run.config.train.recompute == "none" else 0)) * size


def weight_activation_bytes(run: ResolvedRun, unit: str) -> int:
    """Bytes per token that the I of `unit` leaves for its W on one tensor rank: both factors of every product."""
    model, tensor, size = run.config.model, run.layout.tensor, element_bytes(run)
    if unit == "embed":
        return model.hidden * size + 8
    if unit == "head":
        return (model.hidden + model.vocab // tensor) * size
    attention = model.head_dim * (2 * model.heads + 2 * model.key_value_heads) // tensor
    feed_forward = (3 if model.activation == "swiglu" else 2) * model.feed_forward // tensor
    # Inputs of the two halves and the gradients of their outputs: H each, everything inside split.
    return (4 * model.hidden + attention + feed_forward) * size
