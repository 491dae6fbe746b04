"""What a rank needs to hold, from the shapes alone: weights, gradients, optimizer state, activations.

The first three are exact sums over the flat space. Activations are derived from what autograd keeps for the
decoder's operations, per token and block, in elements (H hidden, A = head dimension x heads, K = head dimension x
key/value heads, F feed-forward; A, K and F of one tensor rank):

    nothing recomputed   4 H + 2 A + 2 K + 4 F  (GELU: 2 F)   norm inputs and outputs, q, k, v, o, feed-forward
    selective            4 H + 2 A + 2 K                      the feed-forward is computed again
    full                 H                                    the block's input

and for the head 2 H plus the fp32 softmax over the rank's vocabulary. On a CPU a norm is not one kernel and keeps
H more. Where the backward is split, the factors of the weight gradients stay from I to W: 4 H + 2 A + 2 K + 3 F
(GELU: 2 F). Temporary tensors of the operation under way, the back end's buffers and the interpreter are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parallel.flat.space import FlatSpace
from parallel.pipeline.costs import Costs
from parallel.pipeline.program import Program
from parallel.pipeline.simulate import peak_activations
from parallel.zero.config import ThreeNumbers
from trainer.config.run import ResolvedRun

FP32_BYTES = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank holds at its peak, by category."""

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes


def estimate_memory(
    run: ResolvedRun,
    space: FlatSpace,
    numbers: ThreeNumbers,
    parts: tuple[tuple[str, ...], ...],
    program: Program,
    rank: int,
) -> MemoryEstimate:
    """The estimate for pipeline rank `rank`, which holds `space`; `parts` are the units of each part of the model."""
    compute_bytes = element_bytes(run)
    owned = space.numel // numbers.optim
    separate_master = compute_bytes != FP32_BYTES
    largest = max(unit.numel for unit in space.units)
    # With sharded gradients two units are being reduced while a third is written.
    gradients = space.numel if numbers.grads == 1 else owned + 3 * largest
    tokens = run.batch.micro_batch * run.config.train.sequence
    whole, halved = (
        tuple(float(tokens * sum(bytes_of(run, name) for name in part)) for part in parts)
        for bytes_of in (activation_bytes, weight_activation_bytes)
    )
    peak, _ = peak_activations(program, rank, Costs(activation=whole, weight_activation=halved))
    return MemoryEstimate(
        parameters_bytes=space.numel * compute_bytes,
        gradients_bytes=gradients * FP32_BYTES,
        optimizer_bytes=owned * FP32_BYTES * (3 if separate_master else 2),
        activations_bytes=round(peak),
    )


def element_bytes(run: ResolvedRun) -> int:
    """Bytes of a weight or activation in compute."""
    return 2 if run.config.train.precision == "bf16" else FP32_BYTES


def uses_gpu(run: ResolvedRun) -> bool:
    """Whether the run computes on GPUs, as far as this machine can tell."""
    device = run.config.run.device
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def activation_bytes(run: ResolvedRun, unit: str) -> int:
    """Bytes per token that the forward of `unit` keeps for its backward on one tensor rank."""
    model, tensor, size = run.config.model, run.layout.tensor, element_bytes(run)
    norm = model.hidden * (2 if uses_gpu(run) else 3)
    if unit == "embed":
        return 8  # the token ids
    if unit == "head":
        return norm * size + model.vocab // tensor * FP32_BYTES
    if run.config.train.recompute == "full":
        return model.hidden * size
    heads = model.head_dim * (2 * model.heads + 2 * model.key_value_heads) // tensor
    feed_forward = (4 if model.activation == "swiglu" else 2) * model.feed_forward // tensor
    kept = 2 * norm + heads + (feed_forward if run.config.train.recompute == "none" else 0)
    return kept * size


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
