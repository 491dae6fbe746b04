"""`atoll schedule`: a pipeline schedule on paper - its grid and figures, drawings, and all schedules side by side.

Nothing here loads torch or numpy; what searches loads its solver when it is asked for. The command ends with code
0, with 1 where the program must not run or does not keep to the limit, and with 2 where it cannot be asked so.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import typer

from launch.schedule_options import costs_of, memory_limit_of, offload_of
from launch.schedule_output import (
    as_object,
    comparison_object,
    comparison_text,
    grid_text,
    list_object,
    list_text,
    summary_text,
)
from parallel.pipeline.compare import Entry, compare
from parallel.pipeline.draw_html import draw_html
from parallel.pipeline.draw_svg import draw_svg
from parallel.pipeline.schedules.registry import ScheduleError, require, schedules
from parallel.pipeline.simulate import Sends
from parallel.pipeline.study import Asked, Study, drawing_of, study
from parallel.pipeline.trace import chrome_trace

app = typer.Typer()

_USAGE, _VIOLATIONS = 2, 1
_ALL = "all"


class P2P(StrEnum):
    """How transfers use the ranks; see `Sends`."""

    LATENCY = "latency"
    BLOCKING = "blocking"


@app.command()
def schedule(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME|csv:FILE", help="Which schedule; without one, they are listed.")
    ] = None,
    stages: Annotated[int | None, typer.Option(metavar="P", help="Pipeline ranks.")] = None,
    microbatches: Annotated[int | None, typer.Option(metavar="M", help="Micro-batches per step.")] = None,
    chunks: Annotated[
        int | None,
        typer.Option(metavar="V", help="Parts of the model per rank; by default what the schedule is made for."),
    ] = None,
    costs: Annotated[
        str | None,
        typer.Option(
            metavar="f=..,i=..,w=..,comm=..",
            help="What one action of one stage takes, in any one unit: forward, input-gradient and weight-gradient "
            "half of the backward [1 each], transfer [0]; also offload, reload, reduce, sync, update, gather. "
            "f=10:12:9 gives one number for each stage of the model.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="b=..,w=..",
            help="What an activation weighs until its I, and from I to its W [1, and all of it].",
        ),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="K|24GB", help="The most activations on a rank; in bytes together with --activation."),
    ] = None,
    activation: Annotated[
        str | None, typer.Option(metavar="1.5GiB", help="What one activation of one stage weighs.")
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(metavar="all|half|N", help="Activations of how many stages of each rank go to host memory."),
    ] = None,
    p2p: Annotated[P2P, typer.Option(help="Whether transfers run beside the passes or hold their rank.")] = P2P.LATENCY,
    group: Annotated[
        int | None, typer.Option(metavar="G", help="Micro-batches before the next chunk has its turn.")
    ] = None,
    time_limit: Annotated[
        float, typer.Option(metavar="S", min=0.0, help="Seconds for a schedule that searches.")
    ] = 20.0,
    compare_with: Annotated[
        str | None,
        typer.Option("--compare", metavar="all|NAMES", help="Also the table of all schedules, or of NAME,NAME,..."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page to explore, with memory and what waits for what.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a trace for ui.perfetto.dev.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the program, one row a rank.")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List the schedules.")] = False,
) -> None:
    """Show a pipeline schedule: what each rank does when, its bubble, its memory; compare it with others."""
    if list_all or (name is None and compare_with is None):
        typer.echo(json.dumps(list_object(schedules())) if as_json else list_text(schedules()))
        return
    files = {"svg": svg, "html": html, "trace": trace, "csv": csv}
    try:
        for option, file in files.items():
            require(
                file is None or name is not None,
                value=f"--{option} {file}",
                rule="is of one schedule",
                fix="name it, as in: atoll schedule 1f1b",
            )
        asked = Asked(
            name=name or "",
            ranks=stages,
            microbatches=microbatches,
            chunks=chunks,
            costs=costs_of(costs, memory),
            memory_limit=memory_limit_of(memory_limit, activation),
            group=group,
            time_limit_seconds=time_limit,
            sends=Sends(p2p),
            offload=offload_of(offload),
        )
        found = study(asked) if name is not None else None
        entries = None if compare_with is None else _compare(asked, compare_with, found)
    except ScheduleError as error:
        typer.echo(f"atoll schedule: {error}", err=True)
        raise typer.Exit(_USAGE) from None
    if as_json:
        objects = {} if found is None else as_object(found)
        objects |= {} if entries is None else {"comparison": comparison_object(entries)}
        typer.echo(json.dumps(objects))
    else:
        _print(found, entries)
    if found is not None:
        drawing = cache(partial(drawing_of, found))
        texts: dict[str, Callable[[], str]] = {
            "svg": lambda: draw_svg(drawing()),
            "html": lambda: draw_html(drawing()),
            "trace": lambda: chrome_trace(drawing().bars),
            "csv": found.program.to_csv,
        }
        for option, file in files.items():
            if file is not None:
                _write(file, texts[option](), quiet=as_json)
        raise typer.Exit(_VIOLATIONS if found.violations else 0)


def _compare(asked: Asked, names: str, found: Study | None) -> list[Entry]:
    """The comparison with the schedules named, in units of the schedule that is shown, if one is."""
    chosen = list(schedules()) if names == _ALL else [name.strip() for name in names.split(",")]
    known, given_chunks = ([], 1) if found is None else ([found], found.chunks)
    if found is not None:
        asked = replace(asked, ranks=found.program.ranks, microbatches=found.program.microbatches)
    if not sys.stderr.isatty():
        return compare(asked, chosen, given_chunks, known)
    from rich.console import Console  # only where somebody sees it

    with Console(stderr=True).status("") as status:
        return compare(asked, chosen, given_chunks, known, status.update)


def _print(found: Study | None, entries: Sequence[Entry] | None) -> None:
    if found is not None:
        # What is wrong goes where errors go; the figures below it are output all the same.
        typer.echo(grid_text(found, _columns()), err=bool(found.violations))
        typer.echo(summary_text(found))
    if entries is not None:
        several = found is not None and found.chunks > 1
        unit = f"those of one stage of {found.asked.name}" if found and several else "those of a rank's whole share"
        typer.echo(("\n" if found else "") + comparison_text(entries, unit))


def _write(path: Path, text: str, *, quiet: bool) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        typer.echo(f"atoll schedule: {path} cannot be written: {error.strerror}", err=True)
        raise typer.Exit(_USAGE) from None
    if not quiet:
        typer.echo(f"wrote {path}")


def _columns() -> int | None:
    """The width of the terminal; any width where the output is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
