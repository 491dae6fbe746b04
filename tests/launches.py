"""Real runs of a very small model for tests: a dataset, a YAML file, the two ways to start it, what it left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.data.build import build_dataset
from trainer.data.config import BuildSettings, TextSource

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 120.0

YAML = """\
run:
  directory: {directory}
  ranks: 4
  threads: 1
  device: cpu
model: {{vocab: 320, hidden: 32, layers: 4, heads: 4, kv_heads: 2, ffn_hidden: 64}}
data:
  path: {data}
train:
  steps: 8
  sequence: 32
  global_batch: 8
  micro_batch: 2
  eval_every: 4
  eval_batches: 2
optimizer:
  lr: 3e-3
  learning_rate: {{warmup_steps: 2}}
parallel:
  pipeline: {{stages: 2}}
  data_shard: 2
checkpoint: {{every: 4}}
metrics: {{every: 1, span_steps: 2}}
"""
"""Two pipeline stages x two data-parallel ranks with ZeRO stage 1; 8 steps, evaluated and saved every 4."""


def build_small_dataset(directory: Path) -> Path:
    """A byte-level dataset of some thousand tokens in `directory`/data, from text made here."""
    lines = [f"{number}: the square of {number} is {number * number}, its half {number / 2}\n" for number in range(900)]
    texts = []
    for part in range(3):
        text = directory / f"part-{part}.txt"
        text.write_text("".join(lines[part::3]))
        texts.append(str(text))
    source = TextSource(kind="text", paths=tuple(texts), document_bytes=1024)
    build_dataset(directory / "data", BuildSettings(source=source, eval_fraction=0.2))
    return directory / "data"


def write_yaml(directory: Path, data: Path, name: str = "run") -> Path:
    """The small config, whose run directory is `directory`/`name`."""
    file = directory / f"{name}.yaml"
    file.write_text(YAML.format(directory=directory / name, data=data))
    return file


def atoll(*arguments: object) -> list[str]:
    """The command line of `atoll ...`."""
    return [sys.executable, "-c", "from launch.cli import main; main()", *map(str, arguments)]


def torchrun(ranks: int, *arguments: object) -> list[str]:
    """The command line of `torchrun --nproc-per-node N -m trainer ...`, on a free port."""
    options = ["--nproc-per-node", str(ranks), "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "trainer", *map(str, arguments)]


@contextlib.contextmanager
def started(command: Sequence[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a session of its own; whatever is left of it at the end of the block is killed."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in {process.pid, *descendants(process.pid)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def finished(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """The command run to its end, within the time limit."""
    with started(command, **environment) as process:
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def descendants(pid: int) -> list[int]:
    """The process's children, their children, and so on."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may hold anything; behind it come state and parent.
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found, pending = [], [pid]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def alive(pids: Sequence[int]) -> list[int]:
    """Which of the processes still run; a zombie does not."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def wait_for(condition: Callable[[], bool], what: str, seconds: float = LIMIT_SECONDS) -> None:
    """Return as soon as the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain until {what}"
        time.sleep(0.02)


def metrics(directory: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's metrics that are whole."""
    file = directory / name
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


TIMED = ("seconds", "tokens_per_second", "memory_bytes", "bubble_rate")
"""Metrics that the machine decides."""


def untimed(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics that must repeat exactly."""
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]
