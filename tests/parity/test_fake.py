"""Any rank of any world in one process: groups on a back end that only pretends, tensors without memory."""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from parallel.flat.space import Range
from parallel.layout import Layout
from parallel.mesh import GROUPS, Mesh, PaperMesh, start_process_group
from tests.support import make_run, rank_batches
from trainer.build import build_engine
from trainer.check import build_fake_rank
from trainer.config.run import ResolvedRun

T = TypeVar("T")

LARGE = Layout(tensor=8, data_shard=16, pipeline=4, data_replicate=2)
CASE: dict[str, Any] = {
    "model.preset": "llama3-70b",
    "model.vocab": 128256,
    "model.hidden": 8192,
    "model.layers": 80,
    "model.heads": 64,
    "model.kv_heads": 8,
    "model.ffn_hidden": 28672,
    "train.sequence": 4096,
    "train.global_batch": 256,
    "parallel.tensor": 8,
    "parallel.pipeline.stages": 4,
    "parallel.data_shard": 16,
    "parallel.data_replicate": 2,
    "zero.stage": 2,
}
LLAMA3_70B_PARAMETERS = 70_553_706_496
"""As published for Llama 3 70B: 80 blocks, untied, vocabulary 128256."""


def in_a_process(function: Callable[..., T], *arguments: Any) -> T:
    """A process of its own, because the default process group is one per process."""
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result(timeout=120)


@dataclass
class Held:
    """What a rank holds: per parameter its full shape and its box, per unit the owned range and the length."""

    boxes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    owned: dict[str, tuple[Range, int]]
    meta: bool


def build(run: ResolvedRun, ranks: list[int]) -> dict[int, Held]:
    found = {}
    for rank in ranks:
        engine = build_fake_rank(run, rank)
        boxes = {}
        for unit in engine.space.units:
            for slot in unit.slots:
                spec = slot.spec
                offsets = [0] * len(spec.shape)
                if spec.shard_dim is not None:
                    offsets[spec.shard_dim] = spec.shard_index * spec.shape[spec.shard_dim]
                boxes[spec.name] = (spec.full_shape, tuple(offsets), tuple(spec.shape))
                assert tuple(engine.parameters.parameters[spec.name].shape) == spec.shape
        owned = {name: (each.range, each.unit.numel) for name, each in engine.optimizer.ranges.items()}
        assert all(each.master.numel() == each.range.length for each in engine.optimizer.ranges.values())
        found[rank] = Held(boxes, owned, engine.parameters.buffer.is_meta)
    return found


@pytest.fixture(scope="module")
def held() -> dict[int, Held]:
    """All tensor ranks of the first and of the last stage, one of the others, and one whole data-shard group."""
    run = make_run(LARGE.world_size, CASE)
    assert run.layout == LARGE
    ranks = [LARGE.rank_at(tensor=tensor, pipeline=stage) for stage in (0, 3) for tensor in range(8)]
    ranks += [LARGE.rank_at(pipeline=stage) for stage in (1, 2)]
    ranks += [LARGE.rank_at(data_shard=shard, pipeline=2, data_replicate=1) for shard in range(16)]
    return in_a_process(build, run, ranks)


def test_no_memory_is_taken(held: dict[int, Held]) -> None:
    assert len(held) == 34
    assert all(each.meta for each in held.values())


def test_tensor_ranks_of_a_stage_hold_its_parameters_once(held: dict[int, Held]) -> None:
    for stage in (0, 3):
        ranks = [held[LARGE.rank_at(tensor=tensor, pipeline=stage)] for tensor in range(8)]
        assert len({frozenset(each.boxes) for each in ranks}) == 1
        for name, (full_shape, _, _) in ranks[0].boxes.items():
            boxes = {each.boxes[name][1:] for each in ranks}
            if len(boxes) > 1:
                assert sum(prod(sizes) for _, sizes in boxes) == prod(full_shape), name
            else:
                assert boxes == {((0,) * len(full_shape), full_shape)}, name


def test_the_stages_hold_the_published_model_once(held: dict[int, Held]) -> None:
    names: dict[str, int] = {}
    for stage in range(4):
        boxes = held[LARGE.rank_at(pipeline=stage)].boxes
        assert names.keys().isdisjoint(boxes)
        names |= {name: prod(full_shape) for name, (full_shape, _, _) in boxes.items()}
    assert sum(names.values()) == LLAMA3_70B_PARAMETERS


def test_the_owned_ranges_of_a_shard_group_are_a_partition(held: dict[int, Held]) -> None:
    covered: dict[str, list[Range]] = defaultdict(list)
    lengths = {}
    for shard in range(16):
        for name, (owned, numel) in held[LARGE.rank_at(data_shard=shard, pipeline=2, data_replicate=1)].owned.items():
            covered[name].append(owned)
            lengths[name] = numel
    assert lengths
    for name, ranges in covered.items():
        assert [each.start for each in ranges] == [0, *(each.stop for each in ranges[:-1])], name
        assert ranges[-1].stop == lengths[name]
        assert len({each.length for each in ranges}) == 1


def groups_of(layout: Layout, rank: int) -> dict[tuple[str, ...], tuple[tuple[int, ...], int, int]]:
    """Per set of axes: the ranks of the group, its size, and this rank's index in it."""
    start_process_group("cpu", rank, layout.world_size, 60.0, fake=True)
    try:
        mesh = Mesh(layout, "cpu")
        found = {}
        for axes in GROUPS:
            link = mesh.channel(*axes)
            found[axes] = (tuple(dist.get_process_group_ranks(link.group)), link.size, link.index)
        return found
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 389, 1023])
def test_the_groups_of_a_rank_of_1024(rank: int) -> None:
    paper = PaperMesh(LARGE, rank)
    for axes, (ranks, size, index) in in_a_process(groups_of, LARGE, rank).items():
        assert ranks == LARGE.group_of(rank, *axes)
        assert (size, index) == (len(ranks), ranks.index(rank))
        if axes != GROUPS[-1]:
            assert (paper.channel(*axes).size, paper.channel(*axes).index) == (size, index)


def test_a_rank_that_the_layout_does_not_have() -> None:
    with pytest.raises(ValueError, match="rank 1024 is outside the layout's 1024 ranks"):
        build_fake_rank(make_run(LARGE.world_size, CASE), LARGE.world_size)
    assert not dist.is_initialized()


def trained(run: ResolvedRun) -> float:
    """A step on the fake back end, where every message arrives as whatever the buffer held."""
    start_process_group("cpu", 0, run.layout.world_size, 60.0, fake=True)
    try:
        engine = build_engine(run, Mesh(run.layout, "cpu"), torch.device("cpu"))
        return engine.train(rank_batches(run, 0, 0), 1e-3).grad_norm
    finally:
        dist.destroy_process_group()


def test_one_rank_of_a_large_layout_runs_a_step_alone() -> None:
    """For debugging: the program of rank 0 of 16 x 2 data ranks, with real tensors and no peers."""
    case = {"parallel.data_shard": 16, "parallel.data_replicate": 2, "train.global_batch": 64, "zero.stage": 2}
    assert in_a_process(trained, make_run(32, case)) > 0
