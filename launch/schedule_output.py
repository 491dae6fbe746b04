"""What `atoll schedule` prints: figures as text and as JSON, the comparison, the list of schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.schedule_options import COSTS, MEMORY
from parallel.pipeline.actions import Op
from parallel.pipeline.compare import Entry
from parallel.pipeline.render import render_grid
from parallel.pipeline.schedules.registry import Schedule
from parallel.pipeline.study import Study
from parallel.pipeline.verify import explain


def grid_text(study: Study, columns: int | None) -> str:
    """The grid; below the violations, if there are any, and with marks where they are."""
    program, violations, timeline = study.program, study.violations, study.timeline
    if violations:
        return explain(program, violations, timeline=timeline, columns=columns)
    return render_grid(program, timeline=timeline, columns=columns)


def summary_text(study: Study) -> str:
    """The figures."""
    asked, timeline, program = study.asked, study.timeline, study.program
    lines: list[str] = []
    if study.ended:
        limit = "" if asked.memory_limit is None else f", limit {asked.memory_limit:.6g}"
        lines += [
            f"makespan     {timeline.makespan_seconds:.6g}, {study.ideal_seconds:.6g} without a bubble",
            f"bubble rate  {timeline.bubble_rate:.4f}",
            f"activations  {_row(timeline.peak_activations)} at most on ranks 0 to {program.ranks - 1}{limit}",
        ]
    lines.append(
        f"p2p          {_row(study.transfers)} sent by ranks 0 to {program.ranks - 1}, {sum(study.transfers)} in all "
        f"({asked.sends}, {asked.costs.transfer_seconds:g} each)"
    )
    lines += [f"search       {study.search}"] if study.search else []
    count = len(study.violations)
    lines.append(f"violations   {f'{count}, see above' if count else 'none'}")
    return "\n".join(lines)


def as_object(study: Study) -> dict[str, Any]:
    """Everything about one schedule, for JSON. Times are in the unit of the costs."""
    asked, timeline, program = study.asked, study.timeline, study.program
    return {
        "schedule": asked.name,
        "ranks": program.ranks,
        "microbatches": program.microbatches,
        "chunks": study.chunks,
        "stages": program.depth,
        "replicas": program.replicas,
        "placement": list(program.placement),
        "costs": {key: getattr(asked.costs, field) for key, field in COSTS.items()},
        "memory": {key: getattr(asked.costs, field) for key, field in MEMORY.items()},
        "p2p": str(asked.sends),
        "offloaded": sum(action.op is Op.OFFLOAD for listed in program.actions for action in listed),
        "makespan_seconds": timeline.makespan_seconds if study.ended else None,
        "ideal_seconds": study.ideal_seconds if study.ended else None,
        "bubble_rate": timeline.bubble_rate if study.ended else None,
        "peak_activations": [_plain(peak) for peak in timeline.peak_activations] if study.ended else None,
        "memory_limit": _plain(asked.memory_limit),
        "transfers": list(study.transfers),
        "search": study.search or None,
        "violations": [
            {
                "fault": str(violation.fault),
                "rank": violation.rank,
                "action": str(violation.action),
                "message": violation.message,
            }
            for violation in study.violations
        ],
    }


def comparison_text(entries: Sequence[Entry], unit: str) -> str:
    """The table of a comparison; `unit` says what an activation is."""
    studies = [entry.study for entry in entries if entry.study is not None]
    header = ("schedule", "chunks", "bubble rate", "makespan", "activations", "p2p sends")
    rows = [header, *(_figures(study) for study in studies)]
    notes = ["", *(_note(study) for study in studies)]
    lines = [f"{line}  {note}".rstrip() for line, note in zip(_table(rows), notes, strict=True)]
    lines.append(f"activations: the most on any rank, in {unit}; p2p sends: of all ranks, one activation each")
    cannot = [entry for entry in entries if entry.study is None]
    if cannot:
        width = max(len(entry.name) for entry in cannot)
        lines += ["", "cannot do these numbers:", *(f"{entry.name:<{width}}  {entry.reason}" for entry in cannot)]
    return "\n".join(lines)


def comparison_object(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The same for JSON, in the same order; a schedule that cannot do the numbers has a `reason` and no figures."""
    return [
        {"schedule": entry.name, "reason": entry.reason}
        if entry.study is None
        else {**as_object(entry.study), "within_limit": entry.within}
        for entry in entries
    ]


def list_text(schedules: Mapping[str, Schedule]) -> str:
    """The schedules that there are."""
    rows = [("schedule", "chunks", "limit", "what it is", "source")]
    for schedule in schedules.values():
        chunks = "any" if schedule.chunks is None else " or ".join(map(str, schedule.chunks))
        limit = "kept" if schedule.limited else "-"
        rows.append((schedule.name, chunks, limit, schedule.summary, schedule.source))
    return "\n".join(_table(rows, left=5))


def list_object(schedules: Mapping[str, Schedule]) -> list[dict[str, Any]]:
    """The same for JSON."""
    return [
        {
            "schedule": schedule.name,
            "chunks": None if schedule.chunks is None else list(schedule.chunks),
            "limited": schedule.limited,
            "summary": schedule.summary,
            "source": schedule.source,
        }
        for schedule in schedules.values()
    ]


def _figures(study: Study) -> tuple[str, ...]:
    copies = f" x {study.program.replicas} copies" if study.program.replicas > 1 else ""
    chunks = f"{study.chunks}{copies}"
    sends = str(sum(study.transfers))
    if not study.ended:
        return (study.asked.name, chunks, "-", "-", "-", sends)
    timeline = study.timeline
    rate, makespan = f"{timeline.bubble_rate:.4f}", f"{timeline.makespan_seconds:.6g}"
    return (study.asked.name, chunks, rate, makespan, f"{study.peak:.4g}", sends)


def _note(study: Study) -> str:
    if not study.violations:
        return ""
    return "more than the limit" if study.ended else f"{study.violations[0]}"


def _table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Columns of equal width; the first `left` are set to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _plain(number: float | None) -> float | int | None:
    """A whole number without its decimal point."""
    return int(number) if number is not None and number == int(number) else number


def _row(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:.4g}" for number in numbers)
