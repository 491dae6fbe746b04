"""Whole runs through the command line: the same numbers from every launcher, and what a run leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from parallel.pipeline.actions import PASS_OPS, Action
from tests.launches import ROOT, atoll, build_small_dataset, finished, metrics, torchrun, untimed, write_yaml
from trainer.config.rules import resolve
from trainer.config.run import load_config

STEPS, RANKS = 8, 4
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@dataclass
class Run:
    """A finished run."""

    file: Path
    directory: Path
    process: subprocess.CompletedProcess[str]

    def lines(self) -> list[dict[str, Any]]:
        return metrics(self.directory)


def run(file: Path, command: list[str]) -> Run:
    process = finished(command)
    assert process.returncode == 0, process.stderr
    return Run(file, file.with_suffix(""), process)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("train")
    build_small_dataset(directory)
    return directory


@pytest.fixture(scope="module")
def local(place: Path) -> Run:
    """`atoll train`."""
    file = write_yaml(place, place / "data", "local")
    return run(file, atoll("train", file))


@pytest.fixture(scope="module")
def elastic(place: Path) -> Run:
    """`torchrun -m trainer`."""
    file = write_yaml(place, place / "data", "elastic")
    return run(file, torchrun(RANKS, file))


def test_torchrun_and_atoll_train_give_the_same_numbers(local: Run, elastic: Run) -> None:
    assert len(local.lines()) == STEPS
    assert untimed(local.lines()) == untimed(elastic.lines())


def test_one_process_without_a_launcher_gives_nearly_the_same_numbers(place: Path, local: Run) -> None:
    """fp32 sums in another order, see tests/parity/test_layouts.py."""
    file = write_yaml(place, place / "data", "single")
    degrees = ["parallel.pipeline.stages=1", "parallel.data_shard=1"]
    single = run(file, [sys.executable, "-m", "trainer", str(file), *degrees])
    for one, other in zip(single.lines(), local.lines(), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one.get("eval_loss", 0.0) == pytest.approx(other.get("eval_loss", 0.0), rel=1e-5)
        assert "bubble_rate" not in one, "one rank waits for nobody"


def test_metrics_have_the_documented_keys(local: Run) -> None:
    for number, line in enumerate(local.lines(), 1):
        assert line["step"] == number
        for key in ("loss", "grad_norm", "lr", "seconds", "tokens_per_second", "memory_bytes"):
            assert line[key] > 0, key
        assert line["tokens"] == number * 8 * 32
        assert line["skipped_steps"] == 0
        assert ("eval_loss" in line) == (number % 4 == 0)
        # The times of a step travel with the report of the next one.
        assert ("bubble_rate" in line) == (number > 1)
        assert 0 <= line.get("bubble_rate", 0) < 1
    rates = [line["lr"] for line in local.lines()]
    assert rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert rates[-1] == pytest.approx(3e-4)


def test_the_model_learns(local: Run) -> None:
    losses = [line["loss"] for line in local.lines()]
    assert losses[0] == pytest.approx(5.77, abs=0.1), "ln 320: nothing is known yet"
    assert losses[-1] < losses[0] - 0.3
    assert local.lines()[-1]["eval_loss"] == pytest.approx(losses[-1], abs=0.5)


def test_the_console_tells_what_runs_and_how_it_goes(local: Run) -> None:
    said = local.process.stdout
    assert f"run        {local.directory}" in said
    assert "layout     data-shard 2 x pipeline 2; ZeRO: gradients over 1, optimizer state over 2" in said
    assert "batch      8 samples = micro-batch 2 x accumulation 2 x data ranks 2; 32 tokens each" in said
    assert "stage 0    embed to" in said
    assert "step 8/8  loss" in said
    assert said.count("  bubble ") == STEPS - 1, "a line for each step, the first without"
    assert f"done: step {STEPS} of {STEPS}; everything is in {local.directory}" in said


def test_the_saved_config_is_the_run_again(local: Run) -> None:
    saved = load_config([local.directory / "config.yaml"], [])
    asked = resolve(load_config([local.file], []), RANKS)
    assert resolve(saved, RANKS).values() == asked.values() == saved.model_dump(mode="json")
    assert saved.run.ranks == RANKS
    assert saved.train.gradient_accumulation == asked.batch.gradient_accumulation
    assert asked.layout.describe() == "data-shard 2 x pipeline 2"


def test_the_environment_of_every_start_is_recorded(local: Run, elastic: Run) -> None:
    for finished_run, launcher in ((local, "local"), (elastic, "torchrun")):
        (entry,) = json.loads((finished_run.directory / "environment.json").read_text())
        assert entry["launcher"] == launcher
        assert entry["from_step"] == 0
        assert str(finished_run.file) in entry["command"]
        assert entry["packages"]["torch"].startswith("2.")
        assert entry["environment"]["WORLD_SIZE"] == "4"
        assert entry["cpu"]["usable_cores"] >= 1


def test_tensorboard_shows_the_metrics(local: Run) -> None:
    events = EventAccumulator(str(local.directory / "tensorboard"))
    events.Reload()
    for key in ("loss", "grad_norm", "eval_loss", "tokens_per_second", "bubble_rate"):
        shown = [(event.step, event.value) for event in events.Scalars(key)]
        written = [(line["step"], line[key]) for line in local.lines() if key in line]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in written]


def test_the_trace_has_the_spans_of_all_ranks(local: Run) -> None:
    """Steps 2 and 3 (the first one pays for warming up): every action of every rank once a step."""
    events = json.loads((local.directory / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {rank: f"rank {rank}" for rank in range(RANKS)}
    spans = [event for event in events if event["ph"] == "X"]
    assert {span["args"]["step"] for span in spans} == {2, 3}
    assert all(span["ts"] >= 0 and span["dur"] >= 0 for span in spans)
    for rank in range(RANKS):
        stage = rank // 2  # data-shard neighbours are side by side, stages two apart
        ran = Counter(span["name"] for span in spans if span["pid"] == rank and span["tid"].endswith("runs"))
        passes = {name: count for name, count in ran.items() if Action.parse(name).op in PASS_OPS}
        expected = {f"{stage}{op}{microbatch}" for op in "FB" for microbatch in range(2)}
        assert passes == dict.fromkeys(expected, 2)
        assert ran[f"{stage}UPDATE"] == 2


def test_every_rank_has_a_log(local: Run) -> None:
    logs = local.directory / "logs"
    assert sorted(file.name for file in logs.iterdir()) == [f"rank-{rank}.log" for rank in range(RANKS)]
    assert (logs / "rank-0.log").read_text() == local.process.stdout


def test_checkpoints_are_there(local: Run) -> None:
    checkpoints = local.directory / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["latest", "step-00000004", "step-00000008"]
    assert (checkpoints / "latest").read_text().strip() == "step-00000008"


def test_a_finished_run_has_nothing_more_to_do(local: Run) -> None:
    before = (local.directory / "metrics.jsonl").read_bytes()
    again = finished(atoll("train", local.file))
    assert again.returncode == 0, again.stderr
    assert f"done: step {STEPS} of {STEPS}" in again.stdout
    assert "resumed" in again.stdout
    assert (local.directory / "metrics.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the examples keep their data and runs: one small dataset of the standard library for all of them."""
    directory = tmp_path_factory.mktemp("examples")
    target = directory / "data" / "python-stdlib"
    built = finished(atoll("data", "build", target, "--python-stdlib", "--max-bytes", 2_000_000))
    assert built.returncode == 0, built.stderr
    return {"ATOLL_DATA": str(directory / "data"), "ATOLL_RUNS": str(directory / "runs")}


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, library: dict[str, str]) -> None:
    name = example.relative_to(ROOT)
    head = example.read_text().splitlines()[:8]
    assert "# yaml-language-server: $schema=./atoll.schema.json" in head
    assert f"#   atoll train {name}" in head
    ranks = yaml.safe_load(example.read_text())["run"]["ranks"]
    assert f"#   torchrun --nproc-per-node {ranks} -m trainer {name}" in head
    small = [
        "train.steps=2",
        "train.eval_batches=1",
        "data.source.max_bytes=2000000",
        "optimizer.learning_rate.warmup_steps=0",
        "run.threads=1",
    ]
    process = finished(atoll("train", name, *small), **library)
    assert process.returncode == 0, process.stderr
    lines = metrics(Path(library["ATOLL_RUNS"]) / example.stem)
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["loss"] < lines[0]["loss"]
    assert lines[1]["eval_loss"] < 6
