"""A run that measures its costs, through the command line: what it says, what it writes, what it does not change."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from launch.schedule_options import costs_of
from tests.launches import atoll, build_small_dataset, finished, metrics, write_yaml

LINE = re.compile(
    r"^schedule zb-auto (?:planned again from|kept with) measured costs: "
    r"predicted bubble \d+\.\d%(?: -> \d+\.\d%)?, measured \d+\.\d%$",
    re.MULTILINE,
)
PIPELINE = [
    "run.ranks=2",
    "parallel.data_shard=1",
    "parallel.pipeline.schedule=zb-auto",
    "checkpoint.every=5",
    "optimizer.learning_rate.schedule=constant",
]
PROFILED = [*PIPELINE, "parallel.pipeline.profile.steps=2"]


def train(file: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    process = finished(atoll("train", file, *overrides))
    assert process.returncode == 0, process.stderr
    return process


def test_a_run_profiles_itself_and_a_resumed_one_again(tmp_path: Path) -> None:
    data = build_small_dataset(tmp_path)
    plain, profiled = (write_yaml(tmp_path, data, name) for name in ("plain", "profiled"))
    train(plain, *PIPELINE)
    costs = tmp_path / "profiled" / "costs.json"
    found = []
    for until in (5, 8):
        said = train(profiled, *PROFILED, f"train.steps={until}").stdout
        assert len(LINE.findall(said)) == 1
        written = json.loads(costs.read_text())
        found.append(written)
        forward = costs_of(written["option"], None).forward_seconds
        assert forward == pytest.approx(tuple(written["forward_seconds"]), rel=1e-6)
        assert written["hardware"]["packages"]["torch"]
    assert [written["steps"] for written in found] == [[2, 3], [7, 8]], "behind the first step of either start"
    assert not (tmp_path / "plain" / "costs.json").exists()

    lines, others = metrics(tmp_path / "profiled"), metrics(tmp_path / "plain")
    for line, other in zip(lines, others, strict=True):
        assert line["loss"] == other["loss"]
        assert line["grad_norm"] == other["grad_norm"]
        assert ("predicted_bubble_rate" in line) == ("bubble_rate" in line) == (line["step"] not in (1, 6))
    # The prediction beside a measurement is that for the program, and with the costs known, of the measured step.
    predicted = {line["step"]: line.get("predicted_bubble_rate") for line in lines}
    derived = others[1]["predicted_bubble_rate"]
    bubble = found[0]["bubble_rate"]
    again = bubble["predicted"] if bubble["predicted_again"] is None else bubble["predicted_again"]
    assert [predicted[step] for step in range(2, 6)] == [derived, derived, bubble["predicted"], again]
