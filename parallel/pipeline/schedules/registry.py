"""The schedules by name. A new one is one registered function in a file of this package:

    @register("gpipe", summary="...", source="...")
    def gpipe(request: Request) -> Program: ...

It writes compute actions only, and calls `require` for what it cannot do. Verifier, simulator, drawing,
executor and the tests over all schedules find it by its name; there is no list to add it to.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType

from parallel.pipeline import schedules as package
from parallel.pipeline.costs import Costs
from parallel.pipeline.program import Program

CSV = "csv:"
"""`csv:FILE` in place of a schedule's name reads the program from a file."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a schedule is asked for.

    Attributes:
        ranks: pipeline ranks.
        microbatches: micro-batches per step.
        chunks: parts of the model on each rank; the model is cut into `ranks * chunks` stages.
        costs: for schedules that depend on them. Per-stage costs are for `ranks * chunks` stages.
        memory_limit: the most activations that a rank may hold at a time, in the unit of `costs.activation`;
            None: as the schedule is published.
        group: micro-batches that run through a chunk before the next chunk has its turn (`gis`, interleaving);
            None: as the schedule is published.
        time_limit_seconds: for schedules that search.
    """

    ranks: int
    microbatches: int
    chunks: int = 1
    costs: Costs = field(default_factory=Costs)
    memory_limit: float | None = None
    group: int | None = None
    time_limit_seconds: float = 20.0

    @property
    def stages(self) -> int:
        """Stages of the model."""
        return self.ranks * self.chunks


Generator = Callable[[Request], Program]
Report = Callable[[Request], tuple[Program, str]]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A registered schedule.

    Attributes:
        name: how it is asked for.
        summary: one line about it.
        source: where it is published.
        generator: writes the program.
        chunks: parts of the model per rank that it is made for, in order of preference; None: any number.
        limited: whether it keeps to a memory limit that it is given.
        grouped: whether it can be told how many micro-batches run through a chunk before the next one's turn.
        report: for a schedule that searches: the program, and one line for people about the search.
    """

    name: str
    summary: str
    source: str
    generator: Generator
    chunks: tuple[int, ...] | None = (1,)
    limited: bool = False
    grouped: bool = False
    report: Report | None = None

    @property
    def default_chunks(self) -> int:
        """Parts per rank where nobody says how many."""
        return 2 if self.chunks is None else self.chunks[0]


class ScheduleError(ValueError):
    """A schedule that does not exist, or not for these numbers: the value, the rule, and what to do."""

    def __init__(self, value: str, rule: str, fix: str) -> None:
        super().__init__(f"{value}: {rule}; {fix}")
        self.value = value
        self.rule = rule
        self.fix = fix


_REGISTERED: dict[str, Schedule] = {}


def register(
    name: str,
    *,
    summary: str,
    source: str,
    chunks: tuple[int, ...] | None = (1,),
    limited: bool = False,
    grouped: bool = False,
    report: Report | None = None,
) -> Callable[[Generator], Generator]:
    """Make a generator known by a name; arguments as the attributes of `Schedule`. ValueError if the name is taken."""

    def add(generator: Generator) -> Generator:
        if name in _REGISTERED:
            taken = _REGISTERED[name].generator
            raise ValueError(
                f"schedule {name!r} is already registered by {taken.__module__}.{taken.__name__}"
            )
        _REGISTERED[name] = Schedule(name, summary, source, generator, chunks, limited, grouped, report)
        return generator

    return add


def require(condition: bool, *, value: str, rule: str, fix: str) -> None:
    """For generators: raise a ScheduleError unless the condition holds."""
    if not condition:
        raise ScheduleError(value, rule, fix)


@cache
def schedules() -> Mapping[str, Schedule]:
    """All schedules by name, sorted; every module of this package is loaded for it."""
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    return MappingProxyType(dict(sorted(_REGISTERED.items())))


def find(name: str) -> Schedule:
    """The schedule of that name; ScheduleError if there is none."""
    known = schedules()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"choose one of those, or {CSV}FILE"
        raise ScheduleError(f"schedule={name!r}", f"must be one of {', '.join(known)}", fix)
    return known[name]


def generate(
    name: str,
    ranks: int,
    microbatches: int,
    *,
    chunks: int | None = None,
    costs: Costs | None = None,
    memory_limit: float | None = None,
    group: int | None = None,
    time_limit_seconds: float = 20.0,
) -> Program:
    """The program of a schedule, compute actions only.

    Args:
        name: one of `schedules()`, or csv:FILE.
        chunks: parts of the model per rank; None: what the schedule is made for.
        ranks, microbatches, costs, memory_limit, group, time_limit_seconds: as in `Request`.

    Raises:
        ScheduleError: no such name, or numbers that the schedule cannot do.
        ValueError: per-stage costs for another number of stages.
    """
    if name.startswith(CSV):
        program = read_csv(Path(name.removeprefix(CSV)))
        for key, given in (("chunks", chunks), ("memory_limit", memory_limit), ("group", group)):
            require(
                given is None,
                value=f"{key}={given:g}" if given is not None else key,
                rule="the program in a file is what it is",
                fix=f"leave {key} out, or name a schedule",
            )
        for key, found, wanted in (
            ("ranks", program.ranks, ranks),
            ("microbatches", program.microbatches, microbatches),
        ):
            require(
                found == wanted,
                value=f"schedule={name!r}",
                rule=f"the program in the file is for {key}={found}, not {wanted}",
                fix=f"set {key} to {found}, or name another file",
            )
        return program
    request = request_for(
        name,
        ranks,
        microbatches,
        chunks=chunks,
        costs=costs,
        memory_limit=memory_limit,
        group=group,
        time_limit_seconds=time_limit_seconds,
    )
    return _generated(name, request)


@lru_cache(maxsize=16)
def _generated(name: str, request: Request) -> Program:
    """Generators are pure, and some search for long: what is asked again (by a check, then by a run) is there."""
    return find(name).generator(request)


def request_for(
    name: str,
    ranks: int,
    microbatches: int,
    *,
    chunks: int | None = None,
    costs: Costs | None = None,
    memory_limit: float | None = None,
    group: int | None = None,
    time_limit_seconds: float = 20.0,
) -> Request:
    """What `generate` asks the schedule of that name for; arguments and errors as there."""
    schedule = find(name)
    for key, count in (("ranks", ranks), ("microbatches", microbatches), ("chunks", chunks)):
        if count is not None:
            require(count >= 1, value=f"{key}={count}", rule="must be at least 1", fix="set it to 1 or more")
    if chunks is None:
        chunks = schedule.default_chunks
    if schedule.chunks is not None:
        allowed = " or ".join(map(str, schedule.chunks))
        require(
            chunks in schedule.chunks,
            value=f"chunks={chunks}",
            rule=f"{name} puts {allowed} part{'s' if allowed != '1' else ''} of the model on each rank",
            fix=f"set chunks to {allowed}, or choose another schedule",
        )
    if memory_limit is not None:
        with_limit = ", ".join(each.name for each in schedules().values() if each.limited)
        require(
            schedule.limited,
            value=f"memory_limit={memory_limit:g}",
            rule=f"{name} has a fixed order that no limit changes",
            fix=f"leave the limit out, or choose one of {with_limit}",
        )
    if group is not None:
        with_groups = ", ".join(each.name for each in schedules().values() if each.grouped)
        require(
            schedule.grouped,
            value=f"group={group}",
            rule=f"{name} has no groups of micro-batches",
            fix=f"leave the group out, or choose one of {with_groups}",
        )
    costs = costs or Costs()
    costs.require_stages(ranks * chunks)
    return Request(ranks, microbatches, chunks, costs, memory_limit, group, time_limit_seconds)


def read_csv(path: Path) -> Program:
    """The program in a file, as it is; ScheduleError if there is none."""
    value = f"schedule={CSV + str(path)!r}"
    try:
        return Program.from_csv(path.read_text())
    except OSError as error:
        fix = f"name a file that can be read, as in {CSV}schedule.csv"
        raise ScheduleError(value, f"the file cannot be read ({error.strerror})", fix) from error
    except UnicodeDecodeError as error:
        raise ScheduleError(value, "the file is not text", "write one row a rank, as in 0F0,0B0") from error
    except ValueError as error:
        raise ScheduleError(value, str(error), "correct the file") from error


def model_parts(name: str, ranks: int, chunks: int | None = None) -> int:
    """Into how many parts a schedule cuts the model; arguments and errors as for `generate`."""
    if name.startswith(CSV):
        return read_csv(Path(name.removeprefix(CSV))).depth
    return ranks * (find(name).default_chunks if chunks is None else chunks)
