"""The zero-bubble schedules with one stage a rank: published figures, formulas, memory limits, the search."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import Request, ScheduleError, find, generate
from parallel.pipeline.schedules.zero_bubble_auto import best_plan, limits_of
from parallel.pipeline.schedules.zero_bubble_heuristic import Plan, _Planner, all_choices, least_memory, plan
from parallel.pipeline.schedules.zero_bubble_ilp import _columns, _highs, solve
from parallel.pipeline.schedules.zero_bubble_model import Model, lower_bound
from parallel.pipeline.simulate import Timeline, peak_activations, simulate
from parallel.pipeline.verify import verify

HANDCRAFTED = ("zb-h1", "zb-h2")
FITTED = ("zb-1p", "zb-2p", "zb-auto")

RANKS = st.integers(1, 6)
MICROBATCHES = st.integers(1, 14)
WHOLE = st.integers(1, 9).map(float)  # whole seconds: sums are exact


class Row(NamedTuple):
    """One model and batch of "Zero Bubble Pipeline Parallelism" (arXiv:2401.10241).

    p to seq: Tables 3 and 5; milliseconds: the profile in Table 9; bubble rates: Table 5.
    """

    p: int
    m: int
    hidden: int
    heads: int
    milliseconds: tuple[float, float, float, float]
    rates: dict[str, float]

    def costs(self) -> Costs:
        """Between I and W the layer inputs stay, 32sbh of sb(34h + 5as) bytes (Table 1); the sequence is 1024."""
        kept = 32 * self.hidden / (34 * self.hidden + 5 * self.heads * 1024)
        return Costs(*self.milliseconds, weight_activation=kept)


def rates(*five: float) -> dict[str, float]:
    return dict(zip(("1f1b", "zb-h1", "zb-h2", "zb-1p", "zb-2p"), five, strict=True))


PUBLISHED = [
    Row(8, 24, 2304, 24, (18.522, 18.086, 9.337, 0.601), rates(0.2431, 0.1585, 0.1083, 0.1585, 0.0433)),
    Row(8, 32, 2304, 24, (18.513, 18.086, 9.331, 0.626), rates(0.1985, 0.1242, 0.0837, 0.1242, 0.0039)),
    Row(8, 64, 2304, 24, (18.546, 18.097, 9.321, 0.762), rates(0.1240, 0.0674, 0.0444, 0.0674, 0.0026)),
    Row(16, 48, 5120, 40, (11.347, 11.248, 8.132, 0.377), rates(0.2552, 0.1397, 0.0672, 0.1397, 0.0066)),
    Row(16, 64, 5120, 40, (11.307, 11.254, 8.101, 0.379), rates(0.2082, 0.1088, 0.0516, 0.1088, 0.0054)),
    Row(16, 128, 5120, 40, (11.325, 11.308, 8.109, 0.378), rates(0.1251, 0.0576, 0.0266, 0.0576, 0.0028)),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"p{row.p}-m{row.m}")
def test_published_bubble_rates_come_out_of_the_programs(row: Row) -> None:
    costs = row.costs()
    found = {name: simulate(generate(name, row.p, row.m, costs=costs), costs).bubble_rate for name in row.rates}
    assert {name: round(rate, 4) for name, rate in found.items()} == row.rates


def longest(timeline: Timeline) -> float:
    return max(timeline.span_seconds(rank) for rank in range(timeline.program.ranks))


def orders(program: Program, op: Op) -> list[list[int | None]]:
    return [[action.microbatch for action in listed if action.op is op] for listed in program.actions]


@st.composite
def requests(draw: st.DrawFn, ranks: st.SearchStrategy[int] = RANKS) -> Request:
    """Any costs, the same on all stages or not; activations of which less, as much or more is left for W."""
    p, m = draw(ranks), draw(MICROBATCHES)

    def number(least: int = 0) -> Any:
        one = st.integers(least, 9).map(float)
        return draw(st.one_of(one, st.tuples(*[one] * p)))

    kept = draw(st.sampled_from((None, 0.25, 3.0)))
    costs = Costs(number(), number(), number(), draw(WHOLE) - 1, activation=number(1), weight_activation=kept)
    return Request(p, m, costs=costs)


@given(requests(), st.sampled_from(HANDCRAFTED + FITTED))
def test_programs_are_right_and_run_every_kind_of_pass_in_order(request: Request, name: str) -> None:
    program = generate(name, request.ranks, request.microbatches, costs=request.costs)
    assert program.name == name
    assert verify(program) == []
    assert verify(pair_transfers(program, request.costs)) == []
    in_order = [list(range(request.microbatches))] * request.ranks
    assert orders(program, Op.F) == orders(program, Op.I) == orders(program, Op.W) == in_order


@given(RANKS, st.integers(0, 8), WHOLE, WHOLE, st.data())
def test_bubbles_of_the_handcrafted_schedules(p: int, more: int, f: float, i: float, data: st.DataObject) -> None:
    w = data.draw(st.integers(1, int(min(f, i))))  # with a longer W the last W's of a rank show
    m = 2 * p - 1 + more
    for name, hidden in (("zb-h1", 1), ("zb-h2", 2)):
        span = longest(simulate(generate(name, p, m), Costs(f, i, w)))
        bubble = max((p - 1) * (f + i - hidden * w), 0)
        assert span == m * (f + i + w) + bubble, name


@given(RANKS, st.integers(0, 8), WHOLE, st.floats(0.0, 1.0))
def test_memory_of_the_handcrafted_schedules(p: int, more: int, whole: float, ratio: float) -> None:
    kept, m = whole * ratio, 2 * p - 1 + more
    costs = Costs(activation=whole, weight_activation=kept)
    h1, h2 = (generate(name, p, m) for name in HANDCRAFTED)
    for stage in range(1, p + 1):  # as the paper counts them
        peak, _ = peak_activations(h1, stage - 1, costs)
        assert peak == pytest.approx((p - stage + 1) * whole + (stage - 1) * kept)
        peak, _ = peak_activations(h2, stage - 1, costs)
        assert peak == pytest.approx((2 * p - 2 * stage + 1) * whole + (2 * stage - 2) * kept)


@given(RANKS, st.integers(0, 8))
def test_handcrafted_schedules_hold_as_many_activations_on_every_rank(p: int, more: int) -> None:
    assert simulate(generate("zb-h1", p, p + more)).peak_activations == (p,) * p
    assert simulate(generate("zb-h2", p, 2 * p - 1 + more)).peak_activations == (2 * p - 1,) * p


@given(requests(), st.floats(1.0, 6.0))
def test_the_heuristic_keeps_to_its_limits_and_foresees_its_times(request: Request, room: float) -> None:
    stages, costs = range(request.ranks), request.costs
    limits = [room * max(costs.activation_of(stage), costs.weight_activation_of(stage)) for stage in stages]
    found = plan(request.microbatches, costs, limits)
    program = Program("plan", len(stages), len(stages), request.microbatches, tuple(stages), found.actions)
    peaks = [peak_activations(program, rank, costs)[0] for rank in stages]
    assert all(peak <= limit + 1e-6 for peak, limit in zip(peaks, limits, strict=True))
    assert found.peak == pytest.approx(max(peaks))
    assert found.span_seconds == pytest.approx(longest(simulate(program, costs)))


@given(requests(), st.floats(1.0, 6.0))
def test_a_limit_is_kept_or_refused_with_the_least_that_works(request: Request, room: float) -> None:
    p, m, costs = request.ranks, request.microbatches, request.costs
    least = max(max(costs.activation_of(stage), costs.weight_activation_of(stage)) for stage in range(p))
    for limit in (least, room * least):
        assert verify(generate("zb-auto", p, m, costs=costs, memory_limit=limit), limit + 1e-6, costs=costs) == []
    with pytest.raises(ScheduleError) as caught:
        generate("zb-auto", p, m, costs=costs, memory_limit=least * 0.99)
    assert caught.value.value.startswith("memory_limit=")
    assert caught.value.rule.startswith(f"one micro-batch alone takes {least:g} on rank ")
    assert caught.value.fix == f"set the limit to {least:g} or more"


@given(requests())
def test_fitted_schedules_take_p_and_2p_activations(request: Request) -> None:
    p, m, costs = request.ranks, request.microbatches, request.costs
    for name, count in (("zb-1p", p), ("zb-2p", 2 * p), ("zb-auto", 2 * p)):
        program = generate(name, p, m, costs=costs)
        for rank in range(p):
            most = count * max(costs.activation_of(rank), costs.weight_activation_of(rank))
            assert peak_activations(program, rank, costs)[0] <= most + 1e-6


@given(requests(), st.floats(1.0, 3.0))
def test_automatic_is_never_slower_than_what_fits_into_its_limit(request: Request, factor: float) -> None:
    p, m, costs = request.ranks, request.microbatches, request.costs
    limit = factor * p * max(least_memory(stage, costs) for stage in range(p))
    automatic = longest(simulate(generate("zb-auto", p, m, costs=costs, memory_limit=limit), costs))
    for name in (*HANDCRAFTED, "zb-1p", "zb-2p"):
        other = generate(name, p, m, costs=costs)
        peak = max(peak_activations(other, rank, costs)[0] for rank in range(p))
        # The limit of zb-2p may be the larger one without being used up; it planned with what it may take.
        if peak <= limit and (name != "zb-2p" or factor >= 2):
            assert automatic <= longest(simulate(other, costs)) * (1 + 1e-9), name


def test_of_equally_fast_plans_the_one_with_less_memory_is_taken() -> None:
    slow, large, small = Plan((), 2.0, 1.0), Plan((), 1.0, 3.0), Plan((), 1.0 + 1e-12, 2.0)
    assert small.better_than(large)
    assert large.better_than(slow)
    assert not any(one.better_than(one) or slow.better_than(one) for one in (slow, large, small))
    # On one rank nothing waits, so memory alone decides, however much there is.
    assert simulate(generate("zb-auto", 1, 8, memory_limit=8.0)).peak_activations == (1.0,)


@pytest.mark.parametrize(
    ("choice", "value", "p", "m", "costs", "limit", "seconds"),
    [
        ("delay_first", False, 3, 3, Costs(4.0, 1.0, 9.0, 0.0, weight_activation=0.5), 6.0, 44),
        ("delay_first", True, 2, 3, Costs(8.0, 5.0, 6.0, 1.0), 3.0, 60),
        ("hold_forwards", False, 2, 5, Costs(1.0, 2.0, 2.0, 2.0), 3.0, 30),
        ("hold_forwards", True, 3, 5, Costs(4.0, 3.0, 5.0, 2.0), 4.5, 71),
        ("fill_always", False, 2, 3, Costs(4.0, 6.0, 9.0, 1.0, weight_activation=0.5), 2.0, 65),
        ("fill_always", True, 3, 8, Costs(8.0, 8.0, 5.0, 1.0, weight_activation=0.5), 6.0, 171),
    ],
)
def test_every_choice_is_the_best_somewhere(
    choice: str, value: bool, p: int, m: int, costs: Costs, limit: float, seconds: float
) -> None:
    limits = [limit] * p
    found = {choices: _Planner(m, costs, limits, choices).plan().span_seconds for choices in all_choices()}
    assert plan(m, costs, limits).span_seconds == seconds == min(found.values())
    assert len(found) == 8
    assert all(span > seconds for choices, span in found.items() if getattr(choices, choice) is not value)


def test_automatic_is_not_misled_by_more_memory() -> None:
    request = Request(3, 6, costs=Costs((5.0, 2.0, 2.0), (3.0, 8.0, 3.0), 8.0, 1.0))
    assert plan(6, request.costs, [6.0] * 3).span_seconds == 114
    assert plan(6, request.costs, [3.0] * 3).span_seconds == 113
    assert longest(simulate(generate("zb-auto", 3, 6, costs=request.costs), request.costs)) == 113


def test_a_large_pipeline_is_planned_in_seconds() -> None:
    program = generate("zb-auto", 32, 256)
    assert simulate(program).bubble_rate == 0


def brute_force(request: Request, limits: Sequence[float]) -> float:
    """The shortest span over all orders of F, I and W with each kind in the order of micro-batches."""
    p, m, costs = request.ranks, request.microbatches, request.costs

    def extend(rank: int, done: tuple[int, int, int]) -> Iterator[tuple[Action, ...]]:
        f, i, w = done
        held = (f - i) * costs.activation_of(rank) + (i - w) * costs.weight_activation_of(rank)
        if held > limits[rank] + 1e-9:
            return
        if w == m:
            yield ()
        for number, (op, allowed) in enumerate(((Op.F, f < m), (Op.I, i < f), (Op.W, w < i))):
            if allowed:
                following = (f + (number == 0), i + (number == 1), w + (number == 2))
                yield from ((Action(op, rank, done[number]), *rest) for rest in extend(rank, following))

    shortest = float("inf")
    for rows in product(*(list(extend(rank, (0, 0, 0))) for rank in range(p))):
        timeline = simulate(Program("any", p, p, m, tuple(range(p)), rows), costs)
        if not timeline.blocked:
            shortest = min(shortest, longest(timeline))
    return shortest


@settings(max_examples=12)
@given(st.sampled_from(((1, 3), (2, 2), (3, 2), (2, 3))), st.data())
def test_the_ilp_finds_the_best_of_all_orders(size: tuple[int, int], data: st.DataObject) -> None:
    p, m = size
    request = replace(data.draw(requests(ranks=st.just(p))), microbatches=m)
    least = max(least_memory(stage, request.costs) for stage in range(p))
    request = replace(request, memory_limit=least * data.draw(st.sampled_from((1.0, 1.5, 2.0, 3.0))))
    program, search = solve(request)
    assert verify(program, request.memory_limit, costs=request.costs) == []
    assert search.status == "optimal"
    best = brute_force(request, limits_of(request))
    assert search.objective_seconds == pytest.approx(best, rel=1e-5)
    assert longest(simulate(program, request.costs)) == pytest.approx(search.objective_seconds)
    assert search.gap <= 1e-5


@settings(max_examples=15)
@given(requests(ranks=st.integers(2, 4)))
def test_the_ilp_is_never_worse_than_the_heuristic(request: Request) -> None:
    request = replace(request, time_limit_seconds=0.5)
    program, search = solve(request)
    assert verify(program) == []
    known = best_plan(request, limits_of(request)).span_seconds
    assert search.objective_seconds == pytest.approx(longest(simulate(program, request.costs)))
    assert search.objective_seconds <= known * (1 + 1e-9)
    assert lower_bound(request.microbatches, request.costs, limits_of(request)) <= search.bound_seconds * (1 + 1e-9)
    assert 0 <= search.gap <= 1
    assert search.gap == pytest.approx(1 - search.bound_seconds / search.objective_seconds if known else 0)


def test_the_ilp_improves_on_the_heuristic_and_proves_it() -> None:
    request = Request(3, 4, costs=Costs((3.0, 1.0, 4.0), (1.0, 5.0, 9.0), (2.0, 6.0, 5.0), 1.0), memory_limit=2.0)
    known = best_plan(request, limits_of(request)).span_seconds
    program, search = solve(request)
    assert search.objective_seconds < known
    assert (search.status, round(search.gap, 5)) == ("optimal", 0)
    assert search.seconds < 10
    assert longest(simulate(program, request.costs)) == search.objective_seconds


def test_the_solver_prints_nothing() -> None:
    """In a process of its own: HiGHS introduces itself once, in the standard output that may have to be JSON."""
    script = """
from parallel.pipeline.schedules.registry import Request
from parallel.pipeline.schedules.zero_bubble_ilp import solve
assert solve(Request(3, 4, memory_limit=2.0))[1].status == "optimal"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_search_is_reported_by_the_schedule() -> None:
    report = find("zb-ilp").report
    assert report is not None
    program, text = report(Request(2, 3))
    assert program == generate("zb-ilp", 2, 3)
    assert re.fullmatch(r"zb-ilp: optimal, gap 0\.00%, \d+\.\d s", text)
    assert find("zb-auto").report is None


def test_without_time_the_ilp_answers_with_the_heuristic() -> None:
    row = PUBLISHED[0]
    request = Request(row.p, row.m, costs=row.costs(), memory_limit=float(row.p), time_limit_seconds=0.0)
    program, search = solve(request)
    assert program.actions == generate("zb-auto", row.p, row.m, costs=row.costs(), memory_limit=float(row.p)).actions
    assert search.status == "time limit reached"
    assert 0 < search.gap < 1


def test_the_solver_starts_from_the_known_plan() -> None:
    """It has the plan before it has had any time, and takes it for one that keeps to all rows of the model."""
    row = PUBLISHED[0]
    request = Request(row.p, row.m, costs=row.costs(), memory_limit=float(row.p))
    known = best_plan(request, limits_of(request))
    model = Model(row.m, request.costs, limits_of(request), known.span_seconds, bound_seconds=0.0)
    model.build()
    values, _, _ = _highs(model, _columns(request, model, known), 0.0)
    assert values is not None
    assert values[model.total] * model.unit_seconds == pytest.approx(known.span_seconds)
    assert model.orders(values) == known.actions


def test_a_search_that_is_too_large_is_not_begun() -> None:
    row = PUBLISHED[3]
    _, search = solve(Request(row.p, row.m, costs=row.costs(), memory_limit=float(row.p)))
    assert re.fullmatch(r"not searched, \d+ binaries are more than 20000", search.status)
    assert 0 < search.gap < 1
