"""Whatever is wrong with what a user gives: a message with value, rule, path and fix, exit code 2, nothing left over.

Nearly everything is found by the launcher, before there are processes; those tests call the command in this process.
The others start real ranks, which find it before they meet.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.cli import main
from tests.launches import (
    alive,
    atoll,
    build_small_dataset,
    descendants,
    finished,
    started,
    torchrun,
    write_yaml,
)

Command = Callable[..., str]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def file(tmp_path: Path, dataset: Path) -> Path:
    """A config that would run."""
    return write_yaml(tmp_path, dataset)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs `atoll ...` in this process, expects it to be refused, and gives what it said."""

    def run(*arguments: object) -> str:
        before = set(descendants(os.getpid()))
        monkeypatch.setattr(sys, "argv", ["atoll", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code == 2
        assert said.out == ""
        assert "Traceback" not in said.err
        assert set(descendants(os.getpid())) <= before, "no process was started"
        assert not (tmp_path / "run").exists(), "no run directory was made"
        return said.err

    return run


def says(text: str, path: str, value: str | None, rule: str, fix: str, origin: str = "") -> None:
    """Whether one of the problems in `text` has these parts."""
    blocks = text.split("\n\n")
    heading = f"{path} ({origin})" if origin else path
    found = [block for block in blocks if block.splitlines()[0].startswith(heading)]
    assert len(found) == 1, text
    block = found[0]
    if value is not None:
        assert f"  value: {value}" in block, block
    assert f"  rule:  {rule}" in block, block
    assert fix in block.partition("  fix:   ")[2], block


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize(
    ("override", "path", "value", "rule", "fix"),
    [
        ("train.stepz=5", "train.stepz", "5", "is not a key of train", "did you mean train.steps?"),
        (
            "steps=5",
            "steps",
            "5",
            "is not a section of the configuration",
            "did you mean train.steps or parallel.pipeline.profile.steps?",
        ),
        ("train.steps=ten", "train.steps", "'ten'", "must be an integer of at least 1", "write train.steps: followed"),
        ("train.steps=2.5", "train.steps", "2.5", "must be an integer", "write train.steps: followed by"),
        ("train.steps=0", "train.steps", "0", "must be an integer of at least 1", "write train.steps: followed by"),
        ("optimizer.lr=true", "optimizer.lr", "True", "must be a number", "write optimizer.lr: followed by"),
        ("parallel.tensor=[2]", "parallel.tensor", "[2]", "must be an integer", "write parallel.tensor: followed by"),
        ("train.precision=bf61", "train.precision", "'bf61'", "must be 'fp32' or 'bf16'", "did you mean 'bf16'?"),
        (
            "train.global_batch=9",
            "train.global_batch",
            "9",
            "must be divisible by micro_batch x data-parallel ranks = 2 x 2 = 4",
            "set two of the three so that the equation holds",
        ),
        (
            "model.heads=5",
            "model.hidden",
            "32",
            "must be divisible by the number of heads (5)",
            "set model.hidden to a multiple of 5",
        ),
        (
            "parallel.pipeline.partition=[2,1]",
            "parallel.pipeline.partition",
            "[2, 1]",
            "must be 2 numbers that add up to model.layers (4), positive but for the first and last",
            "give one number of blocks per part of the model, or null",
        ),
        (
            "parallel.pipeline={stages: 2, schedule: breadth-first, chunks: 4}",
            "parallel.pipeline.stages",
            "2",
            "cuts the model into 8 parts, it has 6 units (embedding, blocks, head)",
            "set parallel.pipeline.stages to at most 1, or fewer chunks",
        ),
        (
            "parallel.pipeline.schedule=dualpipe-v",
            "train.gradient_accumulation",
            "2",
            "micro-batches: dualpipe-v needs at least 2 x ranks = 4",
            "set it to 4 or more, or choose zb-v",
        ),
        (
            "parallel.pipeline.chunks=2",
            "parallel.pipeline.chunks",
            "2",
            "1f1b puts 1 part of the model on each rank",
            "set chunks to 1, or choose another schedule",
        ),
        (
            "model.vocab=256",
            "model.vocab",
            "256",
            "must be at least the vocabulary of the dataset",
            "set model.vocab to 257 or more; 320 divides evenly",
        ),
        (
            "run.ranks=6",
            "parallel",
            "'tensor 1 x pipeline.stages 2 x data_shard 2 x data_replicate 1'",
            "the world size, 6, must be the product of the degrees: the degrees multiply to 4, not to 6",
            "start 4 ranks, or change the degrees",
        ),
        (
            "model.preset=llama3-8",
            "model.preset",
            "'llama3-8'",
            "must be one of the presets; did you mean 'llama3-8b'?",
            "change model.preset",
        ),
        (
            "run.directory=/proc/run",
            "run.directory",
            "'/proc/run'",
            "/proc must be a writable directory",
            "name a directory that this user may create and write",
        ),
        (
            "data.path=/nowhere/data",
            "data.path",
            "'/nowhere/data'",
            "must be the directory of a dataset; there is no such directory",
            "build it with `atoll data build /nowhere/data ...`",
        ),
        (
            "train.sequence=10000",
            "train.sequence",
            "10000",
            "the eval split of",
            "set train.sequence to at most 7111, or build with more text or a larger eval_fraction",
        ),
    ],
)
def test_a_wrong_value(
    command: str, override: str, path: str, value: str, rule: str, fix: str, refused: Command, file: Path
) -> None:
    says(refused(command, file, override), path, value, rule, fix)


@pytest.mark.parametrize("key", ["heads", "kv_heads", "ffn_hidden", "vocab"])
def test_sizes_that_tensor_parallelism_cannot_split(key: str, refused: Command, file: Path) -> None:
    values = {"heads": 4, "kv_heads": 2, "ffn_hidden": 64, "vocab": 320}
    settings = ["parallel.tensor=3", "parallel.pipeline.stages=1", "parallel.data_shard=1", "run.ranks=3"]
    text = refused("train", file, *settings)
    says(
        text,
        f"model.{key}",
        str(values[key]),
        "must be divisible by parallel.tensor (3)",
        f"set model.{key} to a multiple of 3",
    )


def test_ranks_that_are_asked_for_on_the_command_line(refused: Command, file: Path) -> None:
    text = refused("train", file, "--ranks", 3)
    says(text, "parallel", None, "the world size, 3, must be the product of the degrees", "start 4 ranks")


def test_a_yaml_syntax_error_is_shown_with_its_line(refused: Command, file: Path) -> None:
    lines = file.read_text().splitlines()
    number = lines.index("train:") + 2
    lines[number - 1] = "  steps: 8: 9"
    file.write_text("\n".join(lines))
    text = refused("train", file)
    says(text, f"{file}:{number}:", None, "must be valid YAML: mapping values are not allowed here", "mend this line")
    assert "\n           steps: 8: 9\n" in text


def test_a_mistake_in_a_file_is_shown_with_its_line(refused: Command, file: Path) -> None:
    file.write_text(file.read_text().replace("  steps: 8", "  stops: 8"))
    number = file.read_text().splitlines().index("  stops: 8") + 1
    text = refused("train", file)
    says(text, "train.stops", "8", "is not a key of train", "did you mean train.steps?", origin=f"{file}:{number}")
    says(text, "train.steps", None, "is required", "add train.steps")


def test_a_file_that_is_not_there(refused: Command, tmp_path: Path) -> None:
    text = refused("train", tmp_path / "missing.yaml")
    says(text, str(tmp_path / "missing.yaml"), None, "the file must exist", "check the path")


def test_all_mistakes_at_once(refused: Command, file: Path) -> None:
    text = refused("train", file, "train.stepz=5", "train.sequence=x", "modell.vocab=3")
    assert text.startswith("3 problems in the configuration:\n")
    text = refused("train", file, "train.global_batch=9", "model.vocab=256", "zero.optim=3", "run.directory=/proc/run")
    assert text.startswith("4 problems in the configuration:\n")


@pytest.fixture
def damaged(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset to damage."""
    return Path(shutil.copytree(dataset, tmp_path / "damaged"))


def test_a_shard_that_is_missing(refused: Command, file: Path, damaged: Path) -> None:
    shard = damaged / "train-00000.bin"
    shard.unlink()
    text = refused("train", file, f"data.path={damaged}")
    says(text, str(shard), None, "must be there, as manifest.json lists it; it is missing", "restore the file")


def test_a_shard_that_is_truncated(refused: Command, file: Path, damaged: Path) -> None:
    shard = damaged / "eval-00000.bin"
    size = shard.stat().st_size
    os.truncate(shard, size - 2)
    text = refused("train", file, f"data.path={damaged}")
    rule = f"must have {size} bytes, as manifest.json says; it is truncated"
    says(text, str(shard), str(size - 2), rule, "restore the file")


def test_a_shard_that_is_corrupt(refused: Command, file: Path, damaged: Path) -> None:
    shard = damaged / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    text = refused("train", file, f"data.path={damaged}")
    says(text, str(shard), "'sha256:", "must have the checksum sha256:", "restore the file from a copy, or build")


def test_a_manifest_that_is_no_manifest(refused: Command, file: Path, damaged: Path) -> None:
    (damaged / "manifest.json").write_text("{")
    text = refused("train", file, f"data.path={damaged}")
    says(text, str(damaged / "manifest.json"), None, "must be JSON text", "restore the file, or build the dataset")


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run that has a checkpoint."""
    file = write_yaml(tmp_path_factory.mktemp("trained"), dataset)
    single = ["parallel.pipeline.stages=1", "parallel.data_shard=1", "run.ranks=1", "train.steps=3"]
    made = finished(atoll("train", file, *single))
    assert made.returncode == 0, made.stderr
    return file


def test_a_checkpoint_of_another_model(refused: Command, trained: Path) -> None:
    """The run's own, and one that it is told to load."""
    checkpoint = trained.with_suffix("") / "checkpoints" / "step-00000003"
    for more in ([], ["run.directory=elsewhere", f"checkpoint.load={checkpoint}"]):
        text = refused("train", trained, "model.hidden=64", "model.activation=gelu", *more)
        assert text.startswith("2 problems in the configuration:")
        rule = f"must be 32: the checkpoint {checkpoint} holds another model"
        says(text, "model.hidden", "64", rule, "set model.hidden=32, or start anew: another run.directory")
        rule = f"must be 'swiglu': the checkpoint {checkpoint} holds another model"
        says(text, "model.activation", "'gelu'", rule, "set model.activation=swiglu")


def test_a_checkpoint_that_is_not_there(refused: Command, file: Path, trained: Path) -> None:
    text = refused("train", file, f"checkpoint.load={trained.with_suffix('')}")
    rule = "must be a complete checkpoint: a directory with atoll.json"
    there = trained.with_suffix("") / "checkpoints" / "step-00000003"
    says(text, str(trained.with_suffix("")), None, rule, f"e.g. {there}")


def test_a_checkpoint_that_is_damaged(refused: Command, file: Path, trained: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained.with_suffix("") / "checkpoints" / "step-00000003", tmp_path / "copy"))
    data = max(copy.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(data, data.stat().st_size - 1)
    text = refused("train", file, f"checkpoint.load={copy}")
    rule = f"must have {data.stat().st_size + 1} bytes, as when it was written"
    says(text, str(data), None, rule, "restore the file")


def test_torchrun_with_a_world_size_that_does_not_match_and_a_corrupt_shard(file: Path, damaged: Path) -> None:
    """Under torchrun the ranks themselves check; one speaks, all end, and so does torchrun."""
    shard = damaged / "train-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    with started(torchrun(3, file, f"data.path={damaged}")) as process:
        output, errors = process.communicate(timeout=60)
        left = alive(descendants(process.pid))
    assert process.returncode != 0
    assert left == []
    assert "2 problems in the configuration:" in errors
    assert errors.count("the world size, 3, must be the product of the degrees") == 1
    assert errors.count("it is corrupt") == 1
    assert "exitcode  : 2" in errors
    assert output == ""


def test_a_rank_started_by_hand(file: Path) -> None:
    ended = finished([sys.executable, "-m", "trainer", str(file), "train.stepz=1"])
    assert ended.returncode == 2
    assert "did you mean train.steps?" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_trouble_of_one_rank_alone(file: Path, dataset: Path, tmp_path: Path) -> None:
    """Rank 0 waits for a peer that was refused: the peer says why, and the launcher ends both."""
    (tmp_path / "data-0").symlink_to(dataset)
    file.write_text(file.read_text().replace(f"path: {dataset}", f"path: {tmp_path}/data-${{LOCAL_RANK:0}}"))
    degrees = ["parallel.pipeline.stages=1", "parallel.data_shard=2"]
    with started(torchrun(2, file, *degrees)) as process:
        _, errors = process.communicate(timeout=100)
        left = alive(descendants(process.pid))
    assert process.returncode != 0
    assert left == []
    assert errors.count(f"value: '{tmp_path}/data-1'") == 1
