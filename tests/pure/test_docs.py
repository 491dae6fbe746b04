"""The documentation says what the program does.

Generated pages are what the program writes today, links lead somewhere, every command line parses and its configuration
resolves, and a problem report that a page shows is the one that the command gives, word for word.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from typer.main import get_command

from launch.cli import app
from parallel.pipeline.actions import PASS_OPS
from parallel.pipeline.render import render_grid
from parallel.pipeline.schedules.registry import generate
from trainer.config import reference
from trainer.config.overrides import split_arguments
from trainer.config.problems import ConfigError
from trainer.config.rules import resolve
from trainer.config.run import ResolvedRun, RunConfig, load_config, local_ranks
from trainer.config.schema import editor_schema
from trainer.metrics.record import StepRecord
from trainer.models.config import PRESETS, ModelConfig
from trainer.models.decoder import Decoder
from trainer.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICKSTART = Path("examples/quickstart.yaml")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command line after `$ ` and what the page shows below it."""

    page: str
    line: str
    output: str

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        for indent, language, text in FENCE.findall(page.read_text()):
            yield Block(page.name, language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE))


def commands() -> Iterator[Command]:
    for block in blocks():
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            line, _, output = part.replace("\\\n", " ").partition("\n")
            yield Command(block.page, " ".join(line.split()), output.strip())


def words_of(command: Command) -> list[str]:
    """The words of a command line without the variables set in front of it."""
    words = shlex.split(command.line)
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    return words


ATOLL = [command for command in commands() if words_of(command)[0] == "atoll"]
TORCHRUN = [command for command in commands() if words_of(command)[0] == "torchrun"]
YAML = [block for block in blocks() if block.language == "yaml" and yaml.safe_load(block.text) is not None]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The name and the parameters of an `atoll` command line; raises what the command line would print."""
    command, names, rest = get_command(app), [], words[1:]
    while hasattr(command, "commands"):
        names.append(rest.pop(0))
        command = command.commands[names[-1]]
    return " ".join(names), command.make_context(" ".join(names), rest).params


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the examples, the files that pages show, and the text that one of them names."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for block in YAML:
        named = re.match(r"# (\S+\.yaml)\n", block.text)
        if named:
            (tmp_path / named[1]).write_text(block.text)
    (tmp_path / "my-text").mkdir()
    (tmp_path / "my-text" / "notes.txt").write_text("Text to train on.\n")
    for name in ("ATOLL_RUNS", "ATOLL_DATA", "MY_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resolved(arguments: list[str], ranks: int | None) -> ResolvedRun:
    config = load_config(*split_arguments(arguments))
    return resolve(config, local_ranks(config, ranks), starting=False)


def test_generated_pages_are_current() -> None:
    """`make docs` writes both."""
    assert (ROOT / "docs" / "configuration.md").read_text() == reference.page()
    assert (ROOT / "examples" / "atoll.schema.json").read_text() == editor_schema(RunConfig)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        assert file.is_relative_to(ROOT), f"{page.name} links to {target}, outside the repository"
        if fragment:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text()), re.MULTILINE)
            assert fragment in map(reference.anchor, headings), f"{page.name}: {path} has no heading {fragment}"


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []
    assert [file.name for file in (ROOT / "examples").glob("*.yaml") if f"(examples/{file.name})" not in text] == []


@pytest.mark.parametrize("command", ATOLL, ids=str)
def test_atoll_command_lines(command: Command, workplace: Path) -> None:
    name, parameters = parsed(words_of(command))
    if name not in ("train", "check"):
        return
    if re.match(r"\d+ problems? in the configuration:", command.output):
        with pytest.raises(ConfigError) as refused:
            resolved(parameters["arguments"], parameters["ranks"])
        assert str(refused.value) == command.output
    else:
        resolved(parameters["arguments"], parameters["ranks"])


@pytest.mark.parametrize("command", TORCHRUN, ids=str)
def test_torchrun_command_lines(command: Command, workplace: Path) -> None:
    words = words_of(command)
    ranks = int(words[words.index("--nproc-per-node") + 1])
    start = words.index("-m")
    assert words[start + 1] == "trainer"
    resolved(words[start + 2 :], ranks)


def test_there_are_command_lines_to_check() -> None:
    """The tests above would pass on pages that they cannot read."""
    assert {command.page for command in ATOLL} >= {"README.md", "checkpoints.md", "configuration.md", "data.md"}
    assert any("problem" in command.output for command in ATOLL)
    assert TORCHRUN


def test_commands_named_in_prose_exist() -> None:
    known: dict[str, Any] = vars(get_command(app))["commands"]
    for page in PAGES:
        named = re.findall(r"`atoll ([a-z]+)(?: ([a-z]+))?", FENCE.sub("", page.read_text()))
        for name, sub in named:
            assert name in known, f"{page.name} names `atoll {name}`"
            below = getattr(known[name], "commands", None)
            assert below is None or not sub or sub in below, f"{page.name} names `atoll {name} {sub}`"


@pytest.mark.parametrize("block", YAML, ids=lambda block: f"{block.page}: {block.text.splitlines()[0]}")
def test_yaml_blocks_load(block: Block, workplace: Path) -> None:
    """A whole configuration by itself, a part of one laid over the quickstart."""
    part = workplace / "block.yaml"
    part.write_text(block.text)
    whole = {"run", "model", "data", "train"} <= set(yaml.safe_load(block.text))
    load_config([part] if whole else [QUICKSTART, part], [])


def test_the_program_that_the_pages_show(workplace: Path) -> None:
    """The grid in the README, its picture, and the list of actions in the architecture are the quickstart's."""
    run = resolved([str(QUICKSTART)], None)
    pipeline = run.config.parallel.pipeline
    program = generate(pipeline.schedule, run.layout.pipeline, run.batch.gradient_accumulation)
    assert render_grid(program).strip() in (ROOT / "README.md").read_text()
    picture = ElementTree.parse(ROOT / "docs" / "images" / "step.svg")
    svg = "{http://www.w3.org/2000/svg}"
    for rank, listed in enumerate(program.actions):
        drawn = [
            text.text
            for text in picture.iterfind(f".//{svg}g[@id='stage-{rank}']/{svg}text")
            if text.get("class") == "in" and text.text in {f"{op}{index}" for op in PASS_OPS for index in range(9)}
        ]
        assert drawn == [str(action).removeprefix(str(rank)) for action in listed]
    shown = re.search(r"^0F0,\S+$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert shown
    passes = [cell for cell in shown[0].split(",") if re.fullmatch(r"0[FB]\d+", cell)]
    assert passes == [str(action) for action in program.actions[0]]


def test_metrics_and_files_of_a_run_are_explained() -> None:
    text = (ROOT / "docs" / "runs.md").read_text()
    assert [field.name for field in fields(StepRecord) if f"| `{field.name}` |" not in text] == []
    directory = RunDirectory(Path())
    files = (directory.metrics, directory.superseded, directory.trace, directory.checkpoints, directory.tensorboard)
    files += (directory.costs,)
    assert [file.name for file in files if f"| `{file.name}" not in text] == []


def test_every_key_has_a_row_and_a_meaning() -> None:
    text = reference.reference(RunConfig)
    for path, model in reference.sections(RunConfig):
        for key, field in model.model_fields.items():
            assert field.description, f"{path}.{key} has no description"
            assert f"| `{key}` | " in text


@pytest.mark.parametrize("preset", [*PRESETS, None])
def test_parameter_counts_are_those_of_the_model(preset: str | None) -> None:
    sizes = {"preset": preset} if preset else {"preset": "tiny", "qk_norm": True, "kv_heads": 1, "activation": "gelu"}
    model = ModelConfig.model_validate(sizes)
    with torch.device("meta"):
        decoder = Decoder(model)
    assert reference.parameter_count(model) == sum(parameter.numel() for parameter in decoder.parameters())
