"""Numbers that are not about layouts: an independent reference loop, bf16, clipping, and steps that are skipped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from parallel.flat.space import ParameterSpec
from parallel.mesh import Mesh
from tests.ranks import run_ranks
from tests.support import (
    Result,
    Trace,
    global_samples,
    join,
    largest_difference,
    make_run,
    relative,
    run_cases,
    shares,
    train_steps,
)
from trainer.build import build_engine
from trainer.config.run import ResolvedRun
from trainer.engine import Engine
from trainer.models.decoder import Decoder
from trainer.models.initialize import initial_weight

CPU = torch.device("cpu")
STEPS = 10
FOUR = {
    "1x1x4x1 stage 2": {"parallel.data_shard": 4, "zero.stage": 2},
    "2x2x1x1": {"parallel.tensor": 2, "parallel.pipeline.stages": 2},
    "1x2x2x1 stage 1": {"parallel.pipeline.stages": 2, "parallel.data_shard": 2, "zero.stage": 1},
    "1x2x2x1 stage 2, zb-v": {
        "parallel.pipeline.stages": 2,
        "parallel.pipeline.schedule": "zb-v",
        "parallel.data_shard": 2,
        "zero.stage": 2,
    },
    "2x2x1x1, bitpipe": {
        "parallel.tensor": 2,
        "parallel.pipeline.stages": 2,
        "parallel.pipeline.schedule": "bitpipe",
    },
    "2x1x1x2 stage 0": {"parallel.tensor": 2, "parallel.data_replicate": 2, "zero.stage": 0},
}


def plain_decoder(run: ResolvedRun) -> Decoder:
    """The model as anybody would build it, with the run's initial weights."""
    model = run.config.model
    decoder = Decoder(model)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            shape = tuple(parameter.shape)
            parameter.copy_(initial_weight(model, ParameterSpec(name, shape, shape), run.config.run.seed))
    return decoder


def reference(case: dict[str, Any]) -> tuple[list[float], list[float], dict[str, np.ndarray]]:
    """Losses, norms and weights of the loop that every tutorial shows: autograd, clip_grad_norm_, torch's AdamW."""
    run = make_run(1, case)
    optimizer, decoder = run.config.optimizer, plain_decoder(run)
    decayed = [parameter for parameter in decoder.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in decoder.parameters() if parameter.dim() == 1]
    groups = [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps)
    losses, norms = [], []
    for step in range(STEPS):
        samples = torch.from_numpy(global_samples(run, step))
        logits = decoder(samples[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(decoder.parameters(), optimizer.grad_clip or float("inf"))))
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses, norms, {name: parameter.detach().numpy() for name, parameter in decoder.named_parameters()}


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped hard": {"optimizer.grad_clip": 0.05},
    "not clipped": {"optimizer.grad_clip": None},
    "tied, gelu, no decay": {
        "model.tied_embeddings": True,
        "model.activation": "gelu",
        "optimizer.weight_decay": 0.0,
        "optimizer.betas": (0.8, 0.99),
        "optimizer.eps": 1e-6,
    },
    "grouped": {"model.kv_heads": 2, "model.rope_theta": 500.0, "model.norm_epsilon": 1e-3},
}


@pytest.fixture(scope="module")
def one() -> dict[str, Result]:
    cases = {**MODELS, "bf16": {"train.precision": "bf16"}}
    return join(run_ranks(1, run_cases, cases, STEPS))


@pytest.fixture(scope="module")
def four() -> dict[str, Result]:
    cases = {f"{name}, bf16": {**case, "train.precision": "bf16"} for name, case in FOUR.items()}
    cases |= {f"{name}, clipped hard": {**case, **MODELS["clipped hard"]} for name, case in FOUR.items()}
    return join(run_ranks(4, run_cases, cases, STEPS, timeout_seconds=240))


@pytest.mark.parametrize("model", MODELS)
def test_one_process_trains_like_a_plain_loop(model: str, one: dict[str, Result]) -> None:
    """The check that shares no code with the engine. Measured: losses within 2e-7, norms within 1e-6."""
    losses, norms, weights = reference(MODELS[model])
    assert relative(one[model].losses, losses) <= 1e-6
    assert relative(one[model].norms, norms) <= 1e-5
    assert largest_difference(one[model].weights, weights) <= 3e-4


@pytest.mark.parametrize("name", FOUR)
def test_clipping_is_that_of_torch_on_every_layout(name: str, four: dict[str, Result]) -> None:
    """Every step is clipped to a twentieth, so a norm that misses or repeats anything would show in the losses."""
    losses, norms, _ = reference(MODELS["clipped hard"])
    assert min(norms) > 0.05
    found = four[f"{name}, clipped hard"]
    assert relative(found.losses, losses) <= 1e-6
    assert relative(found.norms, norms) <= 1e-5


BF16_LOSS_TOLERANCE = 2e-3
BF16_NORM_TOLERANCE = 4e-2


@pytest.mark.parametrize("name", FOUR)
def test_bf16_on_every_layout(name: str, four: dict[str, Result], one: dict[str, Result]) -> None:
    """bf16 keeps 8 bits (0.4 %). One process and another layout round the same activations at other places: where
    tensor parallelism sums halves, or where a weight gradient is rounded per micro-batch before it is added. The
    loss averages over 256 tokens: measured within 7e-4, the norm, which is mostly that of small gradients, 1.2e-2."""
    found, expected = four[f"{name}, bf16"], one["bf16"]
    assert relative(found.losses, expected.losses) <= BF16_LOSS_TOLERANCE
    assert relative(found.eval_loss, expected.eval_loss) <= BF16_LOSS_TOLERANCE
    assert relative(found.norms, expected.norms) <= BF16_NORM_TOLERANCE


def test_bf16_trains_like_fp32(one: dict[str, Result]) -> None:
    """Measured: within 9e-4."""
    assert relative(one["bf16"].losses, one["plain"].losses) <= 5e-3
    assert one["bf16"].losses[-1] < one["bf16"].losses[0] - 0.5


def masters(case: dict[str, Any]) -> None:
    """In bf16 the masters are fp32, the weights are their rounding, and they move by less than bf16 can."""
    run = make_run(dist.get_world_size(), {**case, "train.precision": "bf16", "optimizer.lr": 1e-6})
    engine = build_engine(run, Mesh(run.layout, "cpu"), CPU)
    before = {name: owned.master.clone() for name, owned in engine.optimizer.ranges.items()}
    train_steps(engine, run, range(2), Trace())
    engine.finish()
    for name, owned in engine.optimizer.ranges.items():
        weights = engine.parameters.unit(owned.unit)[owned.range.start : owned.range.stop]
        assert owned.master.dtype == torch.float32
        assert weights.dtype == torch.bfloat16
        assert torch.equal(weights, owned.master.bfloat16())
        moved = owned.master != before[name]
        if owned.master.abs().sum():
            assert moved.any(), name
            assert (owned.master - before[name]).abs().max() < 1e-5
    assert engine.optimizer.state_bytes() == 3 * 4 * engine.space.numel // engine.optimizer.gradients.numbers.optim


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_masters_of_bf16_weights_are_fp32(stage: int) -> None:
    run_ranks(2, masters, {"parallel.data_shard": 2, "zero.stage": stage})


def spoil_gradients(engine: Engine, run: ResolvedRun, bad: float) -> None:
    """Put one bad number into this rank's gradients as its next backward ends, before they are reduced."""
    unit = next(unit for unit in engine.optimizer.gradients.units.values() if "blocks" in unit.unit.name)
    complete = unit._complete

    def spoiled() -> None:
        unit.writable()[5] = bad
        unit._complete = complete  # type: ignore[method-assign]
        complete()

    unit._complete = spoiled  # type: ignore[method-assign]


def skipping(cases: dict[str, dict[str, Any]], culprit: int, bad: float) -> dict[str, Trace]:
    """Steps 0 and 1, a step 2 in which one rank has a bad gradient, then steps 3 and 4."""
    traces = {}
    for name, case in cases.items():
        run = make_run(dist.get_world_size(), case)
        engine = build_engine(run, Mesh(run.layout, "cpu"), CPU)
        trace = traces[name] = Trace()
        train_steps(engine, run, range(2), trace)
        before = {share.name: share.values.tobytes() for share in shares(engine)}
        moments = engine.optimizer.first_moment.clone(), engine.optimizer.second_moment.clone()
        if dist.get_rank() == culprit:
            spoil_gradients(engine, run, bad)
        train_steps(engine, run, [2], trace)
        assert {share.name: share.values.tobytes() for share in shares(engine)} == before
        assert torch.equal(engine.optimizer.first_moment, moments[0])
        assert torch.equal(engine.optimizer.second_moment, moments[1])
        assert engine.optimizer.step_count() == 2, "a skipped step is not counted"
        train_steps(engine, run, [3, 4], trace)
        assert engine.optimizer.step_count() == 4
        trace.weights = shares(engine)
    return traces


def omitting() -> dict[str, Trace]:
    """The same without step 2."""
    run = make_run(1)
    engine = build_engine(run, Mesh(run.layout, "cpu"), CPU)
    trace = Trace()
    train_steps(engine, run, [0, 1, 3, 4], trace)
    trace.weights = shares(engine)
    return {"one": trace}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("culprit", [0, 3])
def test_a_bad_gradient_on_one_rank_skips_the_step_everywhere(culprit: int, bad: float) -> None:
    """The weights stay as they are, bit for bit, and training goes on as if the step had never been."""
    found = join(run_ranks(4, skipping, FOUR, culprit, bad, timeout_seconds=240))
    expected = join(run_ranks(1, omitting))["one"]
    for result in found.values():
        assert result.skipped == [False, False, True, False, False]
        assert not np.isfinite(result.norms[2])
        assert np.isfinite(result.losses).all()
        assert relative(result.losses[:2] + result.losses[3:], expected.losses) <= 1e-6
        assert largest_difference(result.weights, expected.weights) <= 3e-4
