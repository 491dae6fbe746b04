"""What a user says about the parallel axes; composed into the run config by the trainer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from parallel.layout import Layout
from parallel.pipeline.schedules import registry
from parallel.sizes import PATTERN


class ProfileConfig(BaseModel):
    """Measuring what the passes of a run cost, and planning its schedule again with that."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(
        default=0, ge=0, description="Steps behind the first one of each start that are measured; 0: none."
    )
    replan: bool = Field(
        default=True, description="Plan the schedule again with what was measured; false: only write costs.json."
    )


class PipelineConfig(BaseModel):
    """The pipeline axis: how many ranks, how many parts of the model on each, in which order they work."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: int = Field(default=1, ge=1, description="Pipeline ranks: over how many the layers are spread.")
    chunks: int | None = Field(
        default=None,
        ge=1,
        description="Parts of the model on each pipeline rank; null: what the schedule is made for (1 or 2).",
    )
    schedule: str = Field(
        default="1f1b",
        description="Which schedule orders the micro-batches: a name that `atoll schedule --list` shows, or csv:FILE.",
    )
    memory_limit: Annotated[float, Field(gt=0)] | Annotated[str, Field(pattern=f"^{PATTERN}$")] | None = Field(
        default=None,
        description="The most activations that a rank may hold at a time, for schedules that keep to a limit: in bytes "
        "such as 12GB, or in activations of one micro-batch on the heaviest part of the model; null: as published.",
    )
    group: int | None = Field(
        default=None, ge=1, description="Micro-batches that run through a part before the next part's turn (gis)."
    )
    time_limit_seconds: float = Field(default=20.0, gt=0, description="For schedules that search (zb-ilp).")
    partition: tuple[int, ...] | None = Field(
        default=None,
        description="Transformer blocks per part of the model, in the order of the forward pass; null: balanced by "
        "cost (embedding and head have weight).",
    )
    profile: ProfileConfig = Field(default_factory=ProfileConfig, description="Measured costs.")

    def parts(self) -> int:
        """Into how many parts the model is cut.

        Raises:
            ScheduleError: nobody says how many, and there is no such schedule.
        """
        return registry.model_parts(self.schedule, self.stages, self.chunks)


class ParallelConfig(BaseModel):
    """Degrees of the parallel axes. Their product is the number of ranks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensor: int = Field(
        default=1, ge=1, description="Tensor-parallel degree: heads, feed-forward and vocabulary split."
    )
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig, description="Pipeline axis.")
    data_shard: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Data-parallel ranks that ZeRO may shard state over; auto: all ranks that no other axis takes.",
    )
    data_replicate: int = Field(
        default=1, ge=1, description="Data-parallel groups that hold whole copies; they exchange owned ranges only."
    )

    def fixed_degree(self) -> int:
        """The product of the degrees that do not depend on the world size."""
        shard = 1 if self.data_shard == "auto" else self.data_shard
        return self.tensor * self.pipeline.stages * self.data_replicate * shard

    def layout(self, world_size: int) -> Layout:
        """The layout over `world_size` ranks.

        Raises:
            ValueError: the degrees do not multiply to `world_size`.
        """
        fixed = self.fixed_degree()
        shard = self.data_shard
        if shard == "auto":
            shard, rest = divmod(world_size, fixed)
            if rest or not shard:
                raise ValueError(f"{world_size} ranks cannot be divided by {fixed}")
        elif fixed != world_size:
            raise ValueError(f"the degrees multiply to {fixed}, not to {world_size}")
        return Layout(
            tensor=self.tensor,
            data_shard=shard,
            pipeline=self.pipeline.stages,
            data_replicate=self.data_replicate,
        )
