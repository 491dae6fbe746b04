"""The same seed gives the same training on every layout.

Every factorization of 4 ranks into (tensor, pipeline, data_shard, data_replicate) x ZeRO stage, and some of 2 and
3 ranks, train a small decoder for 10 steps in fp32 (variants of it for 4) and are compared with one process: losses,
gradient norms, the evaluation after the last step, and the final weights.

What is equal bit for bit, and asserted so, is what adds the same numbers in the same order:

- gpipe and 1f1b: both run the backwards of a stage in the order of the micro-batches;
- a pipeline of any cut and one process with the same micro-batches: a stage border moves a tensor and rounds
  nothing. Only the global norm is summed stage by stage, so this holds where no clipping multiplies it into the
  gradients;
- ZeRO stages 0 and 1 of a layout without replicas: pairwise exchange sums the ranks' gradients in rank order,
  whole or in shares. The norm is summed over shares, so again: without clipping;
- ZeRO stages 1 and 2 with one micro-batch per step; norm and clipping included. With more, stage 1 sums over
  micro-batches first and stage 2 over ranks first;
- data-sharded and data-replicated ranks at stage 0: one group of the same ranks;
- recomputation: the same operations on the same inputs, later.

Everything else differs by the rounding of sums: tensor parallelism splits the inner dimension of products, data
parallelism splits the batch, replicas of shards ((a + b) + (c + d)) are summed in another order than one group.
Measured over all cases here: losses within 1.2e-7 (one fp32 rounding), norms within 1.2e-6, weights within 4e-5 of
the 3e-2 that 10 steps can move them. (Adam divides by the root of the second moment, so a gradient that is nearly
nothing but rounding moves its weight as far as any other.) QK-norm divides the small queries and keys of the first
steps by their size and so magnifies rounding: losses within 1.7e-6, norms within 2.1e-5, weights within 9e-5 - as
one process with another micro-batch differs from itself (8e-7, 1e-5, 4e-5).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import prod
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.support import Case, Result, Trace, identical, join, largest_difference, relative, run_cases

STEPS = 10
BRIEF_STEPS = 4
LOSS_TOLERANCE = 5e-6
NORM_TOLERANCE = 5e-5
WEIGHT_TOLERANCE = 3e-4

AXES = ("tensor", "pipeline.stages", "data_shard", "data_replicate")
NO_CLIPPING = {"optimizer.grad_clip": None}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"model.tied_embeddings": True},
    "qk-norm, grouped": {"model.qk_norm": True, "model.kv_heads": 2},
    "gelu, tied, grouped": {"model.activation": "gelu", "model.tied_embeddings": True, "model.kv_heads": 2},
}


def factorizations(world: int) -> list[tuple[int, int, int, int]]:
    """All (tensor, pipeline, data_shard, data_replicate) whose product is `world`."""
    divisors = [number for number in range(1, world + 1) if world % number == 0]
    return [degrees for degrees in product(divisors, divisors, divisors, divisors) if prod(degrees) == world]


def case(tensor: int, pipeline: int, shard: int, replicate: int, stage: int = 1, **other: Any) -> dict[str, Any]:
    degrees = {
        f"parallel.{axis}": degree for axis, degree in zip(AXES, (tensor, pipeline, shard, replicate), strict=True)
    }
    return {**degrees, "zero.stage": stage, **other.pop("more", {}), **other}


def name_of(degrees: tuple[int, int, int, int], stage: int) -> str:
    return "x".join(map(str, degrees)) + f" stage {stage}"


ALL = {name_of(degrees, stage): case(*degrees, stage=stage) for degrees in factorizations(4) for stage in (0, 1, 2)}
SCHEDULES = {
    f"{name}, {schedule}": {**ALL[name], "parallel.pipeline.schedule": schedule, "train.gradient_accumulation": 4}
    for name in ("1x2x2x1 stage 1", "1x2x2x1 stage 2", "1x4x1x1 stage 1", "2x2x1x1 stage 1")
    for schedule in ("gpipe", "1f1b")
}
BRIEF: dict[str, Case] = {
    **{
        f"{name}, {model}": {**ALL[name], **MODELS[model]}
        for name in ("2x2x1x1 stage 1", "1x2x2x1 stage 2", "2x1x2x1 stage 1", "1x2x2x1 stage 1")
        for model in MODELS
    },
    **{
        f"{name}, no clipping": {**ALL[name], **NO_CLIPPING}
        for name in (
            *(f"{degrees} stage {stage}" for degrees in ("1x1x4x1", "1x2x2x1", "2x1x2x1") for stage in (0, 1)),
            "1x4x1x1 stage 1",
        )
    },
    **{
        f"{name}, one micro-batch": {**ALL[name], "train.gradient_accumulation": 1}
        for name in ("1x1x4x1 stage 1", "1x1x4x1 stage 2", "1x1x2x2 stage 1", "1x1x2x2 stage 2")
    },
    **{
        f"{name}, recompute {mode}": {**ALL[name], "train.recompute": mode}
        for name in ("2x2x1x1 stage 1", "1x2x2x1 stage 2")
        for mode in ("none", "selective", "full")
    },
    **{
        f"{name}, native": {**ALL[name], "comm.algorithm": "native"}
        for name in ("2x2x1x1 stage 1", "1x1x4x1 stage 1", "1x1x2x2 stage 2")
    },
}
BRIEF_ONE: dict[str, Case] = {
    "briefly": {},
    **MODELS,
    "no clipping": NO_CLIPPING,
    "recompute selective": {"train.recompute": "selective"},
    "recompute full": {"train.recompute": "full"},
}
TWELVE = {"train.global_batch": 12}


def run_both(long: Mapping[str, Case], brief: Mapping[str, Case]) -> dict[str, Trace]:
    """What the tests over all layouts need, for all steps, and what shows within a few."""
    return {**run_cases(long, STEPS), **run_cases(brief, BRIEF_STEPS)}


@pytest.fixture(scope="module")
def one() -> dict[str, Result]:
    """One process."""
    return join(run_ranks(1, run_both, {"plain": {}, "twelve": TWELVE}, BRIEF_ONE))


@pytest.fixture(scope="module")
def four() -> dict[str, Result]:
    """Every case of 4 ranks, one spawn."""
    return join(run_ranks(4, run_both, {**ALL, **SCHEDULES}, BRIEF, timeout_seconds=280))


def assert_close(found: Result, expected: Result) -> None:
    assert not any(found.skipped)
    assert relative(found.losses, expected.losses) <= LOSS_TOLERANCE
    assert relative(found.eval_loss, expected.eval_loss) <= LOSS_TOLERANCE
    assert relative(found.norms, expected.norms) <= NORM_TOLERANCE
    assert largest_difference(found.weights, expected.weights) <= WEIGHT_TOLERANCE


def test_the_reference_learns(one: dict[str, Result]) -> None:
    """Parity of runs in which nothing happens would prove nothing."""
    plain = one["plain"]
    assert plain.losses[-1] < plain.losses[0] - 0.5
    assert max(plain.norms) > 1.0, "some steps are clipped"
    assert min(plain.norms) < 1.0, "and some are not"
    assert plain.eval_loss < plain.losses[0]


@pytest.mark.parametrize("name", ALL)
def test_every_factorization_trains_like_one_process(
    name: str, four: dict[str, Result], one: dict[str, Result]
) -> None:
    assert_close(four[name], one["plain"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["2x2x1x1 stage 1", "1x2x2x1 stage 1", "1x2x2x1 stage 2", "2x1x2x1 stage 1"])
def test_every_model_trains_like_one_process(
    name: str, model: str, four: dict[str, Result], one: dict[str, Result]
) -> None:
    assert_close(four[f"{name}, {model}"], one[model])


@pytest.mark.parametrize("name", ["2x2x1x1 stage 1", "1x1x4x1 stage 1", "1x1x2x2 stage 2"])
def test_native_collectives_train_like_one_process(name: str, four: dict[str, Result], one: dict[str, Result]) -> None:
    assert_close(four[f"{name}, native"], one["briefly"])


@pytest.mark.parametrize("name", ["1x2x2x1 stage 1", "1x2x2x1 stage 2", "1x4x1x1 stage 1", "2x2x1x1 stage 1"])
def test_schedules_are_equal_bitwise(name: str, four: dict[str, Result], one: dict[str, Result]) -> None:
    assert identical(four[f"{name}, gpipe"], four[f"{name}, 1f1b"])
    assert_close(four[f"{name}, 1f1b"], one["plain"])


def assert_same_training(one: Result, other: Result) -> None:
    """Bit for bit; only the norm, which nothing depends on without clipping, is summed in another order."""
    assert one.losses == other.losses
    assert one.eval_loss == other.eval_loss
    assert largest_difference(one.weights, other.weights) == 0.0
    assert relative(one.norms, other.norms) <= NORM_TOLERANCE


def test_a_pipeline_is_equal_to_one_process_bitwise(four: dict[str, Result], one: dict[str, Result]) -> None:
    assert_same_training(four["1x4x1x1 stage 1, no clipping"], one["no clipping"])


@pytest.mark.parametrize("degrees", ["1x1x4x1", "1x2x2x1", "2x1x2x1"])
def test_stages_0_and_1_are_equal_bitwise_without_clipping(degrees: str, four: dict[str, Result]) -> None:
    whole, shared = (four[f"{degrees} stage {stage}, no clipping"] for stage in (0, 1))
    assert_same_training(whole, shared)


@pytest.mark.parametrize("degrees", ["1x1x4x1", "1x1x2x2"])
def test_stages_1_and_2_are_equal_bitwise_with_one_micro_batch(
    degrees: str, four: dict[str, Result], one: dict[str, Result]
) -> None:
    assert identical(*(four[f"{degrees} stage {stage}, one micro-batch"] for stage in (1, 2)))
    assert_close(four[f"{degrees} stage 2, one micro-batch"], one["briefly"])


@pytest.mark.parametrize("degrees", ["1x1x1x4", "1x2x1x2", "1x4x1x1", "2x1x1x2", "2x2x1x1", "4x1x1x1"])
def test_without_shard_ranks_the_stages_are_the_same(degrees: str, four: dict[str, Result]) -> None:
    first, *others = (four[f"{degrees} stage {stage}"] for stage in (0, 1, 2))
    assert all(identical(first, other) for other in others)


@pytest.mark.parametrize(
    ("shard", "replicate"), [("1x1x4x1", "1x1x1x4"), ("1x2x2x1", "1x2x1x2"), ("2x1x2x1", "2x1x1x2")]
)
def test_shards_and_replicas_are_the_same_at_stage_0(shard: str, replicate: str, four: dict[str, Result]) -> None:
    assert identical(four[f"{shard} stage 0"], four[f"{replicate} stage 0"])


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_no_bit(mode: str, four: dict[str, Result], one: dict[str, Result]) -> None:
    assert identical(one[f"recompute {mode}"], one["briefly"])
    for name in ("2x2x1x1 stage 1", "1x2x2x1 stage 2"):
        assert identical(four[f"{name}, recompute {mode}"], four[f"{name}, recompute none"])


def test_two_ranks(one: dict[str, Result]) -> None:
    cases = {
        name_of(degrees, stage): case(*degrees, stage=stage) for degrees in factorizations(2) for stage in (0, 1, 2)
    }
    names = ("1x2x1x1 stage 1", "2x1x1x1 stage 1")
    brief = {f"{name}, tied": {**cases[name], **MODELS["tied"]} for name in names}
    uneven = {**cases["1x2x1x1 stage 1"], "parallel.pipeline.partition": (3, 1), **NO_CLIPPING}
    found = join(run_ranks(2, run_both, cases, {**brief, "uneven": uneven}))
    assert len(cases) == 12
    for name in cases:
        assert_close(found[name], one["plain"])
    for name in brief:
        assert_close(found[name], one["tied"])
    assert_same_training(found["uneven"], one["no clipping"])


def test_three_ranks(one: dict[str, Result]) -> None:
    """A degree that is no power of two: shares of odd sizes, reductions that do not divide evenly."""
    cases = {
        name_of(degrees, stage): case(*degrees, stage=stage, more=TWELVE)
        for degrees in factorizations(3)
        if degrees[0] == 1  # 4 heads are not split 3 ways
        for stage in (0, 1, 2)
    }
    found = join(run_ranks(3, run_cases, cases, STEPS))
    assert len(cases) == 9
    for result in found.values():
        assert_close(result, one["twelve"])
