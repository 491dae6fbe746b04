"""What is said about each way in which a dataset can be unusable, before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config.problems import MISSING, ConfigError, Problem
from trainer.data.build import ensure_dataset
from trainer.data.check import check_dataset
from trainer.data.config import DataConfig
from trainer.data.manifest import FORMAT_VERSION, MANIFEST, TOKENIZER

VOCAB, SEQUENCE = 320, 16


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., DataConfig]:
    """Makes a config for a corpus in a temporary directory; the dataset is `tokens` beside it."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(f'{{"text": "document number {number}"}}\n' for number in range(100)))

    def make(**settings: Any) -> DataConfig:
        source = {"kind": "jsonl", "paths": [str(corpus)]}
        return DataConfig.model_validate({"path": str(tmp_path / "tokens"), "source": source, **settings})

    return make


@pytest.fixture
def config(configured: Callable[..., DataConfig]) -> DataConfig:
    """The config of a dataset that is built, in several shards."""
    made = configured(shard_tokens=600, eval_fraction=0.2)
    ensure_dataset(made)
    return made


def only(problems: list[Problem]) -> Problem:
    (problem,) = problems
    return problem


def test_a_good_dataset_has_no_problems(config: DataConfig) -> None:
    for verify in ("auto", "size", "full"):
        assert check_dataset(config.model_copy(update={"verify": verify}), VOCAB, SEQUENCE) == []
    assert check_dataset(DataConfig(path=config.path), VOCAB, SEQUENCE) == []


def test_missing_directory(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere")
    problem = only(check_dataset(DataConfig(path=path), VOCAB, SEQUENCE))
    assert (problem.path, problem.value) == ("data.path", path)
    assert problem.rule == "must be the directory of a dataset; there is no such directory"
    assert f"atoll data build {path}" in problem.fix
    assert "data.source" in problem.fix


def test_missing_manifest(config: DataConfig) -> None:
    (Path(config.path) / MANIFEST).unlink()
    problem = only(check_dataset(DataConfig(path=config.path), VOCAB, SEQUENCE))
    assert problem.rule == "must be the directory of a dataset; the directory has no manifest.json"


def test_nothing_there_yet_but_a_source(configured: Callable[..., DataConfig], tmp_path: Path) -> None:
    assert check_dataset(configured(), VOCAB, SEQUENCE) == []
    assert [file.name for file in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_nothing_there_yet_and_a_source_that_cannot_serve(
    configured: Callable[..., DataConfig], tmp_path: Path
) -> None:
    source = {"kind": "text", "paths": [str(tmp_path / "gone.txt")]}
    config = configured(source=source, tokenizer={"kind": "bpe", "vocab_size": 4000})
    problems = check_dataset(config, VOCAB, SEQUENCE)
    assert [problem.path for problem in problems] == ["data.source.paths", "model.vocab"]
    assert problems[1].rule == "must be at least the vocabulary of data.tokenizer, 4000 tokens"
    missing = configured(tokenizer={"kind": "file", "path": str(tmp_path / "gone.json")})
    assert only(check_dataset(missing, VOCAB, SEQUENCE)).path == "data.tokenizer.path"


@pytest.mark.parametrize("place", ["directory", "file"])
def test_something_else_in_the_place_of_the_dataset(
    configured: Callable[..., DataConfig], tmp_path: Path, place: str
) -> None:
    other = tmp_path / "tokens"
    if place == "directory":
        other.mkdir()
        assert check_dataset(configured(), VOCAB, SEQUENCE) == []  # an empty directory is free
        other = other / "thesis.tex"
    other.write_text("precious")
    problem = only(check_dataset(configured(), VOCAB, SEQUENCE))
    assert problem.path == "data.path"
    assert "something without a manifest.json is there" in problem.rule
    with pytest.raises(ConfigError, match="something else is there"):
        ensure_dataset(configured())
    assert other.read_text() == "precious"


def test_missing_shard(config: DataConfig) -> None:
    shard = Path(config.path) / "train-00001.bin"
    shard.unlink()
    problem = only(check_dataset(config, VOCAB, SEQUENCE))
    assert (problem.path, problem.value) == (str(shard), MISSING)
    assert problem.rule == "must be there, as manifest.json lists it; it is missing"


@pytest.mark.parametrize("verify", ["size", "full"])
@pytest.mark.parametrize(("change", "word"), [(-3, "truncated"), (8, "too long")])
def test_shard_of_another_size(config: DataConfig, verify: str, change: int, word: str) -> None:
    shard = Path(config.path) / "train-00000.bin"
    size = shard.stat().st_size
    data = shard.read_bytes()
    shard.write_bytes(data[:change] if change < 0 else data + bytes(change))
    problem = only(check_dataset(config.model_copy(update={"verify": verify}), VOCAB, SEQUENCE))
    assert (problem.path, problem.value) == (str(shard), size + change)
    assert problem.rule == f"must have {size} bytes, as manifest.json says; it is {word}"
    assert "restore the file" in problem.fix


@pytest.mark.parametrize("name", ["train-00000.bin", "eval-00000.index", TOKENIZER])
def test_corrupt_file(config: DataConfig, name: str) -> None:
    file = Path(config.path) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    problem = only(check_dataset(config, VOCAB, SEQUENCE))
    assert problem.path == str(file)
    assert problem.value.startswith("sha256:")
    assert "must have the checksum sha256:" in problem.rule
    assert "it is corrupt" in problem.rule
    assert check_dataset(config.model_copy(update={"verify": "size"}), VOCAB, SEQUENCE) == []


def test_large_datasets_are_not_read_in_full(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Path(config.path) / "train-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert "corrupt" in only(check_dataset(config, VOCAB, SEQUENCE)).rule
    monkeypatch.setattr("trainer.data.check.FULL_BELOW_BYTES", 1000)
    assert check_dataset(config, VOCAB, SEQUENCE) == []
    assert check_dataset(config.model_copy(update={"verify": "full"}), VOCAB, SEQUENCE) != []


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b'{"version": 1}\x00'])
def test_manifest_that_is_no_json(config: DataConfig, content: bytes) -> None:
    file = Path(config.path) / MANIFEST
    file.write_bytes(content)
    problem = only(check_dataset(config, VOCAB, SEQUENCE))
    assert (problem.path, problem.rule) == (str(file), "must be JSON text")


def edited(config: DataConfig, edit: Callable[[dict[str, Any]], None]) -> Problem:
    file = Path(config.path) / MANIFEST
    values = json.loads(file.read_text())
    edit(values)
    file.write_text(json.dumps(values))
    problem = only(check_dataset(config, VOCAB, SEQUENCE))
    assert problem.path == str(file)
    return problem


def test_manifest_of_a_newer_version(config: DataConfig) -> None:
    problem = edited(config, lambda values: values.update(version=FORMAT_VERSION + 1, tokenizer="what"))
    assert problem.value == {"version": FORMAT_VERSION + 1}
    assert problem.rule == f"this version of atoll reads datasets up to format version {FORMAT_VERSION}"
    assert problem.fix.startswith("upgrade atoll")


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda values: values.pop("tokenizer"), "tokenizer: Field required"),
        (
            lambda values: values["train"].update(tokens=5),
            "the tokens of the train shards do not add up to 5",
        ),
        (lambda values: values.update(dtype="uint8"), "tokens of uint8 are not"),
        (lambda values: values["tokenizer"].update(vocab_size=99), "99 tokens is not stored as uint16"),
        (lambda values: values["train"]["shards"][0].update(file="../../etc/passwd"), "train.shards.0.file"),
    ],
)
def test_manifest_that_cannot_be_true(
    config: DataConfig, edit: Callable[[dict[str, Any]], None], found: str
) -> None:
    problem = edited(config, edit)
    assert found in problem.value
    assert problem.rule == "must be a manifest as `atoll data build` writes it"


def test_manifest_that_is_no_mapping(config: DataConfig) -> None:
    (Path(config.path) / MANIFEST).write_text("[]")
    assert "must be a manifest" in only(check_dataset(config, VOCAB, SEQUENCE)).rule


def test_vocabulary_larger_than_the_models(config: DataConfig) -> None:
    assert check_dataset(config, 257, SEQUENCE) == []
    problem = only(check_dataset(config, 256, SEQUENCE))
    assert (problem.path, problem.value) == ("model.vocab", 256)
    assert problem.rule == f"must be at least the vocabulary of the dataset {config.path}, 257 tokens"
    assert problem.fix == "set model.vocab to 257 or more; 320 divides evenly"


def test_split_shorter_than_a_window(config: DataConfig) -> None:
    tokens = ensure_dataset(config).manifest.eval.tokens
    assert check_dataset(config, VOCAB, tokens - 1) == []
    problem = only(check_dataset(config, VOCAB, tokens))
    assert (problem.path, problem.value) == ("train.sequence", tokens)
    place = f"the eval split of {config.path}"
    assert (
        problem.rule == f"{place} must hold a window of sequence + 1 = {tokens + 1} tokens, but has {tokens}"
    )
    assert f"set train.sequence to at most {tokens - 1}" in problem.fix
    assert "larger eval_fraction" in problem.fix
    assert len(check_dataset(config, VOCAB, 10**6)) == 2


@pytest.mark.parametrize(
    ("settings", "path", "value", "built"),
    [
        ({"seed": 5}, "data.seed", 5, "0"),
        ({"eval_fraction": 0.1}, "data.eval_fraction", 0.1, "0.2"),
        ({"tokenizer": {"kind": "bpe", "vocab_size": 300}}, "data.tokenizer.kind", "bpe", "'byte'"),
        ({"source": {"kind": "python-stdlib"}}, "data.source.kind", "python-stdlib", "'jsonl'"),
    ],
)
def test_dataset_built_with_other_settings(
    config: DataConfig,
    configured: Callable[..., DataConfig],
    settings: dict[str, Any],
    path: str,
    value: object,
    built: str,
) -> None:
    before = {file: file.stat().st_mtime_ns for file in Path(config.path).iterdir()}
    asked = configured(**{"eval_fraction": 0.2, **settings})
    problem = only(check_dataset(asked, VOCAB, SEQUENCE))
    assert (problem.path, problem.value) == (path, value)
    assert problem.rule == f"must be as the dataset {config.path} was built: {built}"
    for way in (f"set {path} to {built}", "name another data.path", "remove data.source"):
        assert way in problem.fix
    with pytest.raises(ConfigError, match="was built"):
        ensure_dataset(asked)
    assert {file: file.stat().st_mtime_ns for file in Path(config.path).iterdir()} == before


def test_differences_inside_a_section_are_named_by_their_key(
    config: DataConfig, configured: Callable[..., DataConfig]
) -> None:
    source = {**configured().model_dump()["source"], "text_field": "body", "max_bytes": 100}
    problems = check_dataset(configured(eval_fraction=0.2, source=source), VOCAB, SEQUENCE)
    assert [problem.path for problem in problems] == ["data.source.text_field", "data.source.max_bytes"]


def test_the_size_of_shards_is_no_difference(
    config: DataConfig, configured: Callable[..., DataConfig]
) -> None:
    assert check_dataset(configured(eval_fraction=0.2, shard_tokens=7), VOCAB, SEQUENCE) == []


def test_without_a_source_nothing_is_compared(config: DataConfig) -> None:
    values = {"path": config.path, "seed": 9, "tokenizer": {"kind": "bpe", "vocab_size": 999}}
    assert check_dataset(DataConfig.model_validate(values), VOCAB, SEQUENCE) == []


def test_all_problems_come_at_once(config: DataConfig, configured: Callable[..., DataConfig]) -> None:
    directory = Path(config.path)
    (directory / "train-00000.bin").unlink()
    (directory / "train-00001.bin").write_bytes(b"")
    (directory / "eval-00000.index").unlink()
    problems = check_dataset(configured(eval_fraction=0.2, seed=1), 100, 10**6)
    assert [Path(problem.path).name for problem in problems] == [
        "data.seed",
        "train-00000.bin",
        "train-00001.bin",
        "eval-00000.index",
        "model.vocab",
        "train.sequence",
        "train.sequence",
    ]
    text = str(ConfigError(problems))
    assert all(problem.rule in text for problem in problems)


def test_a_path_that_cannot_be_looked_at_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", refuse)
    problem = only(check_dataset(DataConfig(path=str(tmp_path)), VOCAB, SEQUENCE))
    assert (problem.path, problem.rule) == ("data.path", "must be readable (Permission denied)")
