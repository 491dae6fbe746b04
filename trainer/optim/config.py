"""What a user says about the optimizer and its learning rate."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class LearningRateConfig(BaseModel):
    """How the learning rate moves over the run, as a factor of `optimizer.lr`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        default="cosine", description="Shape after warm-up; wsd: warm-up, stable, decay."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps over which the rate rises linearly from 0.")
    decay_steps: int | None = Field(
        default=None, ge=1, description="wsd: steps of the final decay; null: a tenth of the run."
    )
    final_fraction: float = Field(default=0.1, ge=0, le=1, description="Rate at the last step / optimizer.lr.")


class OptimizerConfig(BaseModel):
    """AdamW with decoupled weight decay (arXiv:1711.05101)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernel: Literal["torch", "apex"] = Field(
        default="torch",
        description="Which implementation updates a range: torch's fused AdamW, or NVIDIA apex's FusedAdam "
        "(GPU, installed from NVIDIA's source).",
    )
    lr: float = Field(default=3e-4, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="Decay of the first and second moment.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(default=0.1, ge=0, description="Decoupled decay of matrices; norms are not decayed.")
    grad_clip: float | None = Field(
        default=1.0, gt=0, description="Largest global gradient norm; larger ones are scaled down; null: no clipping."
    )
    validation: Literal["before", "after"] = Field(
        default="before",
        description="When pipeline ranks learn the global gradient norm. before: before they update, which is a "
        "barrier. after: each updates with what it knows, and takes it back in the next step's warm-up if that was "
        "wrong; same numbers, a copy of the optimizer state it owns.",
    )
    learning_rate: LearningRateConfig = Field(
        default_factory=LearningRateConfig, description="How the learning rate moves over the run."
    )
