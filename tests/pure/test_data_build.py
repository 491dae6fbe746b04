"""A dataset appears whole or not at all, and is built once however many ask for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trainer.data.build as build_module
from trainer.config.problems import ConfigError, Problem
from trainer.data.build import build_dataset, ensure_dataset
from trainer.data.config import DataConfig
from trainer.data.manifest import MANIFEST
from trainer.data.mixing import fraction_of

ROOT = Path(build_module.__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "corpus.txt").write_text("a line of text\n" * 10000)
    source = {"kind": "text", "paths": [str(tmp_path / "corpus.txt")], "document_bytes": 2048}
    return DataConfig.model_validate({"path": str(tmp_path / "sub" / "tokens"), "source": source})


def start(config: DataConfig, script: str, *arguments: str) -> subprocess.Popen[str]:
    preamble = "import sys; from trainer.data.config import DataConfig; import trainer.data.build as build\n"
    preamble += "config = DataConfig.model_validate_json(sys.argv[1])\n"
    return subprocess.Popen(
        [sys.executable, "-c", preamble + script, config.model_dump_json(), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refused(settings: DataConfig) -> Problem:
    with pytest.raises(ConfigError) as caught:
        ensure_dataset(settings)
    (problem,) = caught.value.problems
    return problem


def changed(config: DataConfig, **values: Any) -> DataConfig:
    return DataConfig.model_validate({**config.model_dump(), **values})


BUILD_AFTER_ALL_HAVE_STARTED = """
import pathlib, time
names, me = pathlib.Path(sys.argv[2]), sys.argv[3]
write = build._write
def counted(*arguments):
    (names / f"built-{me}").touch()
    while len(list(names.glob("started-*"))) < 3:
        time.sleep(0.01)
    time.sleep(0.1)  # the others find the lock taken
    return write(*arguments)
build._write = counted
(names / f"started-{me}").touch()
print(build.ensure_dataset(config).manifest.train.shards[0].sha256)
"""


def test_three_processes_build_once(config: DataConfig, tmp_path: Path) -> None:
    names = tmp_path / "names"
    names.mkdir()
    processes = [start(config, BUILD_AFTER_ALL_HAVE_STARTED, str(names), str(number)) for number in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({output for output, _ in outputs}) == 1
    assert len(list(names.glob("built-*"))) == 1
    assert [file.name for file in sorted(Path(config.path).parent.iterdir())] == [".tokens.lock", "tokens"]


def test_a_killed_build_leaves_nothing_that_is_picked_up(config: DataConfig, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)  # the builder writes the corpus, then waits here for more
    (tmp_path / "corpus.txt").write_text("a line of text\n" * 200000)
    source = {**config.model_dump()["source"], "paths": [str(tmp_path / "corpus.txt"), str(pipe)]}
    blocked = changed(config, source=source)
    parent = Path(config.path).parent
    process = start(blocked, "build.ensure_dataset(config)")
    wait_until(lambda: [f for f in parent.glob(".tokens.building-*/*.bin") if f.stat().st_size], process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not Path(config.path).exists()
    assert len(list(parent.glob(".tokens.building-*"))) == 1

    pipe.unlink()
    pipe.write_text("the rest\n")
    assert ensure_dataset(blocked).manifest.train.documents > 1
    assert not list(parent.glob(".tokens.building-*"))


def test_a_failed_build_leaves_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build_module, "sync_directory", fail)
    problem = refused(config)
    assert (problem.path, problem.value) == ("data.path", config.path)
    assert "No space left on device" in problem.rule
    assert [file.name for file in Path(config.path).parent.iterdir()] == [".tokens.lock"]


def test_a_dataset_that_is_there_is_opened_without_writing(config: DataConfig) -> None:
    built = ensure_dataset(config)
    (Path(config.path).parent / ".tokens.lock").unlink()
    assert ensure_dataset(config).manifest == built.manifest
    assert ensure_dataset(DataConfig(path=config.path)).manifest == built.manifest
    assert [file.name for file in Path(config.path).parent.iterdir()] == ["tokens"]


def test_another_machine_that_was_faster_wins(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two builders that the lock does not keep apart: the second finds the name taken when it renames."""
    write = build_module._write

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(build_module, "_write", write)
        elsewhere = changed(config, path=config.path + "-elsewhere")
        ensure_dataset(elsewhere)
        manifest = write(*arguments)
        Path(elsewhere.path).rename(config.path)
        return manifest

    monkeypatch.setattr(build_module, "_write", overtaken)
    assert ensure_dataset(config).manifest.train.documents > 1
    assert not list(Path(config.path).parent.glob(".tokens.building-*"))


def test_nothing_there_and_no_source(tmp_path: Path) -> None:
    problem = refused(DataConfig(path=str(tmp_path / "tokens")))
    assert problem.path == str(tmp_path / "tokens" / MANIFEST)
    assert "must be there" in problem.rule
    assert f"atoll data build {tmp_path / 'tokens'}" in problem.fix


def test_an_explicit_build_does_not_replace_a_dataset(config: DataConfig) -> None:
    ensure_dataset(config)
    settings = config.build_settings()
    assert settings is not None
    with pytest.raises(ConfigError, match="must not hold a dataset yet"):
        build_dataset(Path(config.path), settings)


def test_a_place_that_cannot_be_written(config: DataConfig, tmp_path: Path) -> None:
    problem = refused(changed(config, path=str(tmp_path / "corpus.txt" / "tokens")))
    assert problem.path == "data.path"
    assert "Not a directory" in problem.rule or "File exists" in problem.rule


def test_a_missing_source_is_refused_before_anything_is_made(config: DataConfig, tmp_path: Path) -> None:
    gone = {"kind": "text", "paths": [str(tmp_path / "gone.txt")]}
    assert refused(changed(config, source=gone)).path == "data.source.paths"
    assert not Path(config.path).parent.exists()


def test_one_document_cannot_be_split(config: DataConfig) -> None:
    whole = {**config.model_dump()["source"], "document_bytes": 10**6}
    problem = refused(changed(config, source=whole))
    assert problem.path == "data.source"
    assert (
        problem.rule == "must give at least two documents, one to train on and one to hold out, but gives 1"
    )


@pytest.mark.parametrize(
    ("fraction", "name", "word"), [(1e-6, "eval", "at least"), (1 - 1e-6, "train", "at most")]
)
def test_a_split_without_documents_is_refused_with_a_fraction_that_works(
    config: DataConfig, fraction: float, name: str, word: str
) -> None:
    few = {**config.model_dump()["source"], "max_bytes": 10000}
    problem = refused(changed(config, source=few, eval_fraction=fraction))
    assert (problem.path, problem.value) == ("data.eval_fraction", fraction)
    assert f"with seed 0, {name} gets none of the" in problem.rule
    assert f"set eval_fraction to {word} " in problem.fix
    advised = float(problem.fix.split(word)[1].split(",")[0])
    dataset = ensure_dataset(changed(config, source=few, eval_fraction=advised))
    assert min(dataset.manifest.train.documents, dataset.manifest.eval.documents) == 1
    assert any(fraction_of(0, number) < advised for number in range(4))


def test_progress_counts_documents_and_bytes(config: DataConfig) -> None:
    seen: list[tuple[int, int]] = []
    settings = config.build_settings()
    assert settings is not None
    manifest = build_dataset(Path(config.path), settings, lambda *counts: seen.append(counts)).manifest
    assert seen[-1] == (
        manifest.train.documents + manifest.eval.documents,
        manifest.train.text_bytes + manifest.eval.text_bytes,
    )


def test_the_package_needs_no_torch() -> None:
    files = (ROOT / "trainer" / "data").glob("[!_]*.py")
    modules = ", ".join(f"trainer.data.{file.stem}" for file in files)
    script = f"import sys, {modules}, launch.data_command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
