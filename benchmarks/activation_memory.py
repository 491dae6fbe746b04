"""Peak activation memory of pipeline schedules, with and without offload: measured, simulated and published.

A small decoder with one block a part of the model runs on CPU ranks under the schedules of PipeOffload
(arXiv:2503.01328, table 1) and the classic ones. Every rank counts the bytes of activations on its device, exactly,
by storage (offload/meter.py); on a CPU "the device" and "the host" are two kinds of ordinary memory. What is compared
are ratios to 1f1b over the same ranks: of the measured peaks, of those that the simulation of the same programs gives,
and of the paper's formulas. The losses must be 1f1b's to the last bit, or the comparison is void and fails.

The paper's formulas for offload count what waits on the device. Two activations in motion come on top: the pass that
runs, and the copy that is under way. Among many activations that is little, so the formula alone is compared where
there are 192 parts, and the formula with what is in motion where there are 32.

A last comparison is what measuring costs: CPU time of steps of one process with the meter and without, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installation

from benchmarks import common
from parallel.pipeline.actions import Action, Op
from trainer.config.run import BatchSizes, ResolvedRun, RunConfig
from trainer.costs import derived_costs

SEQUENCE, MICROBATCHES, STEPS = 32, 16, 2
TOLERANCE = 0.10
"""Of a ratio against the simulated one and against the formula."""
PLANNED = {"compute_flops_per_second": 1e9, "bandwidth_bytes_per_second": 1e15, "smallest_bytes": 0}
"""What copies are planned with; the bandwidth is set for each layout so that they take its `copy_ratio`."""
METER_MODEL = {"vocab": 512, "hidden": 256, "layers": 4, "heads": 4, "ffn_hidden": 768}


@dataclass(frozen=True)
class Layout:
    """Pipeline ranks, parts of the model on each, and how long copies are planned to take.

    Attributes:
        copy_ratio: Both copies of an activation over its forward and backward (the paper's k).
    """

    ranks: int
    chunks: int
    hidden: int
    copy_ratio: float

    @property
    def parts(self) -> int:
        return self.ranks * self.chunks


LAYOUTS = {
    "4 ranks x 2": Layout(4, 2, 64, 0.25),
    "8 ranks x 4": Layout(8, 4, 64, 0.25),
    "8 ranks x 24": Layout(8, 24, 32, 0.25),
}
HALF, ALL = "uniform, half offloaded", "uniform, all offloaded"
SCHEDULES: dict[str, dict[str, Any]] = {
    "1f1b": {"parallel": {"pipeline": {"schedule": "1f1b"}}},
    "interleaved": {"parallel": {"pipeline": {"schedule": "interleaved"}}},
    "gis": {"parallel": {"pipeline": {"schedule": "gis"}}},
    "gis-h": {"parallel": {"pipeline": {"schedule": "gis-h"}}},
    "uniform": {"parallel": {"pipeline": {"schedule": "uniform"}}},
    HALF: {"parallel": {"pipeline": {"schedule": "uniform"}}, "offload": {"activations": {"stages": "half"}}},
    ALL: {"parallel": {"pipeline": {"schedule": "uniform"}}, "offload": {"activations": {"stages": "all"}}},
}
IN_MOTION = 2
"""Activations that offload has on the device besides those that wait there."""
FULL_OFFLOAD_ACTIVATIONS = 4
"""What full offload keeps on a rank, whatever the depth, in activations of one part (the paper, section 5)."""


def formula(schedule: str, layout: Layout) -> float | None:
    """The paper's ratio to 1f1b; None where it gives none, or only an order of magnitude."""
    v = layout.chunks
    published = {"1f1b": 1.0, "interleaved": (v + 1) / v, "gis": 1.0, "gis-h": (v + 1) / (2 * v)}
    return (published | {HALF: (v + 2) / (8 * v)}).get(schedule)


def make_run(layout: Layout, schedule: str) -> ResolvedRun:
    """One block a part; 1f1b has all parts of a rank in one."""
    chunks = 1 if schedule == "1f1b" else layout.chunks
    values: dict[str, Any] = {
        "run": {"directory": "unused", "device": "cpu"},
        "model": {
            "vocab": 32,
            "hidden": layout.hidden,
            "layers": layout.parts,
            "heads": 4,
            "ffn_hidden": 4 * layout.hidden,
        },
        "data": {"path": "unused"},
        "train": {
            "steps": STEPS,
            "sequence": SEQUENCE,
            "global_batch": MICROBATCHES,
            "gradient_accumulation": MICROBATCHES,
        },
        "metrics": {"activations": True},
    }
    pipeline = {
        "stages": layout.ranks,
        "chunks": chunks,
        "partition": [layout.chunks // chunks] * layout.ranks * chunks,
    }
    values["parallel"] = {"pipeline": pipeline | SCHEDULES[schedule]["parallel"]["pipeline"]}
    offload = SCHEDULES[schedule].get("offload", {}).get("activations", {"stages": "none"})
    run = resolved(values | {"offload": {"activations": offload | PLANNED}})
    if offload["stages"] == "none":
        return run
    # Any part but the first and the last; a copy there is planned to take its share of the passes.
    costs = derived_costs(run)
    passes = sum(costs.seconds(Action(op, 1, 0)) for op in (Op.F, Op.I, Op.W))
    copies = costs.seconds(Action(Op.OFFLOAD, 1, 0)) + costs.seconds(Action(Op.RELOAD, 1, 0))
    bandwidth = PLANNED["bandwidth_bytes_per_second"] * copies / (layout.copy_ratio * passes)
    return resolved(
        values | {"offload": {"activations": offload | PLANNED | {"bandwidth_bytes_per_second": bandwidth}}}
    )


def resolved(values: Mapping[str, Any]) -> ResolvedRun:
    """The run, for as many ranks as its degrees need."""
    config = RunConfig.model_validate(values)
    layout = config.parallel.layout(config.parallel.fixed_degree())
    batch = BatchSizes.solve(config.train, layout.data)
    assert isinstance(batch, BatchSizes), batch
    return ResolvedRun(config, layout, batch)


def batches_of(run: ResolvedRun, step: int) -> list[Any]:
    """Random micro-batches, the same on every rank."""
    import numpy as np

    shape = (run.batch.gradient_accumulation, run.batch.micro_batch, run.config.train.sequence + 1)
    return list(np.random.default_rng(step).integers(0, run.config.model.vocab, shape))


def measure(layout: Layout) -> dict[str, dict[str, Any]]:
    """One rank's part: peaks, simulated peaks and losses under every schedule."""
    import torch
    import torch.distributed as dist

    from parallel.mesh import Mesh, start_process_group
    from trainer.build import build_engine
    from trainer.memory import activation_peaks
    from trainer.program import units_of_parts

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    start_process_group("cpu", rank, layout.ranks, timeout_seconds=300.0)
    found: dict[str, dict[str, Any]] = {}
    mesh: Mesh | None = None
    for schedule in SCHEDULES:
        run = make_run(layout, schedule)
        mesh = mesh or Mesh(run.layout, "cpu", run.config.comm.algorithm)
        engine = build_engine(run, mesh, torch.device("cpu"))
        assert engine.activations is not None
        store, losses, peak = engine.activations.store, [], 0
        for step in range(STEPS):
            losses.append(engine.train(batches_of(run, step), 1e-3).loss)
            peak = store.meter.take_peak()  # of the last step: the first one also meets the rotary tables
        found[schedule] = {
            "losses": losses,
            "peak_bytes": peak,
            "simulated_bytes": activation_peaks(run, units_of_parts(run), engine.train_program)[rank],
            "host_bytes": store.host.allocated_bytes,
            "moved_bytes": store.moved_bytes // STEPS,
        }
    dist.destroy_process_group()
    return found


def measure_meter(steps: int) -> list[list[float]]:
    """CPU seconds of every step of one process, [with the meter, without] each; the two take turns."""
    import torch

    from parallel.mesh import Mesh, start_process_group
    from trainer.build import build_engine

    torch.set_num_threads(1)
    start_process_group("cpu", 0, 1, timeout_seconds=300.0)
    engines = []
    for metered in (True, False):
        run = resolved(
            {
                "run": {"directory": "unused", "device": "cpu"},
                "model": METER_MODEL,
                "data": {"path": "unused"},
                "train": {"steps": 1, "sequence": 128, "global_batch": 4, "micro_batch": 2},
                "metrics": {"activations": metered},
            }
        )
        engines.append(build_engine(run, Mesh(run.layout, "cpu", run.config.comm.algorithm), torch.device("cpu")))
    seconds: list[list[float]] = []
    for step in range(steps + 2):
        taken = [0.0, 0.0]
        for which in (0, 1) if step % 2 else (1, 0):
            start = common.cpu_seconds()
            engines[which].train(batches_of(run, step), 1e-3)
            taken[which] = common.cpu_seconds() - start
        seconds.append(taken)
    return seconds[2:]


def rows_of(name: str, layout: Layout, ranks: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[common.Row]:
    """A row per schedule from what every rank has found."""
    found: list[common.Row] = []
    whole: dict[str, float] = {}
    for schedule in SCHEDULES:
        if any(rank[schedule]["losses"] != ranks[0]["1f1b"]["losses"] for rank in ranks):
            raise RuntimeError(f"{name}, {schedule}: the losses are not those of 1f1b")
        peaks = {key: max(rank[schedule][key] for rank in ranks) for key in ("peak_bytes", "simulated_bytes")}
        whole = whole or {key: float(value) for key, value in peaks.items()}
        row: common.Row = {
            "layout": name,
            "schedule": schedule,
            **peaks,
            "measured_ratio": common.significant(peaks["peak_bytes"] / whole["peak_bytes"]),
            "simulated_ratio": common.significant(peaks["simulated_bytes"] / whole["simulated_bytes"]),
        }
        published = formula(schedule, layout)
        if published is not None:
            row["formula_ratio"] = common.significant(published)
        if schedule in (HALF, ALL):
            row["activations"] = common.significant(row["measured_ratio"] * layout.parts)
            row["host_bytes"] = max(rank[schedule]["host_bytes"] for rank in ranks)
            row["moved_bytes_per_step"] = max(rank[schedule]["moved_bytes"] for rank in ranks)
        found.append(row)
    return found


def bars_of(name: str, layout: Layout, rows: Sequence[common.Row]) -> list[common.Row]:
    """How far measured ratios are from simulated ones and from the formulas."""
    found = []

    def compare(row: common.Row, ratio: float, what: str) -> None:
        away = common.significant(abs(row["measured_ratio"] / ratio - 1))
        found.append(common.bar(f"{name}, {row['schedule']}: off {what}", away, TOLERANCE, "lower"))

    for row in rows:
        if row["schedule"] == "1f1b":
            continue
        compare(row, row["simulated_ratio"], "the simulation")
        if row["schedule"] in ("gis", "gis-h") or (row["schedule"] == HALF and layout.parts >= 128):
            compare(row, row["formula_ratio"], "the formula")
        elif row["schedule"] == HALF and layout.parts >= 32:
            compare(row, row["formula_ratio"] + IN_MOTION / layout.parts, "the formula and what is in motion")
        elif row["schedule"] == ALL:
            bound = f"{name}, {ALL}: activations of one part that a rank holds"
            found.append(common.bar(bound, row["activations"], FULL_OFFLOAD_ACTIVATIONS, "lower"))
    return found


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS), help="which to run (all)")
    parser.add_argument("--measure", choices=LAYOUTS, help=argparse.SUPPRESS)
    parser.add_argument("--measure-meter", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure or options.measure_meter:
        result = measure(LAYOUTS[options.measure]) if options.measure else measure_meter(options.measure_meter)
        print(json.dumps(result), flush=True)
        return 0
    file = str(Path(__file__).resolve())
    rows: list[common.Row] = []
    bars: list[common.Row] = []
    for name in options.layouts:
        layout = LAYOUTS[name]
        found = rows_of(name, layout, common.run_ranks([file, "--measure", name], layout.ranks, 1200.0))
        rows += found
        bars += bars_of(name, layout, found)
        common.say(options, f"{name}: done")
    (turns,) = common.run_ranks([file, "--measure-meter", "30"], 1)
    cost = {"measured": "CPU time of a step with the meter / without", "ratio": common.spread(a / b for a, b in turns)}
    rows.append(cost)
    return common.publish(common.report("activation_memory", rows, bars), options)


if __name__ == "__main__":
    sys.exit(main())
