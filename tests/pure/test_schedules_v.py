"""The V-shaped schedules zb-v, v-half, v-min and dualpipe-v, and how W fill the gaps of an order."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.actions import Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.fill import Order, fill
from parallel.pipeline.schedules.registry import Request, ScheduleError, generate
from parallel.pipeline.schedules.v_half import v_half_block
from parallel.pipeline.schedules.v_min import v_min_block
from parallel.pipeline.schedules.v_shape import Block, block, peak, placement, v_program
from parallel.pipeline.schedules.zb_v import _published
from parallel.pipeline.simulate import Timeline, simulate
from parallel.pipeline.verify import verify

SPLIT = ["zb-v", "v-half", "v-min"]
SECONDS = st.sampled_from([0.25, 0.5, 1.0, 1.3, 2.0])
COSTS = st.builds(Costs, SECONDS, SECONDS, SECONDS, st.sampled_from([0.0, 0.1, 0.7]))
WEIGHTED = st.builds(
    lambda costs, upper, kept: Costs(
        costs.forward_seconds,
        costs.input_gradient_seconds,
        costs.weight_gradient_seconds,
        costs.transfer_seconds,
        activation=(1.0,) * 4 + (upper,) * 4,
        weight_activation=kept,
    ),
    COSTS,
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([None, 0.0, 0.5]),
)


def longest(timeline: Timeline) -> float:
    return max(timeline.span_seconds(rank) for rank in range(timeline.program.ranks))


def longer(name: str, p: int, m: int, costs: Costs | None = None) -> float:
    """By how many seconds the step is longer than the work of a rank, all of which work alike."""
    timeline = simulate(generate(name, p, m, costs=costs), costs)
    return round(longest(timeline) - timeline.busy_seconds(0), 6)


def microbatches(program: Program, stage: int, ops: set[Op]) -> list[int | None]:
    listed = program.actions[program.rank_of(stage)]
    return [action.microbatch for action in listed if action.stage == stage and action.op in ops]


@given(st.sampled_from(SPLIT), st.integers(1, 7), st.integers(1, 18), COSTS)
def test_programs_are_right_whatever_the_costs(name: str, p: int, m: int, costs: Costs) -> None:
    program = generate(name, p, m, costs=costs)
    assert (program.name, program.ranks, program.stages, program.microbatches) == (name, p, 2 * p, m)
    assert program.placement == placement(p)
    assert program.ops == {Op.F, Op.I, Op.W}
    assert verify(program) == []
    assert verify(pair_transfers(program, costs)) == []
    for stage in range(2 * p):  # gradients add up in the order of 1f1b
        for op in (Op.F, Op.I, Op.W):
            assert microbatches(program, stage, {op}) == list(range(m))


@pytest.mark.parametrize("name", [*SPLIT, "dualpipe-v"])
def test_a_rank_holds_two_parts(name: str) -> None:
    assert generate(name, 4, 8).placement == (0, 1, 2, 3, 3, 2, 1, 0)
    with pytest.raises(ScheduleError, match=f"chunks=1: {name} puts 2 parts of the model on each rank"):
        generate(name, 4, 8, chunks=1)


# --- zb-v ---


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 8, 13])
def test_zb_v_has_no_bubble_for_equal_passes(p: int) -> None:
    for m in {2 * p - 1, 2 * p, 2 * p + 1, 3 * p + 1}:
        timeline = simulate(generate("zb-v", p, m))
        assert [timeline.span_seconds(rank) for rank in range(p)] == [6.0 * m] * p
        assert timeline.bubble_rate == 0
        assert timeline.peak_activations == (2.0 * p,) * p


def test_zb_v_needs_enough_microbatches_for_that() -> None:
    assert [longer("zb-v", 4, m) for m in range(1, 8)] == [11, 7, 4, 3, 2, 1, 0]


def test_zb_v_is_the_published_order_for_equal_passes() -> None:
    listed = generate("zb-v", 2, 3).actions
    assert ",".join(map(str, listed[0])) == "0F0,0F1,0F2,3F0,3I0,3W0,3F1,3I1,3W1,0I0,0W0,3F2,3I2,3W2,0I1,0W1,0I2,0W2"
    assert ",".join(map(str, listed[1])) == "1F0,2F0,1F1,2F1,2I0,2W0,1F2,1I0,1W0,2F2,2I1,2W1,1I1,2I2,1I2,1W1,2W2,1W2"


@given(st.integers(1, 6), st.integers(1, 16), COSTS)
def test_zb_v_is_never_worse_than_the_published_order(p: int, m: int, costs: Costs) -> None:
    request = Request(p, m, 2, costs)
    published = v_program("published", request, (_published(rank, request) for rank in range(p)))
    assert verify(published, memory_limit=2 * p) == []
    program = generate("zb-v", p, m, costs=costs)
    assert verify(program, memory_limit=2 * p) == []
    assert longest(simulate(program, costs)) <= longest(simulate(published, costs)) + 1e-9


@pytest.mark.parametrize(
    ("costs", "published", "found"),
    [
        # Forward, input and weight gradient and transfer in ms: zero-bubble paper, Table 9, 1.5B and 14.6B models.
        (Costs(18.522, 18.086, 9.337, 0.601), 0.0921, 0.0878),
        (Costs(11.347, 11.248, 8.132, 0.377), 0.0569, 0.0502),
        (Costs(1.0, 0.5, 1.5), 0.0303, 0.0),
    ],
)
def test_zb_v_is_shorter_than_the_published_order_for_unequal_passes(
    costs: Costs, published: float, found: float
) -> None:
    request = Request(8, 16, 2, costs)
    program = v_program("published", request, (_published(rank, request) for rank in range(8)))
    assert simulate(program, costs).bubble_rate == pytest.approx(published, abs=6e-5)
    assert simulate(generate("zb-v", 8, 16, costs=costs), costs).bubble_rate == pytest.approx(found, abs=6e-5)


@given(st.integers(1, 14), WEIGHTED, st.sampled_from([2.0, 2.5, 3.0, 3.7, 4.5, 6.0, 7.2, 8.0, 9.0, 13.0, 100.0]))
def test_zb_v_keeps_to_a_limit(m: int, costs: Costs, limit: float) -> None:
    least = costs.activation_of(0) + costs.activation_of(7)
    if limit < least:
        with pytest.raises(ScheduleError, match=rf"memory_limit={limit:g}: .*set it to {least:g} or more"):
            generate("zb-v", 4, m, costs=costs, memory_limit=limit)
        return
    program = generate("zb-v", 4, m, costs=costs, memory_limit=limit)
    assert verify(program, limit, costs=costs) == []


def test_zb_v_trades_memory_for_time() -> None:
    costs = Costs(18.522, 18.086, 9.337, 0.601)
    limits = [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28]
    rates = [simulate(generate("zb-v", 8, 20, costs=costs, memory_limit=limit), costs).bubble_rate for limit in limits]
    assert rates == sorted(rates, reverse=True)
    assert rates[limits.index(16)] < 0.08
    assert rates[-1] < rates[limits.index(16)] / 2
    assert rates[0] > 0.7  # one micro-batch at a time


# --- v-half and v-min ---


@pytest.mark.parametrize("p", range(1, 40))
def test_blocks_do_not_collide_and_hold_what_the_docstrings_say(p: int) -> None:
    half, least = v_half_block(p), v_min_block(p)
    assert not half.collides
    assert not least.collides
    assert peak(half) == (p + 1 if p % 2 else p + 2)
    assert peak(least) == 2 * math.ceil((p + 2) / 3)
    assert not any(v_min_block(p, period).collides for period in range(6, 4 * p + 12, 2))


def test_a_block_needs_its_turns() -> None:
    assert block(3, (1, 1), (0, 0, 0)).collides
    assert block(4, (2, 1), (0, 0, 1)).collides
    assert Block(((0, 1, 2, 6),), 6).collides
    assert not Block(((0, 1, 2, 9),), 6).collides
    assert Block(((0, 1, 2, 9),), 9).collides


@given(st.integers(1, 8), st.integers(1, 24), COSTS)
def test_half_and_min_never_hold_more(p: int, m: int, costs: Costs) -> None:
    for name, of in (("v-half", v_half_block(p)), ("v-min", v_min_block(p))):
        assert max(simulate(generate(name, p, m, costs=costs), costs).peak_activations) <= peak(of)


@pytest.mark.parametrize("p", range(1, 13))
def test_half_and_min_hold_and_take_what_they_say_for_equal_passes(p: int) -> None:
    m = 2 * p
    half, least = (simulate(generate(name, p, m)) for name in ("v-half", "v-min"))
    assert max(half.peak_activations) == (p + 1 if p % 2 else p + 2)
    assert max(least.peak_activations) == 2 * math.ceil((p + 2) / 3)
    assert max(simulate(generate("1f1b", p, m)).peak_activations) * 2 == 2 * p  # whole parts, each two chunks
    if p > 1:
        assert longest(half) - 6 * m == 3 * (p - 1) - (1 if p % 2 or p == 2 else 2)
        assert longest(least) - 6 * m == 4 * (p - 1) - 1


# --- W in the gaps of an order ---

# Rank 1 ends the model; rank 0 waits for its gradients.
CHAIN: Order = [
    [(Op.F, 0, 0), (Op.F, 0, 1), (Op.I, 0, 0), (Op.I, 0, 1)],
    [(Op.F, 1, 0), (Op.I, 1, 0), (Op.F, 1, 1), (Op.I, 1, 1)],
]


def filled(costs: Costs, limit: float, *delayed: Op) -> list[str] | None:
    found = fill(CHAIN, (0, 1), costs, limit, delayed)
    return None if found is None else [",".join(map(str, listed)) for listed in found.actions]


def test_weight_gradients_fill_the_gaps_they_fit_into() -> None:
    ends = "1F0,1I0,1F1,1I1,1W0,1W1"
    assert filled(Costs(), 2) == ["0F0,0F1,0I0,0W0,0I1,0W1", ends]
    assert filled(Costs(weight_gradient_seconds=1.5), 2) == ["0F0,0F1,0I0,0I1,0W0,0W1", ends]


def test_weight_gradients_make_room_for_a_forward() -> None:
    assert filled(Costs(), 1) is None  # rank 0 begins with two forwards
    assert filled(Costs(activation=(0.5, 1.0)), 1) == ["0F0,0F1,0I0,0W0,0I1,0W1", "1F0,1I0,1W0,1F1,1I1,1W1"]
    assert filled(Costs(activation=(0.5, 1.0), weight_activation=0.0), 1) == [
        "0F0,0F1,0I0,0W0,0I1,0W1",
        "1F0,1I0,1F1,1I1,1W0,1W1",
    ]


def test_weight_gradients_delay_what_they_may_on_the_most_loaded_rank() -> None:
    costs = Costs(weight_gradient_seconds=1.5)
    assert filled(costs, 2, Op.F) == filled(costs, 2)
    late = fill(CHAIN, (0, 1), costs, 2, (Op.I,))
    early = fill(CHAIN, (0, 1), costs, 2)
    assert late is not None
    assert early is not None
    assert [str(action) for action in late.actions[0]] == ["0F0", "0F1", "0I0", "0W0", "0I1", "0W1"]
    assert (early.span_seconds, late.span_seconds) == (9.0, 8.0)
    assert (early.end_seconds, late.end_seconds) == (9.0, 8.0)


@given(st.integers(1, 5), st.integers(1, 10), COSTS)
def test_the_span_of_a_filling_is_that_of_the_simulation(p: int, m: int, costs: Costs) -> None:
    request = Request(p, m, 2, costs)
    order: Order = [
        [(action.op, action.stage, action.microbatch or 0) for action in _published(rank, request) if action.op != Op.W]
        for rank in range(p)
    ]
    found = fill(order, placement(p), costs, 2 * p, (Op.F, Op.I))
    assert found is not None
    timeline = simulate(v_program("filled", request, found.actions), costs)
    assert found.span_seconds == pytest.approx(longest(timeline))
    assert found.end_seconds == pytest.approx(timeline.makespan_seconds)
    assert found.full == (timeline.bubble_rate < 1e-9)


# --- dualpipe-v ---


def test_dualpipe_v_pairs_forwards_with_backwards() -> None:
    listed = generate("dualpipe-v", 2, 4).actions
    assert ",".join(map(str, listed[1])) == ("1F0,2F0,1F1,2F1,1F2,2B0,2F2,1B0,1F3,2B1,2F3,1B1,2B2,1B2,2I3,1I3,2W3,1W3")


@given(st.integers(1, 6), st.integers(0, 9), COSTS)
def test_dualpipe_v_is_right(p: int, more: int, costs: Costs) -> None:
    m = 2 * p + more
    program = generate("dualpipe-v", p, m, costs=costs)
    assert verify(program, memory_limit=2 * p + 1) == []
    assert verify(pair_transfers(program, costs)) == []
    for stage in range(2 * p):
        for ops in ({Op.F}, {Op.B, Op.I}, {Op.B, Op.W}):
            assert microbatches(program, stage, ops) == list(range(m))


@pytest.mark.parametrize("p", range(1, 9))
def test_dualpipe_v_holds_and_takes_what_it_says_for_equal_passes(p: int) -> None:
    for m in (2 * p, 3 * p + 1):
        timeline = simulate(generate("dualpipe-v", p, m))
        assert timeline.peak_activations == (2.0 * p + 1,) * p
        assert [timeline.span_seconds(rank) - 6 * m for rank in range(p)] == list(reversed(range(p)))


def test_dualpipe_v_fills_its_pipeline() -> None:
    with pytest.raises(ScheduleError) as caught:
        generate("dualpipe-v", 4, 7)
    assert caught.value.value == "microbatches=7"
    assert caught.value.rule == "dualpipe-v needs at least 2 x ranks = 8"
    assert caught.value.fix == "set it to 8 or more, or choose zb-v"
