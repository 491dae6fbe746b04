"""What the benchmarks compute from what they measure, and that a turn that fails cannot pass for a result."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import comm, common, step
from trainer.models.config import ModelConfig
from trainer.models.partition import unit_parameters

RESULTS = sorted((common.ROOT / "benchmarks" / "results").glob("*.json"))


def assert_format(result: dict[str, Any]) -> None:
    """The one JSON format of all benchmarks (benchmarks/README.md)."""
    assert {"benchmark", "environment", "rows", "bars"} <= set(result)
    assert result["rows"]
    assert result["bars"]
    for each in result["bars"]:
        assert set(each) == {"name", "value", "bar", "better", "ok"}
        reached = each["value"] >= each["bar"] if each["better"] == "higher" else each["value"] <= each["bar"]
        assert each["better"] in ("higher", "lower")
        assert each["ok"] is reached
    json.dumps(result, allow_nan=False)


@given(st.lists(st.floats(0.01, 1e6), min_size=1))
def test_spread_holds_the_values(values: list[float]) -> None:
    found = common.spread(values, digits=12)
    assert found["min"] == pytest.approx(min(values))
    assert found["median"] == pytest.approx(statistics.median(values))
    assert found["max"] == pytest.approx(max(values))


@pytest.mark.parametrize(
    ("value", "better", "ok"),
    [(1.0, "higher", True), (0.9, "higher", False), (1.1, "higher", True), (1.0, "lower", True), (1.1, "lower", False)],
)
def test_bar_is_met_at_its_bound_and_on_the_better_side(value: float, better: Any, ok: bool) -> None:
    assert common.bar("x", value, 1.0, better)["ok"] is ok


def test_turns_keep_pairs_side_by_side_and_alternate() -> None:
    order = list(common.turns(["a", "A", "b", "B"], rounds=4))
    for number in range(4):
        names = [name for each, name in order if each == number]
        assert sorted(names) == ["A", "B", "a", "b"]
        assert abs(names.index("a") - names.index("A")) == 1
        assert abs(names.index("b") - names.index("B")) == 1
        assert (names.index("a") < names.index("A")) is (number % 2 == 0)


def test_ranks_get_their_variables_and_one_thread() -> None:
    code = (
        "import json, os; print('noise'); "
        "print(json.dumps([os.environ[k] for k in ('RANK', 'WORLD_SIZE', 'OMP_NUM_THREADS')]))"
    )
    assert common.run_ranks(["-c", code], 2) == [["0", "2", "1"], ["1", "2", "1"]]


def test_a_failing_rank_stops_the_others_and_is_reported() -> None:
    code = "import os, sys, time; sys.exit('the rank is unhappy') if os.environ['RANK'] == '1' else time.sleep(60)"
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 of -c .*status 1:\n.*the rank is unhappy"):
        common.run_ranks(["-c", code], 2)
    assert time.monotonic() - start < 30


def test_a_rank_that_hangs_is_killed() -> None:
    with pytest.raises(RuntimeError, match="rank 0"):
        common.run_ranks(["-c", "import time; time.sleep(60)"], 1, timeout_seconds=0.2)


@pytest.mark.parametrize(("flags", "status"), [([], 0), (["--check"], 1)])
def test_a_missed_bar_fails_only_a_check(
    flags: list[str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "result.json"
    options = common.arguments("What it is.").parse_args(["--json", "--results", str(file), *flags])
    result = common.report("x", [{"name": "row"}], [common.bar("speed", 0.5, 1.0, "higher")])
    assert common.publish(result, options) == status
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(file.read_text()) == result
    assert_format(printed)


def test_table_says_which_bar_is_missed() -> None:
    shown = common.table(
        {
            "rows": [{"name": "row", "speed": common.spread([1.0, 2.0, 4.0])}],
            "bars": [common.bar("speed", 0.5, 1.0, "higher"), common.bar("memory", 0.5, 1.0, "lower")],
        }
    )
    assert "speed 2 (1 .. 4)" in shown
    assert "MISSED  speed: 0.5 (>= 1)" in shown
    assert "ok  memory: 0.5 (<= 1)" in shown


def test_the_model_has_the_stated_size() -> None:
    total = sum(unit_parameters(ModelConfig.model_validate(step.MODEL)).values())
    assert total == pytest.approx(25.04e6, rel=1e-3)


def turns_of(speeds: list[float], rss: int = 100, loss: float = 9.0) -> list[common.Row]:
    return [
        {
            "tokens_per_second": speed,
            "cpu_seconds_per_step": 1 / speed,
            "start_rss_bytes": 10,
            "peak_rss_bytes": rss,
            "loss": loss,
        }
        for speed in speeds
    ]


def test_step_judges_the_median_of_paired_ratios() -> None:
    measured = {name: turns_of([100.0, 100.0, 100.0]) for name in step.CONTESTANTS}
    ddp = step.PAIRS[1]
    # In the second round the machine was slow for both: the ratios are 1.1, 1.2, 0.9.
    measured[ddp.atoll.name] = turns_of([110.0, 60.0, 90.0])
    measured[ddp.peer.name] = turns_of([100.0, 50.0, 100.0])
    rows, bars = step.summary(measured)
    ours = next(row for row in rows if row["name"] == ddp.atoll.name)
    assert ours["speed_ratio"] == {"median": 1.1, "min": 0.9, "max": 1.2}
    assert ours["peer"] == ddp.peer.name
    by_name = {each["name"]: each for each in bars}
    assert by_name[f"tokens/s, {ddp.atoll.name} / {ddp.peer.name}"]["value"] == 1.1
    assert [each["bar"] for each in bars] == [0.98, 1.0, 1.15, 1.0, 1.15, 1.0]
    assert_format(common.report("step", rows, bars))


def test_step_judges_memory_against_the_sharding_peer() -> None:
    measured = {name: turns_of([100.0]) for name in step.CONTESTANTS}
    pair = step.PAIRS[3]
    measured[pair.atoll.name] = turns_of([100.0], rss=101)
    _, bars = step.summary(measured)
    missed = [each["name"] for each in bars if each["better"] == "lower" and not each["ok"]]
    assert missed == [f"peak RSS per rank, {pair.atoll.name} / {pair.peer.name}"]


@pytest.mark.parametrize("loss", [9.01, float("nan")])
def test_step_refuses_a_peer_that_did_other_work(loss: float) -> None:
    measured = {name: turns_of([100.0]) for name in step.CONTESTANTS}
    measured[step.PAIRS[2].peer.name] = turns_of([100.0], loss=loss)
    with pytest.raises(ValueError, match="fsdp2 no reshard"):
        step.summary(measured)


def samples(native: list[float], direct: list[float]) -> comm.Samples:
    """Calls that take as much CPU time as time."""
    return {"native": [[each, each] for each in native], "direct": [[each, each] for each in direct]}


def test_comm_takes_the_slowest_rank_and_the_cpu_time_of_all() -> None:
    ranks = [samples([2.0, 4.0], [1.0, 1.0]), samples([3.0, 1.0], [1.0, 2.0])]
    row = comm.row("all_reduce", 2, 64, ranks)
    assert row["native_milliseconds"] == {"median": 3500.0, "min": 3000.0, "max": 4000.0}
    assert row["native_cpu_milliseconds"]["median"] == 5000.0
    assert row["direct_speed_ratio"] == {"median": 2.5, "min": 2.0, "max": 3.0}


def test_comm_joins_rounds_call_by_call() -> None:
    assert comm.joined([samples([1.0], [2.0]), samples([3.0], [4.0])]) == samples([1.0, 3.0], [2.0, 4.0])


def test_comm_bars_speak_of_one_size() -> None:
    rows = [
        comm.row("reduce_scatter", 2, comm.BAR_BYTES, [samples([2.0], [1.0])]),
        comm.row("all_reduce", 2, comm.BAR_BYTES, [samples([0.9], [1.0])]),
        comm.row("all_reduce", 2, 1, [samples([9.0], [1.0])]),
        comm.row("all_reduce", 4, comm.BAR_BYTES, [samples([9.0], [1.0])]),
    ]
    bars = comm.bars(rows)
    assert [(each["value"], each["ok"]) for each in bars] == [(2.0, True), (0.9, False)]
    assert_format(common.report("comm", rows, bars))


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_kept_results_have_the_format(file: Path) -> None:
    result = json.loads(file.read_text())
    assert_format(result)
    assert result["benchmark"] == file.stem.split("-")[0]
