"""`atoll check`: what a configuration comes to, before anything is started.

Prints the resolved config, the batch equation, the mesh, the stages with parameters and memory per rank, and the
program of a step; with a rank, also builds that rank on a back end that only pretends to communicate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import yaml

from parallel.layout import AXES
from parallel.mesh import Mesh, PaperMesh, start_process_group
from parallel.pipeline.program import Program
from parallel.pipeline.render import render_grid
from parallel.pipeline.simulate import simulate
from parallel.topology import Topology
from trainer.build import build_engine, build_modules, build_space_of
from trainer.config.overrides import split_arguments
from trainer.config.problems import ConfigError, Problem
from trainer.config.rules import resolve
from trainer.config.run import ResolvedRun, load_config, local_ranks
from trainer.engine import Engine
from trainer.memory import activation_peaks, estimate_memory
from trainer.program import build_program, numbers_of, units_of_parts

_SHOWN_RANKS = 16
_SHOWN_COLUMNS = 400


def report(arguments: Sequence[str], ranks: int | None = None, rank: int | None = None) -> str:
    """The report for `ranks` ranks (default: what `atoll train` would start); with `rank`, that rank is built too.

    Raises:
        ConfigError: everything that is wrong with the configuration.
    """
    files, overrides = split_arguments(list(arguments))
    config = load_config(files, overrides)
    run = resolve(config, local_ranks(config, ranks, torch.cuda.device_count()), starting=False)
    if rank is not None and rank >= run.layout.world_size:
        rule = f"must be less than the number of ranks ({run.layout.world_size})"
        raise ConfigError(Problem("--rank", rank, rule, "name another rank, or more --ranks"))
    program = build_program(run)
    parts = [_configuration(run), _summary(run), _mesh(run), _axes(run), _stages(run, program), _program(program)]
    if rank is not None:
        parts.append(_built(run, rank))
    return "\n\n".join(parts)


def build_fake_rank(run: ResolvedRun, rank: int) -> Engine:
    """Rank `rank` of the run's layout, built in this process: real groups on a fake back end, tensors without memory.

    Raises:
        ValueError: the layout has no such rank.
    """
    run.layout.coordinates(rank)
    start_process_group("cpu", rank, run.layout.world_size, run.config.run.timeout_seconds, fake=True)
    try:
        return build_engine(run, Mesh(run.layout, "cpu"), torch.device("meta"))
    finally:
        dist.destroy_process_group()


def _configuration(run: ResolvedRun) -> str:
    return "configuration\n" + _indented(yaml.safe_dump(run.values(), sort_keys=False).rstrip().splitlines())


def _summary(run: ResolvedRun) -> str:
    batch, numbers = run.batch, numbers_of(run)
    return _indented(
        [
            f"layout      {run.layout.world_size} ranks: {run.layout.describe()}",
            f"batch       {batch.global_batch} samples = micro-batch {batch.micro_batch} x accumulation "
            f"{batch.gradient_accumulation} x data ranks {run.layout.data}",
            f"ZeRO        parameters over {numbers.params}, gradients over {numbers.grads}, "
            f"optimizer state over {numbers.optim}",
        ],
        "",
    )


def _mesh(run: ResolvedRun) -> str:
    """One row per rank and one column per axis; long meshes are cut."""
    layout = run.layout
    shown = range(min(layout.world_size, _SHOWN_RANKS))
    rows = [[str(rank), *map(str, layout.coordinates(rank).values())] for rank in shown]
    lines = list(_table([["rank", *AXES], *rows]))
    if layout.world_size > _SHOWN_RANKS:
        lines.append(f"... and {layout.world_size - _SHOWN_RANKS} more ranks")
    return "mesh\n" + _indented(lines)


def _axes(run: ResolvedRun) -> str:
    """Over which level of the topology each axis communicates."""
    layout = run.layout
    per_node = min(layout.world_size, torch.cuda.device_count() or layout.world_size)
    topology = Topology.from_config(run.config.topology, per_node, -(-layout.world_size // per_node))
    rows = [["axis", "degree", "level", "bandwidth bytes/s", "latency s"]]
    for axis in AXES:
        cells = ["-", "-", "-"]
        if layout.degree(axis) > 1:
            level = topology.levels[max(topology.level_of(group) for group in layout.groups(axis))]
            known = (level.bandwidth_bytes_per_second, level.latency_seconds)
            cells = [level.name, *("not known" if value is None else f"{value:g}" for value in known)]
        rows.append([axis, str(layout.degree(axis)), *cells])
    return "axes, and the slowest level that each communicates over\n" + _indented(_table(rows))


def _stages(run: ResolvedRun, program: Program) -> str:
    """Units, parameters and memory of one rank of every pipeline position."""
    rows = [["rank", "units", "parameters", "weights", "gradients", "optimizer", "activations", "sum MB"]]
    activations = activation_peaks(run, units_of_parts(run), program)
    for index in range(run.layout.pipeline):
        mesh = PaperMesh(run.layout, run.layout.rank_at(pipeline=index))
        stages = build_modules(run, mesh, program)
        space = build_space_of(run, mesh, stages)
        memory = estimate_memory(run, space, numbers_of(run), activations[index])
        sizes = (
            memory.parameters_bytes,
            memory.gradients_bytes,
            memory.optimizer_bytes,
            memory.activations_bytes,
            memory.total_bytes,
        )
        units = ", ".join(span_of(stage.chain) for stage in stages)
        rows.append([str(index), units, f"{space.parameters:,}", *(f"{size / 1e6:,.1f}" for size in sizes)])
    title = "one rank of each pipeline position: parameters, memory in MB (activations derived, see trainer/memory.py)"
    return f"{title}\n" + _indented(_table(rows))


def span_of(chain: Sequence[str]) -> str:
    """The units of a stage, first to last."""
    return chain[0] if len(chain) == 1 else f"{chain[0]} .. {chain[-1]}"


def _program(program: Program) -> str:
    lines = [line[:_SHOWN_COLUMNS] for line in render_grid(program).rstrip().splitlines()]
    timeline = simulate(program)
    lines.append(f"bubble {timeline.bubble_rate:.1%} at F = I = W and free transfers")
    return "program\n" + _indented(lines)


def _built(run: ResolvedRun, rank: int) -> str:
    engine = build_fake_rank(run, rank)
    position = ", ".join(f"{axis} {index}" for axis, index in run.layout.coordinates(rank).items())
    rows = [["unit", "parameters", "owned from", "to"]]
    for name, owned in engine.optimizer.ranges.items():
        held = sum(slot.spec.numel for slot in owned.unit.slots)
        rows.append([name, f"{held:,}", f"{owned.range.start:,}", f"{owned.range.stop:,}"])
    actions = engine.train_executor.actions
    shown = " ".join(str(action) for action in actions[:_SHOWN_RANKS])
    return "\n".join(
        [
            f"rank {rank} built: {position}",
            _indented(_table(rows)),
            _indented([f"{len(actions)} actions: {shown}{' ...' if len(actions) > _SHOWN_RANKS else ''}"]),
        ]
    )


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their widest cell; the first two to the left where they are words."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if not _numeric(cell) else cell.rjust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def _numeric(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").isdigit()


def _indented(lines: Sequence[str] | Iterator[str], indent: str = "  ") -> str:
    return "\n".join(indent + line for line in lines)
