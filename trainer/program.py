"""The program of a run's training step: the schedule that the config names, completed by the passes. Pure: no torch."""

from __future__ import annotations

from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.offload import offload_activations
from parallel.pipeline.passes.reduce import add_reduce
from parallel.pipeline.passes.sync import add_sync
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.passes.update import add_update
from parallel.pipeline.passes.validate import add_validation
from parallel.pipeline.program import Program
from parallel.pipeline.schedules import registry
from parallel.pipeline.verify import check
from parallel.sizes import parse_bytes
from parallel.zero.config import ThreeNumbers
from trainer.config.run import ResolvedRun
from trainer.costs import derived_costs, heaviest_activation_bytes
from trainer.models.partition import stage_units


def numbers_of(run: ResolvedRun) -> ThreeNumbers:
    """The three ZeRO numbers for the run's layout."""
    return run.config.zero.numbers(run.layout.data_shard)


def build_schedule(run: ResolvedRun, costs: Costs | None = None, *, search: bool = True) -> Program:
    """The compute actions of a training step, as the schedule orders them for these costs (None: derived ones).

    Without `search`, a schedule that searches gives what it starts from: enough to know that there is one.
    """
    pipeline = run.config.parallel.pipeline
    return registry.generate(
        pipeline.schedule,
        run.layout.pipeline,
        run.batch.gradient_accumulation,
        chunks=pipeline.chunks,
        costs=costs or derived_costs(run),
        memory_limit=memory_limit(run),
        group=pipeline.group,
        time_limit_seconds=pipeline.time_limit_seconds if search else 0.0,
    )


def memory_limit(run: ResolvedRun) -> float | None:
    """The configured limit in activations, which is what derived and measured costs count in."""
    limit = run.config.parallel.pipeline.memory_limit
    return parse_bytes(limit) / heaviest_activation_bytes(run) if isinstance(limit, str) else limit


def complete_program(run: ResolvedRun, program: Program, costs: Costs | None = None) -> Program:
    """A schedule with everything that a training step has besides: transfers, copies of activations, reductions,
    updates; verified."""
    costs = costs or derived_costs(run)
    program = pair_transfers(program, costs)
    parts = max(len(program.stages_of(rank)) for rank in range(program.ranks))
    if fraction := run.config.offload.activations.fraction(parts):
        program = offload_activations(program, costs, fraction=fraction)
    program = add_reduce(program, per_microbatch=numbers_of(run).grads > 1)
    program = add_update(add_sync(program, costs))
    if run.config.optimizer.validation == "after":
        program = add_validation(program)
    check(program)
    return program


def build_program(run: ResolvedRun, costs: Costs | None = None) -> Program:
    """The program of a training step, planned for these costs (None: derived ones)."""
    return complete_program(run, build_schedule(run, costs), costs)


def units_of_parts(run: ResolvedRun) -> tuple[tuple[str, ...], ...]:
    """The units of each part of the model, in the order of the forward pass."""
    return stage_units(run.config.model, run.config.train.sequence, run.parts, run.config.parallel.pipeline.partition)
