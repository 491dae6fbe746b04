"""The bidirectional schedule bitpipe, and list scheduling at a pace under a memory limit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.actions import Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.bitpipe import _Pace, _published
from parallel.pipeline.schedules.pace import paced
from parallel.pipeline.schedules.registry import ScheduleError, generate
from parallel.pipeline.simulate import simulate
from parallel.pipeline.verify import verify

RANKS = st.sampled_from([2, 4, 6])
SECONDS = st.sampled_from([0.5, 1.0, 1.3, 2.0])
COSTS = st.builds(Costs, SECONDS, SECONDS, SECONDS, st.sampled_from([0.0, 0.1, 0.7]))


def shape_of(p: int, m: int) -> Program:
    return generate("bitpipe", p, m).with_actions([()] * p)


def published(p: int, m: int) -> Program:
    shape = shape_of(p, m)
    return shape.with_actions(_published(rank, shape) for rank in range(p))


def longer(program: Program, costs: Costs | None = None) -> float:
    """By how many seconds the step is longer than the work of a rank, all of which work alike."""
    timeline = simulate(program, costs)
    return round(max(map(timeline.span_seconds, range(program.ranks))) - timeline.busy_seconds(0), 6)


@settings(max_examples=25)
@given(RANKS, st.integers(1, 4), COSTS)
def test_programs_are_right_whatever_the_costs(p: int, units: int, costs: Costs) -> None:
    m = units * p
    program = generate("bitpipe", p, m, costs=costs)
    assert (program.name, program.ranks, program.stages, program.replicas) == ("bitpipe", p, 4 * p, 2)
    assert program.ops == {Op.F, Op.B}
    assert verify(program, memory_limit=2.5 * p) == []
    assert verify(pair_transfers(program, costs)) == []
    for stage in range(program.stages):  # within a copy, gradients add up in the order of 1f1b
        for op in (Op.F, Op.B):
            listed = program.actions[program.rank_of(stage)]
            found = [action.microbatch for action in listed if action.stage == stage and action.op is op]
            assert found == list(program.microbatches_of(stage))


def test_the_copies_run_in_opposite_directions() -> None:
    program = generate("bitpipe", 4, 4)
    assert program.placement == (0, 1, 2, 3, 3, 2, 1, 0, 3, 2, 1, 0, 0, 1, 2, 3)
    assert [list(program.microbatches_of(stage)) for stage in (0, 7, 8, 15)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    for stage in range(8):
        assert program.rank_of(stage) + program.rank_of(stage + 8) == 3


# Stages and micro-batches of the forwards and backwards on each rank for p = m = 4; the index lists of the
# published implementation, [0, 1, 2, 10, 3, 11, 8, 9] and so on, written out.
FORWARDS = [
    "0F0,0F1,11F2,12F2,11F3,12F3,7F0,7F1",
    "1F0,10F2,1F1,10F3,13F2,6F0,13F3,6F1",
    "9F2,2F0,9F3,2F1,5F0,14F2,5F1,14F3",
    "8F2,8F3,3F0,4F0,3F1,4F1,15F2,15F3",
]
BACKWARDS = [
    "7B0,7B1,12B2,11B2,12B3,11B3,0B0,0B1",
    "6B0,13B2,6B1,13B3,10B2,1B0,10B3,1B1",
    "14B2,5B0,14B3,5B1,2B0,9B2,2B1,9B3",
    "15B2,15B3,4B0,3B0,4B1,3B1,8B2,8B3",
]


def test_a_unit_is_as_published() -> None:
    program = generate("bitpipe", 4, 4)
    for op, rows in ((Op.F, FORWARDS), (Op.B, BACKWARDS)):
        for rank, row in enumerate(rows):
            assert ",".join(str(action) for action in program.actions[rank] if action.op is op) == row
    warm_ups = [[action.op for action in listed].index(Op.B) for listed in program.actions]
    assert warm_ups == [7, 8, 8, 7]  # 3p/2 + min(r, p-1-r), and the first of a pair


@pytest.mark.parametrize("p", [2, 4, 6, 8, 12])
def test_one_unit_has_the_published_bubble(p: int) -> None:
    program = generate("bitpipe", p, p)
    assert program == published(p, p)
    timeline = simulate(program)
    assert timeline.bubble_rate == pytest.approx((p - 2) / (3 * p + p - 2))
    # 1F1B with two of these parts a stage: activations of two chunks each, passes twice as long.
    single = simulate(generate("1f1b", p, p))
    assert max(timeline.peak_activations) == 2 * max(single.peak_activations) == 2 * p
    assert timeline.bubble_rate < single.bubble_rate


@pytest.mark.parametrize("p", [4, 6, 8])
def test_the_published_order_waits_at_its_seams_and_the_other_does_not(p: int) -> None:
    for units in (1, 2, 3):
        program = published(p, units * p)
        assert verify(program, memory_limit=2 * p) == []
        assert longer(program) == (p - 2) * (1 + units)
    seamless = [longer(paced(shape_of(p, m), _Pace(p), Costs(), 2.5 * p)) for m in (3 * p, 6 * p)]
    assert len(set(seamless)) == 1
    assert seamless[0] <= 2.5 * p - 2
    assert longer(generate("bitpipe", p, 6 * p)) == seamless[0]


@pytest.mark.parametrize("p", range(2, 21, 2))
def test_the_pace_gives_every_pass_of_a_rank_its_own_slots(p: int) -> None:
    pace, shape = _Pace(p), shape_of(p, p)
    for rank in range(p):
        busy: list[int] = []
        for stage in shape.stages_of(rank):
            busy += [pace(Op.F, stage, 0), pace(Op.B, stage, 0), pace(Op.B, stage, 0) + 1]
        assert sorted(slot % 12 for slot in busy) == list(range(12))


@settings(max_examples=30)
@given(RANKS, st.integers(1, 3), COSTS, st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([4.0, 5.0, 6.5, 9.0, 40.0]))
def test_a_limit_is_kept(p: int, units: int, costs: Costs, upper: float, limit: float) -> None:
    weighted = Costs(
        costs.forward_seconds,
        costs.input_gradient_seconds,
        costs.weight_gradient_seconds,
        costs.transfer_seconds,
        activation=(1.0,) * p + (upper,) * p,
    )
    least = 2 * (1.0 + upper)
    if limit < least:
        with pytest.raises(ScheduleError, match=rf"memory_limit={limit:g}: .*set it to {least:g} or more"):
            generate("bitpipe", p, units * p, costs=weighted, memory_limit=limit)
        return
    program = generate("bitpipe", p, units * p, costs=weighted, memory_limit=limit)
    assert verify(program, limit, costs=weighted) == []


def test_memory_is_traded_for_time() -> None:
    waits = [longer(generate("bitpipe", 6, 18, memory_limit=limit)) for limit in (4.0, 6.0, 9.0, 12.0, 14.0)]
    assert waits == sorted(waits, reverse=True)
    assert len(set(waits)) == len(waits)


@pytest.mark.parametrize(
    ("arguments", "value", "rule", "fix"),
    [
        ((3, 6), "ranks=3", "their number must be even", "set it to 4, or choose another schedule"),
        ((1, 2), "ranks=1", "their number must be even", "set it to 2, or choose another schedule"),
        ((4, 6), "microbatches=6", "must be a multiple of that", "set them to 4 or 8"),
        ((4, 2), "microbatches=2", "must be a multiple of that", "set them to 4 or 8"),
    ],
)
def test_what_it_cannot_do_is_explained(arguments: tuple[int, int], value: str, rule: str, fix: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        generate("bitpipe", *arguments)
    assert caught.value.value == value
    assert caught.value.rule.endswith(rule)
    assert caught.value.fix == fix
