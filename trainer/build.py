"""How a rank's engine is put together: a short list of named steps in a fixed order.

The order matters: modules are made without memory, made parallel from outside (tensor parallelism first, because
it decides the shapes), laid out in the flat space, given their gradient slots, wrapped for recomputation (last,
because wrapping must see the final modules), and only then filled with weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.comm.channel import Channel
from parallel.flat.buffers import FlatParameters
from parallel.flat.space import FlatSpace, ParameterSpec, build_space
from parallel.gradients import WeightGradients, attach_slot
from parallel.mesh import Mesh, PaperMesh
from parallel.pipeline.actions import Op
from parallel.pipeline.executor import Executor, Observer, unobserved
from parallel.pipeline.passes.forward import forward_only
from parallel.pipeline.passes.reduce import add_reduce
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.passes.update import add_update
from parallel.pipeline.program import Program
from parallel.pipeline.schedules import registry
from parallel.pipeline.stage import Stage
from parallel.pipeline.verify import check
from parallel.tensor.functions import cross_entropy
from parallel.tensor.plan import apply_plan, parameter_specs
from parallel.zero.config import ThreeNumbers
from parallel.zero.gradients import DataChannels, GradientStore
from parallel.zero.optimizer import ShardedOptimizer
from parallel.zero.tied import TiedGradient
from trainer.config.run import ResolvedRun
from trainer.engine import Engine, OptimizerStep
from trainer.models.decoder import TENSOR_PLAN, unit_builders
from trainer.models.initialize import initial_weight
from trainer.models.partition import stage_units
from trainer.optim.kernels import make_kernel

_EMBED = "embed"
_EMBED_WEIGHT = "embed.tokens.weight"


@dataclass(frozen=True)
class StageModules:
    """The modules of this rank's stage.

    Attributes:
        index: The stage's number.
        chain: Names of the units that the forward runs, in order.
        modules: All units that hold weights here; with tied embeddings the last stage holds a copy of the embedding
            that is not in its chain.
        gradients: Queue of the stage's weight-gradient work.
    """

    index: int
    chain: tuple[str, ...]
    modules: dict[str, nn.Module]
    gradients: WeightGradients


def numbers_of(run: ResolvedRun) -> ThreeNumbers:
    """The three ZeRO numbers for the run's layout."""
    return run.config.zero.numbers(run.layout.data_shard)


def build_program(run: ResolvedRun) -> Program:
    """The program of a training step: generated, verified, and completed by the passes."""
    stages = run.layout.pipeline
    program = registry.generate(run.config.parallel.pipeline.schedule, stages, run.batch.gradient_accumulation)
    program = pair_transfers(program)
    program = add_reduce(program, per_microbatch=numbers_of(run).grads > 1)
    program = add_update(program)
    check(program)
    return program


def build_modules(run: ResolvedRun, mesh: Mesh | PaperMesh) -> StageModules:
    """This rank's share of the model: parallel modules on the meta device, without memory."""
    model, pipeline = run.config.model, run.config.parallel.pipeline
    index = mesh.position["pipeline"]
    chain = stage_units(model, run.config.train.sequence, pipeline.stages, pipeline.partition)[index]
    held = dict.fromkeys(chain)
    if model.tied_embeddings and "head" in chain:
        held[_EMBED] = None
    # On paper there is no channel, but layers need one only when they run; their shapes need its size and index.
    tensor = cast(Channel, mesh.channel("tensor"))
    gradients = WeightGradients(hold=tensor.size > 1)
    builders = unit_builders(model)
    with torch.device("meta"):
        modules = {name: apply_plan(name, builders[name](), TENSOR_PLAN, tensor, gradients) for name in held}
    return StageModules(index, chain, modules, gradients)


def build_space_of(run: ResolvedRun, mesh: Mesh | PaperMesh, stage: StageModules) -> FlatSpace:
    """The flat space of this rank's units."""
    tied = run.config.model.tied_embeddings
    units = []
    for name, module in stage.modules.items():
        specs = parameter_specs(name, module, cast(Channel, mesh.channel("tensor")))
        if tied and name == "head":
            specs = [spec for spec in specs if spec.name != "head.projection.weight"]
        if name not in stage.chain:
            specs = [_copy_of(spec) for spec in specs]
        units.append((name, stage.index, specs))
    return build_space(units, splits=(run.layout.data_shard,))


def _copy_of(spec: ParameterSpec) -> ParameterSpec:
    return ParameterSpec(
        spec.name, spec.shape, spec.full_shape, spec.shard_dim, spec.shard_index, spec.decay, spec.name
    )


def attach_parameters(run: ResolvedRun, stage: StageModules, parameters: FlatParameters) -> None:
    """Make the modules' parameters views of the flat buffer; a tied head shares the embedding's."""
    parameters.attach(stage.modules)
    if run.config.model.tied_embeddings and "head" in stage.modules:
        stage.modules["head"].get_submodule("projection").weight = parameters.parameters[_EMBED_WEIGHT]


def attach_gradients(run: ResolvedRun, stage: StageModules, parameters: FlatParameters, store: GradientStore) -> None:
    """Give every parameter its gradient slot. A tied weight whose embedding and head are here has two writers."""
    both = run.config.model.tied_embeddings and {_EMBED, "head"} <= set(stage.chain)
    for unit in parameters.space.units:
        for slot in unit.slots:
            name = slot.spec.name
            uses = 2 if both and name == _EMBED_WEIGHT else 1
            attach_slot(parameters.parameters[name], store.slot(unit.name, name, uses))


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


def build_engine(run: ResolvedRun, mesh: Mesh, device: torch.device, observer: Observer = unobserved) -> Engine:
    """Everything that this rank trains with, with initial weights (on the meta device: shapes only)."""
    config, numbers = run.config, numbers_of(run)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.precision]
    stage_modules = build_modules(run, mesh)
    space = build_space_of(run, mesh, stage_modules)
    parameters = FlatParameters(space, dtype, device)
    attach_parameters(run, stage_modules, parameters)
    data = DataChannels(
        mesh.channel("data_shard"), mesh.channel("data_replicate"), mesh.channel("data_shard", "data_replicate")
    )
    store = GradientStore(space, numbers, data, device)
    attach_gradients(run, stage_modules, parameters, store)
    optimizer = ShardedOptimizer(parameters, store, make_kernel(config.optimizer))
    units = recompute_units(run, stage_modules)
    if device.type != "meta":
        initialize(run, parameters)
        optimizer.adopt_parameters()

    tied_share = store.units[_EMBED].owned if config.model.tied_embeddings and _EMBED in store.units else None
    tied = TiedGradient(mesh.channel("pipeline"), tied_share)
    step = OptimizerStep(mesh, optimizer, space, tied, config.optimizer.grad_clip)
    is_last = stage_modules.index == run.layout.pipeline - 1
    stage = Stage(
        stage_modules.index,
        units,
        partial(_loss, mesh, config.train.sequence * run.batch.global_batch) if is_last else None,
        stage_modules.gradients,
        store,
        partial(await_weights, run, optimizer),
    )
    program = build_program(run)
    shape = (run.batch.micro_batch, config.train.sequence, config.model.hidden)
    border = torch.empty(shape, dtype=dtype, device=device)
    handlers = {Op.REDUCE: step.reduce, Op.UPDATE: step.update, Op.GATHER: step.gather}
    train, evaluate = (
        Executor(each, {stage.index: stage}, mesh.channel("pipeline"), border, handlers, observer)
        for each in (program, forward_only(program))
    )
    return Engine(mesh, space, parameters, optimizer, step, program, train, evaluate)


def _loss(mesh: Mesh, tokens: int, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """This micro-batch's part of the mean loss per token over the `tokens` tokens of the global batch."""
    tensor = mesh.channel("tensor")
    start = logits_BSV.shape[-1] * tensor.index
    summed = cross_entropy(logits_BSV.flatten(0, 1), targets_BS.reshape(-1), start, tensor)
    return summed / tokens
