"""atoll's algorithms for a collective on gloo, its own (native) and the direct exchange of shares, by size.

This is the measurement behind `comm.algorithm: auto` (parallel/comm/channel.py). The algorithms run in the same
processes on the same buffer and take turns, call by call; a ratio is the median over calls of native time
divided by the other's time in the same turn. A call ends when its slowest rank has ended. CPU time counts all
threads of all ranks: where ranks compute meanwhile, it is what a collective takes away from them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installation

from benchmarks import common

RANKS = (2, 4)
SIZES_BYTES = (64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
OPERATIONS = ("reduce_scatter", "all_gather", "all_reduce")
ALGORITHMS: tuple[Literal["native", "direct"], ...] = ("native", "direct")
BAR_RANKS, BAR_BYTES = 2, 16 << 20
BARS = {"reduce_scatter": 1.5, "all_reduce": 0.95}
"""The least native / direct time at BAR_BYTES over BAR_RANKS ranks."""

Samples = dict[str, list[list[float]]]
"""Per algorithm the [seconds, CPU seconds] of every call."""


def measure(calls: int) -> list[Samples]:
    """One rank's part: samples of every operation at every size, in the order of `cases`."""
    import torch
    import torch.distributed as dist

    from parallel.comm.channel import Channel, Pending
    from parallel.mesh import start_process_group

    torch.set_num_threads(1)
    start_process_group("cpu", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout_seconds=120.0)
    assert dist.group.WORLD is not None
    channels = {algorithm: Channel(dist.group.WORLD, algorithm) for algorithm in ALGORITHMS}

    def timed(channel: Channel, operation: str, buffer: torch.Tensor) -> list[float]:
        dist.barrier()
        start, cpu_start = time.perf_counter(), common.cpu_seconds()
        Pending(getattr(channel, operation)(buffer)).finish()
        seconds = time.perf_counter() - start
        dist.barrier()  # the other side of a transfer may still be at work here
        return [seconds, common.cpu_seconds() - cpu_start]

    found = []
    for operation, size in cases():
        buffer = torch.zeros(size // 4)
        samples: Samples = {algorithm: [] for algorithm in ALGORITHMS}
        for _ in range(calls + 1):
            for algorithm, channel in channels.items():
                samples[algorithm].append(timed(channel, operation, buffer))
        # The first call of each finds cold memory and is not counted.
        found.append({algorithm: taken[1:] for algorithm, taken in samples.items()})
    dist.destroy_process_group()
    return found


def cases() -> list[tuple[str, int]]:
    """Every (operation, bytes) that is measured."""
    return [(operation, size) for size in SIZES_BYTES for operation in OPERATIONS]


def row(operation: str, ranks: int, size: int, samples: Sequence[Samples]) -> common.Row:
    """The row of a case from every rank's samples: a call takes as long as its slowest rank, the CPU time of all."""
    found: common.Row = {"operation": operation, "ranks": ranks, "bytes": size}
    seconds: dict[str, list[float]] = {}
    for algorithm in samples[0]:
        calls = list(zip(*(rank[algorithm] for rank in samples), strict=True))
        seconds[algorithm] = [max(rank[0] for rank in call) for call in calls]
        cpu = [sum(rank[1] for rank in call) for call in calls]
        found[f"{algorithm}_milliseconds"] = common.spread(value * 1e3 for value in seconds[algorithm])
        found[f"{algorithm}_cpu_milliseconds"] = common.spread(value * 1e3 for value in cpu)
        if algorithm != "native":
            pairs = zip(seconds["native"], seconds[algorithm], strict=True)
            found[f"{algorithm}_speed_ratio"] = common.spread(native / other for native, other in pairs)
    return found


def bars(rows: Sequence[common.Row]) -> list[common.Row]:
    """The bars of `BARS`, from the rows that they speak of."""
    ratios = {(each["operation"], each["ranks"], each["bytes"]): each["direct_speed_ratio"]["median"] for each in rows}
    return [
        common.bar(
            f"native / direct time, {operation}, {BAR_BYTES >> 20} MiB, {BAR_RANKS} ranks",
            ratios[operation, BAR_RANKS, BAR_BYTES],
            bound,
            "higher",
        )
        for operation, bound in BARS.items()
    ]


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="fresh process groups per number of ranks")
    parser.add_argument("--calls", type=int, default=9, help="timed calls of each kind per round")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.calls)), flush=True)
        return 0
    arguments = [str(Path(__file__).resolve()), "--measure", "--calls", str(options.calls)]
    rows = []
    for ranks in RANKS:
        measured: list[list[Samples]] = [[] for _ in range(ranks)]  # per rank, cases of one round behind the other's
        for number in range(options.rounds):
            for rank, samples in enumerate(common.run_ranks(arguments, ranks)):
                measured[rank] += samples
            common.say(options, f"{ranks} ranks: round {number} done")
        for place, (operation, size) in enumerate(cases()):
            rows.append(row(operation, ranks, size, [joined(rank[place :: len(cases())]) for rank in measured]))
    return common.publish(common.report("comm", rows, bars(rows)), options)


def joined(rounds: Sequence[Samples]) -> Samples:
    """The samples of several rounds as those of one."""
    return {algorithm: [call for each in rounds for call in each[algorithm]] for algorithm in rounds[0]}


if __name__ == "__main__":
    sys.exit(main())
