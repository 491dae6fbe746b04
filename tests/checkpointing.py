"""Engines in any arrangement of ranks, and their whole state put together without the code that is tested."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.flat.space import Slot
from parallel.mesh import Mesh
from parallel.zero.optimizer import OwnedRange
from tests.support import make_run, rank_batches
from trainer.build import build_engine
from trainer.config.run import ResolvedRun
from trainer.engine import Engine

STATES = ("model", "first_moment", "second_moment")


@dataclass(frozen=True)
class Arrangement:
    """Degrees of the axes, a ZeRO stage, and the schedule, which decides what a pipeline rank holds."""

    tensor: int = 1
    pipeline: int = 1
    shard: int = 1
    replicate: int = 1
    zero: int = 0
    schedule: str = "1f1b"

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.shard * self.replicate

    def __str__(self) -> str:
        degrees = {"tensor": self.tensor, "pipeline": self.pipeline, "shard": self.shard, "replicate": self.replicate}
        named = [f"{name}{degree}" for name, degree in degrees.items() if degree > 1]
        named += [self.schedule] if self.schedule != "1f1b" else []
        return "-".join([*named, f"zero{self.zero}"] if self.shard > 1 else named or ["single"])

    def run(self, **keys: Any) -> ResolvedRun:
        """A run in this arrangement; `keys` are config keys with two underscores for a dot."""
        case = {
            "model.hidden": 32,
            "model.ffn_hidden": 48,
            "model.qk_norm": True,
            "train.sequence": 16,
            "parallel.tensor": self.tensor,
            "parallel.pipeline.stages": self.pipeline,
            "parallel.pipeline.schedule": self.schedule,
            "parallel.data_shard": self.shard,
            "parallel.data_replicate": self.replicate,
            "zero.stage": self.zero,
        }
        return make_run(self.ranks, case | {key.replace("__", "."): value for key, value in keys.items()})


def make_engine(run: ResolvedRun) -> Engine:
    """This rank's engine, on the CPU."""
    return build_engine(run, Mesh(run.layout, "cpu"), torch.device("cpu"))


def train(engine: Engine, run: ResolvedRun, steps: range) -> list[float]:
    """Train on the given steps' batches, which are the same in every arrangement; the losses."""
    rank = engine.mesh.channel("data_shard", "data_replicate").index
    return [engine.train(rank_batches(run, rank, step), run.config.optimizer.lr).loss for step in steps]


def full_state(engine: Engine) -> dict[str, Tensor]:
    """Every full tensor of weights and moments, on every rank: first whole units, then shards, then tensors.

    Raises:
        AssertionError: ranks that hold the same weights differ in a bit, or the weights that the model computes
            with are not the master weights.
    """
    engine.finish()
    optimizer = engine.optimizer
    mine = [
        (engine.mesh.position, name, owned.range.start, owned.unit.slots, _clones(owned))
        for name, owned in optimizer.ranges.items()
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)

    # One holder of a unit is what tensor, pipeline and (with the state not sharded) data ranks say apart.
    units: dict[tuple[Any, ...], dict[int, tuple[tuple[Slot, ...], dict[str, Tensor]]]] = defaultdict(dict)
    for ranges in everyone:
        for position, name, start, slots, buffers in ranges:
            copy = position["data_replicate"], position["data_shard"] if not optimizer.sharded else 0
            units[(name, position["pipeline"], copy, position["tensor"])][start] = slots, buffers
    shards: dict[tuple[Any, ...], dict[int, tuple[Slot, Tensor]]] = defaultdict(dict)
    for (_, stage, copy, tensor), shares in units.items():
        for kind in STATES:
            whole = torch.cat([shares[start][1][kind] for start in sorted(shares)])
            for slot in next(iter(shares.values()))[0]:
                value = whole[slot.range.start : slot.range.stop].view(slot.spec.shape)
                shards[(f"{kind}.{slot.spec.name}", stage, copy)][tensor] = slot, value
    state = _joined(shards)
    _check_weights(engine, state)
    return state


def _clones(owned: OwnedRange) -> dict[str, Tensor]:
    buffers = owned.master, owned.first_moment, owned.second_moment
    return {state: buffer.detach().clone() for state, buffer in zip(STATES, buffers, strict=True)}


def _joined(shards: dict[tuple[Any, ...], dict[int, tuple[Slot, Tensor]]]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for (name, _, _), by_tensor in shards.items():
        values = [by_tensor[index][1] for index in sorted(by_tensor)]
        spec = by_tensor[0][0].spec
        if spec.shard_dim is None:
            full = values[0]
            assert all(torch.equal(full, value) for value in values), f"{name} differs along the tensor axis"
        else:
            full = torch.cat(values, dim=spec.shard_dim)
        assert tuple(full.shape) == spec.full_shape
        assert torch.equal(state.setdefault(name, full), full), f"copies of {name} differ"
    return state


def _check_weights(engine: Engine, state: dict[str, Tensor]) -> None:
    for unit in engine.space.units:
        for slot in unit.slots:
            spec, weight = slot.spec, engine.parameters.parameters[slot.spec.name].detach()
            full = state[f"model.{spec.name}"]
            if spec.shard_dim is not None:
                length = spec.shape[spec.shard_dim]
                full = full.narrow(spec.shard_dim, spec.shard_index * length, length)
            assert torch.equal(weight, full.to(weight.dtype)), f"{spec.name} is not what its master weights say"
