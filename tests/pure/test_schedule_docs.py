"""docs/schedules.md says what `atoll schedule` says, shows every schedule, and its example of a new one works."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from parallel.pipeline.gallery import pictures
from parallel.pipeline.schedules.registry import schedules

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "schedules.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [text.removeprefix("$ atoll ").partition("\n") for kind, text in BLOCKS if kind == "console"]


@pytest.mark.parametrize(("line", "shown"), [(line, shown) for line, _, shown in COMMANDS])
def test_commands_print_what_the_page_shows(
    line: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, text in BLOCKS:
        if kind == "csv":
            Path(re.match(r"# (\S+)\n", text)[1]).write_text(text)  # type: ignore[index]
    result = CliRunner().invoke(app, shlex.split(line))
    if shown:
        assert result.output.strip() == shown.strip()
    else:
        assert result.exit_code == 0


def test_the_published_rate_that_the_page_promises() -> None:
    line = next(line for line, _, shown in COMMANDS if not shown)
    assert round(json.loads(CliRunner().invoke(app, shlex.split(line)).output)["bubble_rate"], 4) == 0.0433


def test_every_schedule_has_a_place_in_the_gallery() -> None:
    headings = " ".join(re.findall(r"^### (.+)$", PAGE, re.MULTILINE)).replace(" and ", " ").split()
    assert sorted(headings) == sorted(schedules())
    assert [name for name in schedules() if f"(images/schedules/{name}.svg)" not in PAGE] == []


def test_pictures_are_current() -> None:
    """`make docs` writes them. What a search finds may differ from machine to machine."""
    directory = ROOT / "docs" / "images" / "schedules"
    assert {file.stem for file in directory.glob("*.svg")} == set(schedules())
    for name, picture in pictures():
        if schedules()[name].report is None:
            assert (directory / f"{name}.svg").read_text() == picture, f"{name}.svg is out of date"


def test_the_keys_of_the_json_are_explained() -> None:
    arguments = ["schedule", "1f1b", "--stages", "2", "--microbatches", "2", "--compare", "1f1b", "--json"]
    found = json.loads(CliRunner().invoke(app, arguments).output)
    table = PAGE[PAGE.index("## JSON") :]
    assert [key for key in {*found, *found["comparison"][0]} if f"`{key}`" not in table] == []


def test_the_example_of_a_new_schedule_works() -> None:
    example = next(text for kind, text in BLOCKS if kind == "python")
    shown = (
        "from parallel.pipeline.schedules.registry import generate\n"
        "from parallel.pipeline.verify import check\n"
        "check(generate('one-by-one', 3, 4))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", example + shown], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
