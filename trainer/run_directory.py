"""What a run leaves on disk, and where:

    config.yaml          the resolved configuration
    environment.json     versions, hardware, launcher; one entry per start of the run
    metrics.jsonl        one line per step, reduced over ranks
    superseded.jsonl     lines of steps that a resume went back over
    checkpoints/         see trainer/checkpoint
    tensorboard/         events
    costs.json           measured costs of the passes, if they were asked for
    trace.json           spans of all ranks for a few steps (open in Perfetto)
    logs/rank-N.log      what each rank printed

Rank 0 writes everything but the logs and its peers' share of checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from trainer.files import replace_text


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.superseded = path / "superseded.jsonl"
        self.tensorboard = path / "tensorboard"
        self.costs = path / "costs.json"
        self.trace = path / "trace.json"

    def open(self, config: Mapping[str, Any], environment: Mapping[str, Any], step: int) -> None:
        """Record a start of the run, whose resolved values are `config`, that continues behind `step`."""
        self.path.mkdir(parents=True, exist_ok=True)
        resolved = yaml.safe_dump(dict(config), sort_keys=False)
        replace_text(self.path / "config.yaml", resolved)
        starts = self.path / "environment.json"
        entries = json.loads(starts.read_text()) if starts.exists() else []
        entries.append({"time": datetime.now(UTC).isoformat(timespec="seconds"), "from_step": step, **environment})
        replace_text(starts, json.dumps(entries, indent=1) + "\n")
        self._supersede(step)

    def _supersede(self, step: int) -> None:
        """Move the metrics of steps behind `step` aside: they are about to be made again."""
        if not self.metrics.exists():
            return
        kept: list[str] = []
        moved: list[str] = []
        text = self.metrics.read_text()
        for line in text.splitlines():
            try:
                (kept if json.loads(line)["step"] <= step else moved).append(line)
            except json.JSONDecodeError:
                moved.append(line)  # the last line of a killed run may be cut short
        if moved:
            with self.superseded.open("a") as file:
                file.writelines(f"{line}\n" for line in moved)
        remaining = "".join(f"{line}\n" for line in kept)
        if remaining != text:  # also where a kill cut off nothing but the end of the last line
            replace_text(self.metrics, remaining)
