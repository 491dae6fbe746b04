"""What a run writes down about its machine and software."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from trainer.environment import describe, usable_cores


def test_the_facts_are_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("ATOLL_TOKEN", "not for others")
    monkeypatch.setenv("HOME_OF_NOTHING", "x")
    monkeypatch.setenv("ATOLL_LAUNCHER", "local")
    facts = json.loads(json.dumps(describe()))
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["environment"].items() >= {("OMP_NUM_THREADS", "3"), ("NCCL_DEBUG", "WARN")}
    assert not {"ATOLL_TOKEN", "HOME_OF_NOTHING"} & set(facts["environment"])
    assert facts["launcher"] == "local"
    assert facts["cpu"]["usable_cores"] == len(usable_cores()) >= 1
    assert facts["memory_bytes"] > 2**28
    assert len(facts["devices"]) == torch.cuda.device_count()


def test_the_commit_is_that_of_the_configuration(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("a: 1\n")
    assert describe([config])["git"] is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", "run.yaml")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert describe([config])["git"] == {"commit": commit, "dirty": False}
    config.write_text("a: 2\n")
    assert describe([config])["git"] == {"commit": commit, "dirty": True}
