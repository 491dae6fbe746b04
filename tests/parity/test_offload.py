"""Offloading activations changes no bit of a run, and takes the memory that was planned, however fast the copies are.

Two groups of ranks run every case; the tests look at what they brought back. The model has one block a stage, so that
all activations weigh nearly the same, and copies are planned to be fast: what moves is decided by the program alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from offload import lanes
from parallel.mesh import Mesh
from parallel.pipeline.actions import Op
from tests.ranks import run_ranks
from tests.support import Case, Trace, identical, join, make_run, rank_batches, shares, train_steps
from trainer.build import build_engine
from trainer.memory import activation_peaks
from trainer.program import units_of_parts

STEPS = 3
BASE: dict[str, Any] = {
    "run.device": "cpu",
    "model.layers": 8,
    "train.global_batch": 8,
    "train.gradient_accumulation": 8,
    "metrics.activations": True,
    "parallel.pipeline.stages": 2,
    "parallel.pipeline.chunks": 4,
    "parallel.pipeline.partition": [1] * 8,
    "offload.activations.compute_flops_per_second": 1e9,
    "offload.activations.smallest_bytes": 256,
}
UNIFORM = {**BASE, "parallel.pipeline.schedule": "uniform"}
HALF = {"offload.activations.stages": "half"}
ALL = {"offload.activations.stages": "all"}
BF16 = {"train.precision": "bf16"}
FULL = {"train.recompute": "full"}
WHOLE = {**BASE, "parallel.pipeline.schedule": "interleaved"}
SLOW = "slow "  # cases whose copies take longer than everything else

ONE_BLOCK = {**BASE, "parallel.pipeline.chunks": 1, "parallel.pipeline.partition": [4, 4]}
TWO: dict[str, Case] = {
    "none": UNIFORM,
    "half": {**UNIFORM, **HALF},
    "all": {**UNIFORM, **ALL},
    "three": {**UNIFORM, "offload.activations.stages": 3},
    SLOW + "half": {**UNIFORM, **HALF},
    SLOW + "all": {**UNIFORM, **ALL},
    "gis-h": {**BASE, "parallel.pipeline.schedule": "gis-h"},
    "gis-h all": {**BASE, "parallel.pipeline.schedule": "gis-h", **ALL},
    "whole": WHOLE,
    "whole all": {**WHOLE, **ALL},
    "1f1b": {**ONE_BLOCK, "parallel.pipeline.schedule": "1f1b"},
    "zb-2p all": {**ONE_BLOCK, "parallel.pipeline.schedule": "zb-2p", **ALL},
    "full": {**UNIFORM, **FULL},
    "full all": {**UNIFORM, **FULL, **ALL},
    "selective all": {**UNIFORM, "train.recompute": "selective", **ALL},
    "bf16": {**UNIFORM, **BF16},
    "bf16 all": {**UNIFORM, **BF16, **ALL},
    "bf16 full all": {**UNIFORM, **BF16, **FULL, **ALL},
    "after": {**UNIFORM, "optimizer.validation": "after", **ALL, "optimizer.grad_clip": 0.05},
    "clipped": {**UNIFORM, "optimizer.grad_clip": 0.05},
}
TENSOR = {**UNIFORM, "parallel.tensor": 2}
FOUR: dict[str, Case] = {
    "none": TENSOR,
    "all": {**TENSOR, **ALL},
    "full all": {**TENSOR, **FULL, **ALL},
    "zero 2": {**UNIFORM, "zero.stage": 2, "train.global_batch": 16},
    "zero 2 all": {**UNIFORM, "zero.stage": 2, "train.global_batch": 16, **ALL},
}


@dataclass
class Seen:
    """What one rank saw of a case beside its results.

    Attributes:
        peaks: Measured peak of each step.
        predicted: The simulated peak.
        left: Alive behind the last step.
        offloaded: OFFLOADs in the rank's program.
        host: Bytes of host buffers behind each step.
        moved: Bytes copied to the host in all steps.
    """

    peaks: list[int]
    predicted: int
    left: int
    offloaded: int
    host: list[int]
    moved: int


def run_all(cases: Mapping[str, Case]) -> tuple[dict[str, Trace], dict[str, Seen]]:
    meshes: dict[Any, Mesh] = {}
    traces, seen = {}, {}
    fast = lanes._copy
    for name, case in cases.items():
        run = make_run(dist.get_world_size(), case)
        if run.layout not in meshes:
            meshes[run.layout] = Mesh(run.layout, "cpu", run.config.comm.algorithm)
        engine = build_engine(run, meshes[run.layout], torch.device("cpu"))
        assert engine.activations is not None
        store, rank = engine.activations.store, engine.mesh.position["pipeline"]
        lanes._copy = slow_copy if name.startswith(SLOW) else fast
        trace, peaks, host = Trace(), [], []
        for step in range(STEPS):
            train_steps(engine, run, [step], trace)
            peaks.append(store.meter.take_peak())
            host.append(store.host.allocated_bytes)
        lanes._copy = fast
        data_rank = engine.mesh.channel("data_shard", "data_replicate").index
        trace.eval_loss = engine.evaluate(rank_batches(run, data_rank, STEPS))
        trace.weights = shares(engine)
        traces[name] = trace
        seen[name] = Seen(
            peaks=peaks,
            predicted=activation_peaks(run, units_of_parts(run), engine.train_program)[rank],
            left=store.meter.alive_bytes,
            offloaded=sum(action.op is Op.OFFLOAD for action in engine.train_program.actions[rank]),
            host=host,
            moved=store.moved_bytes,
        )
    return traces, seen


def slow_copy(copies: lanes.Copies) -> None:
    time.sleep(0.01)
    for to, origin in copies:
        to.copy_(origin)
    copies.clear()


Outcome = tuple[dict[str, Any], dict[str, list[Seen]]]


def outcome(ranks: int, cases: Mapping[str, Case]) -> Outcome:
    found = run_ranks(ranks, run_all, cases, timeout_seconds=300)
    return join([traces for traces, _ in found]), {name: [seen[name] for _, seen in found] for name in cases}


@pytest.fixture(scope="module")
def two() -> Outcome:
    return outcome(2, TWO)


@pytest.fixture(scope="module")
def four() -> Outcome:
    return outcome(4, FOUR)


def reference(name: str) -> str:
    """The case without offload that a case must equal bit for bit."""
    if "bf16" in name:
        return "bf16"
    return {"after": "clipped", "clipped": "clipped", "1f1b": "1f1b", "zb-2p all": "1f1b"}.get(name, "none")


@pytest.mark.parametrize("name", [name for name in TWO if reference(name) != name])
def test_no_bit_changes(two: Outcome, name: str) -> None:
    results, _ = two
    assert identical(results[name], results[reference(name)]), name
    assert results[name].losses[-1] != results[name].losses[0]


@pytest.mark.parametrize(("name", "like"), [("all", "none"), ("full all", "none"), ("zero 2 all", "zero 2")])
def test_no_bit_changes_on_four_ranks(four: Outcome, name: str, like: str) -> None:
    results, seen = four
    assert identical(results[name], results[like]), name
    assert all(each.offloaded for each in seen[name])


OFFLOADED = [name for name in TWO if name.endswith(("half", "all", "three", "after"))]


@pytest.mark.parametrize("name", OFFLOADED)
def test_activations_were_moved_and_nothing_is_left(two: Outcome, name: str) -> None:
    ranks = two[1][name]
    assert ranks[0].offloaded > 0  # the last one may have forwards that their backwards follow at once
    for rank in ranks:
        assert (rank.moved > 0) == (rank.offloaded > 0)
        assert rank.left == 0


def is_exact(name: str) -> bool:
    """In the middle of an I that recomputes there is more than before it or behind it."""
    return not any(word in name for word in ("full", "selective"))


@pytest.mark.parametrize("name", [name for name in TWO if is_exact(name)])
def test_the_measured_peak_is_the_simulated_one(two: Outcome, name: str) -> None:
    # Small tensors (row norms, log-sum-exps) are not in the sizes.
    for rank in two[1][name]:
        assert rank.peaks[-1] == pytest.approx(rank.predicted, rel=0.05), rank


@pytest.mark.parametrize("name", TWO)
def test_every_step_has_the_same_peak(two: Outcome, name: str) -> None:
    for rank in two[1][name]:
        assert len(set(rank.peaks[1:])) == 1, rank.peaks


@pytest.mark.parametrize("name", ["half", "all"])
def test_the_peak_is_not_a_matter_of_luck(two: Outcome, name: str) -> None:
    seen = two[1]
    for fast, slow in zip(seen[name], seen[SLOW + name], strict=True):
        assert fast.peaks == slow.peaks


def peak(seen: Mapping[str, list[Seen]], name: str) -> int:
    return max(rank.peaks[-1] for rank in seen[name])


def test_memory_falls_as_published(two: Outcome, four: Outcome) -> None:
    seen = two[1]
    assert peak(seen, "half") < 0.65 * peak(seen, "none")
    assert peak(seen, "all") < 0.45 * peak(seen, "none")
    assert peak(seen, "all") <= peak(seen, "three") < peak(seen, "half")
    assert peak(seen, "gis-h all") < 0.5 * peak(seen, "gis-h")
    assert peak(seen, "whole all") < 0.5 * peak(seen, "whole")
    assert peak(seen, "bf16 all") < 0.45 * peak(seen, "bf16")
    assert peak(four[1], "all") < 0.45 * peak(four[1], "none")


def test_recomputation_leaves_little_and_that_moves_too(two: Outcome) -> None:
    # The peak is then what W reads after I: the factors of one block, more than all inputs that are kept.
    seen = two[1]
    assert peak(seen, "full") < 0.5 * peak(seen, "none")
    assert peak(seen, "full all") < peak(seen, "full")


@pytest.mark.parametrize("name", OFFLOADED)
def test_host_memory_is_bounded(two: Outcome, name: str) -> None:
    for rank in two[1][name]:
        assert len(set(rank.host)) == 1, "the buffers of the first step are enough for the others"
        assert rank.host[-1] <= 1.25 * rank.moved / STEPS + 4096 * rank.offloaded
