"""Runs that are killed, stopped and asked to save, started again with the same command: no step is lost or changed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launches import (
    alive,
    atoll,
    build_small_dataset,
    descendants,
    finished,
    metrics,
    started,
    torchrun,
    untimed,
    wait_for,
    write_yaml,
)

SEED = 20
STEPS, EVERY = 90, 7
CHANGES = {
    "ranks: 4": "ranks: 2",
    "  pipeline: {stages: 2}\n": "",
    "steps: 8\n": f"steps: {STEPS}\n",
    "eval_every: 4\n": "eval_every: 20\n",
    "checkpoint: {every: 4}": f"checkpoint: {{every: {EVERY}, keep: null}}",
}


def prepare(place: Path, name: str) -> Path:
    """The config of a longer run on 2 data-parallel ranks with ZeRO stage 1."""
    file = write_yaml(place, place / "data", name)
    text = file.read_text()
    for old, new in CHANGES.items():
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resume")
    build_small_dataset(directory)
    return directory


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> list[dict[str, Any]]:
    """The metrics of the run that nobody disturbs."""
    file = prepare(place, "uninterrupted")
    ended = finished(atoll("train", file))
    assert ended.returncode == 0, ended.stderr
    lines = untimed(metrics(file.with_suffix("")))
    assert len(lines) == STEPS
    return lines


def last_step(directory: Path) -> int:
    lines = metrics(directory)
    return lines[-1]["step"] if lines else 0


def saved_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(path.name[5:]) for path in (directory / "checkpoints").glob("step-*"))


Act = Callable[[subprocess.Popen[str], list[int]], None]


def interrupt(command: list[str], directory: Path, moment: Callable[[], bool], act: Act) -> tuple[int, str, str]:
    """Start the run, `act` on it (launcher, ranks) at the moment, and wait until all of it is gone."""
    with started(command) as process:
        wait_for(lambda: moment() or process.poll() is not None, f"the moment to act on {directory.name}")
        assert process.poll() is None, f"the run ended before the moment: {process.communicate()}"
        ranks = descendants(process.pid)
        assert ranks
        act(process, ranks)
        output, errors = process.communicate(timeout=60)
        wait_for(lambda: not alive(ranks), "every rank is gone", seconds=20)
        return process.returncode, output, errors


def kill_everything(process: subprocess.Popen[str], ranks: list[int]) -> None:
    for pid in (process.pid, *ranks):
        os.kill(pid, signal.SIGKILL)


def kill_launcher(process: subprocess.Popen[str], ranks: list[int]) -> None:
    """Nobody is left to tell the ranks; the kernel does."""
    process.kill()


def check_against(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Whatever is recorded so far is what the undisturbed run recorded."""
    assert untimed(lines) == expected[: len(lines)]


def test_a_run_that_is_killed_and_stopped_again_and_again(place: Path, uninterrupted: list[dict[str, Any]]) -> None:
    chance = random.Random(SEED)
    file = prepare(place, "disturbed")
    directory, checkpoints = file.with_suffix(""), file.with_suffix("") / "checkpoints"
    local, elastic = atoll("train", file), torchrun(2, file)

    # Everything at once, somewhere behind the first checkpoint.
    first = chance.randint(EVERY + 1, 3 * EVERY)
    interrupt(local, directory, lambda: last_step(directory) >= first, kill_everything)
    check_against(metrics(directory), uninterrupted)
    saved = saved_steps(directory)
    assert saved
    assert all(step % EVERY == 0 for step in saved)

    # The launcher alone, torchrun this time; the steps behind the last checkpoint are made again.
    second = last_step(directory) + chance.randint(1, EVERY)
    interrupt(elastic, directory, lambda: last_step(directory) >= second, kill_launcher)
    check_against(metrics(directory), uninterrupted)
    assert set(saved) <= set(saved_steps(directory))

    # Everything, in the middle of a save.
    before = saved_steps(directory)[-1]
    interrupt(
        local,
        directory,
        lambda: saved_steps(directory)[-1] > before and any(checkpoints.glob(".step-*.partial")),
        kill_everything,
    )
    check_against(metrics(directory), uninterrupted)

    # A polite stop: the step is finished and saved, the ranks end by themselves.
    target = last_step(directory) + chance.randint(1, EVERY - 1)
    code, output, errors = interrupt(
        local,
        directory,
        lambda: last_step(directory) >= target,
        lambda process, ranks: process.send_signal(signal.SIGTERM),
    )
    assert code == 0, errors
    assert "stopped by SIGTERM; all ranks ended cleanly" in errors
    stopped = last_step(directory)
    assert stopped < STEPS
    assert f"stopped at step {stopped} of {STEPS}; the same command goes on from there" in output
    assert saved_steps(directory)[-1] == stopped
    check_against(metrics(directory), uninterrupted)

    # To the end, with no checkpoint on the way but the one that is asked for.
    code, output, errors = interrupt(
        [*local, "checkpoint.every=null"],
        directory,
        lambda: last_step(directory) > stopped,
        lambda process, ranks: process.send_signal(signal.SIGUSR1),
    )
    assert code == 0, errors
    assert f"resumed    {checkpoints / f'step-{stopped:08d}'} (step {stopped}, sample {stopped * 8:,})" in output
    *asked_for, end = [int(step) for step in re.findall(r"^checkpoint .*/step-(\d+)$", output, re.MULTILINE)]
    assert end == STEPS
    assert 1 <= len(asked_for) <= 2, "two where the signal reaches the ranks in different steps"
    assert stopped < asked_for[0] < STEPS

    assert untimed(metrics(directory)) == uninterrupted
    superseded = metrics(directory, "superseded.jsonl")
    again = {line["step"]: line for line in untimed(superseded)}
    assert again, "killed runs had steps behind their last checkpoint"
    assert all(uninterrupted[step - 1] == line for step, line in again.items())
    starts = json.loads((directory / "environment.json").read_text())
    assert [start["launcher"] for start in starts] == ["local", "torchrun", "local", "local", "local"]
    assert [start["from_step"] for start in starts] == sorted(start["from_step"] for start in starts)
    assert starts[0]["from_step"] == 0
    assert starts[-1]["from_step"] == stopped
    assert not list(checkpoints.glob(".step-*")), "unfinished saves are cleared away"


def test_skipped_steps_are_still_counted_after_a_resume(place: Path, uninterrupted: list[dict[str, Any]]) -> None:
    """A checkpoint knows how many updates were made; the others were skipped. On another layout, for good measure."""
    file = prepare(place, "skipping")
    checkpoint = file.with_suffix("") / "checkpoints" / f"step-{STEPS:08d}"
    shutil.copytree(place / "uninterrupted" / "checkpoints" / checkpoint.name, checkpoint)
    manifest = json.loads((checkpoint / "atoll.json").read_text())
    assert manifest["updates"] == STEPS
    (checkpoint / "atoll.json").write_text(json.dumps({**manifest, "updates": STEPS - 3}))
    longer = ["parallel.data_shard=1", f"train.steps={STEPS + 1}"]
    ended = finished([sys.executable, "-m", "trainer", str(file), *longer])
    assert ended.returncode == 0, ended.stderr
    (line,) = metrics(file.with_suffix(""))
    assert line["step"] == STEPS + 1
    assert line["skipped_steps"] == 3
    assert line["tokens"] == (STEPS + 1) * 8 * 32
    assert "3 skipped" in ended.stdout


@pytest.mark.slow
def test_torchrun_passes_a_stop_on(place: Path, uninterrupted: list[dict[str, Any]]) -> None:
    """As a batch system ends a job. torchrun itself calls that a failure; the run is saved all the same."""
    file = prepare(place, "elastic")
    directory, command = file.with_suffix(""), torchrun(2, file, "checkpoint.every=null")
    interrupt(
        command,
        directory,
        lambda: last_step(directory) >= 5,
        lambda process, ranks: process.send_signal(signal.SIGTERM),
    )
    stopped = last_step(directory)
    assert 5 <= stopped < STEPS
    assert saved_steps(directory) == [stopped]
    check_against(metrics(directory), uninterrupted)
    ended = finished(command)
    assert ended.returncode == 0, ended.stderr
    assert untimed(metrics(directory)) == uninterrupted
