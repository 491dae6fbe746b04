"""The schedules by name. A new one is one registered function in a file of this package:

    @register("gpipe", summary="...", source="...")
    def gpipe(ranks: int, stages: int, microbatches: int, costs: Costs) -> Program: ...

It writes compute actions only, and calls `require` for what it cannot do. Verifier, simulator, drawing,
executor and the tests over all schedules find it by its name; there is no list to add it to.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from parallel.pipeline import schedules as package
from parallel.pipeline.costs import Costs
from parallel.pipeline.program import Program

Generator = Callable[[int, int, int, Costs], Program]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A registered schedule: its generator, one line about it, and where it is published."""

    name: str
    summary: str
    source: str
    generator: Generator


class ScheduleError(ValueError):
    """A schedule that does not exist, or not for these numbers: the value, the rule, and what to do."""

    def __init__(self, value: str, rule: str, fix: str) -> None:
        super().__init__(f"{value}: {rule}; {fix}")
        self.value = value
        self.rule = rule
        self.fix = fix


_REGISTERED: dict[str, Schedule] = {}


def register(name: str, *, summary: str, source: str) -> Callable[[Generator], Generator]:
    """Make a generator known by a name; ValueError if the name is taken."""

    def add(generator: Generator) -> Generator:
        if name in _REGISTERED:
            taken = _REGISTERED[name].generator
            raise ValueError(
                f"schedule {name!r} is already registered by {taken.__module__}.{taken.__name__}"
            )
        _REGISTERED[name] = Schedule(name, summary, source, generator)
        return generator

    return add


def require(condition: bool, *, value: str, rule: str, fix: str) -> None:
    """For generators: raise a ScheduleError unless the condition holds."""
    if not condition:
        raise ScheduleError(value, rule, fix)


def require_one_stage_per_rank(name: str, ranks: int, stages: int) -> None:
    """For generators of schedules in which stage r is on rank r."""
    require(
        stages == ranks,
        value=f"stages={stages} on ranks={ranks}",
        rule=f"{name} puts exactly one stage on each rank",
        fix=f"set stages to {ranks}, or choose a schedule with several stages a rank",
    )


@cache
def schedules() -> Mapping[str, Schedule]:
    """All schedules by name, sorted; every module of this package is loaded for it."""
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    return MappingProxyType(dict(sorted(_REGISTERED.items())))


def generate(name: str, ranks: int, stages: int, microbatches: int, costs: Costs | None = None) -> Program:
    """The program of a schedule, compute actions only.

    Args:
        name: one of `schedules()`.
        ranks: pipeline ranks.
        stages: pipeline stages of the model.
        microbatches: micro-batches per step.
        costs: for schedules that depend on them; unit costs if None.

    Raises:
        ScheduleError: no such name, or numbers that the schedule cannot do.
        ValueError: per-stage costs for another number of stages.
    """
    known = schedules()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        fix = f"did you mean {near[0]!r}?" if near else "choose one of those"
        raise ScheduleError(f"schedule={name!r}", f"must be one of {', '.join(known)}", fix)
    for field, count in (("ranks", ranks), ("stages", stages), ("microbatches", microbatches)):
        require(count >= 1, value=f"{field}={count}", rule="must be at least 1", fix="set it to 1 or more")
    costs = costs or Costs()
    costs.require_stages(stages)
    return known[name].generator(ranks, stages, microbatches, costs)
