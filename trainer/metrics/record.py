"""What is known about a step when it is over."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class StepRecord:
    """One training step, reduced over all ranks; also a line of metrics.jsonl.

    Attributes:
        step: Steps done, this one included.
        loss: Mean training loss per token, nats.
        grad_norm: Global gradient norm before clipping.
        lr: Learning rate of the update.
        seconds: Wall time of the step on the slowest rank.
        tokens: Tokens trained on since the start of the run.
        tokens_per_second: Tokens of the step per second, over all ranks.
        memory_bytes: Largest memory of any rank so far: device memory on GPUs, resident memory on CPUs.
        skipped_steps: Updates skipped so far because the gradient norm was not finite.
        mfu: Share of the devices' peak that the model's FLOPs took; None where the peak is not known.
        bubble_rate: (span - busy) / span of the rank with the longest span, from its first pass to its last, in the
            step before; None with one pipeline rank, and in the first step of a start.
        predicted_bubble_rate: What the simulation gives for the program of that step, with measured costs if there are
            any, else with costs derived from the sizes.
        activation_bytes: Most activations in device memory at a time on any rank, in the step before; None where they
            are not measured, and in the first step of a start.
        eval_loss: Mean held-out loss per token, where it was evaluated after this step.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    tokens: int
    tokens_per_second: float
    memory_bytes: int
    skipped_steps: int
    mfu: float | None = None
    bubble_rate: float | None = None
    predicted_bubble_rate: float | None = None
    activation_bytes: int | None = None
    eval_loss: float | None = None

    def values(self) -> dict[str, Any]:
        """The fields that have a value."""
        return {key: value for key, value in asdict(self).items() if value is not None}
