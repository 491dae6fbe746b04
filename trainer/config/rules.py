"""Rules between sections of the run config, checked together before any process group exists."""

from __future__ import annotations

import tempfile
from math import prod
from pathlib import Path

from parallel.layout import Layout
from parallel.pipeline.actions import PASS_OPS
from parallel.pipeline.program import Program
from parallel.pipeline.schedules import registry
from parallel.pipeline.verify import explain, verify
from trainer.checkpoint.manifest import check_compatible
from trainer.checkpoint.start import starting_checkpoint
from trainer.config.problems import ConfigError, Problem
from trainer.config.run import BatchSizes, ResolvedRun, RunConfig
from trainer.costs import heaviest_activation_bytes
from trainer.data.check import check_dataset
from trainer.program import build_schedule


def resolve(config: RunConfig, world_size: int, *, starting: bool = True) -> ResolvedRun:
    """The config for `world_size` ranks; if `starting`, this machine must also have the devices it asks for.

    Raises:
        ConfigError: all rules that are broken, each with its value, rule, config path and fix.
    """
    problems = [Problem(f"model.{key}", value, rule, fix) for key, value, rule, fix in config.model.problems()]
    layout = _layout(config, world_size, problems)
    problems += _topology(config, world_size)
    batch: BatchSizes | None = None
    if layout is not None:
        batch = _batch(config, layout, problems)
        problems += _divisibility(config)
        problems += _pipeline(config, layout, batch)
        for key, value, rule, fix in config.zero.problems(layout.data_shard):
            problems.append(Problem(f"zero.{key}", value, rule, fix))
    problems += _optimizer(config)
    if starting:
        problems += _device(config)
    problems += _run_directory(config)
    problems += check_dataset(config.data, config.model.vocab, config.train.sequence)
    problems += _checkpoint(config)
    if problems:
        raise ConfigError(problems)
    assert layout is not None
    assert batch is not None
    return ResolvedRun(config, layout, batch)


def _layout(config: RunConfig, world_size: int, problems: list[Problem]) -> Layout | None:
    try:
        return config.parallel.layout(world_size)
    except ValueError as error:
        parallel = config.parallel
        degrees = (
            f"tensor {parallel.tensor} x pipeline.stages {parallel.pipeline.stages} x data_shard "
            f"{parallel.data_shard} x data_replicate {parallel.data_replicate}"
        )
        fixed = parallel.fixed_degree()
        fix = f"start {fixed} ranks" + (f" or a multiple of {fixed}" if parallel.data_shard == "auto" else "")
        rule = f"the world size, {world_size}, must be the product of the degrees: {error}"
        problems.append(Problem("parallel", degrees, rule, f"{fix}, or change the degrees"))
        return None


def _topology(config: RunConfig, world_size: int) -> list[Problem]:
    """Configured levels must describe exactly the ranks that there are."""
    levels = config.topology.levels
    if levels is None:
        return []
    described = prod(level.size for level in levels)
    if described == world_size:
        return []
    sizes = " x ".join(f"{level.name} {level.size}" for level in levels) or "none"
    rule = f"the sizes of the levels multiply to {described}, the world size is {world_size}"
    fix = "correct the sizes, or leave topology.levels out"
    return [Problem("topology.levels", sizes, rule, fix)]


def _batch(config: RunConfig, layout: Layout, problems: list[Problem]) -> BatchSizes | None:
    solved = BatchSizes.solve(config.train, layout.data)
    if isinstance(solved, BatchSizes):
        return solved
    fix = "set two of the three so that the equation holds, and leave the third out"
    problems.append(Problem("train.global_batch", config.train.global_batch, solved, fix))
    return None


def _divisibility(config: RunConfig) -> list[Problem]:
    """What tensor parallelism splits must split evenly."""
    tensor, model = config.parallel.tensor, config.model
    split = {
        "heads": model.heads,
        "kv_heads": model.key_value_heads,
        "ffn_hidden": model.feed_forward,
        "vocab": model.vocab,
    }
    return [
        Problem(
            f"model.{key}",
            value,
            f"must be divisible by parallel.tensor ({tensor})",
            f"set model.{key} to a multiple of {tensor}, e.g. {-(-value // tensor) * tensor}, or lower parallel.tensor",
        )
        for key, value in split.items()
        if value % tensor
    ]


def _pipeline(config: RunConfig, layout: Layout, batch: BatchSizes | None) -> list[Problem]:
    pipeline, layers = config.parallel.pipeline, config.model.layers
    try:
        parts = pipeline.parts()
    except registry.ScheduleError as error:
        return [Problem("parallel.pipeline.schedule", pipeline.schedule, error.rule, error.fix)]
    problems = []
    if parts > layers + 2:
        problems.append(
            Problem(
                "parallel.pipeline.stages",
                pipeline.stages,
                f"cuts the model into {parts} parts, it has {layers + 2} units (embedding, blocks, head)",
                f"set parallel.pipeline.stages to at most {(layers + 2) * pipeline.stages // parts}, or fewer chunks",
            )
        )
    if pipeline.partition is not None:
        partition = list(pipeline.partition)
        if len(partition) != parts or sum(partition) != layers or min(partition[1:-1], default=1) < 1:
            rule = (
                f"must be {parts} numbers that add up to model.layers ({layers}), positive but for the first and last"
            )
            fix = "give one number of blocks per part of the model, or null for a balanced partition"
            problems.append(Problem("parallel.pipeline.partition", partition, rule, fix))
    problems += _offload(config, parts // pipeline.stages)
    problems += _search(config)
    if batch is None or problems:
        return problems
    run = ResolvedRun(config, layout, batch)
    try:
        return _program_of_a_file(config, build_schedule(run, search=False))
    except registry.ScheduleError as error:
        return [_refused(error, run)]


def _refused(error: registry.ScheduleError, run: ResolvedRun) -> Problem:
    """What a schedule cannot do, under the key that says so."""
    pipeline = run.config.parallel.pipeline
    word = error.value.partition("=")[0]
    if word == "microbatches":
        value, fix = run.batch.gradient_accumulation, error.fix.replace("microbatches", "it")
        return Problem("train.gradient_accumulation", value, f"micro-batches: {error.rule}", fix)
    if word == "ranks":
        return Problem("parallel.pipeline.stages", pipeline.stages, error.rule, error.fix.replace("ranks", "it"))
    if word == "memory_limit" and isinstance(pipeline.memory_limit, str):
        unit = f"activations of {heaviest_activation_bytes(run) / 1e6:,.1f} MB"
        return Problem(
            "parallel.pipeline.memory_limit", pipeline.memory_limit, f"{error.rule}, in {unit}", f"{error.fix} {unit}"
        )
    key = word if word in type(pipeline).model_fields else "schedule"
    return Problem(f"parallel.pipeline.{key}", getattr(pipeline, key), error.rule, error.fix)


def _program_of_a_file(config: RunConfig, program: Program) -> list[Problem]:
    """Registered schedules are right; what somebody wrote may be anything."""
    schedule, fix, rule = config.parallel.pipeline.schedule, "correct the file", ""
    if not schedule.startswith(registry.CSV):
        return []
    crowded = [s for s in range(program.depth) if program.rank_of(s) in map(program.rank_of, program.twins_of(s))]
    folded = program.rank_of(0) == program.rank_of(program.depth - 1)
    if added := sorted(program.ops - PASS_OPS):
        rule = f"must list F, B, I and W only, and lists {', '.join(added)}"
        fix = "leave them out of the file: a run adds transfers and all else itself"
    elif violations := verify(program):
        rule = explain(program, violations)
    elif idle := [rank for rank in range(program.ranks) if not program.stages_of(rank)]:
        rule = f"must put a stage on every pipeline rank, and puts none on rank {idle[0]}"
    elif program.replicas > 2:
        rule = f"holds the model {program.replicas} times; a run can hold it twice"
    elif crowded:
        rule = f"must put the two copies of stage {crowded[0]} on two ranks, and puts both on the same"
    elif config.model.tied_embeddings and program.replicas > 1 and not folded:
        rule = "with model.tied_embeddings and the model twice, its first and last stage must be on one rank"
    return [Problem("parallel.pipeline.schedule", schedule, rule, fix)] if rule else []


def _search(config: RunConfig) -> list[Problem]:
    """A search must not outlast those who wait for it."""
    limit, timeout = config.parallel.pipeline.time_limit_seconds, config.run.timeout_seconds
    if limit < timeout:
        return []
    rule = f"must be less than run.timeout_seconds ({timeout:g}): the other ranks wait meanwhile"
    fix = f"set it to less than {timeout:g}"
    return [Problem("parallel.pipeline.time_limit_seconds", limit, rule, fix)]


def _offload(config: RunConfig, parts: int) -> list[Problem]:
    """Of the parts of the model on a rank, no more can be offloaded than there are."""
    stages = config.offload.activations.stages
    if isinstance(stages, str) or stages <= parts:
        return []
    rule = f"a pipeline rank holds {parts} of the model's parts"
    return [Problem("offload.activations.stages", stages, rule, f"set it to at most {parts}, or to all")]


def _optimizer(config: RunConfig) -> list[Problem]:
    """A warm-up or decay longer than the run is fine: a trial run is the beginning of a longer one."""
    rule, fix = "must be at least 0 and less than 1", "e.g. optimizer.betas: [0.9, 0.95]"
    return [Problem("optimizer.betas", beta, rule, fix) for beta in config.optimizer.betas if not 0 <= beta < 1]


def _device(config: RunConfig) -> list[Problem]:
    """What the machine must have: a GPU where one is asked for, apex where it is."""
    problems = []
    if config.run.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            rule = "needs a GPU that this torch can use, and there is none"
            problems.append(Problem("run.device", "cuda", rule, "set run.device: cpu, or auto"))
    if config.optimizer.kernel == "apex":
        from trainer.optim.kernels import apex_problem

        reason = apex_problem()
        if reason:
            fix = "install NVIDIA apex from its source, or set optimizer.kernel: torch"
            problems.append(Problem("optimizer.kernel", "apex", reason, fix))
    return problems


def _run_directory(config: RunConfig) -> list[Problem]:
    """The run directory, or the nearest parent that exists, must be a writable directory."""
    directory = Path(config.run.directory).absolute()
    place = next(parent for parent in (directory, *directory.parents) if parent.exists() or parent.is_symlink())
    try:
        # Permission bits do not tell what root, a full disk or a read-only mount may do: try it.
        with tempfile.TemporaryFile(dir=place):
            return []
    except OSError as error:
        rule = f"{place} must be a writable directory ({error.strerror})"
    fix = "name a directory that this user may create and write, e.g. run.directory=runs/mine"
    return [Problem("run.directory", config.run.directory, rule, fix)]


def _checkpoint(config: RunConfig) -> list[Problem]:
    """What the run starts from must be undamaged and hold this model."""
    path = starting_checkpoint(config)
    return check_compatible(path, config) if path is not None else []
