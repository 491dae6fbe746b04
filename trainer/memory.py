"""What a rank needs to hold, from the shapes alone: weights, gradients, optimizer state, activations.

The first three are exact sums over the flat space. Activations are derived from what autograd keeps for the
decoder's operations, per token and block, in elements (H hidden, A = head dimension x heads, K = head dimension x
key/value heads, F feed-forward; A, K and F of one tensor rank):

    nothing recomputed   4 H + 2 A + 2 K + 4 F  (GELU: 2 F)   norm inputs and outputs, q, k, v, o, feed-forward
    selective            4 H + 2 A + 2 K                      the feed-forward is computed again
    full                 H                                    the block's input

and for the head 2 H plus the fp32 softmax over the rank's vocabulary. On a CPU a norm is not one kernel: it keeps H
more, and its input and this in fp32. Where the backward is split, the factors of the weight gradients stay from I to
W: 4 H + 2 A + 2 K + 3 F (GELU: 2 F). Activations that are offloaded do not count while they are in host memory.
Temporary tensors of the operation under way, the back end's buffers and the interpreter are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from parallel.flat.space import FlatSpace
from parallel.pipeline.actions import Op
from parallel.pipeline.program import Program
from parallel.pipeline.simulate import peak_activations, simulate
from parallel.zero.config import ThreeNumbers
from trainer.config.run import ResolvedRun
from trainer.costs import activations, derived_costs
from trainer.sizes import FP32_BYTES, element_bytes


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
    run: ResolvedRun, space: FlatSpace, numbers: ThreeNumbers, activations_bytes: int, replicas: int = 1
) -> MemoryEstimate:
    """The estimate for a rank that holds `space` and so many bytes of activations (`activation_peaks`).

    Args:
        replicas: Copies of the model in the program: what a rank exchanges with the other copy arrives beside its own.
    """
    compute_bytes = element_bytes(run)
    owned = space.numel // numbers.optim
    separate_master = compute_bytes != FP32_BYTES
    largest = max(unit.numel for unit in space.units)
    # With sharded gradients two units are being reduced while a third is written.
    gradients = space.numel if numbers.grads == 1 else owned + 3 * largest
    gradients += owned if replicas > 1 else 0
    state = 3 if separate_master else 2
    if run.config.optimizer.validation == "after" and run.layout.pipeline > 1:
        state += 3  # master weights and moments as they were before the update
    return MemoryEstimate(
        parameters_bytes=space.numel * compute_bytes,
        gradients_bytes=gradients * FP32_BYTES,
        optimizer_bytes=owned * FP32_BYTES * state,
        activations_bytes=activations_bytes,
    )


def activation_peaks(run: ResolvedRun, parts: tuple[tuple[str, ...], ...], program: Program) -> list[int]:
    """The most bytes of activations that each pipeline rank holds at a time while it runs `program`.

    Args:
        parts: The units of each part of the model.
    """
    whole, halved = activations(run, parts)
    costs = replace(derived_costs(run), activation=whole, weight_activation=halved)
    if Op.OFFLOAD in program.ops:  # then time decides what is where
        return [round(peak) for peak in simulate(program, costs).peak_activations]
    return [round(peak_activations(program, rank, costs)[0]) for rank in range(program.ranks)]
