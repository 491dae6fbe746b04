"""Small runs for tests: a config from a few overrides, synthetic samples, an engine driven for some steps.

A *case* is a mapping of dotted config keys to values, laid over `BASE`: {"parallel.tensor": 2, "zero.stage": 1}.
`run_cases` runs many of them on the ranks of one process group, one after the other, and `join` turns what the
ranks say into one result per case: losses, gradient norms and the full weights, replicas compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from parallel.layout import Layout
from parallel.mesh import Mesh
from trainer.build import build_engine
from trainer.config.run import BatchSizes, ResolvedRun, RunConfig
from trainer.data.batches import BatchPlan
from trainer.engine import Engine

Case = Mapping[str, Any]

BASE: dict[str, Any] = {
    "run": {"directory": "unused"},
    "model": {"vocab": 128, "hidden": 64, "layers": 4, "heads": 4, "kv_heads": 4, "ffn_hidden": 96},
    "data": {"path": "unused"},
    "train": {"steps": 10, "sequence": 32, "global_batch": 8, "gradient_accumulation": 2},
    "optimizer": {"lr": 3e-3},
}
POOL_SAMPLES = 24
"""The synthetic samples repeat after so many, so that a model learns them and its loss falls."""


class Slot:
    """A gradient slot on its own, in the type of its parameter; NaN until it is written.

    Attributes:
        writes: How many contributions there were.
        told: Called at each.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.view = torch.full_like(parameter, float("nan"), requires_grad=False)
        self.writes = 0
        self.told: Callable[[], None] = lambda: None

    def accumulate(self, write: Callable[[Tensor, bool], None]) -> None:
        write(self.view, self.writes == 0)
        self.writes += 1
        self.told()


def make_config(case: Case | None = None) -> RunConfig:
    """The base config with the dotted keys of `case` laid over it."""
    values = deepcopy(BASE)
    for path, value in (case or {}).items():
        *sections, key = path.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return RunConfig.model_validate(values)


def make_run(world_size: int, case: Case | None = None) -> ResolvedRun:
    """The case resolved for `world_size` ranks, without asking for a dataset or a run directory."""
    config = make_config(case)
    layout = config.parallel.layout(world_size)
    batch = BatchSizes.solve(config.train, layout.data)
    assert isinstance(batch, BatchSizes), batch
    return ResolvedRun(config, layout, batch)


def global_samples(run: ResolvedRun, step: int) -> NDArray[np.int64]:
    """All samples of a step, shape (global_batch, sequence + 1), the same for every layout."""
    train, model = run.config.train, run.config.model
    pool = np.random.default_rng(7).integers(0, model.vocab, (POOL_SAMPLES, train.sequence + 1))
    cursor = step * run.batch.global_batch
    return pool[np.arange(cursor, cursor + run.batch.global_batch) % POOL_SAMPLES]


def rank_batches(run: ResolvedRun, data_rank: int, step: int) -> list[NDArray[np.int64]]:
    """The micro-batches of one data-parallel rank at a step."""
    plan = BatchPlan(run.batch.global_batch, run.batch.micro_batch, run.layout.data)
    samples = global_samples(run, step)
    return [samples[rows] for rows in plan.samples(0, data_rank)]


@dataclass
class Trace:
    """What one rank saw of a case.

    Attributes:
        losses, norms, skipped: Per step.
        eval_loss: Of the step after the last one, with the final weights.
        weights: This rank's shares of the final weights.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    eval_loss: float = float("nan")
    weights: list[Share] = field(default_factory=list)


@dataclass
class Share:
    """A parameter as one rank holds it: a box of the full tensor of `name`."""

    name: str
    full_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: NDArray[Any]


def train_steps(engine: Engine, run: ResolvedRun, steps: Sequence[int], trace: Trace) -> None:
    """Train on the samples of `steps` at the peak learning rate; results go to `trace`."""
    data_rank = engine.mesh.channel("data_shard", "data_replicate").index
    for step in steps:
        result = engine.train(rank_batches(run, data_rank, step), run.config.optimizer.lr)
        trace.losses.append(result.loss)
        trace.norms.append(result.grad_norm)
        trace.skipped.append(result.skipped)


def shares(engine: Engine) -> list[Share]:
    """This rank's parameters, copies of tied weights under the name of the original."""
    engine.finish()
    found = []
    for unit in engine.space.units:
        for slot in unit.slots:
            spec = slot.spec
            offsets = [0] * len(spec.shape)
            if spec.shard_dim is not None:
                offsets[spec.shard_dim] = spec.shard_index * spec.shape[spec.shard_dim]
            values = engine.parameters.parameters[spec.name].detach().clone()
            # numpy has no bfloat16; every one of them is a float32.
            array = values.float().numpy() if values.dtype == torch.bfloat16 else values.numpy()
            found.append(Share(spec.tied_to or spec.name, spec.full_shape, tuple(offsets), array))
    return found


def run_cases(cases: Mapping[str, Case], steps: int = 10) -> dict[str, Trace]:
    """Every case on the ranks of the default process group. One mesh serves all cases of a layout."""
    meshes: dict[tuple[Layout, str], Mesh] = {}
    traces = {}
    for name, case in cases.items():
        run = make_run(dist.get_world_size(), case)
        algorithm = run.config.comm.algorithm
        if (run.layout, algorithm) not in meshes:
            meshes[run.layout, algorithm] = Mesh(run.layout, "cpu", algorithm)
        engine = build_engine(run, meshes[run.layout, algorithm], torch.device("cpu"))
        trace = traces[name] = Trace()
        train_steps(engine, run, range(steps), trace)
        data_rank = engine.mesh.channel("data_shard", "data_replicate").index
        trace.eval_loss = engine.evaluate(rank_batches(run, data_rank, steps))
        trace.weights = shares(engine)
    return traces


@dataclass
class Result:
    """A case as all ranks saw it; `weights` are full tensors."""

    losses: list[float]
    norms: list[float]
    skipped: list[bool]
    eval_loss: float
    weights: dict[str, NDArray[Any]]


def join(ranks: Sequence[Mapping[str, Trace]]) -> dict[str, Result]:
    """One result per case. All ranks must agree on everything they report and on every weight they share."""
    results = {}
    for name, first in ranks[0].items():
        traces = [traces[name] for traces in ranks]
        for rank, trace in enumerate(traces):
            for what in ("losses", "norms", "skipped", "eval_loss"):
                found, expected = getattr(trace, what), getattr(first, what)
                assert repr(found) == repr(expected), f"{name}: {what} of rank {rank}: {found}, of rank 0: {expected}"
        weights = assemble(name, [trace.weights for trace in traces])
        results[name] = Result(first.losses, first.norms, first.skipped, first.eval_loss, weights)
    return results


def assemble(name: str, ranks: Sequence[Sequence[Share]]) -> dict[str, NDArray[Any]]:
    """Full tensors from the shares of all ranks: everything covered, and whoever holds the same holds it bitwise."""
    full: dict[str, NDArray[Any]] = {}
    held: dict[str, NDArray[np.bool_]] = {}
    for rank, listed in enumerate(ranks):
        for share in listed:
            whole = full.setdefault(share.name, np.zeros(share.full_shape, share.values.dtype))
            covered = held.setdefault(share.name, np.zeros(share.full_shape, np.bool_))
            sizes = share.values.shape
            box = tuple(slice(start, start + size) for start, size in zip(share.offsets, sizes, strict=True))
            if covered[box].any():
                assert covered[box].all(), f"{name}: shares of {share.name} overlap in part"
                same = whole[box].tobytes() == share.values.tobytes()
                assert same, f"{name}: rank {rank} holds other values of {share.name} than a rank before it"
            whole[box] = share.values
            covered[box] = True
    missing = [parameter for parameter, covered in held.items() if not covered.all()]
    assert not missing, f"{name}: no rank holds all of {missing}"
    return full


def relative(found: Sequence[float] | float, expected: Sequence[float] | float) -> float:
    """The largest relative difference; infinite where only one of the two is a number."""
    one, other = np.atleast_1d(found), np.atleast_1d(expected)
    assert one.shape == other.shape, (one.shape, other.shape)
    difference = np.abs(one - other) / np.abs(other)
    return float(np.where(np.isnan(difference), np.inf, difference).max())


def largest_difference(found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> float:
    """The largest absolute difference of two models' weights."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max(float(np.abs(found[name] - expected[name]).max()) for name in expected)


def identical(one: Result, other: Result) -> bool:
    """Whether losses, norms, eval loss and weights are equal bit for bit."""
    numbers = [(each.losses, each.norms, each.skipped, each.eval_loss) for each in (one, other)]
    same_weights = one.weights.keys() == other.weights.keys() and all(
        one.weights[name].tobytes() == other.weights[name].tobytes() for name in one.weights
    )
    return repr(numbers[0]) == repr(numbers[1]) and same_weights
