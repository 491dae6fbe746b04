"""What benchmarks/pipeline.py plans, and what it computes from what it measures."""

from __future__ import annotations

import pytest

from benchmarks import common, pipeline
from benchmarks.parts import sleeping, split_backward
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import schedules
from parallel.pipeline.simulate import simulate

NAMES = ("1f1b", "gpipe", "zb-v")
Planned = tuple[dict[str, pipeline.Case], dict[str, pipeline.Expected]]


@pytest.fixture(scope="module")
def planned() -> Planned:
    cases, expected, refused = pipeline.plan(NAMES, [8])
    assert refused == []
    return cases, expected


def steps(seconds: list[float]) -> list[common.Row]:
    """Rounds of a contestant whose longest rank and whose step take so long."""
    passes = dict.fromkeys("FIW", pipeline.PASS_SECONDS)
    return [{"span_seconds": each, "makespan_seconds": each, "pass_seconds": passes} for each in seconds]


def test_every_schedule_is_measured_with_20_ms_a_stage() -> None:
    names = [name for name in schedules() if name != "zb-ilp"]  # its search takes seconds
    cases, expected, refused = pipeline.plan(names, [8])
    assert refused == []
    whole = [case for case in cases.values() if case.system == "atoll" and not case.is_compared]
    assert [case.schedule for case in whole] == names
    assert {(case.shape, case.pass_seconds, case.layers) for case in whole} == {
        (pipeline.SMALL, pipeline.PASS_SECONDS, 1)
    }
    for case in whole:
        assert expected[case.name].makespan_seconds >= case.busy_seconds


def test_a_comparison_is_between_equal_shares_of_the_model(planned: Planned) -> None:
    cases, _ = planned
    for shape in (pipeline.SMALL, pipeline.LARGE):
        fair = [case for case in cases.values() if case.shape == shape and case.is_compared]
        assert {case.schedule for case in fair if case.system == "torch"} == set(pipeline.TORCH)
        assert "zb-v" in {case.schedule for case in fair if case.system == "atoll"}
        assert {round(case.busy_seconds, 9) for case in fair} == {0.48}
        assert {case.layers for case in fair} == {pipeline.LAYERS}
    # gpipe keeps too much; 1f1b is too far behind to become the best, and is compared with torch's
    assert [case.schedule for case in cases.values() if case.system == "atoll" and case.shape == pipeline.LARGE] == [
        "1f1b",
        "zb-v",
    ]


def test_a_schedule_that_cannot_do_the_numbers_is_left_out_with_its_reason() -> None:
    cases, _, refused = pipeline.plan(["1f1b", "interleaved"], [7])
    assert {case.schedule for case in cases.values() if case.system == "atoll"} == {"1f1b"}
    assert len(refused) == 1
    assert refused[0].startswith("interleaved: microbatches=7")


def test_programs_and_their_expectations_are_those_of_the_simulation(planned: Planned) -> None:
    cases, expected = planned
    for name, found in expected.items():
        case, program = cases[name], Program.from_csv(cases[name].program)
        assert program.has_transfers
        timeline = simulate(program, pipeline.costs(round(pipeline.PASS_SECONDS / case.pass_seconds)))
        assert found.makespan_seconds == pytest.approx(timeline.makespan_seconds)
        assert case.busy_seconds == pytest.approx(timeline.busy_seconds(0))
    plain, whole, fair = (
        expected[f"atoll {name}"] for name in ("1f1b, 8 x 20 ms", "zb-v, 8 x 20 ms", "zb-v, 8 x 10 ms, 8 layers")
    )
    assert plain.makespan_seconds == plain.span_seconds == pytest.approx(0.66)  # (m + p - 1) (F + I + W)
    assert whole.span_seconds == pytest.approx(0.96)  # no bubble on any rank
    assert fair.makespan_seconds == pytest.approx(whole.makespan_seconds / 2)
    assert fair.peak_activations == plain.peak_activations == 4


def test_ranks_are_joined_on_one_clock() -> None:
    passes = dict.fromkeys("FIW", 0.02)
    ranks = [{"start": 10.0, "end": 11.0, "pass_seconds": passes}, {"start": 10.5, "end": 12.0, "pass_seconds": passes}]
    joined = pipeline.joined(ranks)
    assert joined == {"span_seconds": 1.5, "makespan_seconds": 2.0, "pass_seconds": passes}


def test_a_row_sets_the_measured_against_the_simulated(planned: Planned) -> None:
    cases, expected = planned
    name = "atoll zb-v, 8 x 20 ms"
    row = pipeline.row(cases[name], steps([1.2, 0.96, 1.92]), expected[name])
    assert row["span_ratio"] == {"median": 1.25, "min": 1.0, "max": 2.0}
    assert row["bubble_rate"] == {"median": 0.2, "min": 0.0, "max": 0.5}
    assert row["simulated_bubble_rate"] == pytest.approx(0.06 / 1.02, rel=1e-3)
    assert row["slept_milliseconds"] == {"F": 20.0, "I": 20.0, "W": 20.0}


def test_the_best_within_1f1bs_memory_is_compared_with_the_best_of_torch(planned: Planned) -> None:
    cases, expected = planned
    measured = {name: steps([0.9] * 3) for name in cases}
    measured["atoll gpipe, 8 x 20 ms"] = steps([0.48] * 3)  # the fastest, but it keeps too much
    measured["atoll zb-v, 8 x 20 ms"] = steps([0.48] * 3)  # as fast, but not of equal work
    measured["atoll zb-v, 8 x 10 ms, 8 layers"] = steps([0.5, 0.6, 6.0])
    measured["torch DualPipeV, 8 x 10 ms, 8 layers"] = steps([0.625] * 3)
    bars = {each["name"]: each for each in pipeline.bars(cases, measured, expected)}
    best = bars["step, atoll zb-v, 8 x 10 ms, 8 layers / torch DualPipeV, 8 x 10 ms, 8 layers"]
    assert (best["value"], best["bar"], best["ok"]) == (0.96, 0.92, False)
    plain = bars["step, atoll 1f1b, 8 x 20 ms, 8 layers / torch 1F1B, 8 x 20 ms, 8 layers"]
    assert (plain["value"], plain["bar"], plain["ok"]) == (1.0, 1.0, True)
    own = bars["span / simulated span, atoll 1f1b, 8 x 20 ms"]
    assert (own["value"], own["bar"], own["ok"]) == (1.364, 1.03, False)
    assert sum(each["bar"] == pipeline.LARGE_BAR for each in bars.values()) == 1
    assert sum(each["bar"] == pipeline.SIMULATION_BAR for each in bars.values()) == len(NAMES)


def test_work_that_was_left_out_or_done_twice_is_refused() -> None:
    marks = [(op, 0.0, 1.0) for op in "FIWFIW"]
    sleeping.require_passes("all", marks, 2)
    for wrong in (marks[:-1], [*marks, ("I", 0.0, 1.0)]):
        with pytest.raises(ValueError, match="torch 1F1B ran"):
            sleeping.require_passes("torch 1F1B", wrong, 2)


def test_a_split_backward_is_judged_by_cpu_time_and_by_its_recomputations() -> None:
    whole = {"F": 1.0, "F cpu": 1.0, "B": 2.0, "B cpu": 2.0, "forwards": 2.0}
    split = {"F": 1.0, "F cpu": 1.0, "I": 3.0, "I cpu": 1.4, "W": 1.0, "W cpu": 0.8, "forwards": 3.0}
    (row,) = split_backward.rows({"atoll, recompute full": [[whole, split]]})
    assert row["split_ratio"]["median"] == 2.0
    assert row["split_cpu_ratio"]["median"] == 1.1
    assert row["I_milliseconds"]["median"] == 1500.0  # of one micro-batch of two
    cost, again = split_backward.bars([row])
    assert (cost["value"], cost["ok"]) == (1.1, False)
    assert (again["value"], again["bar"], again["ok"]) == (2.0, 1.0, False)
