"""A schedule under given costs: its program, its timeline, what is wrong with it, and its figures.

All figures are read off the simulated timeline; none comes from a formula of a schedule.

A schedule is asked for as `launch` and reports do, with one difference to `registry.generate`: a memory limit is
welcome with every schedule. One that can keep to a limit is told, the order of any other is checked against it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.draw_bars import Drawing, bars_of
from parallel.pipeline.passes.offload import offload_activations
from parallel.pipeline.passes.reduce import add_reduce
from parallel.pipeline.passes.sync import add_sync
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.passes.update import add_update
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import CSV, ScheduleError, find, generate, read_csv, request_for, require
from parallel.pipeline.simulate import Sends, Timeline, simulate
from parallel.pipeline.verify import Fault, Violation, verify


@dataclass(frozen=True)
class Asked:
    """What is asked about a schedule.

    Attributes:
        name: of the schedule, or csv:FILE.
        ranks, microbatches, chunks, memory_limit, group, time_limit_seconds: as in `Request`; None: what the
            file says, or what the schedule is made for.
        costs: what actions take and activations weigh.
        sends: `latency` or `blocking`, see `simulate`.
        offload: how many of the stages of each rank send their activations to host memory, as a number or as a
            fraction below 1; 0: none.
    """

    name: str
    ranks: int | None = None
    microbatches: int | None = None
    chunks: int | None = None
    costs: Costs = field(default_factory=Costs)
    memory_limit: float | None = None
    group: int | None = None
    time_limit_seconds: float = 20.0
    sends: Sends = Sends.LATENCY
    offload: float = 0


@dataclass(frozen=True)
class Study:
    """What came of it.

    Attributes:
        asked: the question.
        program: as generated or read, with what has a cost besides passes; without transfers, unless the file
            lists them.
        search: what a schedule that searches says about its search; else empty.
        violations: why the program must not run, or does not keep to the limit.
        timeline: the simulation, as far as the program runs; with transfers as actions where they are blocking.
    """

    asked: Asked
    program: Program
    search: str
    violations: tuple[Violation, ...]
    timeline: Timeline

    @property
    def right(self) -> bool:
        """Whether the program may run; it may still take more memory than it should."""
        return all(violation.fault is Fault.MEMORY for violation in self.violations)

    @property
    def ended(self) -> bool:
        """Whether the program comes to its end; else it has no makespan, no bubble rate and no peaks."""
        return not self.timeline.blocked

    @property
    def chunks(self) -> int:
        """Stages on a rank, those of one copy of the model only."""
        return self.program.depth // self.program.ranks

    @cached_property
    def ideal_seconds(self) -> float:
        """What the busiest rank works: the time of a step without bubbles."""
        return max(self.timeline.busy_seconds(rank) for rank in range(self.program.ranks))

    @cached_property
    def peak(self) -> float:
        """The most activations on any rank, in the unit of the costs."""
        return max(self.timeline.peak_activations)

    @cached_property
    def drawn(self) -> Timeline:
        """The timeline for drawings: transfers that take time are actions in it, whether or not they hold a lane."""
        free = self.asked.costs.transfer_seconds == 0 or self.program.has_transfers
        if free or self.asked.sends is not Sends.LATENCY or not self.right:
            return self.timeline
        return simulate(pair_transfers(self.program, self.asked.costs), self.asked.costs)

    @cached_property
    def transfers(self) -> tuple[int, ...]:
        """How many activations and gradients each rank sends."""
        return tuple(sum(_leaves(action, self.program) for action in listed) for listed in self.program.actions)


def study(asked: Asked) -> Study:
    """Generate or read the program, check it, and run it on paper.

    Raises:
        ScheduleError: no such schedule, numbers that it cannot do, or per-stage costs for another number of stages.
    """
    program, search = _program(asked)
    violations = verify(program)
    if violations:
        return Study(asked, program, search, tuple(violations), simulate(program, asked.costs))
    program = _completed(program, asked)
    timeline = _timeline(program, asked)
    return Study(asked, program, search, tuple(_over_the_limit(program, timeline, asked)), timeline)


def drawing_of(study: Study) -> Drawing:
    """What is drawn of one schedule."""
    asked, program, timeline = study.asked, study.program, study.drawn
    counts = {"ranks": program.ranks, "stages": program.depth, "micro-batches": program.microbatches}
    facts = [(name, str(count)) for name, count in counts.items()]
    facts += [("copies of the model", str(program.replicas))] if program.replicas > 1 else []
    if study.ended:
        facts += [
            ("makespan", f"{timeline.makespan_seconds:.6g}"),
            ("without a bubble", f"{study.ideal_seconds:.6g}"),
            ("bubble rate", f"{timeline.bubble_rate:.4f}"),
            ("peak activations", f"{study.peak:.4g}"),
        ]
    facts += [("p2p sends", str(sum(study.transfers)))]
    facts += [("violations", str(len(study.violations)))] if study.violations else []
    return Drawing(
        title=program.name,
        bars=bars_of(timeline),
        facts=facts,
        memory=[timeline.memory(rank) for rank in range(program.ranks)],
        memory_limit=asked.memory_limit,
    )


def _program(asked: Asked) -> tuple[Program, str]:
    """The program, and what its schedule says about the search for it."""
    if asked.name.startswith(CSV):
        return _from_file(asked), ""
    ranks = given("stages", asked.ranks, asked.name)
    microbatches = given("microbatches", asked.microbatches, asked.name)
    schedule = find(asked.name)
    require_costs(asked.costs, ranks * (asked.chunks or schedule.default_chunks))
    request = request_for(
        asked.name,
        ranks,
        microbatches,
        chunks=asked.chunks,
        costs=asked.costs,
        memory_limit=asked.memory_limit if schedule.limited else None,
        group=asked.group,
        time_limit_seconds=asked.time_limit_seconds,
    )
    return schedule.report(request) if schedule.report else (schedule.generator(request), "")


def _from_file(asked: Asked) -> Program:
    found = read_csv(Path(asked.name.removeprefix(CSV)))
    ranks = found.ranks if asked.ranks is None else asked.ranks
    program = generate(asked.name, ranks, asked.microbatches or found.microbatches)
    require_costs(asked.costs, program.depth)
    chunks = program.depth // program.ranks
    require(
        asked.chunks in (None, chunks),
        value=f"chunks={asked.chunks}",
        rule=f"the program in the file has {program.depth} stages on {program.ranks} ranks",
        fix=f"leave chunks out, or set it to {chunks}",
    )
    return program


def given(option: str, value: int | None, name: str) -> int:
    """The value of an option that `name` cannot do without."""
    if value is None:
        raise ScheduleError(f"{option} is missing", f"{name} needs it", f"add --{option} N")
    return value


def _completed(program: Program, asked: Asked) -> Program:
    """With the actions that have a cost and that nobody has listed: a schedule writes passes only."""
    costs = asked.costs
    if asked.offload:
        of_rank = program.stages // program.ranks
        fraction = asked.offload if asked.offload < 1 else min(asked.offload / of_rank, 1.0)
        program = offload_activations(program, costs, fraction=fraction)
    if costs.reduce_seconds and Op.REDUCE not in program.ops:
        program = add_reduce(program, per_microbatch=False)
    if costs.sync_seconds and Op.SYNC not in program.ops:
        program = add_sync(program, costs)
    if (costs.update_seconds or costs.gather_seconds) and program.ops.isdisjoint({Op.UPDATE, Op.GATHER}):
        program = add_update(program)
    return program


def require_costs(costs: Costs, stages: int) -> None:
    """ScheduleError unless per-stage costs are for so many stages of the model."""
    try:
        costs.require_stages(stages)
    except ValueError as error:
        fix = f"give one number for all stages, or {stages} with colons between them"
        raise ScheduleError("per-stage costs", str(error).removeprefix("costs: "), fix) from error


def _timeline(program: Program, asked: Asked) -> Timeline:
    if asked.sends is Sends.BLOCKING and not program.has_transfers:
        program = pair_transfers(program, asked.costs, late=True)
    return simulate(program, asked.costs, sends=asked.sends)


def _over_the_limit(program: Program, timeline: Timeline, asked: Asked) -> list[Violation]:
    """As `verify` finds it by the order of the passes; where activations leave the device, by the simulated times."""
    if asked.memory_limit is None or Op.OFFLOAD not in program.ops:
        return verify(program, asked.memory_limit, costs=asked.costs)
    found: list[Violation] = []
    for rank, peak in enumerate(timeline.peak_activations):
        if peak > asked.memory_limit:
            when = next(seconds for seconds, held in timeline.memory(rank) if round(held, 9) == peak)
            action = next(
                span.action
                for span in timeline.spans[rank]
                if span.start == when and span.action.op in (Op.F, Op.RELOAD)
            )
            message = f"rank {rank} holds {peak:g} activations at {action}, the limit is {asked.memory_limit:g}"
            found.append(Violation(Fault.MEMORY, rank, action, message))
    return found


def _leaves(action: Action, program: Program) -> bool:
    """Whether what a pass produces goes to another rank."""
    if action.op is Op.F:
        return program.crossings[action.stage]
    if action.op in (Op.B, Op.I):
        before = program.before(action.stage)
        return before is not None and program.crossings[before]
    return False
