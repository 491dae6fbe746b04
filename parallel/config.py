"""What a user says about the parallel axes; composed into the run config by the trainer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from parallel.layout import Layout


class PipelineConfig(BaseModel):
    """The pipeline axis: how many stages, in which order they work."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: int = Field(default=1, ge=1, description="How many pipeline stages the layers are cut into; one per rank.")
    schedule: str = Field(default="1f1b", description="Which schedule orders the micro-batches; 1f1b or gpipe.")
    partition: tuple[int, ...] | None = Field(
        default=None,
        description="Transformer blocks per stage, first stage first; null: balanced by cost (embedding and head "
        "have weight).",
    )


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
