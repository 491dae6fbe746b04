"""One rank on a GPU trains like one rank on a CPU. Needs a GPU; skipped elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that this torch can use"),
]
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"


def train(directory: Path, data: Path, *overrides: str) -> list[float]:
    """Losses of a short run of one rank."""
    settings = [
        f"run.directory={directory}",
        f"data.path={data}",
        "train.steps=10",
        "train.eval_every=null",
        "parallel.pipeline.stages=1",
        "parallel.data_shard=1",
    ]
    command = [sys.executable, "-m", "trainer", str(QUICKSTART), *settings, *overrides]
    subprocess.run(command, check=True, timeout=280)
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2)])
def test_gpu_losses_follow_the_cpu(tmp_path: Path, precision: str, tolerance: float) -> None:
    """Kernels sum in other orders (and the GPU may use TF32), so the curves agree, but not to the bit."""
    curves = [
        train(tmp_path / device, tmp_path / "data", f"run.device={device}", f"train.precision={precision}")
        for device in ("cpu", "cuda")
    ]
    assert curves[1] == pytest.approx(curves[0], rel=tolerance)


def test_a_gpu_run_resumes_and_leaves_a_trace(tmp_path: Path) -> None:
    data, directory = tmp_path / "data", tmp_path / "run"
    profile = "parallel.pipeline.profile.steps=2"
    whole = train(tmp_path / "whole", data, "run.device=cuda", "run.deterministic=true", profile)
    costs = json.loads((tmp_path / "whole" / "costs.json").read_text())
    assert 0 < costs["forward_seconds"][0] < 1, "measured by events in the stream"
    assert 0 <= costs["bubble_rate"]["measured"] < 1
    train(directory, data, "run.device=cuda", "run.deterministic=true", "train.steps=10", "checkpoint.every=5")
    assert json.loads((directory / "trace.json").read_text())["traceEvents"]
    assert [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()] == whole
