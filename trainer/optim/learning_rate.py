"""The learning rate of every step: linear warm-up, then a shape. A pure function of the step."""

from __future__ import annotations

import math

from trainer.optim.config import LearningRateConfig


def learning_rate_factor(config: LearningRateConfig, step: int, steps: int) -> float:
    """The factor of the peak rate that update `step` (0-based) of `steps` uses.

    The first update already moves: with warm-up over w steps, step 0 uses 1 / (w + 1). The last update of a
    cosine, linear or wsd run uses `final_fraction`; wsd holds the peak until the last `decay_steps` updates.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        length = config.decay_steps or max(1, steps // 10)
        start = max(config.warmup_steps, steps - 1 - length)
    else:
        start = config.warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.final_fraction + (1 - config.final_fraction) * shape
