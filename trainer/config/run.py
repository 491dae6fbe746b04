"""The run config: composed of what each component says it needs, resolved against a number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from offload.config import OffloadConfig
from parallel.comm.config import CommConfig
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.topology import TopologyConfig
from parallel.zero.config import ZeroConfig
from trainer.checkpoint.config import CheckpointConfig
from trainer.config.loading import load
from trainer.data.config import DataConfig
from trainer.metrics.config import MetricsConfig
from trainer.models.config import ModelConfig
from trainer.optim.config import OptimizerConfig


class RunSection(BaseModel):
    """The run itself: its directory, seed and devices."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: str = Field(description="Where the run writes everything; a run with checkpoints there is resumed.")
    seed: int = Field(default=1, ge=0, description="Seed of the initial weights and of the sample order.")
    deterministic: bool = Field(default=False, description="Refuse operations whose result may vary between runs.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: CUDA where there is a GPU.")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads per rank; null: the cores of the machine shared by its ranks."
    )
    ranks: int | None = Field(
        default=None,
        ge=1,
        description="Processes that `atoll train` starts; null: one per GPU, or what the parallel degrees need.",
    )
    timeout_seconds: float = Field(default=600.0, gt=0, description="How long a collective may wait for its peers.")


class TrainSection(BaseModel):
    """What one step is, and how many there are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1, description="Optimizer steps of the whole run.")
    sequence: int = Field(ge=1, description="Tokens per sample.")
    global_batch: int | None = Field(default=None, ge=1, description="Samples per step over all ranks.")
    micro_batch: int | None = Field(default=None, ge=1, description="Samples per forward pass on one rank.")
    gradient_accumulation: int | None = Field(
        default=None, ge=1, description="Micro-batches per step and rank; any two of the three give the third."
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Type of weights and activations in compute; state and gradients stay fp32."
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Activations computed again in the backward: none, selective (feed-forward), full (blocks).",
    )
    eval_every: int | None = Field(default=None, ge=1, description="Steps between evaluations; null: only at the end.")
    eval_batches: int = Field(
        default=8, ge=0, description="Global batches of held-out samples per evaluation; 0: no evaluation."
    )


class RunConfig(BaseModel):
    """Everything one YAML says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: RunSection = Field(description="Directory, seed, devices.")
    model: ModelConfig = Field(description="Sizes of the model.")
    data: DataConfig = Field(description="Where the tokens come from.")
    train: TrainSection = Field(description="Steps and batches.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW and its learning rate.")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="Degrees of the parallel axes.")
    zero: ZeroConfig = Field(default_factory=ZeroConfig, description="How far state is spread.")
    offload: OffloadConfig = Field(default_factory=OffloadConfig, description="What waits in host memory.")
    comm: CommConfig = Field(default_factory=CommConfig, description="How collectives are carried out.")
    topology: TopologyConfig = Field(default_factory=TopologyConfig, description="Levels of the cluster.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Saving and resuming.")
    metrics: MetricsConfig = Field(default_factory=MetricsConfig, description="Console, files, TensorBoard, spans.")


@dataclass(frozen=True)
class BatchSizes:
    """The batch equation, solved: global_batch = micro_batch x gradient_accumulation x data ranks."""

    global_batch: int
    micro_batch: int
    gradient_accumulation: int

    @staticmethod
    def solve(train: TrainSection, data_ranks: int) -> BatchSizes | str:
        """The three sizes from any two of them, or the rule that is broken."""
        total, micro, steps = train.global_batch, train.micro_batch, train.gradient_accumulation
        if sum(value is not None for value in (total, micro, steps)) < 2:
            return "two of train.global_batch, train.micro_batch and train.gradient_accumulation must be given"
        if total is None:
            assert micro is not None
            assert steps is not None
            return BatchSizes(micro * steps * data_ranks, micro, steps)
        known = micro if micro is not None else steps
        assert known is not None
        other, rest = divmod(total, known * data_ranks)
        name = "micro_batch" if micro is not None else "gradient_accumulation"
        if rest or not other:
            return f"must be divisible by {name} x data-parallel ranks = {known} x {data_ranks} = {known * data_ranks}"
        if micro is not None and steps is not None and steps != other:
            return (
                f"must equal micro_batch x gradient_accumulation x data-parallel ranks = {micro} x {steps} x "
                f"{data_ranks} = {micro * steps * data_ranks}"
            )
        return BatchSizes(total, micro or other, other if micro is not None else known)


@dataclass(frozen=True)
class ResolvedRun:
    """A run config that holds for a number of ranks: what everything is built from."""

    config: RunConfig
    layout: Layout
    batch: BatchSizes

    @property
    def parts(self) -> int:
        """Into how many parts the model is cut: pipeline ranks x chunks."""
        return self.config.parallel.pipeline.parts()

    def values(self) -> dict[str, Any]:
        """The config as plain values with everything that was derived filled in: loading them gives the same run."""
        values = self.config.model_dump(mode="json")
        values["run"]["ranks"] = self.layout.world_size
        values["train"] |= vars(self.batch)
        values["parallel"]["data_shard"] = self.layout.data_shard
        return values


def local_ranks(config: RunConfig, requested: int | None, devices: int = 0) -> int:
    """How many processes to start on this machine: asked for, configured, one per device, or what the degrees need."""
    return requested or config.run.ranks or devices or config.parallel.fixed_degree()


def load_config(
    files: Sequence[Path], overrides: Sequence[str], environment: Mapping[str, str] | None = None
) -> RunConfig:
    """Read and merge the files, apply the overrides, check every field on its own."""
    return load(RunConfig, files, overrides, environment)
