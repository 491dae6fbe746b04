"""Schedules side by side: who is fastest within a memory limit.

Schedules cut a rank's share of the model into different numbers of parts. Costs are therefore given for one
number of parts and carried over to the others: a rank's share takes the same time and weighs the same however
it is cut. Per-stage costs are carried over as a density along the model, so two stages may become one or one
may become two. A transfer is of one activation at any border, so it costs the same under every schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise

from parallel.pipeline.costs import Costs, PerStage
from parallel.pipeline.schedules.registry import ScheduleError, find
from parallel.pipeline.study import Asked, Study, given, require_costs, study


@dataclass(frozen=True, slots=True)
class Entry:
    """One schedule of a comparison: what came of it, or why it cannot do these numbers."""

    name: str
    study: Study | None
    reason: str = ""

    @property
    def within(self) -> bool:
        """Whether it runs, within the limit if there is one."""
        return self.study is not None and not self.study.violations


def compare(
    asked: Asked,
    names: Iterable[str],
    given_chunks: int = 1,
    known: Iterable[Study] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> list[Entry]:
    """The schedules, ranked by makespan and peak: those that keep to the limit, the others, those that cannot.

    Args:
        asked: about each of them, ranks and micro-batches included. `chunks` is for schedules that take any number.
        names: registered schedules.
        given_chunks: the parts per rank that the costs are for. All figures are in units of their activations.
        known: what has been studied with these costs already.
        progress: is told the name of each schedule when its turn comes; some search for a while.

    Raises:
        ScheduleError: there is no schedule of a name, numbers are missing, or per-stage costs for others.
    """
    ranks = given("stages", asked.ranks, "a comparison")
    given("microbatches", asked.microbatches, "a comparison")
    require_costs(asked.costs, ranks * given_chunks)
    entries = [Entry(each.asked.name, each) for each in known]
    done = {entry.name for entry in entries}
    for name in dict.fromkeys(names):
        schedule = find(name)
        if name not in done:
            progress(name)
            chunks = schedule.default_chunks if schedule.chunks else asked.chunks or schedule.default_chunks
            costs = carried_over(asked.costs, ranks * given_chunks, ranks * chunks)
            entries.append(_entry(replace(asked, name=name, chunks=chunks, costs=costs)))
    return sorted(entries, key=_place)


def carried_over(costs: Costs, stages: int, to_stages: int) -> Costs:
    """Costs for a model cut into `stages`, as those of the same model cut into `to_stages`."""
    if stages == to_stages:
        return costs
    changed: dict[str, PerStage | None] = {}
    for field in fields(costs):
        value = getattr(costs, field.name)
        if isinstance(value, tuple):
            changed[field.name] = _recut(value, to_stages)
        elif value is not None and field.name != "transfer_seconds":
            changed[field.name] = value * stages / to_stages
    return replace(costs, **changed)  # type: ignore[arg-type]


def _entry(asked: Asked) -> Entry:
    try:
        return Entry(asked.name, study(asked))
    except ScheduleError as error:
        return Entry(asked.name, None, str(error))


def _place(entry: Entry) -> tuple[bool, bool, float, float, str]:
    """What the order goes by; equal makespans by what they take."""
    if entry.study is None or not entry.study.ended:
        return entry.study is None, True, math.inf, 0.0, entry.name
    makespan = float(f"{entry.study.timeline.makespan_seconds:.12g}")  # sums of the same times, in another order
    return False, not entry.within, makespan, entry.study.peak, entry.name


def _recut(values: Sequence[float], parts: int) -> tuple[float, ...]:
    """What equal parts of the model cost, by the costs of other equal parts."""
    until = list(accumulate(values, initial=0.0))

    def before(place: float) -> float:
        whole = min(math.floor(place), len(values) - 1)
        return until[whole] + (place - whole) * values[whole]

    places = [part * len(values) / parts for part in range(parts + 1)]
    return tuple(before(end) - before(start) for start, end in pairwise(places))
