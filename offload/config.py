"""What a user says about offload; composed into the run config by the trainer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class ActivationOffloadConfig(BaseModel):
    """Which saved activations wait for their backward in host memory, and how fast copies are planned to be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: Literal["none", "half", "all"] | Annotated[int, Field(ge=1)] = Field(
        default="none",
        description="Whose activations go to host memory between forward and backward: of none, half (rounded up), all "
        "or so many of the parts of the model on each pipeline rank; those that live longest are taken first.",
    )
    bandwidth_bytes_per_second: float = Field(
        default=15e9, gt=0, description="How fast copies to and from host memory are planned to be, per rank."
    )
    compute_flops_per_second: float = Field(
        default=220e12,
        gt=0,
        description="How fast a rank is planned to compute: with the bandwidth it says for what there is time.",
    )
    smallest_bytes: int = Field(
        default=4096, ge=0, description="Saved tensors of fewer bytes stay on the device: a copy of them does not pay."
    )

    def fraction(self, parts: int) -> float:
        """Of the parts of the model on a rank, at most `parts`, what is offloaded, rounded up to whole parts."""
        if isinstance(self.stages, int):
            return min(1.0, self.stages / parts)
        return {"none": 0.0, "half": 0.5, "all": 1.0}[self.stages]


class OffloadConfig(BaseModel):
    """What is kept in memory other than the device's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    activations: ActivationOffloadConfig = Field(
        default_factory=ActivationOffloadConfig, description="Activations between forward and backward."
    )
