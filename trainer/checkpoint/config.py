"""What a user says about checkpoints."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class CheckpointConfig(BaseModel):
    """When checkpoints are written, how many are kept, and what a run starts from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int | None = Field(default=None, ge=1, description="Steps between checkpoints; null: only at the end.")
    keep: int | None = Field(default=3, ge=1, description="How many of the newest are kept; null: all.")
    at_end: bool = Field(default=True, description="Also write one after the last step.")
    resume: bool = Field(default=True, description="Continue from the newest checkpoint of the run directory.")
    load: str | None = Field(
        default=None, description="A checkpoint directory to start from when the run directory has none of its own."
    )
