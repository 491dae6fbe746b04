"""Where the records of steps go: the console, metrics.jsonl, TensorBoard. All run on rank 0 only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from trainer.metrics.record import StepRecord


class Sink(Protocol):
    """Takes the record of every step."""

    def write(self, record: StepRecord) -> None: ...

    def close(self) -> None: ...


class ConsoleSink:
    """One line per `every` steps, for the first and last step, and for evaluations."""

    def __init__(self, steps: int, every: int) -> None:
        self.steps, self.every = steps, every
        self._seconds: list[float] = []
        self._bubbles: list[float] = []

    def write(self, record: StepRecord) -> None:
        self._seconds = [*self._seconds[-49:], record.seconds]
        if record.bubble_rate is not None:
            self._bubbles.append(record.bubble_rate)
        due = record.step % self.every == 0 or record.step in (1, self.steps)
        if not due and record.eval_loss is None:
            return
        width = len(str(self.steps))
        parts = [
            f"step {record.step:>{width}}/{self.steps}",
            f"loss {record.loss:.4f}",
            f"grad norm {record.grad_norm:.3f}",
            f"lr {record.lr:.2e}",
            f"{record.tokens_per_second:,.0f} tokens/s",
            f"{record.memory_bytes / 1e6:,.0f} MB",
        ]
        if record.mfu is not None:
            parts.append(f"MFU {record.mfu:.1%}")
        if self._bubbles:
            mean = sum(self._bubbles) / len(self._bubbles)
            predicted = record.predicted_bubble_rate
            parts.append(f"bubble {mean:.1%}" + (f" (predicted {predicted:.1%})" if predicted is not None else ""))
            self._bubbles.clear()
        if record.skipped_steps:
            parts.append(f"{record.skipped_steps} skipped")
        if record.eval_loss is not None:
            parts.append(f"eval loss {record.eval_loss:.4f}")
        left = (self.steps - record.step) * sum(self._seconds) / len(self._seconds)
        parts.append(f"eta {_clock(left)}")
        print("  ".join(parts), flush=True)

    def close(self) -> None:
        """Nothing is held."""


class JsonLinesSink:
    """metrics.jsonl: one JSON object per step, on disk when the step is over."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def write(self, record: StepRecord) -> None:
        self._file.write(json.dumps(record.values()) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Every number of every record as a scalar."""

    def __init__(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what a killed run wrote behind the step that is now resumed.
        self._writer = SummaryWriter(str(directory), purge_step=step + 1)

    def write(self, record: StepRecord) -> None:
        for key, value in record.values().items():
            if key != "step":
                self._writer.add_scalar(key, value, record.step)

    def close(self) -> None:
        self._writer.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
