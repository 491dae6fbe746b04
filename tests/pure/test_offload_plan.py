"""When copies to the host must be over, what they are planned to cost, and what the config says about them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from offload.config import ActivationOffloadConfig
from parallel.pipeline.actions import Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.offload import offload_activations
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import generate
from parallel.pipeline.simulate import simulate
from tests.support import make_config, make_run
from trainer.activations import finishes
from trainer.config.problems import ConfigError
from trainer.config.rules import resolve
from trainer.costs import derived_costs
from trainer.program import build_program
from trainer.sizes import activation_bytes

ROW = "0F0,0OFFLOAD0,0F1,0F2,0RELOAD0,0B0,0B1,0B2"


def one_rank(row: str) -> Program:
    return Program.from_csv(row)


def due(row: str, seconds: float) -> dict[str, list[str]]:
    found = finishes(one_rank(row), 0, Costs(offload_seconds=seconds, reload_seconds=0.0))
    return {str(action): [str(copy) for copy in copies] for action, copies in found.items()}


@pytest.mark.parametrize(
    ("seconds", "at"),
    [
        (0.0, "0F1"),  # it ends at once
        (0.5, "0F2"),  # under way when F1 starts, over when F2 does
        (1.0, "0F2"),
        (1.5, "0RELOAD0"),  # a RELOAD waits for its OFFLOAD anyway
    ],
)
def test_a_copy_is_over_before_the_first_action_that_needs_its_memory(seconds: float, at: str) -> None:
    assert due(ROW, seconds) == {at: ["0OFFLOAD0"]}


def test_several_copies_may_end_before_one_action() -> None:
    row = "0F0,0OFFLOAD0,0F1,0OFFLOAD1,0B2,0F3,0RELOAD1,0B1,0RELOAD0,0B0,0B3"
    row = row.replace("0F0", "0F2,0F0", 1)
    assert due(row, 1.0) == {"0F3": ["0OFFLOAD0", "0OFFLOAD1"]}


def listed_peak(program: Program, rank: int, costs: Costs) -> float:
    """What a rank holds at most if memory follows its list: forwards and RELOADs take, finished OFFLOADs give."""
    finished = finishes(program, rank, costs)
    held = peak = 0.0
    for action in program.actions[rank]:
        held -= len(finished.get(action, ()))
        if action.op in (Op.F, Op.RELOAD):
            held += 1
        elif action.op in (Op.B, Op.W):
            held -= 1
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "interleaved", "gis-h", "uniform"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0, 1.5])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_memory_in_the_order_of_the_list_is_the_simulated_memory(name: str, share: float, fraction: float) -> None:
    costs = Costs(offload_seconds=1.5 * share, reload_seconds=1.5 * share)
    chunks = 1 if name in ("1f1b", "gpipe") else 4
    program = offload_activations(generate(name, 4, 8, chunks=chunks), costs, fraction=fraction)
    simulated = simulate(program, costs).peak_activations
    for rank in range(4):
        assert listed_peak(program, rank, costs) == simulated[rank]


OFFLOAD: dict[str, Any] = {
    "run.device": "cpu",
    "parallel.pipeline.stages": 2,
    "parallel.pipeline.chunks": 2,
    "parallel.pipeline.schedule": "uniform",
    "train.global_batch": 8,
    "train.gradient_accumulation": 8,
    "offload.activations.compute_flops_per_second": 1e9,
}


def offloads(**more: Any) -> set[int]:
    """The stages that a run's program offloads."""
    run = make_run(2, {**OFFLOAD, **{f"offload.activations.{key}": value for key, value in more.items()}})
    return {action.stage for action in build_program(run).listed if action.op is Op.OFFLOAD}


def test_as_many_stages_are_offloaded_as_the_config_says() -> None:
    assert offloads() == set()
    assert offloads(stages="half") == offloads(stages=1) == {0, 1}, "the first of each rank lives longest"
    assert offloads(stages="all") == offloads(stages=2) == {0, 1, 2}, "on the last, backwards follow forwards at once"


def test_more_stages_than_a_rank_holds_are_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        resolve(make_config({**OFFLOAD, "offload.activations.stages": 3}), 2)
    (problem,) = (each for each in refused.value.problems if each.path == "offload.activations.stages")
    assert problem.value == 3
    assert problem.rule == "a pipeline rank holds 2 of the model's parts"
    assert problem.fix == "set it to at most 2, or to all"


def test_nothing_is_offloaded_where_there_is_no_time() -> None:
    assert offloads(stages="all", bandwidth_bytes_per_second=1e3) == set()


def test_copies_take_their_bytes_over_the_bandwidth() -> None:
    key = "offload.activations"
    run = make_run(2, {**OFFLOAD, f"{key}.stages": "all", f"{key}.bandwidth_bytes_per_second": 1e6})
    tokens = run.batch.micro_batch * run.config.train.sequence
    costs = derived_costs(run)
    seconds = tokens * activation_bytes(run, "blocks.1") / 1e6
    for stage in (1, 2):
        for op in (Op.OFFLOAD, Op.RELOAD):
            assert costs.seconds(Action(op, stage, 0)) == pytest.approx(seconds)
    faster = make_run(2, {**OFFLOAD, f"{key}.stages": "all", f"{key}.compute_flops_per_second": 2e9})
    assert derived_costs(faster).seconds(Action(Op.F, 1, 0)) == pytest.approx(costs.seconds(Action(Op.F, 1, 0)) / 2)


@pytest.mark.parametrize(
    ("stages", "parts", "count"), [("none", 3, 0), ("half", 3, 2), ("half", 4, 2), ("all", 3, 3), (2, 3, 2)]
)
def test_stages_to_offload(stages: Any, parts: int, count: int) -> None:
    assert math.ceil(ActivationOffloadConfig(stages=stages).fraction(parts) * parts) == count


@pytest.mark.parametrize(
    "wrong", [{"stages": 0}, {"stages": "some"}, {"bandwidth_bytes_per_second": 0}, {"smallest_bytes": -1}, {"tier": 1}]
)
def test_config_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ActivationOffloadConfig.model_validate(wrong)
