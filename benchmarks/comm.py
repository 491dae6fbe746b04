"""atoll's two algorithms for a collective, gloo's own and the direct exchange of shares, at several sizes.

This is the measurement behind `comm.algorithm: auto` (parallel/comm/channel.py). Both algorithms run in the same
processes on the same buffer and take turns, call by call; a ratio is the median over calls of native time
divided by the direct time of the call right behind it. A call ends when its slowest rank has ended. CPU time
counts all threads of all ranks: where ranks compute meanwhile, it is what a collective takes away from them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installation

from benchmarks import common

RANKS = (2, 4)
SIZES_BYTES = (64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
OPERATIONS = ("reduce_scatter", "all_gather", "all_reduce")
SAMPLES = ("native", "native_cpu", "direct", "direct_cpu")
BAR_RANKS, BAR_BYTES = 2, 16 << 20
BARS = {"reduce_scatter": 1.5, "all_reduce": 0.95}
"""The least native / direct time at BAR_BYTES over BAR_RANKS ranks."""


def measure(calls: int) -> list[common.Row]:
    """One rank's part: by operation and size, the seconds and CPU seconds of every call of each algorithm."""
    import torch
    import torch.distributed as dist

    from parallel.comm.channel import Channel, Pending
    from parallel.mesh import start_process_group

    torch.set_num_threads(1)
    start_process_group("cpu", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout_seconds=120.0)
    assert dist.group.WORLD is not None
    channels = {"native": Channel(dist.group.WORLD, "native"), "direct": Channel(dist.group.WORLD, "direct")}

    def timed(channel: Channel, operation: str, buffer: torch.Tensor) -> tuple[float, float]:
        dist.barrier()
        start, cpu_start = time.perf_counter(), common.cpu_seconds()
        Pending(getattr(channel, operation)(buffer)).finish()
        seconds = time.perf_counter() - start
        dist.barrier()  # the other side of a transfer may still be at work here
        return seconds, common.cpu_seconds() - cpu_start

    found = []
    for size in SIZES_BYTES:
        buffer = torch.zeros(size // 4)
        for operation in OPERATIONS:
            row: common.Row = {"operation": operation, "bytes": size, **{key: [] for key in SAMPLES}}
            for number in range(calls + 1):
                for algorithm, channel in channels.items():
                    seconds, cpu = timed(channel, operation, buffer)
                    if number:  # the first call of each finds cold memory and is not counted
                        row[algorithm].append(seconds)
                        row[f"{algorithm}_cpu"].append(cpu)
            found.append(row)
    dist.destroy_process_group()
    return found


def combine(world: int, ranks: Sequence[Sequence[common.Row]]) -> list[common.Row]:
    """Rows for one number of ranks: a call takes as long as its slowest rank and the CPU time of all."""
    rows = []
    for parts in zip(*ranks, strict=True):
        calls = {key: list(zip(*(part[key] for part in parts), strict=True)) for key in SAMPLES}
        seconds = {name: [max(call) for call in calls[name]] for name in ("native", "direct")}
        row: common.Row = {"operation": parts[0]["operation"], "ranks": world, "bytes": parts[0]["bytes"]}
        for name in seconds:
            row[f"{name}_milliseconds"] = common.spread(value * 1e3 for value in seconds[name])
            row[f"{name}_cpu_milliseconds"] = common.spread(sum(call) * 1e3 for call in calls[f"{name}_cpu"])
        pairs = zip(seconds["native"], seconds["direct"], strict=True)
        row["speed_ratio"] = common.spread(native / direct for native, direct in pairs)
        rows.append(row)
    return rows


def bars(rows: Sequence[common.Row]) -> list[common.Row]:
    """The bars of `BARS`, from the rows that they speak of."""
    ratios = {(row["operation"], row["ranks"], row["bytes"]): row["speed_ratio"]["median"] for row in rows}
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
    rows = []
    for world in RANKS:
        rounds = []
        for number in range(options.rounds):
            arguments = [str(Path(__file__).resolve()), "--measure", "--calls", str(options.calls)]
            rounds.append(common.run_ranks(arguments, world))
            common.say(options, f"{world} ranks: round {number} done")
        rows += combine(world, [_joined(each) for each in zip(*rounds, strict=True)])
    return common.publish(common.report("comm", rows, bars(rows)), options)


def _joined(rounds: Sequence[Sequence[common.Row]]) -> list[common.Row]:
    """One rank's rounds as one, calls behind calls."""
    return [
        {**parts[0], **{key: list(chain.from_iterable(part[key] for part in parts)) for key in SAMPLES}}
        for parts in zip(*rounds, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
