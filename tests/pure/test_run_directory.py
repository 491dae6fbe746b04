"""What a run leaves on disk, over several starts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from tests.support import make_config
from trainer.config.run import RunConfig
from trainer.files import replace_text
from trainer.metrics.record import StepRecord
from trainer.metrics.sinks import ConsoleSink, JsonLinesSink
from trainer.run_directory import RunDirectory


def record(step: int, **other: float) -> StepRecord:
    values = {"loss": 4.0, "grad_norm": 1.0, "lr": 1e-3, "seconds": 0.5, "tokens_per_second": 512.0}
    return StepRecord(step=step, tokens=256 * step, memory_bytes=2 * 10**6, skipped_steps=0, **{**values, **other})


def write(directory: RunDirectory, *steps: int) -> None:
    sink = JsonLinesSink(directory.metrics)
    for step in steps:
        sink.write(record(step))
    sink.close()


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_the_config_in_the_directory_is_the_run_again(tmp_path: Path) -> None:
    config = make_config({"optimizer.betas": (0.8, 0.99), "parallel.pipeline.partition": (4,), "zero.optim": "all"})
    directory = RunDirectory(tmp_path / "deep" / "run")
    directory.open(config.model_dump(mode="json"), {}, 0)
    saved = yaml.safe_load((directory.path / "config.yaml").read_text())
    assert RunConfig.model_validate(saved) == config
    assert list(saved) == list(RunConfig.model_fields)


def test_every_start_is_recorded(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for step in (0, 30):
        directory.open(make_config().model_dump(mode="json"), {"hostname": f"host-{step}"}, step)
    entries = json.loads((tmp_path / "environment.json").read_text())
    assert [(entry["from_step"], entry["hostname"]) for entry in entries] == [(0, "host-0"), (30, "host-30")]
    assert all(entry["time"].endswith("+00:00") for entry in entries)


def test_metrics_behind_the_resumed_step_are_moved_aside(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.open(make_config().model_dump(mode="json"), {}, 0)
    write(directory, 1, 2, 3, 4, 5)
    directory.open(make_config().model_dump(mode="json"), {}, 3)
    assert steps_in(directory.metrics) == [1, 2, 3]
    assert steps_in(directory.superseded) == [4, 5]
    write(directory, 4, 5, 6)
    directory.open(make_config().model_dump(mode="json"), {}, 5)
    assert steps_in(directory.metrics) == [1, 2, 3, 4, 5]
    assert steps_in(directory.superseded) == [4, 5, 6]


def test_a_start_from_nothing_moves_everything_aside(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    write(directory, 1, 2)
    directory.open(make_config().model_dump(mode="json"), {}, 0)
    assert steps_in(directory.metrics) == []
    assert steps_in(directory.superseded) == [1, 2]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_a_kill_cut_short(tmp_path: Path, cut: int) -> None:
    """Whatever is cut off the last line - in the worst case only its end - later lines stay lines of their own."""
    directory = RunDirectory(tmp_path)
    write(directory, 1, 2, 3)
    text = directory.metrics.read_text()
    directory.metrics.write_text(text[:-cut])
    directory.open(make_config().model_dump(mode="json"), {}, 3)
    write(directory, 4)
    complete = [1, 2, 3, 4] if cut == 1 else [1, 2, 4]
    assert steps_in(directory.metrics) == complete
    assert directory.superseded.exists() == (cut > 1)


def test_a_start_without_metrics_makes_none(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.open(make_config().model_dump(mode="json"), {}, 7)
    assert not directory.metrics.exists()
    assert not directory.superseded.exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file.json"
    replace_text(file, "old")
    assert file.read_text() == "old"

    def fails(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        replace_text(file, "new and much longer")
    assert file.read_text() == "old"
    monkeypatch.undo()
    replace_text(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_record_leaves_out_what_it_does_not_know() -> None:
    plain, full = record(1).values(), record(2, mfu=0.4, eval_loss=3.0).values()
    assert {"step", "loss", "grad_norm", "lr", "seconds", "tokens", "tokens_per_second", "memory_bytes"} < set(plain)
    assert "mfu" not in plain
    assert "eval_loss" not in plain
    assert (full["mfu"], full["eval_loss"]) == (0.4, 3.0)


def test_what_the_console_shows(capsys: pytest.CaptureFixture[str]) -> None:
    console = ConsoleSink(steps=40, every=10)
    for step in range(1, 41):
        other = {"eval_loss": 3.5} if step == 15 else {}
        console.write(record(step, **other))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/40", "10/40", "15/40", "20/40", "30/40", "40/40"]
    assert lines[0] == "step  1/40  loss 4.0000  grad norm 1.000  lr 1.00e-03  512 tokens/s  2 MB  eta 0:00:20"
    assert "eval loss 3.5000" in lines[2]
    console.write(StepRecord(**{**record(20).values(), "skipped_steps": 2, "mfu": 0.25}))
    assert "MFU 25.0%  2 skipped" in capsys.readouterr().out
