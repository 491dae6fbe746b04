"""Gradients and optimizer state spread over data-parallel ranks, unit by unit, against plain sums and plain AdamW.

The parts are tested without a model: a flat space of a few units whose gradients are written by hand. Gradients are
small whole numbers where sums are compared, so that every order of adding them is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.flat.buffers import FlatParameters
from parallel.flat.space import FlatSpace, ParameterSpec, Range, build_space
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.zero.config import ThreeNumbers, ZeroConfig
from parallel.zero.gradients import DataChannels, GradientStore
from parallel.zero.optimizer import ShardedOptimizer
from tests.ranks import run_ranks
from tests.support import make_run, rank_batches
from trainer.build import build_engine
from trainer.optim.config import OptimizerConfig
from trainer.optim.kernels import TorchAdamW

MICRO_BATCHES = 3
PASSES = {0: MICRO_BATCHES}
LAYOUTS = {
    2: [Layout(data_shard=2), Layout(data_replicate=2)],
    3: [Layout(data_shard=3), Layout(data_replicate=3)],
    4: [Layout(data_shard=4), Layout(data_shard=2, data_replicate=2), Layout(data_replicate=4)],
}
CPU = torch.device("cpu")


def space_of(*units: tuple[str, Mapping[str, tuple[int, ...]]], shard: int) -> FlatSpace:
    """Units of a single stage; matrices decay, vectors do not."""
    specs = [
        (unit, 0, [ParameterSpec(name, shape, shape, decay=len(shape) > 1) for name, shape in parameters.items()])
        for unit, parameters in units
    ]
    return build_space(specs, (shard,))


def gapped_space(shard: int) -> FlatSpace:
    """Two units of the same padded length: a gap between the slots of one is inside a slot of the other."""
    whole, gapped = ("whole", {"w.all": (6, 10)}), ("gapped", {"g.first": (3, 3), "g.second": (3, 3), "g.v": (26,)})
    return space_of(whole, gapped, ("norm", {"n.v": (5,)}), shard=shard)


def data_channels(mesh: Mesh) -> DataChannels:
    both = mesh.channel("data_shard", "data_replicate")
    return DataChannels(mesh.channel("data_shard"), mesh.channel("data_replicate"), both)


def whole_gradient(name: str, shape: tuple[int, ...], rank: int, microbatch: int) -> Tensor:
    """Whole numbers from -8 to 8."""
    seed = sum(name.encode()) * 1000 + rank * 10 + microbatch
    return torch.from_numpy(np.random.default_rng(seed).integers(-8, 9, shape)).float()


def summed_gradient(name: str, shape: tuple[int, ...], ranks: int) -> Tensor:
    """Over all ranks and micro-batches of a step, exactly."""
    parts = [
        whole_gradient(name, shape, rank, microbatch) for rank in range(ranks) for microbatch in range(MICRO_BATCHES)
    ]
    return torch.stack(parts).sum(0)


def write_step(store: GradientStore, space: FlatSpace, rank: int, *, skip: str = "") -> None:
    """All micro-batches of a step, the last unit's gradients first, as a backward writes them."""
    store.begin_step()
    for microbatch in range(MICRO_BATCHES):
        store.begin_backward(0)
        for unit in reversed(space.units):
            for slot in unit.slots:
                if slot.spec.name == skip:
                    continue
                gradient = whole_gradient(slot.spec.name, slot.spec.shape, rank, microbatch)

                def write(view: Tensor, fresh: bool, gradient: Tensor = gradient) -> None:
                    if fresh:
                        view.copy_(gradient)
                    else:
                        view.add_(gradient)

                store.slot(unit.name, slot.spec.name).accumulate(write)
        store.end_backward(0)
    store.close(0)
    store.finish()


def expected_unit(space: FlatSpace, name: str, ranks: int, *, skip: str = "") -> Tensor:
    """The sum over ranks and micro-batches, padding zero, shape (unit.numel,)."""
    unit = next(unit for unit in space.units if unit.name == name)
    total = torch.zeros(unit.numel)
    for slot in unit.slots:
        if slot.spec.name != skip:
            summed = summed_gradient(slot.spec.name, slot.spec.shape, ranks)
            total[slot.range.start : slot.range.stop] = summed.flatten()
    return total


def check_reductions() -> None:
    """On every layout and stage: the owned shares are the sums, in every step, whatever the buffers held before."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for layout in LAYOUTS[ranks]:
        mesh = Mesh(layout, "cpu")
        space = gapped_space(layout.data_shard)
        assert len({unit.numel for unit in space.units[:2]}) == 1, "they share staging buffers' sizes"
        for stage in (0, 1, 2):
            numbers = ZeroConfig(stage=stage).numbers(layout.data_shard)
            store = GradientStore(space, numbers, data_channels(mesh), CPU, PASSES)
            for skip in ("", "g.second", ""):
                write_step(store, space, rank, skip=skip)
                for name, unit in store.units.items():
                    expected = expected_unit(space, name, ranks, skip=skip)
                    own = unit.owned_range
                    assert own == unit.unit.share(mesh.position["data_shard"] if stage else 0, numbers.optim)
                    assert torch.equal(unit.owned, expected[own.start : own.stop]), (layout, stage, name, skip)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_owned_shares_are_the_sums_over_ranks_and_micro_batches(ranks: int) -> None:
    run_ranks(ranks, check_reductions)


def reductions_of_a_step(stage: Literal[0, 1, 2]) -> list[tuple[int, str]]:
    """(micro-batch, unit) at the moment its reduction is launched."""
    mesh = Mesh(Layout(data_shard=2), "cpu")
    space = gapped_space(2)
    store = GradientStore(space, ZeroConfig(stage=stage).numbers(2), data_channels(mesh), CPU, PASSES)
    launched: list[tuple[int, str]] = []
    for name, unit in store.units.items():
        reduce = unit._reduce

        def spy(buffer: Tensor, last: bool, name: str = name, reduce: Any = reduce) -> Any:
            launched.append((backwards[-1], name))
            return reduce(buffer, last)

        unit._reduce = spy  # type: ignore[method-assign]
    backwards: list[int] = []
    begin = store.begin_backward

    def begin_backward(stage: int) -> None:
        backwards.append(len(backwards))
        begin(stage)

    store.begin_backward = begin_backward  # type: ignore[method-assign]
    write_step(store, space, dist.get_rank())
    return launched


def test_when_units_are_reduced() -> None:
    """Once a step in order of readiness; with sharded gradients once a micro-batch."""
    order = ["norm", "gapped", "whole"]
    for stage, microbatches in ((0, [2]), (1, [2]), (2, [0, 1, 2])):
        expected = [(microbatch, unit) for microbatch in microbatches for unit in order]
        assert run_ranks(2, reductions_of_a_step, stage) == [expected] * 2


def check_memory() -> None:
    """Stage 2 keeps its share and at most three units' staging; stages 0 and 1 keep everything."""
    mesh = Mesh(Layout(data_shard=4), "cpu")
    units = [(f"unit {index}", {f"u{index}.w": (64, 64)}) for index in range(12)]
    space = space_of(*units, shard=4)
    held = {}
    for stage in (0, 1, 2):
        store = GradientStore(space, ZeroConfig(stage=stage).numbers(4), data_channels(mesh), CPU, PASSES)
        write_step(store, space, dist.get_rank())
        held[stage] = store.memory_bytes()
    assert held[0] == held[1] == 4 * space.numel
    assert 4 * space.numel // 4 < held[2] <= 4 * (space.numel // 4 + 3 * 64 * 64)


def test_sharded_gradients_take_less_memory() -> None:
    run_ranks(4, check_memory)


def reference_adamw(
    weights: dict[str, Tensor], gradients: list[dict[str, Tensor]], config: OptimizerConfig, divisors: list[float]
) -> None:
    """torch.optim.AdamW on plain parameters, in place."""
    parameters = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
    decayed = [parameter for parameter in parameters.values() if parameter.dim() > 1]
    others = [parameter for parameter in parameters.values() if parameter.dim() == 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    for step, divisor in zip(gradients, divisors, strict=True):
        for name, parameter in parameters.items():
            parameter.grad = step[name] / divisor
        optimizer.step()
    for name, parameter in parameters.items():
        weights[name] = parameter.detach()


def check_updates(dtype: torch.dtype) -> None:
    """Three updates on every layout and stage against AdamW on whole tensors."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    config = OptimizerConfig(lr=1e-2, weight_decay=0.3)
    divisors = [1.0, 2.5, 1.0]
    for layout in LAYOUTS[ranks]:
        mesh, space = Mesh(layout, "cpu"), gapped_space(layout.data_shard)
        slots = [slot for unit in space.units for slot in unit.slots]
        start = {slot.spec.name: torch.linspace(-1, 1, slot.spec.numel).view(slot.spec.shape) for slot in slots}
        gradient = {slot.spec.name: summed_gradient(slot.spec.name, slot.spec.shape, ranks) for slot in slots}
        expected = {name: weight.to(dtype).float().clone() for name, weight in start.items()}
        reference_adamw(expected, [gradient] * 3, config, divisors)
        for stage in (0, 1, 2):
            numbers = ZeroConfig(stage=stage).numbers(layout.data_shard)
            parameters = FlatParameters(space, dtype, CPU)
            views = {}
            for unit in space.units:
                for slot in unit.slots:
                    first = unit.offset + slot.range.start
                    view = parameters.buffer[first : first + slot.range.length].view(slot.spec.shape)
                    view.copy_(start[slot.spec.name])
                    views[slot.spec.name] = view
            store = GradientStore(space, numbers, data_channels(mesh), CPU, PASSES)
            optimizer = ShardedOptimizer(parameters, store, TorchAdamW(config))
            optimizer.adopt_parameters()
            for divisor in divisors:
                write_step(store, space, rank)
                optimizer.update(0, config.lr, torch.tensor(divisor), torch.zeros(()))
                optimizer.gather(0)
                optimizer.finish_gathers()
            assert optimizer.step_count() == 3
            assert_weights(views, expected, dtype, (layout, stage))
            assert_state_is_shared(optimizer, space, numbers, dtype)


def assert_weights(views: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, where: object) -> None:
    for name, view in views.items():
        if dtype == torch.float32:
            torch.testing.assert_close(view, expected[name], rtol=1e-6, atol=1e-7, msg=lambda text: f"{where}: {text}")
        else:
            # The masters are fp32, so the weights are the exact ones rounded once.
            torch.testing.assert_close(view.float(), expected[name], rtol=2**-8, atol=1e-7)


def assert_state_is_shared(
    optimizer: ShardedOptimizer, space: FlatSpace, numbers: ThreeNumbers, dtype: torch.dtype
) -> None:
    """Two moments, and masters beside bf16 weights, of 1 / k_optim of the space."""
    tensors = 2 if dtype == torch.float32 else 3
    assert optimizer.state_bytes() == tensors * 4 * space.numel // numbers.optim


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_updates_of_shares_are_those_of_adamw(dtype: torch.dtype) -> None:
    for ranks in (3, 4):
        run_ranks(ranks, check_updates, dtype)


def check_norm() -> None:
    """Counted elements only, each once, in owned shares; fp64 sums of long rows."""
    mesh = Mesh(Layout(data_shard=2), "cpu")
    space = space_of(("a", {"a.w": (80, 63)}), ("b", {"b.v": (31,)}), shard=2)
    store = GradientStore(space, ZeroConfig(stage=1).numbers(2), data_channels(mesh), CPU, PASSES)
    optimizer = ShardedOptimizer(FlatParameters(space, torch.float32, CPU), store, TorchAdamW(OptimizerConfig()))
    write_step(store, space, dist.get_rank())
    whole = {name: expected_unit(space, name, 2).double() for name in ("a", "b")}
    for counted in ({"a": [Range(0, 80 * 63)], "b": [Range(0, 31)]}, {"a": [Range(7, 99), Range(200, 5040)], "b": []}):
        squared = optimizer.norm_squared(counted)
        dist.all_reduce(squared)
        expected = sum(
            whole[name][part.start : part.stop].square().sum().item()
            for name, parts in counted.items()
            for part in parts
        )
        assert squared.item() == pytest.approx(expected, rel=1e-6)


def test_the_norm_counts_what_it_is_told_to_count() -> None:
    run_ranks(2, check_norm)


def gathers_left(case: dict[str, Any]) -> list[str]:
    """Units whose weights a forward pass did not wait for."""
    run = make_run(dist.get_world_size(), case)
    mesh = Mesh(run.layout, "cpu")
    engine = build_engine(run, mesh, CPU)
    data_rank = mesh.channel("data_shard", "data_replicate").index
    engine.train(rank_batches(run, data_rank, 0), 1e-3)
    engine.evaluate(rank_batches(run, data_rank, 1))
    return list(engine.optimizer._gathers)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_forward_waits_for_every_weight_it_reads(stages: int, tied: bool) -> None:
    """Also for the copy of a tied embedding, which the last stage reads in its head."""
    case = {"parallel.pipeline.stages": stages, "parallel.data_shard": 2, "model.tied_embeddings": tied}
    assert run_ranks(2 * stages, gathers_left, case) == [[]] * 2 * stages


def norms(case: dict[str, Any]) -> list[float]:
    run = make_run(dist.get_world_size(), case)
    mesh = Mesh(run.layout, "cpu")
    engine = build_engine(run, mesh, CPU)
    data_rank = mesh.channel("data_shard", "data_replicate").index
    return [engine.train(rank_batches(run, data_rank, step), 1e-3).grad_norm for step in range(2)]


def test_padding_never_enters_the_norm() -> None:
    """Sizes at which the embedding and a block are padded to the same length, and the gap between two norms of the
    block lies within the embedding: what one leaves in a staging buffer must not be counted for the other."""
    sizes = {"vocab": 194, "hidden": 24, "layers": 3, "heads": 4, "kv_heads": 4, "ffn_hidden": 32}
    case = {f"model.{key}": value for key, value in sizes.items()}
    sharded = {**case, "parallel.data_shard": 4, "zero.stage": 2}
    assert run_ranks(4, norms, sharded)[0] == pytest.approx(run_ranks(1, norms, case)[0], rel=1e-6)
