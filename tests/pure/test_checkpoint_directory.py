"""What is a checkpoint, which one is newest, and whether a run can use it - without torch or processes."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint.directory import (
    LATEST,
    begin,
    commit,
    complete_checkpoints,
    find_latest,
    partial_path,
    step_path,
)
from trainer.checkpoint.manifest import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    CheckpointManifest,
    check_compatible,
    read_manifest,
)
from trainer.config.problems import ConfigError
from trainer.config.run import RunConfig

ROOT = Path(__file__).parents[2]


def config(**model: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"directory": "runs/test"},
            "model": {"preset": "tiny", **model},
            "data": {"path": "data"},
            "train": {"steps": 1, "sequence": 8, "micro_batch": 1, "global_batch": 4},
        }
    )


def fill(partial: Path, step: int, **model: Any) -> None:
    """The files of a checkpoint, with stand-ins for its data."""
    index, data = b"index", b"data" * step
    (partial / INDEX).write_bytes(index)
    (partial / "__0_0.distcp").write_bytes(data)
    manifest = CheckpointManifest(
        step=step,
        cursor=4 * step,
        updates=step,
        precision="fp32",
        model=config(**model).model.model_dump(mode="json"),
        layout={},
        zero={},
        versions={},
        saved_at="",
        files={INDEX: len(index), "__0_0.distcp": len(data)},
        index_crc32=zlib.crc32(index),
    )
    (partial / MANIFEST).write_bytes(manifest.to_bytes())


def add(directory: Path, step: int, keep: int | None = None, **model: Any) -> Path:
    partial = begin(directory, step)
    fill(partial, step, **model)
    return commit(partial, keep)


def test_without_checkpoints_there_is_no_latest(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "absent") is None
    (tmp_path / LATEST).write_text("step-00000001\n")
    assert find_latest(tmp_path) is None


def test_a_committed_checkpoint_is_the_latest(tmp_path: Path) -> None:
    for step in (1, 2):
        path = add(tmp_path, step)
        assert path == tmp_path / f"step-{step:08d}"
        assert find_latest(tmp_path) == path
    assert (tmp_path / LATEST).read_text() == "step-00000002\n"
    assert read_manifest(path).cursor == 8


def test_a_step_that_needs_nine_digits_is_found(tmp_path: Path) -> None:
    assert add(tmp_path, 123_456_789).name == "step-123456789"
    assert find_latest(tmp_path) == step_path(tmp_path, 123_456_789)


def test_latest_may_be_set_back_by_hand(tmp_path: Path) -> None:
    older, _ = add(tmp_path, 1), add(tmp_path, 2)
    (tmp_path / LATEST).write_text(older.name)
    assert find_latest(tmp_path) == older


@pytest.mark.parametrize("content", [None, "", "step-00000009\n", "../elsewhere\n"])
def test_a_lost_latest_is_found_by_looking(tmp_path: Path, content: str | None) -> None:
    add(tmp_path, 1)
    newest = add(tmp_path, 10)
    (tmp_path / LATEST).unlink()
    if content is not None:
        (tmp_path / LATEST).write_text(content)
    assert find_latest(tmp_path) == newest


def test_a_half_written_checkpoint_is_never_found_and_is_cleared_by_the_next_save(tmp_path: Path) -> None:
    complete = add(tmp_path, 1)
    fill(begin(tmp_path, 2), 2)  # everything is written, but it was not committed
    (tmp_path / ".step-00000000.removed").mkdir()
    (tmp_path / "step-00000003").mkdir()  # without a manifest
    assert find_latest(tmp_path) == complete
    assert list(complete_checkpoints(tmp_path)) == [1]
    begin(tmp_path, 4)
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert hidden == [partial_path(tmp_path, 4).name]


def test_keep_leaves_the_newest(tmp_path: Path) -> None:
    for step in range(1, 6):
        add(tmp_path, step, keep=2)
    assert list(complete_checkpoints(tmp_path)) == [4, 5]
    add(tmp_path, 6, keep=None)
    assert list(complete_checkpoints(tmp_path)) == [4, 5, 6]
    add(tmp_path, 7, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-00000007"]


def test_the_checkpoint_just_written_stays_even_if_it_is_not_the_last_step(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        add(tmp_path, step)
    written = add(tmp_path, 15, keep=2)
    assert list(complete_checkpoints(tmp_path)) == [15, 30]
    assert find_latest(tmp_path) == written


def test_a_step_saved_again_takes_the_place_of_the_old(tmp_path: Path) -> None:
    old = add(tmp_path, 1, layers=2)
    assert add(tmp_path, 1, layers=3) == old
    assert read_manifest(old).model["layers"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-00000001"]


def test_a_step_that_was_being_replaced_is_not_lost(tmp_path: Path) -> None:
    path = add(tmp_path, 1)
    aside = tmp_path / ".step-00000001.replaced"
    path.rename(aside)  # the moment between the two renames of a commit
    assert find_latest(tmp_path) == aside
    assert check_compatible(aside, config()) == []
    begin(tmp_path, 2)
    assert find_latest(tmp_path) == path


def test_a_checkpoint_of_the_same_model_fits(tmp_path: Path) -> None:
    path = add(tmp_path, 1)
    assert check_compatible(path, config()) == []
    # null and what it stands for are the same; how weights began does not matter.
    assert check_compatible(add(tmp_path, 2, kv_heads=4), config(kv_heads=None, init_std=0.5)) == []


def test_every_differing_field_of_the_model_is_named_with_both_values(tmp_path: Path) -> None:
    path = add(tmp_path, 1, hidden=64, tied_embeddings=True)
    found = {problem.path: problem for problem in check_compatible(path, config(layers=7))}
    assert sorted(found) == ["model.hidden", "model.layers", "model.tied_embeddings"]
    assert found["model.hidden"].value == 128
    assert f"must be 64: the checkpoint {path} holds another model" in found["model.hidden"].rule
    assert "model.tied_embeddings=true" in found["model.tied_embeddings"].fix
    assert found["model.layers"].value == 7
    assert "model.layers=4" in found["model.layers"].fix


def test_missing_and_truncated_files_are_found_before_anything_is_read(tmp_path: Path) -> None:
    path = add(tmp_path, 1)
    (path / "__0_0.distcp").write_bytes(b"da")
    (path / INDEX).unlink()
    found = {Path(problem.path).name: problem for problem in check_compatible(path, config())}
    assert "must have 4 bytes, as when it was written, not 2" in found["__0_0.distcp"].rule
    assert "must be there" in found[INDEX].rule
    assert f"delete {path}" in found[INDEX].fix


def test_a_changed_index_is_found(tmp_path: Path) -> None:
    path = add(tmp_path, 1)
    (path / INDEX).write_bytes(b"jndex")
    (problem,) = check_compatible(path, config())
    assert problem.path == str(path / INDEX)
    assert "checksum" in problem.rule


def test_a_directory_that_is_no_checkpoint_is_refused_and_a_near_one_named(tmp_path: Path) -> None:
    path = add(tmp_path / "checkpoints", 3)
    for place in (tmp_path, path.parent):
        (problem,) = check_compatible(place, config())
        assert problem.path == str(place)
        assert str(path) in problem.fix
    (problem,) = check_compatible(tmp_path / "absent", config())
    assert "must be a complete checkpoint" in problem.rule


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("{", "must be readable JSON"),
        ("[]", "must be the manifest of a checkpoint"),
        ('{"format": "else", "version": 1}', "must be the manifest of a checkpoint"),
        ('{"format": "atoll-checkpoint", "version": 1, "step": 1}', "field 'cursor' must be valid"),
        (
            json.dumps({"format": "atoll-checkpoint", "version": FORMAT_VERSION + 1}),
            f"must be of format version {FORMAT_VERSION} or older; a newer atoll wrote this checkpoint",
        ),
    ],
)
def test_a_manifest_that_cannot_be_used_says_why(tmp_path: Path, content: str, rule: str) -> None:
    path = add(tmp_path, 1)
    (path / MANIFEST).write_text(content)
    with pytest.raises(ConfigError, match=rule):
        read_manifest(path)
    (problem,) = check_compatible(path, config())
    assert rule in problem.rule


def test_a_model_with_fields_of_another_version_is_refused(tmp_path: Path) -> None:
    path = add(tmp_path, 1)
    content = json.loads((path / MANIFEST).read_text())
    content["model"]["experts"] = 8
    (path / MANIFEST).write_text(json.dumps(content))
    (problem,) = check_compatible(path, config())
    assert "does not understand experts" in problem.rule


def test_asking_about_checkpoints_loads_no_torch() -> None:
    script = "import sys, trainer.checkpoint.directory, trainer.checkpoint.pieces; assert 'torch' not in sys.modules"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
