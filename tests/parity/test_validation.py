"""Optimizer post-validation: no barrier before the updates, and not a bit of difference.

Runs without a barrier are driven as the loop does it: the outcome of a step is asked for after the next one has run,
so that its validation, and what is repeated where a guess was wrong, happens in that next step's warm-up. The norm is
clipped in some steps and not in others, and NaN and infinity are put into the gradient of one rank in turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import Mesh
from parallel.pipeline.actions import Op
from tests.ranks import run_ranks
from tests.support import Case, Result, Trace, identical, join, make_run, rank_batches, shares
from trainer.build import build_engine
from trainer.engine import Engine, UnderWay
from trainer.optim.post_validation import PostValidation
from trainer.program import build_program

STEPS = 8
CLIP = 1.4
BATCHES = {"train.global_batch": 8, "train.gradient_accumulation": 8, "optimizer.grad_clip": CLIP}
SCHEDULES = ("1f1b", "gpipe", "zb-h2", "interleaved", "zb-v", "zb-auto")


def poison(engine: Engine, number: float, rank: int) -> None:
    """A reduced gradient of pipeline rank `rank` gets a bad number in the next step."""
    if engine.mesh.position["pipeline"] != rank:
        return
    copies, plain = engine.step.copies, engine.step.copies.finish

    def finish() -> None:
        plain()
        engine.optimizer.ranges[engine.space.units[0].name].gradient[0] = number
        copies.finish = plain  # type: ignore[method-assign]

    copies.finish = finish  # type: ignore[method-assign]


def drive(cases: Mapping[str, Case], bad: Mapping[int, tuple[float, int]], steps: int) -> dict[str, tuple[Trace, int]]:
    """Every case with its results asked for one step late; `bad` maps a step to (bad number, pipeline rank)."""
    found = {}
    meshes: dict[Any, Mesh] = {}
    for name, case in cases.items():
        run = make_run(dist.get_world_size(), case)
        mesh = meshes.setdefault(run.layout, Mesh(run.layout, "cpu"))
        engine = build_engine(run, mesh, torch.device("cpu"))
        data_rank = mesh.channel("data_shard", "data_replicate").index
        trace, waiting = Trace(), list[UnderWay]()

        def note(trace: Trace, under_way: UnderWay) -> None:
            result = under_way.result()
            trace.losses.append(result.loss)
            trace.norms.append(result.grad_norm)
            trace.skipped.append(result.skipped)

        for step in range(steps):
            if step in bad:
                poison(engine, *bad[step])
            waiting.append(engine.launch(rank_batches(run, data_rank, step), run.config.optimizer.lr))
            if len(waiting) > 1:
                note(trace, waiting.pop(0))
        trace.eval_loss = engine.evaluate(rank_batches(run, data_rank, steps))
        note(trace, waiting.pop())
        trace.weights = shares(engine)
        found[name] = trace, getattr(engine.step, "rollbacks", -1)
    return found


def both(ranks: int, cases: Mapping[str, Case], bad: Mapping[int, tuple[float, int]], steps: int = STEPS) -> Any:
    """Every case with and without the barrier, joined over the ranks, and the rollbacks of the latter."""
    every = {
        f"{name} {when}": {**BATCHES, **case, "optimizer.validation": when}
        for name, case in cases.items()
        for when in ("before", "after")
    }
    told = run_ranks(ranks, drive, every, bad, steps, timeout_seconds=200.0)
    results = join([{name: trace for name, (trace, _) in each.items()} for each in told])
    rollbacks = {name: {each[name][1] for each in told} for name in every}
    return results, rollbacks


def check(
    results: Mapping[str, Result], rollbacks: Mapping[str, set[int]], cases: Mapping[str, Case], skips: int, wrong: int
) -> None:
    for name in cases:
        before, after = results[f"{name} before"], results[f"{name} after"]
        assert identical(before, after), name
        assert sum(after.skipped) == skips
        assert rollbacks[f"{name} after"] == {wrong}, name
        assert rollbacks[f"{name} before"] == {-1}


def schedule(name: str, stages: int, **other: Any) -> dict[str, Any]:
    return {"parallel.pipeline.stages": stages, "parallel.pipeline.schedule": name, "model.layers": 6, **other}


def test_two_ranks_every_way() -> None:
    """Clipped steps are guessed wrong, bad numbers on the first rank rightly, on the last wrongly."""
    cases = {name: schedule(name, 2) for name in SCHEDULES}
    results, rollbacks = both(2, cases, {2: (math.nan, 1), 4: (math.inf, 0), 5: (math.nan, 1)})
    norms = results["1f1b before"].norms
    clipped = sum(norm > CLIP for norm in norms if math.isfinite(norm))
    assert 0 < clipped < STEPS - 3, norms
    check(results, rollbacks, cases, skips=3, wrong=clipped + 2)


def test_four_stages() -> None:
    cases = {name: schedule(name, 4) for name in ("1f1b", "zb-h2", "zb-v")}
    results, rollbacks = both(4, cases, {1: (math.nan, 2), 3: (math.inf, 0)}, 6)
    clipped = sum(norm > CLIP for norm in results["1f1b before"].norms if math.isfinite(norm))
    check(results, rollbacks, cases, skips=2, wrong=clipped + 1)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_with_data_parallel_ranks(zero: int) -> None:
    """Two stages of two data ranks; fp32 and bf16; tied weights, whose gradient the first and last rank share."""
    plain = {"zero.stage": zero, "train.gradient_accumulation": 4}
    cases = {
        "fp32": schedule("zb-h2", 2, **plain),
        "bf16": schedule("zb-h2", 2, **plain, **{"train.precision": "bf16"}),
        "tied": schedule("1f1b", 2, **plain, **{"model.tied_embeddings": True}),
        "tied V": schedule("zb-v", 2, **plain, **{"model.tied_embeddings": True, "train.recompute": "full"}),
    }
    results, rollbacks = both(4, cases, {2: (math.nan, 1)}, 6)
    for name in cases:
        clipped = sum(norm > CLIP for norm in results[f"{name} before"].norms if math.isfinite(norm))
        check(results, rollbacks, {name: {}}, skips=1, wrong=clipped + 1)


def test_with_tensor_parallel_ranks() -> None:
    cases = {"tensor": schedule("zb-h1", 2, **{"parallel.tensor": 2})}
    results, rollbacks = both(4, cases, {1: (math.nan, 1)}, 4)
    clipped = sum(norm > CLIP for norm in results["tensor before"].norms if math.isfinite(norm))
    check(results, rollbacks, cases, skips=1, wrong=clipped + 1)


def test_without_a_pipeline_nothing_is_guessed() -> None:
    results, rollbacks = both(1, {"one": {"train.gradient_accumulation": 2}}, {2: (math.nan, 0)}, 4)
    check(results, rollbacks, {"one": {}}, skips=1, wrong=0)


def count_forwards() -> tuple[int, int]:
    """Forwards of this rank in a step whose predecessor was guessed rightly, and wrongly."""
    run = make_run(dist.get_world_size(), {**BATCHES, **schedule("zb-h2", 2), "optimizer.validation": "after"})
    engine = build_engine(run, Mesh(run.layout, "cpu"), torch.device("cpu"))
    assert isinstance(engine.step, PostValidation)
    stage = next(iter(engine.train_executor.stages.values()))
    counted = 0

    def count(*_: object) -> None:
        nonlocal counted
        counted += 1

    stage.units[0][1].register_forward_hook(count)
    seen = []
    waiting = [engine.launch(rank_batches(run, 0, 0), 1e-3)]
    for clip in (1e9, 1e-3):
        engine.step.clip = clip
        waiting.append(engine.launch(rank_batches(run, 0, 1), 1e-3))
        waiting.pop(0).result()
        seen.append(counted)
        counted = 0
    engine.finish()
    return seen[0], seen[1]


def test_only_the_warm_up_is_repeated() -> None:
    """The limit changes between the guess and the validation, which is how a rank is made to be wrong."""
    program = build_program(make_run(2, {**BATCHES, **schedule("zb-h2", 2), "optimizer.validation": "after"}))
    for rank, (first, second) in enumerate(run_ranks(2, count_forwards)):
        listed = [action.op for action in program.actions[rank]]
        warm_up = listed[: listed.index(Op.VALIDATE)].count(Op.F)
        assert warm_up > 0
        assert first == 2 * 8  # the first step, and one that was not repeated
        assert second == 8 + warm_up


def measure_forgotten() -> tuple[int, int]:
    """Rollbacks, and bytes of activations that are alive when nothing is under way."""
    case = {**BATCHES, **schedule("1f1b", 2), "optimizer.validation": "after", "metrics.activations": True}
    run = make_run(dist.get_world_size(), {**case, "optimizer.grad_clip": 0.1})
    engine = build_engine(run, Mesh(run.layout, "cpu"), torch.device("cpu"))
    for step in range(4):
        engine.launch(rank_batches(run, 0, step), 1e-3)
    engine.finish()
    assert isinstance(engine.step, PostValidation)
    assert engine.activations is not None
    return engine.step.rollbacks, engine.activations.store.meter.alive_bytes


def test_forwards_that_are_repeated_leave_nothing_behind() -> None:
    """Every step is clipped and so guessed wrong."""
    assert run_ranks(2, measure_forgotten) == [(4, 0), (4, 0)]
