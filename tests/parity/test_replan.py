"""A run that measures its costs and plans its schedule again: true costs, one program, the same losses to the bit."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import Mesh
from parallel.pipeline.actions import Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.forward import forward_only
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import schedules
from tests.ranks import run_ranks
from tests.support import Case, Trace, make_run, shares, train_steps
from trainer.build import build_engine
from trainer.metrics.passes import PassTimer
from trainer.profile import Profile

WARM_UP, PROFILED, STEPS = 1, 2, 5
DELAY_SECONDS = 0.03
UNEQUAL: dict[str, Any] = {
    "model": {"vocab": 64, "hidden": 64, "layers": 12, "heads": 4, "kv_heads": 4, "ffn_hidden": 192},
    "train.global_batch": 8,
    "train.gradient_accumulation": 8,
    "train.sequence": 64,
    "parallel.data_shard": 1,
}

def case(ranks: int, schedule: str, partition: list[int], **more: Any) -> Case:
    pipeline = {"stages": ranks, "schedule": schedule, "partition": partition}
    return {**UNEQUAL, "parallel.pipeline": pipeline | more}


@dataclass
class Outcome:
    """What one rank saw."""

    trace: Trace
    programs: tuple[str, str]
    costs: Costs | None
    predicted: tuple[float, float]


def train(case: Case, file: Path, slow: int | None) -> Outcome:
    """Some steps of a run, profiled as its config says, whose stage `slow` takes longer than its sizes tell."""
    run = make_run(dist.get_world_size(), case)
    timer = PassTimer(torch.device("cpu"))
    engine = build_engine(run, Mesh(run.layout, "cpu"), torch.device("cpu"), timer)
    profile = Profile(run, engine, timer, WARM_UP, file)
    if slow in engine.train_executor.stages:
        _, unit = engine.train_executor.stages[slow].units[0]
        unit.register_forward_pre_hook(lambda *_: time.sleep(DELAY_SECONDS))
    first, trace, predicted = engine.train_program, Trace(), []
    for step in range(STEPS):
        timer.begin(step + 1)
        train_steps(engine, run, [step], trace)
        timer.end()
        profile.after(step + 1)
        predicted.append(profile.predicted_before)
    now = engine.train_program
    assert engine.train_executor.program == now
    assert engine.eval_executor.program == forward_only(now)
    trace.weights = shares(engine)
    before, after = predicted[WARM_UP + PROFILED - 1], predicted[-1]
    assert predicted[WARM_UP + PROFILED] == after == profile.predicted
    return Outcome(trace, (first.to_csv(), now.to_csv()), profile.costs, (before, after))


def train_all(cases: Mapping[str, Case], directory: str, slow: int | None = None) -> dict[str, Outcome]:
    return {name: train(each, Path(directory) / f"{name}.json", slow) for name, each in cases.items()}


def compare(ranks: list[dict[str, Outcome]], plain: str, profiled: str) -> None:
    """Losses, norms and every weight, bit by bit; one program and one opinion of the costs on all ranks."""
    for rank in ranks:
        assert repr(rank[plain].trace) == repr(rank[profiled].trace)
        for one, other in zip(rank[plain].trace.weights, rank[profiled].trace.weights, strict=True):
            assert one.values.tobytes() == other.values.tobytes(), one.name
        first = ranks[0][profiled]
        assert rank[profiled].programs == first.programs
        assert rank[profiled].costs == first.costs
        assert rank[plain].costs is None
        assert rank[plain].programs[0] == rank[plain].programs[1]


PROFILE = {"steps": PROFILED}
MORE: Case = {"optimizer.validation": "after", "offload.activations": {"stages": "all", "smallest_bytes": 0}}
"""What carries something over from step to step, or is planned with the program."""


@pytest.mark.parametrize(("ranks", "partition"), [(2, [2, 10]), (4, [1, 1, 9, 1])])
def test_an_unequal_run_measures_and_plans_again(ranks: int, partition: list[int], tmp_path: Path) -> None:
    cases = {
        "plain": case(ranks, "zb-auto", partition),
        "again": case(ranks, "zb-auto", partition, profile=PROFILE),
        "only": case(ranks, "zb-auto", partition, profile={"steps": PROFILED, "replan": False}),
    }
    found = run_ranks(ranks, train_all, cases, str(tmp_path))
    compare(found, "plain", "again")
    compare(found, "plain", "only")
    again, only = found[0]["again"], found[0]["only"]
    costs = again.costs
    assert costs is not None
    heavy = partition.index(max(partition))
    for seconds in (costs.forward_seconds, costs.input_gradient_seconds, costs.weight_gradient_seconds):
        assert isinstance(seconds, tuple)
        assert seconds[heavy] > 1.5 * max(each for part, each in enumerate(seconds) if part != heavy)
    assert 0 < costs.transfer_seconds < 1
    assert only.programs[0] == only.programs[1]
    written = json.loads((tmp_path / "again.json").read_text())
    assert tuple(written["forward_seconds"]) == costs.forward_seconds
    assert written["bubble_rate"]["predicted"] == again.predicted[0]
    assert 0 <= written["bubble_rate"]["measured"] < 1
    assert written["hardware"]["cpu"]["cores"] > 0
    assert json.loads((tmp_path / "only.json").read_text())["bubble_rate"]["predicted_again"] is None
    assert not (tmp_path / "plain.json").exists()


@pytest.mark.parametrize(("ranks", "partition", "slow"), [(2, [10, 2], 1), (4, [9, 1, 1, 1], 3)])
def test_what_no_size_tells_changes_the_program(ranks: int, partition: list[int], slow: int, tmp_path: Path) -> None:
    cases = {
        "plain": case(ranks, "zb-auto", partition),
        "again": case(ranks, "zb-auto", partition, profile=PROFILE),
        "more": {**case(ranks, "zb-auto", partition, profile=PROFILE), **MORE},
    }
    found = run_ranks(ranks, train_all, cases, str(tmp_path), slow)
    compare(found, "plain", "again")
    compare(found, "plain", "more")
    assert found[0]["more"].programs[0] != found[0]["more"].programs[1]
    again = found[0]["again"]
    assert again.costs is not None
    forward = again.costs.forward_seconds
    assert isinstance(forward, tuple)
    assert forward[slow] >= DELAY_SECONDS > max(each for part, each in enumerate(forward) if part != slow)
    old, new = map(Program.from_csv, again.programs)
    assert old != new
    assert old.placement == new.placement
    assert old.listed == new.listed, "the same actions in another order"
    before, after = again.predicted
    assert after < before
    written = json.loads((tmp_path / "again.json").read_text())["bubble_rate"]
    assert (written["predicted"], written["predicted_again"]) == (before, after)
    assert written["measured"] == pytest.approx(before, abs=0.25), "the simulation tells what was measured"


SCHEDULES = ("gpipe", "interleaved", "zb-v", "bitpipe")
"""Backward whole and split, one and two stages a rank, the model once and twice."""


def test_other_schedules_measure_too(tmp_path: Path) -> None:
    """Their passes have a fixed order: at most transfers move, and the costs are as many as parts of the model."""
    known = [name for name in SCHEDULES if name in schedules()]
    cases: dict[str, Case] = {}
    for name in known:
        pipeline = {"stages": 2, "schedule": name}
        cases[name] = {**UNEQUAL, "parallel.pipeline": pipeline}
        cases[f"{name} again"] = {**UNEQUAL, "parallel.pipeline": pipeline | {"profile": PROFILE}}
    found = run_ranks(2, train_all, cases, str(tmp_path))
    for name in known:
        compare(found, name, f"{name} again")
        costs = found[0][f"{name} again"].costs
        assert costs is not None
        costs.require_stages(2 * schedules()[name].default_chunks)
        written = json.loads((tmp_path / f"{name} again.json").read_text())
        halves = {action.op for action in Program.from_csv(found[0][name].programs[0]).listed} & {Op.W}
        assert written["backward"].startswith("measured in halves" if halves else "measured whole")
