"""What a built dataset holds: every document once, in order, packed into windows that reach over shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.problems import ConfigError
from trainer.data.build import ensure_dataset
from trainer.data.config import DataConfig
from trainer.data.dataset import Dataset, open_dataset
from trainer.data.manifest import SPLITS
from trainer.data.mixing import fraction_of

Build = Callable[..., Dataset]
TEXTS = [f"document {number}: " + "word " * (number % 7) + "é🙂" for number in range(60)]


def build_in(directory: Path, texts: list[str] = TEXTS, **settings: Any) -> Dataset:
    corpus = directory / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {
        "path": str(directory / "tokens"),
        "source": {"kind": "jsonl", "paths": [str(corpus)]},
        **settings,
    }
    return ensure_dataset(DataConfig.model_validate(values))


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return lambda *arguments, **settings: build_in(tmp_path, *arguments, **settings)


def stream(dataset: Dataset, name: str, texts: list[str] = TEXTS) -> list[int]:
    """The tokens that the split should hold, worked out one document at a time."""
    fraction, seed = dataset.manifest.settings.eval_fraction, dataset.manifest.settings.seed
    tokenizer = dataset.tokenizer()
    tokens: list[int] = []
    for number, text in enumerate(texts):
        if (fraction_of(seed, number) < fraction) == (name == "eval"):
            tokens += [*tokenizer.encode(text).tolist(), tokenizer.eos_id]
    return tokens


@pytest.mark.parametrize("tokenizer", [{"kind": "byte"}, {"kind": "bpe", "vocab_size": 280}])
@pytest.mark.parametrize("shard_tokens", [1, 50, 10**6])
def test_windows_are_cuts_of_the_joined_documents(
    build: Build, tokenizer: dict[str, Any], shard_tokens: int
) -> None:
    dataset = build(tokenizer=tokenizer, shard_tokens=shard_tokens, eval_fraction=0.2)
    for name in SPLITS:
        tokens = stream(dataset, name)
        for sequence in (1, 7, 64):
            split = dataset.split(name, sequence)
            assert split.windows == (len(tokens) - 1) // sequence
            for index in range(split.windows):
                window = split.sample(index)
                assert (window.dtype, window.shape) == (np.int64, (sequence + 1,))
                assert window.tolist() == tokens[index * sequence : index * sequence + sequence + 1]


def test_the_manifest_counts_what_is_there(build: Build) -> None:
    dataset = build(shard_tokens=200, eval_fraction=0.2)
    manifest = dataset.manifest
    assert manifest.train.documents + manifest.eval.documents == len(TEXTS)
    assert manifest.train.text_bytes + manifest.eval.text_bytes == sum(len(text.encode()) for text in TEXTS)
    for name in SPLITS:
        split = manifest.split(name)
        assert split.tokens == len(stream(dataset, name))
        assert split.tokens == split.text_bytes + split.documents  # bytes as tokens, and one for each end
        assert split.tokens_per_byte == pytest.approx(split.tokens / split.text_bytes)
    assert len(manifest.train.shards) > 2
    for shard in manifest.shards():
        assert shard.tokens >= 200 or shard in (manifest.train.shards[-1], manifest.eval.shards[-1])
        data = (dataset.directory / shard.file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        index = np.fromfile(dataset.directory / shard.index, dtype="<u8")
        ends = np.flatnonzero(np.frombuffer(data, dtype="<u2") == dataset.eos_id) + 1
        assert index.tolist() == [0, *ends.tolist()]


def test_documents_can_be_read_back_one_by_one(build: Build) -> None:
    dataset = build(shard_tokens=100, eval_fraction=0.2)
    tokenizer, seed = dataset.tokenizer(), 0
    for name in SPLITS:
        split = dataset.split(name, 8)
        is_in = [(fraction_of(seed, number) < 0.2) == (name == "eval") for number in range(len(TEXTS))]
        texts = [text for text, chosen in zip(TEXTS, is_in, strict=True) if chosen]
        assert split.documents == len(texts)
        for index, text in enumerate(texts):
            tokens = split.document(index)
            assert tokens[-1] == dataset.eos_id
            assert tokenizer.decode(tokens[:-1]) == text
        with pytest.raises(IndexError):
            split.document(len(texts))


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return build_in(tmp_path_factory.mktemp("data"), shard_tokens=1)


@given(sequence=st.integers(1, 400), data=st.data())
def test_every_target_comes_once(many_shards: Dataset, sequence: int, data: st.DataObject) -> None:
    split = many_shards.split("train", sequence)
    index = data.draw(st.integers(0, split.windows - 1))
    window = split.sample(index)
    if index:
        assert split.sample(index - 1)[-1] == window[0]
    targets = np.concatenate([split.sample(each)[1:] for each in range(split.windows)])
    assert targets.tolist() == stream(many_shards, "train")[1 : len(targets) + 1]


def test_many_shards_stay_within_the_file_descriptors(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.dataset._OPEN_SHARDS", 4)
    dataset = build(shard_tokens=1)
    split = dataset.split("train", 16)
    assert len(dataset.manifest.train.shards) > 40
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    for index in range(split.windows):
        split.sample(index)
    after = len(list(Path("/proc/self/fd").iterdir())) if before else 0
    assert after <= before + 4


def test_there_is_no_window_beyond_the_last(build: Build) -> None:
    split = build().split("train", 32)
    for index in (-1, split.windows):
        with pytest.raises(IndexError, match=f"window {index} of {split.windows}"):
            split.sample(index)


def test_a_sequence_has_a_token(build: Build) -> None:
    with pytest.raises(ValueError, match="sequence must be at least 1, not 0"):
        build().split("train", 0)


def test_the_same_text_and_settings_give_the_same_files(tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        corpus = {"source": {"kind": "jsonl", "paths": [str(tmp_path / "first" / "corpus.jsonl")]}}
        dataset = build_in(tmp_path / name, tokenizer={"kind": "bpe", "vocab_size": 300}, **corpus)
        contents.append({file.name: file.read_bytes() for file in dataset.directory.iterdir()})
    assert contents[0] == contents[1]


def test_the_seed_moves_the_held_out_documents(tmp_path: Path) -> None:
    held_out = set()
    for seed in range(3):
        directory = tmp_path / str(seed)
        directory.mkdir()
        split = build_in(directory, seed=seed, eval_fraction=0.3).split("eval", 1)
        held_out.add(tuple(tuple(split.document(index)) for index in range(split.documents)))
    assert len(held_out) == 3


def test_merges_are_learned_from_training_documents_only(tmp_path: Path) -> None:
    texts = ["common words here " * 5 if fraction_of(0, n) >= 0.3 else "zqxjkv " * 50 for n in range(40)]
    dataset = build_in(tmp_path, texts, tokenizer={"kind": "bpe", "vocab_size": 290}, eval_fraction=0.3)
    tokenizer = dataset.tokenizer()
    assert len(tokenizer.encode("zqxjkv")) == 6
    assert len(tokenizer.encode("common")) == 1


def test_a_bpe_dataset_opens_with_its_own_tokenizer(build: Build) -> None:
    dataset = build(tokenizer={"kind": "bpe", "vocab_size": 300})
    again = open_dataset(dataset.directory)
    assert (again.vocab_size, again.eos_id) == (300, dataset.eos_id)
    text = again.tokenizer().decode(again.split("train", 16).document(0)[:-1])
    assert text in TEXTS


def test_opening_names_every_damaged_file(build: Build) -> None:
    dataset = build(shard_tokens=300)
    first, second = dataset.manifest.train.shards[:2]
    (dataset.directory / first.file).unlink()
    (dataset.directory / second.index).write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        open_dataset(dataset.directory)
    assert [Path(problem.path).name for problem in caught.value.problems] == [first.file, second.index]
