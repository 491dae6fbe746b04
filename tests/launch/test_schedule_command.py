"""`atoll schedule`: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.cli import app
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import generate, schedules

ROOT = Path(__file__).parents[2]
# arXiv:2401.10241: Table 9 (the measured times of the 1.5B model) and Table 5 (the bubble rates they give).
TABLE_9 = {24: "f=18.522,i=18.086,w=9.337,comm=0.601", 64: "f=18.546,i=18.097,w=9.321,comm=0.762"}
TABLE_5 = {
    (24, "1f1b"): 0.2431,
    (24, "zb-h1"): 0.1585,
    (24, "zb-2p"): 0.0433,
    (64, "1f1b"): 0.124,
    (64, "zb-2p"): 0.0026,
}


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `atoll schedule ...`."""
    result = CliRunner().invoke(app, ["schedule", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def answer(*arguments: object) -> Any:
    """The object of `--json`."""
    status, out, err = call(*arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def refused(*arguments: object) -> str:
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("atoll schedule: ")
    return err


def test_grid_and_summary() -> None:
    status, out, err = call("1f1b", "--stages", 2, "--microbatches", 3)
    assert (status, err) == (0, "")
    assert out == (
        "1f1b: 2 ranks, 2 stages, 3 micro-batches\n"
        "rank 0 | F0 F1 .  .  B0 -- F2 B1 -- .  B2 --\n"
        "rank 1 | .  F0 B0 -- F1 B1 -- F2 B2 -- .  .\n"
        "\n"
        "makespan     12, 9 without a bubble\n"
        "bubble rate  0.2500\n"
        "activations  2 1 at most on ranks 0 to 1\n"
        "p2p          3 3 sent by ranks 0 to 1, 6 in all (latency, 0 each)\n"
        "violations   none\n"
    )


def test_json_has_everything() -> None:
    found = answer("1f1b", "--stages", 4, "--microbatches", 8, "--costs", "f=1:2:1:1,w=0.5,comm=0.25")
    assert found["schedule"] == "1f1b"
    assert (found["ranks"], found["stages"], found["chunks"], found["microbatches"]) == (4, 4, 1, 8)
    assert found["peak_activations"] == [4, 3, 2, 1]
    assert all(isinstance(peak, int) for peak in found["peak_activations"])
    assert found["transfers"] == [8, 16, 16, 8]
    assert found["costs"] | {"f": [1, 2, 1, 1], "i": 1, "w": 0.5, "comm": 0.25} == found["costs"]
    assert found["ideal_seconds"] == 8 * 3.5
    assert found["makespan_seconds"] > found["ideal_seconds"]
    assert (found["violations"], found["memory_limit"], found["search"], found["p2p"]) == ([], None, None, "latency")


@pytest.mark.parametrize(("microbatches", "name"), TABLE_5)
def test_the_published_bubble_rates(microbatches: int, name: str) -> None:
    """24 heads, hidden size 2304, sequences of 1024: 32 of the 34 + 5 * 24 * 1024 / 2304 parts are left for W."""
    numbers = ("--stages", 8, "--microbatches", microbatches, "--costs", TABLE_9[microbatches])
    found = answer(name, *numbers, "--memory", f"w={32 / (34 + 5 * 24 * 1024 / 2304)}")
    assert round(found["bubble_rate"], 4) == TABLE_5[microbatches, name]


def test_the_rate_does_not_depend_on_the_unit() -> None:
    numbers = ("1f1b", "--stages", 4, "--microbatches", 6, "--costs")
    small, large = (answer(*numbers, costs) for costs in ("f=1,i=2,w=1.5,comm=0.1", "f=1e3,i=2e3,w=1500,comm=100"))
    assert small["bubble_rate"] == pytest.approx(large["bubble_rate"], rel=1e-12)


def test_blocking_transfers_take_time_of_their_ranks() -> None:
    numbers = ("1f1b", "--stages", 4, "--microbatches", 8, "--costs", "f=1,i=1,w=1,comm=0.2")
    beside, holding = answer(*numbers), answer(*numbers, "--p2p", "blocking")
    assert holding["makespan_seconds"] > beside["makespan_seconds"]
    assert holding["transfers"] == beside["transfers"]
    free = ("1f1b", "--stages", 4, "--microbatches", 8)
    assert answer(*free)["makespan_seconds"] == answer(*free, "--p2p", "blocking")["makespan_seconds"]


@pytest.mark.parametrize("name", schedules())
def test_every_schedule_has_a_page(name: str) -> None:
    status, out, err = call(name, "--stages", 4, "--microbatches", 8, "--time-limit", 2)
    assert (status, err) == (0, "")
    assert "rank 3 | " in out
    assert out.endswith("violations   none\n")


def test_csv_out_and_in(tmp_path: Path) -> None:
    file = tmp_path / "program.csv"
    status, out, _ = call("zb-h1", "--stages", 3, "--microbatches", 5, "--csv", file)
    assert status == 0
    assert f"wrote {file}" in out
    assert Program.from_csv(file.read_text()) == generate("zb-h1", 3, 5)
    kept = ("makespan_seconds", "bubble_rate", "peak_activations", "ranks", "microbatches", "stages")
    read, generated = answer(f"csv:{file}"), answer("zb-h1", "--stages", 3, "--microbatches", 5)
    assert {key: read[key] for key in kept} == {key: generated[key] for key in kept}
    assert answer(f"csv:{file}", "--stages", 3, "--microbatches", 5, "--chunks", 1) == read


def test_drawings(tmp_path: Path) -> None:
    files = {kind: tmp_path / f"drawing.{kind}" for kind in ("svg", "html", "trace")}
    options = [word for kind, file in files.items() for word in (f"--{kind}", file)]
    status, out, _ = call("zb-h1", "--stages", 3, "--microbatches", 5, "--costs", "comm=0.5", *options)
    assert status == 0
    assert all(f"wrote {file}\n" in out for file in files.values())
    assert "<title>2RECV_F4: " in files["svg"].read_text()
    assert '"2RECV_F4"' in files["html"].read_text()
    events = json.loads(files["trace"].read_text())["traceEvents"]
    assert max(event["ts"] + event["dur"] for event in events if event["ph"] == "X") == pytest.approx(
        answer("zb-h1", "--stages", 3, "--microbatches", 5, "--costs", "comm=0.5")["makespan_seconds"] * 1e6
    )


def test_a_wrong_program_is_drawn_as_far_as_it_runs(tmp_path: Path) -> None:
    file = tmp_path / "wrong.csv"
    file.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1B1,1F1\n")
    status, _, _ = call(f"csv:{file}", "--svg", tmp_path / "wrong.svg", "--p2p", "blocking", "--costs", "comm=1")
    assert status == 1
    assert "<title>1B0: " in (tmp_path / "wrong.svg").read_text()


def test_the_list() -> None:
    for arguments in ((), ("--list",)):
        status, out, _ = call(*arguments)
        assert status == 0
        for schedule in schedules().values():
            assert f"\n{schedule.name} " in out
            assert schedule.summary in out
            assert schedule.source in out
    assert [entry["schedule"] for entry in answer("--list")] == list(schedules())


# Comparisons


def table(out: str) -> list[dict[str, str]]:
    """The rows of the comparison that have figures."""
    lines = out[out.index("schedule ") :].split("activations:")[0].splitlines()
    rows = ["\t".join(cell.strip() for cell in line.split("  ") if cell.strip()) for line in lines]
    return list(csv.DictReader(io.StringIO("\n".join(rows)), delimiter="\t", restkey="notes"))


def test_all_schedules_ranked_within_a_limit() -> None:
    numbers = ("--stages", 4, "--microbatches", 8, "--memory-limit", 4, "--time-limit", 2)
    status, out, _ = call("--compare", "all", *numbers)
    assert status == 0
    rows = table(out)
    named = {row["schedule"] for row in rows}
    assert {"gpipe", "1f1b", "zb-h1", "zb-h2"} <= named
    assert all(name in out for name in schedules())
    within = [row for row in rows if "notes" not in row]
    beyond = [row for row in rows if "notes" in row]
    assert rows == within + beyond
    for part in (within, beyond):
        makespans = [float(row["makespan"]) for row in part]
        assert makespans == sorted(makespans)
    assert all(float(row["activations"]) <= 4 for row in within)
    assert all(float(row["activations"]) > 4 for row in beyond)
    entries = answer("--compare", "all", *numbers)["comparison"]
    assert {entry["schedule"] for entry in entries} == set(schedules())
    figured = [entry for entry in entries if "reason" not in entry]
    assert [entry["within_limit"] for entry in figured] == [row in within for row in rows]


def test_costs_are_carried_over_to_other_numbers_of_chunks() -> None:
    numbers = ("--stages", 2, "--microbatches", 4, "--compare", "interleaved,1f1b")
    entries = answer(*numbers, "--costs", "f=2:4,i=2,w=2,comm=0.5")["comparison"]
    by_name = {entry["schedule"]: entry for entry in entries}
    assert by_name["1f1b"]["costs"]["f"] == [2, 4]
    assert by_name["interleaved"]["costs"]["f"] == [1, 1, 2, 2]
    assert by_name["interleaved"]["costs"]["i"] == 1
    assert by_name["interleaved"]["costs"]["comm"] == 0.5
    assert by_name["interleaved"]["memory"]["b"] == 0.5
    shown = answer("interleaved", "--chunks", 2, *numbers, "--costs", "f=1:2:3:4")
    by_name = {entry["schedule"]: entry for entry in shown["comparison"]}
    assert by_name["1f1b"]["costs"]["f"] == [3, 7]
    assert by_name["1f1b"]["peak_activations"] == [4, 2], "in activations of half a rank's share"
    assert by_name["interleaved"]["makespan_seconds"] == shown["makespan_seconds"]


def test_what_cannot_do_the_numbers_is_listed_with_its_reason() -> None:
    entries = answer("--stages", 4, "--microbatches", 8, "--memory-limit", 0.5, "--compare", "1f1b,zb-auto")
    found = {entry["schedule"]: entry for entry in entries["comparison"]}
    assert found["1f1b"]["within_limit"] is False
    assert "memory_limit" in found["zb-auto"]["reason"]
    out = call("--stages", 4, "--microbatches", 8, "--memory-limit", 0.5, "--compare", "1f1b,zb-auto")[1]
    assert out[out.index("cannot do these numbers:") :].splitlines()[1].startswith("zb-auto  memory_limit=0.5")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nonsense", "--stages", 2, "--microbatches", 2), "nonsense"),
        (("1f1b", "--microbatches", 2), "add --stages N"),
        (("1f1b", "--stages", 2), "add --microbatches N"),
        (("--compare", "all", "--stages", 2), "add --microbatches N"),
        (("--compare", "1f1b,gpope", "--stages", 2, "--microbatches", 2), "did you mean 'gpipe'?"),
        (("1f1b", "--stages", 0, "--microbatches", 2), "ranks=0"),
        (("1f1b", "--stages", 2, "--microbatches", 2, "--chunks", 2), "chunks=2"),
        (("csv:nowhere.csv",), "nowhere.csv"),
        (("1f1b", "--stages", 2, "--microbatches", 2, "--costs", "q=1"), "'q=1'"),
        (("1f1b", "--stages", 2, "--microbatches", 2, "--costs", "b=1"), "give i and w"),
        (("1f1b", "--stages", 2, "--microbatches", 2, "--costs", "f"), "'f'"),
        (("1f1b", "--stages", 2, "--microbatches", 2, "--costs", "f=1,f=2"), "given twice"),
        (("1f1b", "--stages", 2, "--microbatches", 2, "--costs", "f=-1"), "f=-1"),
        (("1f1b", "--stages", 2, "--microbatches", 2, "--costs", "f=1:nan"), "f=1:nan"),
        (("1f1b", "--stages", 2, "--microbatches", 2, "--costs", "f=1:2:3"), "lists 3 stages, the model has 2"),
        (("--compare", "all", "--stages", 2, "--microbatches", 2, "--costs", "f=1:2:3"), "the model has 2"),
        (("1f1b", "--stages", 2, "--microbatches", 2, "--costs", "comm=1:2"), "one number for all stages"),
        (("1f1b", "--stages", 2, "--microbatches", 2, "--memory", "f=1"), "--memory 'f=1'"),
        (("1f1b", "--stages", 2, "--microbatches", 2, "--memory-limit", "4GB"), "--activation"),
        (("1f1b", "--stages", 2, "--microbatches", 2, "--memory-limit", "4XB"), "4XB"),
        (("1f1b", "--stages", 2, "--microbatches", 2, "--memory-limit", "0"), "positive"),
        (("1f1b", "--stages", 2, "--microbatches", 2, "--activation", "1GB"), "there is no limit"),
        (("1f1b", "--stages", 2, "--microbatches", 2, "--activation", "1GB", "--memory-limit", "4"), "unit"),
        (("zb-auto", "--stages", 4, "--microbatches", 4, "--memory-limit", "0.5"), "memory_limit=0.5"),
        (("1f1b", "--stages", 4, "--microbatches", 4, "--offload", "some"), "--offload some"),
        (("1f1b", "--stages", 4, "--microbatches", 4, "--offload", "0"), "--offload 0"),
        (("--stages", 4, "--microbatches", 4, "--compare", "all", "--svg", "x.svg"), "--svg x.svg"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_question_that_cannot_be_answered(arguments: tuple[object, ...], said: str, as_json: bool) -> None:
    assert said in refused(*arguments, *(["--json"] if as_json else []))


def test_a_limit_in_bytes() -> None:
    numbers = ("1f1b", "--stages", 4, "--microbatches", 8, "--activation", "1.5GiB", "--memory-limit")
    assert answer(*numbers, "6GiB")["memory_limit"] == 4
    status, out, _ = call(*numbers, "5GB", "--json")
    assert status == 1
    assert json.loads(out)["memory_limit"] == pytest.approx(5e9 / (1.5 * 2**30))


def test_offloaded_activations_do_not_count() -> None:
    numbers = ("uniform", "--stages", 4, "--chunks", 4, "--microbatches", 8, "--costs", "offload=0.4,reload=0.4")
    half, one, gone = (answer(*numbers, "--offload", how) for how in ("half", 1, "all"))
    stay = answer(*numbers)
    assert max(stay["peak_activations"]) > max(one["peak_activations"]) > max(half["peak_activations"])
    assert max(half["peak_activations"]) > max(gone["peak_activations"])
    assert stay["offloaded"] == 0 < one["offloaded"] < half["offloaded"] < gone["offloaded"]
    assert stay["makespan_seconds"] == half["makespan_seconds"] == gone["makespan_seconds"]
    limit = max(half["peak_activations"])
    assert answer(*numbers, "--offload", "half", "--memory-limit", limit)["violations"] == []
    status, _, err = call(*numbers, "--offload", "half", "--memory-limit", limit - 1)
    assert status == 1
    assert re.search(rf"memory: rank 0 holds {limit} activations at \d+F\d+, the limit is {limit - 1}", err)


def test_what_has_a_cost_takes_its_time() -> None:
    numbers = ("bitpipe", "--stages", 4, "--microbatches", 8, "--costs")
    plain, synced, updated = (answer(*numbers, costs) for costs in ("f=1", "f=1,reduce=3,sync=5", "f=1,update=2"))
    assert plain["makespan_seconds"] < synced["makespan_seconds"] <= plain["makespan_seconds"] + 4 * (3 + 5)
    assert updated["makespan_seconds"] >= plain["makespan_seconds"] + 2
    assert plain["bubble_rate"] == synced["bubble_rate"] == updated["bubble_rate"], "of the passes"


def test_a_search_says_what_it_found() -> None:
    numbers = ("zb-ilp", "--stages", 2, "--microbatches", 3)
    assert "\nsearch       " in call(*numbers)[1]
    assert answer(*numbers)["search"]


def test_a_limit_that_a_fixed_order_does_not_keep() -> None:
    status, out, err = call("gpipe", "--stages", 2, "--microbatches", 3, "--memory-limit", 2)
    assert status == 1
    assert "memory: rank 1 holds 3 activations at 1F2, the limit is 2" in err
    assert "rank 0 | F0   F1   !F2! " in err
    assert "activations  3 3 at most on ranks 0 to 1, limit 2\n" in out


@pytest.mark.parametrize(
    ("text", "said", "marked"),
    [
        (
            "0F0,0F1,0B0,0B1\n1F0,1I0,1F1,1B1",
            "1W0 is missing on rank 1, the other half 1I0 is listed",
            "rank 1 | .  F0 I0 F1 B1 -- .  .  | not listed: !W0!",
        ),
        (
            "0F0,0SEND_F0,0RECV_I0,0B0\n1RECV_F0,1RECV_F0,1F0,1B0,1SEND_I0",
            "1RECV_F0 is listed on rank 1, and before that on rank 1",
            "       | p2p: !RECV_F0! !RECV_F0! SEND_I0",
        ),
        (
            "0F0,0F1,0B0,0B1\n1F0,1B0,1B1,1F1",
            "rank 1, lane compute: 1B1 waits for 1F1 on rank 1 (its forward has run)",
            "rank 1 | .  F0 B0 -- .  .  | never runs: !B1! F1",
        ),
        (
            "0F0,0B0\n1F0\n1B0",
            "1B0 is listed on rank 2, stage 1 is on rank 1",
            "rank 2 |",
        ),
    ],
)
def test_a_file_with_a_wrong_program(text: str, said: str, marked: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.csv"
    file.write_text(text + "\n")
    status, _, err = call(f"csv:{file}")
    assert status == 1
    assert said in err
    assert marked in err
    status, out, err = call(f"csv:{file}", "--json")
    assert (status, err) == (1, "")
    assert said in "\n".join(violation["message"] for violation in json.loads(out)["violations"])


@pytest.mark.parametrize(
    ("text", "said"),
    [("0F0,0B0\n1F0,1Q0\n", "rank 1, cell 1: '1Q0' is not an action"), ("", "no rows"), ("2F0,2B0\n", "no rank lists")],
)
def test_a_file_without_a_program(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.csv"
    file.write_text(text)
    assert said in refused(f"csv:{file}")


def test_a_file_for_other_numbers(tmp_path: Path) -> None:
    file = tmp_path / "program.csv"
    file.write_text(generate("1f1b", 2, 3).to_csv())
    assert "ranks=2, not 4" in refused(f"csv:{file}", "--stages", 4)
    assert "microbatches=3, not 4" in refused(f"csv:{file}", "--microbatches", 4)
    assert "chunks=2" in refused(f"csv:{file}", "--chunks", 2)
    assert "lists 3 stages" in refused(f"csv:{file}", "--costs", "f=1:2:3")


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    status, _, err = call("1f1b", "--stages", 2, "--microbatches", 2, "--csv", tmp_path / "no" / "file.csv")
    assert status == 2
    assert "No such file or directory" in err


def test_it_starts_without_torch_and_numpy() -> None:
    script = (
        "import sys\n"
        "from launch.cli import app\n"
        "app(['schedule', '1f1b', '--stages', '2', '--microbatches', '4'], standalone_mode=False)\n"
        "assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "bubble rate" in ended.stdout
