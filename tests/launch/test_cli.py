"""The `atoll` command as a user meets it: a process, its output and its exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def atoll(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from launch.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_refused_configuration_is_printed_plainly(command: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("trian: {}\ntrain: {steps: 1: 2}\n")
    ended = atoll(command, str(file), "train.sequence=x", "--ranks", "2")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("2 problems in the configuration:\n")
    assert f"{file}:2:" in ended.stderr
    assert "train.sequence (command line)" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "train.steps=1"), "name at least one YAML file"),
        (("train",), "Missing argument"),
        (("train", "--ranks", "0", "x.yaml"), "--ranks"),
        (("nonsense",), "No such command"),
    ],
)
def test_a_wrong_command_line(arguments: tuple[str, ...], said: str) -> None:
    ended = atoll(*arguments)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_names_every_command() -> None:
    ended = atoll("--help")
    assert ended.returncode == 0
    assert all(f" {command} " in ended.stdout for command in ("train", "check", "schema", "data", "version"))


def test_help_and_schema_do_not_load_torch() -> None:
    script = (
        "import sys\n"
        "from launch.cli import app\n"
        "for command in (['--help'], ['train', '--help'], ['schema']):\n"
        "    app(command, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_the_schema_of_the_examples_is_current() -> None:
    """Editors read the file; `make docs` writes it."""
    assert (ROOT / "examples" / "atoll.schema.json").read_text() == atoll("schema").stdout
