"""The pipeline executor on stages that sleep: against its own simulation, and against torch.distributed.pipelining.

Four ranks on gloo. Passes sleep, so that two cores suffice and whatever a step takes longer than its simulation is
the runtime's: Python, autograd, messages, waking up. Two questions are asked, with 8, 12 and 24 micro-batches.

- Does a step take as long as `simulate` says? Every registered schedule; F, I and W of a stage take 20 ms each. Where
  the user may ask for it, the ranks go before the other work of the machine, which is not what is measured.
- Is it faster than torch's? Every schedule gets the same work: F, I and W of a rank's share of the model take 20 ms
  each, be it one stage or two of 10 ms, and a stage is eight layers with a weight each. Ranks are scheduled as all
  processes are. atoll's best schedule that keeps no more activations than 1f1b, against torch's best of all, and 1f1b
  against 1f1b; the former also with activations of 4 MB, where sending takes time.

Last, a question without a pipeline: what the split backward of the real model costs (`parts/split_backward.py`).
README.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import truediv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installation

from benchmarks import common
from benchmarks.parts import split_backward
from benchmarks.parts.realtime import may_be_realtime
from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import ScheduleError, generate, schedules
from parallel.pipeline.simulate import Timeline, simulate
from parallel.pipeline.verify import check

RANKS = 4
PASS_SECONDS = 0.02
MICROBATCHES = (8, 12, 24)
SMALL, LARGE = (1, 1, 64), (1, 1024, 1024)
"""Shapes of an activation in fp32: 256 bytes, of which only the latency counts, and 4 MiB."""
LARGE_MICROBATCHES = 8
LAYERS = 8
"""Layers of a stage where runtimes are compared, each with a weight: a block of a transformer has seven to nine. What a
runtime spends on each parameter is part of what it costs."""
SEARCH_SECONDS = 5.0
CLOSE = 1.06
"""Who is simulated within this factor of the best may turn out to be the best."""
SPLIT_ROUNDS = 4
SIMULATION_BAR, PEER_BAR, PLAIN_BAR, LARGE_BAR = 1.03, 0.92, 1.0, 0.85
TORCH = {
    "GPipe": 1,
    "1F1B": 1,
    "Interleaved1F1B": 2,
    "InterleavedZeroBubble": 2,
    "ZBVZeroBubble": 2,
    "DualPipeV": 2,
}
"""torch's schedules, and how many stages each puts on a rank."""


@dataclass(frozen=True)
class Case:
    """A contestant: a schedule of a system, on so many micro-batches of such activations.

    Attributes:
        chunks: stages on a rank that a micro-batch passes through.
        pass_seconds: what F, I and W of a stage take.
        program: of atoll, with transfers, as CSV; generated once, because a search may end differently on each rank.
        layers: of a stage, each with a weight of its own.
    """

    system: str
    schedule: str
    microbatches: int
    shape: tuple[int, int, int]
    chunks: int
    pass_seconds: float
    program: str = ""
    layers: int = 1

    @property
    def name(self) -> str:
        large = ", 4 MB" if self.shape == LARGE else ""
        layers = f", {self.layers} layers" if self.layers > 1 else ""
        milliseconds = common.significant(1e3 * self.pass_seconds)
        return f"{self.system} {self.schedule}, {self.microbatches} x {milliseconds:g} ms{layers}{large}"

    @property
    def busy_seconds(self) -> float:
        """What every rank sleeps in a step."""
        return 3 * self.pass_seconds * self.microbatches * self.chunks

    @property
    def is_compared(self) -> bool:
        """Whether it is one of those that are compared with each other, not with a simulation."""
        return self.layers == LAYERS


@dataclass(frozen=True)
class Expected:
    """What the simulation says: seconds, and the most that a rank keeps, in micro-batches through its share."""

    span_seconds: float
    makespan_seconds: float
    peak_activations: float

    @classmethod
    def of(cls, timeline: Timeline) -> Expected:
        ranks = timeline.program.ranks
        chunks = timeline.program.depth // ranks
        span = max(timeline.span_seconds(rank) for rank in range(ranks))
        return cls(span, timeline.makespan_seconds, max(timeline.peak_activations) / chunks)


def plan(names: Sequence[str], microbatches: Sequence[int]) -> tuple[dict[str, Case], dict[str, Expected], list[str]]:
    """All contestants by name, neighbours in time next to each other; what atoll's should take; who cannot run."""
    cases: list[Case] = []
    expected: dict[str, Expected] = {}
    refused: list[str] = []
    for count in microbatches:
        programs: dict[str, Program] = {}
        for name in names:
            try:
                programs[name] = generate(name, RANKS, count, costs=costs(1), time_limit_seconds=SEARCH_SECONDS)
            except ScheduleError as error:
                refused.append(f"{name}: {error}")
        ours = [atoll_case(program, name, SMALL, 1) for name, program in programs.items()]
        cases += [case for case, _ in ours]
        expected |= {case.name: found for case, found in ours}
        for shape in (SMALL, LARGE) if count == LARGE_MICROBATCHES else (SMALL,):
            for name in dict.fromkeys(["1f1b", *close_to_best({case.schedule: (case, found) for case, found in ours})]):
                case, found = atoll_case(programs[name], name, shape, programs[name].depth // RANKS, LAYERS)
                cases.append(case)
                expected[case.name] = found
            cases += [
                Case("torch", name, count, shape, chunks, PASS_SECONDS / chunks, layers=LAYERS)
                for name, chunks in TORCH.items()
            ]
    return {case.name: case for case in cases}, expected, refused


def costs(share: int) -> Costs:
    """F, I and W of a stage that is one of `share` parts of what takes 20 ms."""
    seconds = PASS_SECONDS / share
    return Costs(seconds, seconds, seconds)


def atoll_case(
    program: Program, name: str, shape: tuple[int, int, int], share: int, layers: int = 1
) -> tuple[Case, Expected]:
    """A contestant of a program without transfers, and what it should take."""
    completed = pair_transfers(program, costs(share))
    check(completed)
    chunks, text = program.depth // RANKS, completed.to_csv()
    case = Case("atoll", name, program.microbatches, shape, chunks, PASS_SECONDS / share, text, layers)
    return case, Expected.of(simulate(program, costs(share)))


def close_to_best(ours: Mapping[str, tuple[Case, Expected]]) -> list[str]:
    """Schedules that may turn out to be the fastest of those that keep no more than 1f1b, which keeps one per rank."""
    rates = {
        name: found.makespan_seconds / case.busy_seconds
        for name, (case, found) in ours.items()
        if found.peak_activations <= RANKS
    }
    return [name for name, rate in rates.items() if rate <= CLOSE * min(rates.values())]


def measure(cases: Sequence[Case], realtime: bool) -> list[common.Row]:
    """One rank's part of a round: a step of every contestant, each behind a step without sleeps."""
    import torch
    import torch.distributed as dist

    from benchmarks.parts import sleeping
    from parallel.comm.channel import Channel
    from parallel.mesh import start_process_group

    torch.set_num_threads(1)
    start_process_group("cpu", int(os.environ["RANK"]), RANKS, timeout_seconds=120.0)
    assert dist.group.WORLD is not None
    channel, passes = Channel(dist.group.WORLD), sleeping.Passes()
    taken = []
    for case in cases:
        activation = torch.zeros(case.shape)
        passes.layers = case.layers
        if case.system == "atoll":
            step = sleeping.atoll_step(Program.from_csv(case.program), passes, channel, activation)
        else:
            step = sleeping.torch_step(case.schedule, case.chunks, case.microbatches, passes, channel, activation)
        sleeping.warm_up(step, passes)
        first = realtime and not case.is_compared  # runtimes are compared as they are used: scheduled as all others
        marks = sleeping.timed(step, passes, case.pass_seconds, channel, first)
        sleeping.require_passes(case.name, marks, case.microbatches * case.chunks * case.layers)
        layers = {op: [end - start for each, start, end in marks if each == op] for op in "FIW"}
        seconds = {op: case.layers * statistics.median(each) for op, each in layers.items()}
        taken.append({"start": marks[0][1], "end": marks[-1][2], "pass_seconds": seconds})
    dist.barrier()
    dist.destroy_process_group()
    return taken


def turn(cases: Sequence[Case], realtime: bool) -> list[common.Row]:
    """One round of all ranks: for each contestant the longest span of a rank, and the time from first to last."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([asdict(case) for case in cases], file)
        file.flush()
        priority = ["--realtime"] if realtime else []
        ranks = common.run_ranks([str(Path(__file__).resolve()), "--measure", file.name, *priority], RANKS)
    return [joined(each) for each in zip(*ranks, strict=True)]


def joined(ranks: Sequence[common.Row]) -> common.Row:
    """What a step took, from what each rank saw of it on the machine's one clock."""
    return {
        "span_seconds": max(rank["end"] - rank["start"] for rank in ranks),
        "makespan_seconds": max(rank["end"] for rank in ranks) - min(rank["start"] for rank in ranks),
        "pass_seconds": {op: statistics.median(rank["pass_seconds"][op] for rank in ranks) for op in "FIW"},
    }


def row(case: Case, taken: Sequence[common.Row], expected: Expected | None) -> common.Row:
    """A contestant's figures over all rounds."""
    busy = case.busy_seconds
    spans, makespans = ([each[key] for each in taken] for key in ("span_seconds", "makespan_seconds"))
    found: common.Row = {
        "name": case.name,
        "microbatches": case.microbatches,
        "stages_per_rank": case.chunks,
        "pass_seconds": case.pass_seconds,
        "activation_bytes": 4 * case.shape[0] * case.shape[1] * case.shape[2],
        "busy_seconds": common.significant(busy),
        "span_seconds": common.spread(spans),
        "makespan_seconds": common.spread(makespans),
        "bubble_rate": common.spread((each - busy) / each for each in makespans),
        "slept_milliseconds": {
            op: common.significant(1e3 * statistics.median(each["pass_seconds"][op] for each in taken)) for op in "FIW"
        },
    }
    if expected is not None:
        found |= {
            "simulated_span_seconds": common.significant(expected.span_seconds),
            "simulated_makespan_seconds": common.significant(expected.makespan_seconds),
            "simulated_bubble_rate": common.significant(1 - busy / expected.makespan_seconds),
            "peak_activations": common.significant(expected.peak_activations),
            "span_ratio": common.spread(each / expected.span_seconds for each in spans),
            "makespan_ratio": common.spread(each / expected.makespan_seconds for each in makespans),
        }
    return found


def bars(
    cases: Mapping[str, Case], measured: Mapping[str, Sequence[common.Row]], expected: Mapping[str, Expected]
) -> list[common.Row]:
    """Every schedule against its simulation; the best against the best; 1f1b against 1f1b."""
    found = []
    for name, simulated in expected.items():
        if not cases[name].is_compared:
            ratios = [each["span_seconds"] / simulated.span_seconds for each in measured[name]]
            value = common.significant(statistics.median(ratios))
            found.append(common.bar(f"span / simulated span, {name}", value, SIMULATION_BAR, "lower"))
    for count, shape in dict.fromkeys((case.microbatches, case.shape) for case in cases.values()):
        here = {
            name: case
            for name, case in cases.items()
            if (case.microbatches, case.shape) == (count, shape) and case.is_compared
        }
        ours = [name for name in here if name in expected and expected[name].peak_activations <= RANKS]
        theirs = [name for name in here if here[name].system == "torch"]
        bound = LARGE_BAR if shape == LARGE else PEER_BAR
        pairs = [(best(ours, measured), best(theirs, measured), bound)]
        by_schedule = {case.schedule: name for name, case in here.items()}
        if shape == SMALL and {"1f1b", "1F1B"} <= set(by_schedule):
            pairs.append((by_schedule["1f1b"], by_schedule["1F1B"], PLAIN_BAR))
        for mine, other, bound in pairs:
            value = statistics.median(map(truediv, steps(measured[mine]), steps(measured[other])))
            found.append(common.bar(f"step, {mine} / {other}", common.significant(value), bound, "lower"))
    return found


def steps(taken: Sequence[common.Row]) -> list[float]:
    """What a step took from the first pass of any rank to the last, round by round."""
    return [each["makespan_seconds"] for each in taken]


def best(names: Sequence[str], measured: Mapping[str, Sequence[common.Row]]) -> str:
    """Whose step is the shortest in the median of the rounds."""
    return min(names, key=lambda name: statistics.median(steps(measured[name])))


def main() -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contestant")
    parser.add_argument("--quick", action="store_true", help="one round with 8 micro-batches only")
    parser.add_argument("--schedules", nargs="+", default=None, help="of atoll; default: all")
    parser.add_argument("--normal", action="store_true", help="do not ask for real-time scheduling of the ranks")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--realtime", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        listed = json.loads(options.measure.read_text())
        contestants = [Case(**{**each, "shape": tuple(each["shape"])}) for each in listed]
        print(json.dumps(measure(contestants, options.realtime)), flush=True)
        return 0
    realtime = not options.normal and may_be_realtime()
    rounds, counts = (1, MICROBATCHES[:1]) if options.quick else (options.rounds, MICROBATCHES)
    cases, expected, refused = plan(options.schedules or list(schedules()), counts)
    for each in refused:
        common.say(options, f"left out: {each}")
    measured: dict[str, list[common.Row]] = {name: [] for name in cases}
    for number in range(rounds):
        order = list(cases) if number % 2 == 0 else list(reversed(cases))
        for name, taken in zip(order, turn([cases[name] for name in order], realtime), strict=True):
            measured[name].append(taken)
        common.say(options, f"round {number} of {rounds} is done")
    rows = [row(case, measured[name], expected.get(name)) for name, case in cases.items()]
    judged = bars(cases, measured, expected)
    common.say(options, "the split backward")
    split_rows, split_bars = split_backward.run(1 if options.quick else SPLIT_ROUNDS)
    result = common.report("pipeline", rows + split_rows, judged + split_bars)
    result["settings"] = {"ranks": RANKS, "rounds": rounds, "realtime": realtime, "left_out": refused}
    return common.publish(result, options)


if __name__ == "__main__":
    sys.exit(main())
