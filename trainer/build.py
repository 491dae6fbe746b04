"""How a rank's engine is put together: a short list of named steps in a fixed order.

The order matters: modules are made without memory, made parallel from outside (tensor parallelism first, because
it decides the shapes), laid out in the flat space, given their gradient slots, wrapped for recomputation (last,
because wrapping must see the final modules), and only then filled with weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.comm.channel import Channel
from parallel.flat.buffers import FlatParameters
from parallel.flat.space import FlatSpace, build_space
from parallel.gradients import WeightGradients, attach_slot
from parallel.mesh import Mesh, PaperMesh
from parallel.pipeline.actions import Op
from parallel.pipeline.executor import Executor, Observer, unobserved
from parallel.pipeline.passes.forward import forward_only
from parallel.pipeline.program import Program
from parallel.pipeline.stage import Stage, keep_nothing
from parallel.tensor.functions import cross_entropy
from parallel.tensor.plan import apply_plan, parameter_specs
from parallel.zero.copies import CopiedGradients
from parallel.zero.gradients import DataChannels, GradientStore
from parallel.zero.norm import GradientNorm, counted_ranges
from parallel.zero.optimizer import ShardedOptimizer
from trainer.activations import build_activations
from trainer.config.run import ResolvedRun
from trainer.costs import derived_costs
from trainer.engine import Engine
from trainer.models.decoder import TENSOR_PLAN, unit_builders
from trainer.models.initialize import initial_weight
from trainer.optim.kernels import make_kernel
from trainer.optim.post_validation import PostValidation
from trainer.optim.step import OptimizerStep
from trainer.profile import shared
from trainer.program import build_program, numbers_of, units_of_parts

_EMBED = "embed"
_EMBED_WEIGHT = "embed.tokens.weight"


@dataclass(frozen=True)
class StageModules:
    """The modules of one stage of this rank.

    Attributes:
        index: The stage's number in the program.
        chain: Names of the units that the forward runs, in order.
        modules: All units that hold weights for it; with tied embeddings a head whose embedding is on another rank
            comes with a copy of the embedding that is not in its chain.
        copied: Whether another stage, with a lower number, holds the same part of the model.
        gradients: Queue of the stage's weight-gradient work.
    """

    index: int
    chain: tuple[str, ...]
    modules: dict[str, nn.Module]
    copied: bool
    gradients: WeightGradients


def build_modules(run: ResolvedRun, mesh: Mesh | PaperMesh, program: Program) -> list[StageModules]:
    """This rank's share of the model: parallel modules on the meta device, without memory."""
    rank = mesh.position["pipeline"]
    # On paper there is no channel, but layers need one only when they run; their shapes need its size and index.
    tensor = cast(Channel, mesh.channel("tensor"))
    parts, builders = units_of_parts(run), unit_builders(run.config.model)
    stages: list[StageModules] = []
    held: set[str] = set()
    for index in program.stages_of(rank):
        chain = parts[program.part_of(index)]
        names = dict.fromkeys(chain)
        if (
            run.config.model.tied_embeddings
            and "head" in chain
            and program.rank_of(index - program.part_of(index)) != rank
        ):
            names[_EMBED] = None
        gradients = WeightGradients(hold=tensor.size > 1)
        with torch.device("meta"):
            modules = {name: apply_plan(name, builders[name](), TENSOR_PLAN, tensor, gradients) for name in names}
        assert held.isdisjoint(modules), "a rank holds a unit once"
        held.update(modules)
        copied = index >= program.depth
        stages.append(StageModules(index, chain, modules, copied, gradients))
    return stages


def build_space_of(run: ResolvedRun, mesh: Mesh | PaperMesh, stages: Sequence[StageModules]) -> FlatSpace:
    """The flat space of this rank's units."""
    tied = run.config.model.tied_embeddings
    units = []
    for stage in stages:
        for name, module in stage.modules.items():
            specs = parameter_specs(name, module, cast(Channel, mesh.channel("tensor")))
            if tied and name == "head":
                specs = [spec for spec in specs if spec.name != "head.projection.weight"]
            if stage.copied or name not in stage.chain:
                specs = [replace(spec, tied_to=spec.name) for spec in specs]
            units.append((name, stage.index, specs))
    return build_space(units, splits=(run.layout.data_shard,))


def all_modules(stages: Sequence[StageModules]) -> dict[str, nn.Module]:
    """The units of all stages of a rank by name."""
    return {name: module for stage in stages for name, module in stage.modules.items()}


def attach_parameters(run: ResolvedRun, stages: Sequence[StageModules], parameters: FlatParameters) -> None:
    """Make the modules' parameters views of the flat buffer; a tied head shares the embedding's."""
    modules = all_modules(stages)
    parameters.attach(modules)
    if run.config.model.tied_embeddings and "head" in modules:
        modules["head"].get_submodule("projection").weight = parameters.parameters[_EMBED_WEIGHT]


def attach_gradients(
    run: ResolvedRun, stages: Sequence[StageModules], parameters: FlatParameters, store: GradientStore
) -> None:
    """Give every parameter its gradient slot. A tied weight whose embedding and head are here has two writers."""
    queues = {stage.index: stage.gradients for stage in stages}
    for unit in parameters.space.units:
        for slot in unit.slots:
            name = slot.spec.name
            attach_slot(parameters.parameters[name], store.slot(unit.name, name), queues[unit.stage])
    chains = {name: stage.index for stage in stages for name in stage.chain}
    if run.config.model.tied_embeddings and {_EMBED, "head"} <= set(chains):
        store.add_writer(_EMBED, chains["head"])


def copy_peers(run: ResolvedRun, program: Program, rank: int, stages: Sequence[StageModules]) -> dict[str, int]:
    """For each unit whose weights another pipeline rank holds as well, that rank."""
    peers = {}
    for stage in stages:
        for name in stage.modules:
            if name not in stage.chain:
                peers[name] = program.rank_of(stage.index - program.part_of(stage.index))
            for twin in program.twins_of(stage.index):
                peers[name] = program.rank_of(twin)
        if run.config.model.tied_embeddings and _EMBED in stage.chain:
            head = program.rank_of(stage.index + program.depth - 1)
            if head != rank:
                peers.setdefault(_EMBED, head)
    return peers


def recompute_units(run: ResolvedRun, stage: StageModules) -> list[tuple[str, nn.Module]]:
    """The chain with what is to be computed again in the backward wrapped: whole blocks, or their feed-forward."""
    mode = run.config.train.recompute
    for name in stage.chain:
        module = stage.modules[name]
        if name.startswith("blocks.") and mode == "full":
            stage.modules[name] = Recomputed(module)
        elif name.startswith("blocks.") and mode == "selective":
            module.feed_forward = Recomputed(module.get_submodule("feed_forward"))
    return [(name, stage.modules[name]) for name in stage.chain]


class Recomputed(nn.Module):
    """Keeps only the input of `module` and computes its activations again when the backward needs them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        # The decoder draws no random numbers, so there is no generator state to keep.
        output: Tensor = checkpoint(self.module, x, use_reentrant=False, preserve_rng_state=False)
        return output


def initialize(run: ResolvedRun, parameters: FlatParameters) -> None:
    """Fill the flat parameters from the run's seed, the same on every layout."""
    for unit in parameters.space.units:
        for slot in unit.slots:
            weight = initial_weight(run.config.model, slot.spec, run.config.run.seed)
            with torch.no_grad():
                parameters.parameters[slot.spec.name].copy_(weight)


def await_weights(run: ResolvedRun, optimizer: ShardedOptimizer, unit: str) -> None:
    """Before a unit's forward: wait for the weights that it reads. A tied head reads those of the embedding."""
    optimizer.finish_gather(unit)
    if unit == "head" and run.config.model.tied_embeddings:
        optimizer.finish_gather(_EMBED)


def build_optimizer_step(
    run: ResolvedRun, mesh: Mesh, optimizer: ShardedOptimizer, copies: CopiedGradients
) -> OptimizerStep:
    """The tail of the step, with or without a barrier before the updates."""
    config = run.config.optimizer
    units = optimizer.parameters.space.units
    counted = {unit.name: counted_ranges(unit.slots, mesh.position["tensor"]) for unit in units}
    axes = ("tensor", "data_shard") if optimizer.sharded else ("tensor",)
    norm = GradientNorm(optimizer, counted, mesh.channel(*axes), mesh.beside_pipeline)
    if config.validation == "after":
        return PostValidation(norm, optimizer, copies, config.grad_clip, mesh.beside_pipeline)
    return OptimizerStep(norm, optimizer, copies, config.grad_clip)


def build_engine(run: ResolvedRun, mesh: Mesh, device: torch.device, observer: Observer = unobserved) -> Engine:
    """Everything that this rank trains with, with initial weights (on the meta device: shapes only)."""
    config, numbers = run.config, numbers_of(run)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.precision]
    # A search that is limited by time finds something else on every rank: one plans for all.
    program = build_program(run) if device.type == "meta" else shared(mesh, lambda: build_program(run))
    stages = build_modules(run, mesh, program)
    space = build_space_of(run, mesh, stages)
    parameters = FlatParameters(space, dtype, device)
    attach_parameters(run, stages, parameters)
    data = DataChannels(
        mesh.channel("data_shard"), mesh.channel("data_replicate"), mesh.channel("data_shard", "data_replicate")
    )
    passes = {stage.index: len(program.microbatches_of(stage.index)) for stage in stages}
    store = GradientStore(space, numbers, data, device, passes)
    attach_gradients(run, stages, parameters, store)
    optimizer = ShardedOptimizer(parameters, store, make_kernel(config.optimizer))
    chains = [recompute_units(run, stage) for stage in stages]
    if device.type != "meta":
        initialize(run, parameters)
        optimizer.adopt_parameters()

    pipeline = mesh.channel("pipeline")
    copies = CopiedGradients(mesh.beside_pipeline, store, copy_peers(run, program, pipeline.index, stages))
    step = build_optimizer_step(run, mesh, optimizer, copies)
    activations = build_activations(run, pipeline.index, parameters.buffer)
    if activations is not None:
        activations.plan(program, derived_costs(run))
        for stage in stages:
            stage.gradients.on_keep = activations.store.hold
    tokens = config.train.sequence * run.batch.global_batch
    running = {
        stage.index: Stage(
            stage.index,
            chain,
            partial(_loss, mesh, tokens) if program.after(stage.index) is None else None,
            stage.gradients,
            store,
            partial(await_weights, run, optimizer),
            keep_nothing if activations is None else activations.keeper,
        )
        for stage, chain in zip(stages, chains, strict=True)
    }
    shape = (run.batch.micro_batch, config.train.sequence, config.model.hidden)
    border = torch.empty(shape, dtype=dtype, device=device)
    handlers = {Op.REDUCE: step.reduce, Op.SYNC: step.sync, Op.UPDATE: step.update, Op.GATHER: step.gather}
    handlers |= {} if activations is None else activations.handlers
    train, evaluate = (
        Executor(each, running, pipeline, border, handlers, observer, step.validate)
        for each in (program, forward_only(program))
    )
    return Engine(mesh, space, parameters, optimizer, step, program, train, evaluate, activations)


def _loss(mesh: Mesh, tokens: int, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """This micro-batch's part of the mean loss per token over the `tokens` tokens of the global batch."""
    tensor = mesh.channel("tensor")
    start = logits_BSV.shape[-1] * tensor.index
    summed = cross_entropy(logits_BSV.flatten(0, 1), targets_BS.reshape(-1), start, tensor)
    return summed / tokens
