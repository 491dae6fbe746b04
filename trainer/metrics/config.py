"""What a user says about metrics."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class MetricsConfig(BaseModel):
    """How often a run reports, and where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int = Field(default=10, ge=1, description="Steps between progress lines on the console.")
    tensorboard: bool = Field(default=True, description="Write TensorBoard events under the run directory.")
    spans: bool = Field(default=True, description="Write the spans of each rank's steps as a Chrome/Perfetto trace.")
    span_steps: int = Field(default=4, ge=0, description="How many steps after the first one the spans cover.")
    activations: bool = Field(
        default=False,
        description="Measure the peak of the activations in device memory; always done where they are offloaded.",
    )
    peak_flops: float | None = Field(
        default=None, gt=0, description="Peak FLOP/s of one device, for MFU; null: known GPUs only."
    )
