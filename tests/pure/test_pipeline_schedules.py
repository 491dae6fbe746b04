"""Every registered schedule, and the registry."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.actions import PASS_OPS, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import Request, ScheduleError, generate, model_parts, register, schedules
from parallel.pipeline.verify import verify
from tests.programs import generate_from, possible_ranks

NAMES = st.sampled_from(sorted(schedules()))


@given(NAMES, st.data(), st.integers(1, 16))
def test_schedules_are_right_and_write_compute_only(name: str, data: st.DataObject, m: int) -> None:
    p = data.draw(st.sampled_from(possible_ranks(name)))
    program = generate_from(name, p, m)
    assert (program.name, program.ranks) == (name, p)
    assert program.depth == model_parts(name, p)
    assert m <= program.microbatches <= m + 2 * p
    assert program.ops <= PASS_OPS
    assert verify(program) == []
    assert verify(pair_transfers(program)) == []


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("name", sorted(schedules()))
def test_usual_numbers_are_possible_for_every_schedule(name: str, p: int) -> None:
    for m in (2 * p, 4 * p):
        assert generate_from(name, p, m).microbatches == m


@pytest.mark.parametrize("name", sorted(schedules()))
def test_every_stage_adds_its_micro_batches_up_in_order(name: str) -> None:
    """What makes all schedules equal bit for bit."""
    program = generate_from(name, 4, 8)
    for stage in range(program.stages):
        listed = program.actions[program.rank_of(stage)]
        adding = [action.microbatch for action in listed if action.stage == stage and action.op in (Op.B, Op.W)]
        assert adding == list(program.microbatches_of(stage))


@given(st.integers(1, 8), st.integers(1, 16))
def test_gpipe_and_1f1b_accumulate_gradients_in_the_same_order(p: int, m: int) -> None:
    def backwards(name: str) -> list[list[int | None]]:
        program = generate(name, p, m)
        return [[action.microbatch for action in listed if action.op is Op.B] for listed in program.actions]

    assert backwards("gpipe") == backwards("1f1b") == [list(range(m))] * p


def test_a_single_rank_alternates() -> None:
    assert [str(action) for action in generate("1f1b", 1, 3).actions[0]] == [
        "0F0",
        "0B0",
        "0F1",
        "0B1",
        "0F2",
        "0B2",
    ]


def test_schedules_say_what_they_are() -> None:
    assert {"gpipe", "1f1b"} <= set(schedules())
    for name, schedule in schedules().items():
        assert schedule.name == name
        assert schedule.summary
        assert schedule.source


@pytest.mark.parametrize(
    ("arguments", "options", "value", "rule", "fix"),
    [
        (("1f1c", 2, 4), {}, "schedule='1f1c'", "must be one of 1f1b, ", "did you mean '1f1b'?"),
        (("qqqqq", 2, 4), {}, "schedule='qqqqq'", "must be one of 1f1b, ", "choose one of those, or csv:FILE"),
        (("1f1b", 0, 4), {}, "ranks=0", "must be at least 1", "set it to 1 or more"),
        (("1f1b", 2, 0), {}, "microbatches=0", "must be at least 1", "set it to 1 or more"),
        (("1f1b", 2, 4), {"chunks": 0}, "chunks=0", "must be at least 1", "set it to 1 or more"),
        (
            ("gpipe", 2, 8),
            {"chunks": 2},
            "chunks=2",
            "gpipe puts 1 part of the model on each rank",
            "set chunks to 1, or choose another schedule",
        ),
        (
            ("1f1b", 4, 8),
            {"memory_limit": 2.0},
            "memory_limit=2",
            "1f1b has a fixed order that no limit changes",
            "leave the limit out, or choose one of",
        ),
    ],
)
def test_what_cannot_be_generated_is_explained(
    arguments: tuple[str, int, int], options: dict[str, Any], value: str, rule: str, fix: str
) -> None:
    with pytest.raises(ScheduleError) as caught:
        generate(*arguments, **options)
    assert caught.value.value == value
    assert caught.value.rule.startswith(rule)
    assert caught.value.fix.startswith(fix)
    assert str(caught.value) == f"{value}: {caught.value.rule}; {caught.value.fix}"


def test_costs_of_another_number_of_stages_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("forward_seconds lists 3 stages, the model has 2")):
        generate("1f1b", 2, 4, costs=Costs(forward_seconds=(1.0, 2.0, 3.0)))


def test_a_name_is_registered_once() -> None:
    def again(request: Request) -> Program:
        raise NotImplementedError

    with pytest.raises(ValueError, match=r"'gpipe' is already registered by .*schedules\.gpipe\.gpipe"):
        register("gpipe", summary="another", source="none")(again)
    assert schedules()["gpipe"].generator is not again
