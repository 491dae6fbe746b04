"""What the passes of each part of the model cost, from the sizes alone: what is planned with until it is measured.

Times are FLOPs over the rate that a rank is planned to compute at (offload.activations.compute_flops_per_second);
only their ratios matter, to each other and to the copies of activations, which are bytes over the planned bandwidth.
A matrix costs the same in F, I and W. Attention scores have no weights: their backward, twice their forward, is all
in I. Recomputation runs the forward again within I (or B). Transfers count nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence

from parallel.pipeline.costs import Costs
from trainer.config.run import ResolvedRun
from trainer.models.partition import feed_forward_elements, stage_units, unit_flops, unit_products
from trainer.sizes import activation_bytes, weight_activation_bytes


def derived_costs(run: ResolvedRun) -> Costs:
    """Costs per part of the model for one micro-batch.

    Activations weigh what they take in memory: 1 is the heaviest part's, before its I or between I and W. (With
    recomputation a part weighs more between the halves: W needs what I has computed again.)
    """
    model, train = run.config.model, run.config.train
    parts = stage_units(model, train.sequence, run.parts, run.config.parallel.pipeline.partition)
    rank_rate = run.config.offload.activations.compute_flops_per_second
    rate = rank_rate * run.layout.tensor / (run.batch.micro_batch * train.sequence)
    products, flops = unit_products(model), unit_flops(model, train.sequence)
    forward, inputs, weights = [], [], []
    for part in parts:
        in_products = sum(2.0 * products[name] for name in part)
        scores = sum(flops[name] for name in part) / 3 - in_products
        again = sum(recomputed_flops(run, name) for name in part)
        forward.append((in_products + scores) / rate)
        inputs.append((in_products + 2 * scores + again) / rate)
        weights.append(in_products / rate)
    copies = copy_seconds(run, parts)
    whole, halved = activations(run, parts)
    unit = max(*whole, *halved)
    return Costs(
        tuple(forward),
        tuple(inputs),
        tuple(weights),
        offload_seconds=copies,
        reload_seconds=copies,
        activation=tuple(size / unit for size in whole),
        weight_activation=tuple(size / unit for size in halved),
    )


def heaviest_activation_bytes(run: ResolvedRun) -> float:
    """Bytes of what the costs count as one activation."""
    parts = stage_units(run.config.model, run.config.train.sequence, run.parts, run.config.parallel.pipeline.partition)
    return max(size for sizes in activations(run, parts) for size in sizes)


def activations(run: ResolvedRun, parts: Sequence[Sequence[str]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Bytes of one micro-batch's activations on each part of the model: from F to I, and from I to W."""
    tokens = run.batch.micro_batch * run.config.train.sequence
    whole, halved = (
        tuple(float(tokens * sum(bytes_of(run, unit) for unit in part)) for part in parts)
        for bytes_of in (activation_bytes, weight_activation_bytes)
    )
    return whole, halved


def copy_seconds(run: ResolvedRun, parts: Sequence[Sequence[str]]) -> tuple[float, ...]:
    """How long the activations of one micro-batch take to host memory, or back, for each part of the model."""
    tokens = run.batch.micro_batch * run.config.train.sequence
    bandwidth = run.config.offload.activations.bandwidth_bytes_per_second
    if run.config.offload.activations.stages == "none":  # then nothing is copied, and nobody has to know the device
        return (0.0,) * len(parts)
    return tuple(tokens * sum(activation_bytes(run, unit) for unit in part) / bandwidth for part in parts)


def recomputed_flops(run: ResolvedRun, unit: str) -> float:
    """FLOPs per token that the backward of `unit` spends on computing activations again."""
    model, mode = run.config.model, run.config.train.recompute
    if mode == "none" or not unit.startswith("blocks."):
        return 0.0
    if mode == "selective":
        return 2.0 * feed_forward_elements(model)
    return unit_flops(model, run.config.train.sequence)[unit] / 3
