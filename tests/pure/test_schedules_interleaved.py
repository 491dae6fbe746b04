"""Schedules in loop placement: their order, memory and bubble, and the published table of interleaved 1F1B."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.actions import PASS_OPS, Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import ScheduleError, generate
from parallel.pipeline.simulate import Timeline, simulate
from parallel.pipeline.simulate import peak_activations as listed_peak
from parallel.pipeline.verify import verify

SECONDS = st.floats(0.25, 4.0)
NAMES = ("interleaved", "breadth-first", "gis", "gis-h", "uniform")


def rows(program: Program) -> list[str]:
    return [" ".join(map(str, listed)) for listed in program.actions]


def peaks(program: Program) -> list[float]:
    return [listed_peak(program, rank)[0] for rank in range(program.ranks)]


def beyond_work(timeline: Timeline, costs: Costs) -> float:
    """By how much the longest rank is longer than its work, in seconds; equal stages."""
    program = timeline.program
    seconds = sum(costs.seconds(Action(op, 0, 0)) for op in (Op.F, Op.I, Op.W))
    work = program.stages // program.ranks * program.microbatches * seconds
    return max(map(timeline.span_seconds, range(program.ranks))) - work


@st.composite
def looped(draw: st.DrawFn) -> Program:
    name, p, v = draw(st.sampled_from(NAMES)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    m = draw(st.integers(1, 3)) * p if name == "interleaved" else draw(st.integers(1, 12))
    group = draw(st.integers(-(-p // 2), p)) if name in ("gis", "uniform") else None
    return generate(name, p, m, chunks=v, group=group)


@given(looped())
def test_loops_are_right_and_keep_the_order_of_micro_batches(program: Program) -> None:
    assert program.ops <= PASS_OPS
    assert program.placement == tuple(stage % program.ranks for stage in range(program.stages))
    assert verify(program) == []
    assert verify(pair_transfers(program)) == []
    for listed in program.actions:
        for op in program.ops:
            for stage in {action.stage for action in listed}:
                passes = [action.microbatch for action in listed if (action.op, action.stage) == (op, stage)]
                assert passes == list(range(program.microbatches))


@given(st.sampled_from(NAMES), st.integers(1, 8), st.integers(1, 16))
def test_one_chunk_is_a_plain_pipeline(name: str, p: int, m: int) -> None:
    program = generate(name, p, m, chunks=1)
    plain = generate("gpipe" if name == "breadth-first" else "1f1b", p, m)
    whole = [
        [Action(Op.B, a.stage, a.microbatch) if a.op is Op.I else a for a in listed if a.op is not Op.W]
        for listed in program.actions
    ]
    assert program.with_actions(whole).actions == plain.actions


def test_orders_of_two_ranks() -> None:
    assert rows(generate("interleaved", 2, 2))[0] == "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1"
    assert rows(generate("interleaved", 2, 4)) == [
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 2B2 2B3 0B1 0B2 0B3",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 3F2 3B2 3F3 3B3 1B1 1B2 1B3",
    ]
    assert rows(generate("breadth-first", 2, 2)) == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1",
    ]
    assert rows(generate("gis", 2, 2)) == [
        "0F0 0F1 2F0 2F1 2I0 2W0 2I1 2W1 0I0 0W0 0I1 0W1",
        "1F0 1F1 3F0 3I0 3W0 3F1 3I1 3W1 1I0 1W0 1I1 1W1",
    ]
    # Groups of one: stage 2 has its turn before micro-batch 1 comes.
    assert rows(generate("gis-h", 2, 2))[1] == "1F0 3F0 3I0 3W0 1F1 1I0 1W0 3F1 3I1 3W1 1I1 1W1"
    assert generate("gis-h", 3, 4, chunks=3).actions == generate("gis", 3, 4, chunks=3, group=2).actions


# --- interleaved ----------------------------------------------------------------------------------------------


# Zero-bubble paper (arXiv:2401.10241), Table 9 (TF, TB, TW and T_comm in ms) and Table 5 (bubble rate of 1F1B-I):
# ranks, micro-batches, chunks of one layer (the first and the last rank hold one layer less).
PUBLISHED = [
    (8, 24, 3, (18.522, 18.086, 9.337, 0.601), 0.1055),
    (8, 32, 3, (18.513, 18.086, 9.331, 0.626), 0.0818),
    (8, 64, 3, (18.546, 18.097, 9.321, 0.762), 0.0443),
    (16, 48, 3, (11.347, 11.248, 8.132, 0.377), 0.1104),
    (16, 64, 3, (11.307, 11.254, 8.101, 0.379), 0.0852),
    (16, 128, 3, (11.325, 11.308, 8.109, 0.378), 0.0445),
]


@pytest.mark.parametrize(("p", "m", "v", "milliseconds", "rate"), PUBLISHED)
def test_interleaved_has_the_published_bubble_rate(
    p: int, m: int, v: int, milliseconds: tuple[float, float, float, float], rate: float
) -> None:
    *passes, transfer = milliseconds
    forward, inputs, weights = (each / v for each in passes)
    timeline = simulate(generate("interleaved", p, m, chunks=v), Costs(forward, inputs, weights, transfer))
    assert round(timeline.bubble_rate, 4) == rate


@given(st.integers(2, 8), st.integers(2, 4), st.integers(2, 4), SECONDS, SECONDS, SECONDS, st.floats(0.0, 1.0))
def test_interleaved_costs_what_the_closed_form_says(
    p: int, v: int, groups: int, forward: float, inputs: float, weights: float, share: float
) -> None:
    """Transfers short enough that p of them hide behind one pass: (p-1) T + (2pv - p - 2) c beyond the work."""
    costs = Costs(forward, inputs, weights, transfer_seconds=share * min(forward, inputs + weights) / p)
    timeline = simulate(generate("interleaved", p, groups * p, chunks=v), costs)
    expected = (p - 1) * (forward + inputs + weights) + (2 * p * v - p - 2) * costs.transfer_seconds
    assert beyond_work(timeline, costs) == pytest.approx(expected)


def in_the_order_of_megatron(program: Program) -> Program:
    """The backward through chunk 0 that was moved, back behind the one before it and the forward between them."""
    p, m = program.ranks, program.microbatches
    lists = []
    for rank, listed in enumerate(program.actions):
        forwards = [action for action in listed if action.op is Op.F]
        order = [
            (group * p + number, program.stages // p - 1 - chunk)
            for group in range(m // p)
            for chunk in range(program.stages // p)
            for number in range(p)
        ]
        backwards = [Action(Op.B, chunk * p + rank, microbatch) for microbatch, chunk in order]
        ahead = min((program.stages // p - 1) * p + 2 * (p - 1 - rank), len(forwards))
        actions = forwards[:ahead]
        for forward, backward in zip(forwards[ahead:], backwards, strict=False):
            actions += [forward, backward]
        lists.append(actions + backwards[len(forwards) - ahead :])
    return program.with_actions(lists)


@given(
    st.integers(2, 6),
    st.integers(2, 4),
    st.integers(1, 4),
    SECONDS,
    SECONDS,
    SECONDS,
    st.floats(0.0, 2.0),
)
def test_the_moved_backward_is_free(
    p: int, v: int, groups: int, forward: float, inputs: float, weights: float, transfer: float
) -> None:
    costs = Costs(forward, inputs, weights, transfer)
    program = generate("interleaved", p, groups * p, chunks=v)
    plain = in_the_order_of_megatron(program)
    assert sorted(map(sorted, plain.actions)) == sorted(map(sorted, program.actions))
    assert (plain.actions == program.actions) is (groups == 1)
    assert simulate(program, costs).makespan_seconds <= simulate(plain, costs).makespan_seconds + 1e-9
    assert max(peaks(program)) == max(peaks(plain))


@given(st.integers(2, 8), st.integers(2, 4), st.integers(1, 4))
def test_interleaved_holds_as_much_as_published(p: int, v: int, groups: int) -> None:
    m = groups * p
    held = peaks(generate("interleaved", p, m, chunks=v))
    formula = [min(p * (v - 1) + 2 * (p - rank) - 1, m * v) for rank in range(p)]
    assert held[0] == max(held) == formula[0] <= (v + 1) / v * p * v
    # One backward waits longer, on ranks that hold less than the first.
    assert all(0 <= one - other <= 1 for one, other in zip(held, formula, strict=True))


@pytest.mark.parametrize(
    ("m", "fix"), [(3, "set microbatches to 4, or choose"), (6, "set microbatches to 4 or 8, or choose")]
)
def test_interleaved_needs_whole_groups(m: int, fix: str) -> None:
    with pytest.raises(ScheduleError, match=rf"^microbatches={m}: .* groups of ranks=4, .*; {fix}"):
        generate("interleaved", 4, m, chunks=2)


# --- breadth-first --------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 4), SECONDS, SECONDS)
def test_breadth_first(p: int, m: int, v: int, forward: float, inputs: float) -> None:
    costs = Costs(forward, inputs, 0.0)
    program = generate("breadth-first", p, m, chunks=v)
    assert peaks(program) == [m * v] * p
    around = (v - 1) * max(0, p - m)
    assert beyond_work(simulate(program, costs), costs) == pytest.approx((p - 1 + around) * (forward + inputs))


# --- gis, uniform ---------------------------------------------------------------------------------------------


@st.composite
def groups(draw: st.DrawFn) -> tuple[int, int]:
    """Ranks, and a group size for them."""
    p = draw(st.integers(1, 8))
    return p, draw(st.integers(-(-p // 2), p))


@given(groups(), st.integers(1, 16), st.integers(1, 5))
def test_gis_holds_as_much_as_published(ranks_and_group: tuple[int, int], m: int, v: int) -> None:
    """g(v-1) + p - r on rank r, so pv on the first for whole groups; for any costs, as the lists' order decides."""
    p, g = ranks_and_group
    held = peaks(generate("gis", p, m, chunks=v, group=g))
    formula = [min(g * (v - 1) + p - rank, m * v) for rank in range(p)]
    if m % g == 0:
        assert held == formula
    else:  # holes in the last group only take away
        assert all(one <= other for one, other in zip(held, formula, strict=True))


@given(groups(), st.integers(2, 5), st.integers(1, 5), SECONDS, SECONDS, st.floats(0.0, 1.0))
def test_gis_has_the_published_bubble(
    ranks_and_group: tuple[int, int], rounds: int, v: int, forward: float, inputs: float, share: float
) -> None:
    p, g = ranks_and_group
    # The way around takes no longer than a group, g T >= p max(F, I), and W no longer than F + I.
    least = max(0.0, p / g * max(forward, inputs) - forward - inputs)
    weights = least + share * (forward + inputs - least)
    costs = Costs(forward, inputs, weights)
    timeline = simulate(generate("gis", p, rounds * g, chunks=v, group=g), costs)
    around = (p - g) * forward + max(0.0, p * inputs - g * (inputs + weights))
    assert beyond_work(timeline, costs) == pytest.approx((p - 1) * (forward + inputs) + (v - 1) * around)


@given(st.integers(1, 4), st.integers(2, 5), st.integers(1, 5), SECONDS)
def test_the_bubble_of_half_groups_in_the_words_of_the_paper(half: int, rounds: int, v: int, each: float) -> None:
    d = 2 * half
    costs = Costs(each, each, each)
    timeline = simulate(generate("gis-h", d, rounds * half, chunks=v), costs)
    expected = (d - 1) * 2 * each + (v - 1) * d / 2 * each  # (d-1)(TF+TB) + (v-1) d/2 (TF+TB-TW)
    assert beyond_work(timeline, costs) == pytest.approx(expected)


@given(groups(), st.integers(1, 8))
def test_uniform_holds_lifespans(ranks_and_group: tuple[int, int], v: int) -> None:
    """Each chunk holds its lifespan over v slots; the sum is that of gis, and less than v above it."""
    p, g = ranks_and_group
    program = generate("uniform", p, 6 * p, chunks=v, group=g)
    for held, rank in zip(peaks(program), range(p), strict=True):
        assert g * (v - 1) + p - rank <= held < g * (v - 1) + p - rank + v


@given(groups(), st.integers(1, 8))
def test_uniform_repeats_every_v_slots(ranks_and_group: tuple[int, int], v: int) -> None:
    """In the steady state the list of a rank repeats, one micro-batch later, every v slots of three passes."""
    p, g = ranks_and_group
    m = 4 * p + 6
    for listed in generate("uniform", p, m, chunks=v, group=g).actions:
        first = next(number for number, action in enumerate(listed) if action.op is Op.I and action.stage < p)
        last = max(number for number, action in enumerate(listed) if action.op is Op.F and action.stage < p)
        for action, later in zip(listed[first:last], listed[first + 3 * v : last], strict=False):
            assert later == Action(action.op, action.stage, (action.microbatch or 0) + 1)


@pytest.mark.parametrize("name", ["gis", "uniform"])
@pytest.mark.parametrize("group", [2, 6])
def test_groups_are_between_half_of_the_ranks_and_all(name: str, group: int) -> None:
    with pytest.raises(ScheduleError, match=rf"^group={group}: must be between .*, 3 to 5: .*; set group to"):
        generate(name, 5, 10, group=group)


def test_half_groups_are_half() -> None:
    assert generate("gis-h", 5, 6, group=3) == generate("gis-h", 5, 6)
    with pytest.raises(ScheduleError, match=r"^group=4: gis-h is gis in groups .*, which is 3; leave group out"):
        generate("gis-h", 5, 6, group=4)


@pytest.mark.parametrize("name", NAMES)
def test_large_programs_are_fast(name: str) -> None:
    begun = time.perf_counter()
    program = generate(name, 32, 256, chunks=4)
    assert time.perf_counter() - begun < 2.0
    assert math.isclose(sum(map(len, program.actions)), len(program.listed))
