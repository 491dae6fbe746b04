"""What a user says about collectives."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class CommConfig(BaseModel):
    """How collectives are carried out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    algorithm: Literal["auto", "native", "direct"] = Field(
        default="auto",
        description="native: the back end's own collectives; direct: pairwise exchanges, summed in rank order; "
        "auto: direct on gloo, native elsewhere.",
    )
