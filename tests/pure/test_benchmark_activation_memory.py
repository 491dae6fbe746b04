"""What benchmarks/activation_memory.py computes from what ranks have measured, and the runs that it asks for."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.activation_memory import ALL, HALF, LAYOUTS, SCHEDULES, bars_of, formula, make_run, rows_of
from parallel.pipeline.actions import Action, Op
from trainer.costs import derived_costs
from trainer.program import build_program

NAME = "8 ranks x 4"
LAYOUT = LAYOUTS[NAME]


def found(schedule: str, part: int = 100) -> dict[str, Any]:
    return {"losses": [1.5], "peak_bytes": part, "simulated_bytes": part, "host_bytes": 7, "moved_bytes": 9}


def ranks(**peaks: int) -> list[dict[str, dict[str, Any]]]:
    """Two ranks that hold 3200 bytes under 1f1b, the second less everywhere."""
    first = {schedule: found(schedule, 3200) for schedule in SCHEDULES}
    for schedule, peak in peaks.items():
        first[{"half": HALF, "all": ALL, "gish": "gis-h"}[schedule]]["peak_bytes"] = peak
    return [first, {schedule: found(schedule, 50) for schedule in SCHEDULES}]


def bars(**peaks: int) -> dict[str, dict[str, Any]]:
    rows = rows_of(NAME, LAYOUT, ranks(**peaks))
    return {each["name"].removeprefix(f"{NAME}, "): each for each in bars_of(NAME, LAYOUT, rows)}


def test_ratios_are_to_1f1b_and_of_the_rank_that_holds_most() -> None:
    rows = {row["schedule"]: row for row in rows_of(NAME, LAYOUT, ranks(half=800))}
    assert rows[HALF]["measured_ratio"] == 0.25
    assert rows[HALF]["simulated_ratio"] == 1.0
    assert rows[HALF]["activations"] == 8.0
    assert rows["gis-h"]["formula_ratio"] == 0.625
    assert "formula_ratio" not in rows["uniform"]


def test_a_bar_is_missed_by_more_than_a_tenth() -> None:
    assert bars(gish=2100)["gis-h: off the formula"]["ok"]
    assert not bars(gish=2250)["gis-h: off the formula"]["ok"]
    assert not bars(gish=1750)["gis-h: off the formula"]["ok"], "less than published is no match either"
    assert bars(half=800)[f"{HALF}: off the formula and what is in motion"]["ok"]
    assert not bars(half=800)[f"{HALF}: off the simulation"]["ok"]
    assert bars(all=400)[f"{ALL}: activations of one part that a rank holds"]["ok"]
    assert not bars(all=410)[f"{ALL}: activations of one part that a rank holds"]["ok"]


def test_other_losses_void_the_comparison() -> None:
    wrong = ranks()
    wrong[1]["gis"]["losses"] = [1.5000001]
    with pytest.raises(RuntimeError, match="gis: the losses are not those of 1f1b"):
        rows_of(NAME, LAYOUT, wrong)


def test_formulas_are_the_papers() -> None:
    values = {schedule: formula(schedule, LAYOUT) for schedule in SCHEDULES}
    assert values == {
        "1f1b": 1.0,
        "interleaved": 1.25,
        "gis": 1.0,
        "gis-h": 0.625,
        "uniform": None,
        HALF: 0.1875,
        ALL: None,
    }


def test_copies_are_planned_to_take_their_share() -> None:
    run = make_run(LAYOUT, HALF)
    costs = derived_costs(run)
    copies = costs.seconds(Action(Op.OFFLOAD, 5, 0)) + costs.seconds(Action(Op.RELOAD, 5, 0))
    passes = costs.seconds(Action(Op.F, 5, 0)) + costs.seconds(Action(Op.B, 5, 0))
    assert copies / passes == pytest.approx(LAYOUT.copy_ratio)
    assert Op.OFFLOAD in build_program(run).ops
    assert Op.OFFLOAD not in build_program(make_run(LAYOUT, "uniform")).ops
