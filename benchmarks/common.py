"""What all benchmarks share: how they measure, and the one JSON object that they print.

A comparison on a machine that other work shares must not trust a single run. So contestants take turns in short
rounds, every turn in fresh processes, and what is judged is the median over rounds of the ratio of two turns
that lie side by side in time: a slow minute hits both and cancels. README.md describes the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


def spread(values: Iterable[float], digits: int = 4) -> dict[str, float]:
    """Median, smallest and largest of the values, rounded to `digits` significant digits."""
    ordered = sorted(values)
    found = {"median": statistics.median(ordered), "min": ordered[0], "max": ordered[-1]}
    return {key: significant(value, digits) for key, value in found.items()}


def significant(value: float, digits: int = 4) -> float:
    """`value` with `digits` significant digits."""
    return float(f"{value:.{digits}g}")


def bar(name: str, value: float, bound: float, better: Literal["higher", "lower"]) -> Row:
    """A figure and the bound that it must reach: at least `bound` if higher is better, else at most."""
    ok = value >= bound if better == "higher" else value <= bound
    return {"name": name, "value": value, "bar": bound, "better": better, "ok": ok}


def report(benchmark: str, rows: list[Row], bars: list[Row]) -> dict[str, Any]:
    """The JSON object of a benchmark."""
    from trainer.environment import describe

    return {"benchmark": benchmark, "environment": describe(), "rows": rows, "bars": bars}


def turns(contestants: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Every contestant once per round, as (round, contestant); every other round runs backwards.

    Neighbours stay neighbours, and a machine that gets slower or faster favours neither of them.
    """
    for number in range(rounds):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            yield number, contestant


def run_ranks(arguments: Sequence[str], ranks: int, timeout_seconds: float = 600.0) -> list[Any]:
    """Run `python *arguments` once per rank, with one compute thread each and torchrun's variables.

    Returns:
        What each rank printed as its last line, read as JSON, in rank order.

    Raises:
        RuntimeError: a rank failed, or the time was over; the others are killed. The message holds its output.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    with contextlib.ExitStack() as stack:
        # Files, not pipes: a rank that writes much must not wait until somebody reads.
        outputs, errors = ([stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)] for _ in range(2))
        processes = [
            subprocess.Popen(
                [sys.executable, *arguments],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=outputs[rank],
                stderr=errors[rank],
            )
            for rank in range(ranks)
        ]
        try:
            failed = _first_failure(processes, time.monotonic() + timeout_seconds)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        printed, complaints = [_content(each) for each in outputs], [_content(each) for each in errors]
    if failed is not None:
        why = f"rank {failed} of {' '.join(arguments)} ended with status {processes[failed].returncode}"
        raise RuntimeError(f"{why}:\n{printed[failed]}{complaints[failed]}")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def _first_failure(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> int | None:
    """Wait until all have ended; the rank that failed, or one that is late, if there is one."""
    while True:
        states = [process.poll() for process in processes]
        failed = [rank for rank, state in enumerate(states) if state not in (None, 0)]
        late = [rank for rank, state in enumerate(states) if state is None and time.monotonic() > deadline]
        if failed or late or None not in states:
            return next(iter(failed + late), None)
        time.sleep(0.02)


def _content(output: IO[str]) -> str:
    output.seek(0)
    return output.read()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cpu_seconds() -> float:
    """CPU time of all threads of this process so far: what noise from other processes does not stretch."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the JSON object and nothing else")
    parser.add_argument("--results", type=Path, metavar="FILE", help="also write the JSON object to this file")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a bar is missed")
    return parser


def say(options: argparse.Namespace, text: str) -> None:
    """Progress for a person who waits; on stderr, so that stdout is the result."""
    if not options.json:
        print(text, file=sys.stderr, flush=True)


def publish(result: dict[str, Any], options: argparse.Namespace) -> int:
    """Print the result, write it where asked, and give the exit status."""
    if options.results is not None:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result) if options.json else table(result))
    return int(options.check and not all(each["ok"] for each in result["bars"]))


def table(result: dict[str, Any]) -> str:
    """Rows and bars for a person."""
    lines = ["  ".join(f"{key} {_shown(value)}" for key, value in row.items()) for row in result["rows"]]
    for each in result["bars"]:
        sign = ">=" if each["better"] == "higher" else "<="
        verdict = "ok" if each["ok"] else "MISSED"
        lines.append(f"{verdict:>6}  {each['name']}: {each['value']:.4g} ({sign} {each['bar']:g})")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"median", "min", "max"}:
        return f"{value['median']:g} ({value['min']:g} .. {value['max']:g})"
    return f"{value:g}" if isinstance(value, float) else str(value)
