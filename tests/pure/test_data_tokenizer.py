"""Text to tokens and back, for every kind of tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import models, pre_tokenizers, processors

from trainer.config.problems import ConfigError
from trainer.data.config import BpeTokenizerConfig, FileTokenizerConfig
from trainer.data.manifest import token_dtype
from trainer.data.tokenizer import EOS, ByteTokenizer, SubwordTokenizer, load_tokenizer_file, train_bpe

CORPUS = [
    "def f(x):\n    return x + 1\n",
    "the quick brown fox\n" * 20,
    "naïve café, 日本語 🙂\r\n\ttabs",
] * 3


@pytest.fixture(scope="module")
def bpe() -> SubwordTokenizer:
    return train_bpe(BpeTokenizerConfig(kind="bpe", vocab_size=300), CORPUS)


@given(text=st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.dtype("<u2")
    assert bytes(tokens.tolist()) == text.encode()
    assert tokenizer.decode(tokens) == text


@given(text=st.text())
def test_bpe_round_trips(bpe: SubwordTokenizer, text: str) -> None:
    tokens = bpe.encode(text)
    assert tokens.dtype == token_dtype(300)
    assert bpe.decode(tokens) == text


@pytest.mark.parametrize("text", [EOS, f"a{EOS}b", f"{EOS}{EOS}"])
def test_text_never_becomes_the_end_of_a_document(bpe: SubwordTokenizer, text: str) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        tokens = tokenizer.encode(text)
        assert tokenizer.eos_id not in tokens
        assert tokenizer.decode(tokens) == text


def test_the_end_of_a_document_is_visible_in_decoded_text(bpe: SubwordTokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        joined = [*tokenizer.encode("one"), tokenizer.eos_id, *tokenizer.encode("two"), tokenizer.eos_id]
        assert tokenizer.decode(np.array(joined)) == f"one{EOS}two{EOS}"


def test_half_a_character_decodes_to_a_replacement() -> None:
    tokens = ByteTokenizer().encode("é")
    assert ByteTokenizer().decode(tokens[:1]) == "�"


@given(text=st.text())
def test_the_byte_tokenizers_file_means_the_same_to_the_tokenizers_package(text: str) -> None:
    tokenizer, hub = ByteTokenizer(), HubTokenizer.from_str(ByteTokenizer().to_json())
    hub.encode_special_tokens = True
    assert hub.encode(text).ids == tokenizer.encode(text).tolist()
    assert hub.get_vocab_size() == tokenizer.vocab_size
    assert hub.token_to_id(EOS) == tokenizer.eos_id


def test_training_is_deterministic_and_compresses(bpe: SubwordTokenizer) -> None:
    again = train_bpe(BpeTokenizerConfig(kind="bpe", vocab_size=300), iter(CORPUS))
    assert again.to_json() == bpe.to_json()
    assert bpe.vocab_size == 300
    assert len(bpe.encode(CORPUS[1])) < len(CORPUS[1]) / 2


def test_a_small_corpus_gives_a_small_vocabulary() -> None:
    tokenizer = train_bpe(BpeTokenizerConfig(kind="bpe", vocab_size=5000), ["abab abab"])
    assert 257 < tokenizer.vocab_size < 300


def test_batches_encode_as_single_texts_do(bpe: SubwordTokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        for text, tokens in zip(CORPUS, tokenizer.encode_batch(CORPUS), strict=True):
            assert np.array_equal(tokens, tokenizer.encode(text))


def test_a_tokenizer_file_round_trips(bpe: SubwordTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(bpe.to_json(), encoding="utf-8")
    loaded = load_tokenizer_file(FileTokenizerConfig(kind="file", path=str(file)))
    assert (loaded.vocab_size, loaded.eos_id) == (bpe.vocab_size, bpe.eos_id)
    assert np.array_equal(loaded.encode(CORPUS[0]), bpe.encode(CORPUS[0]))


def word_tokenizer(file: Path, special: list[str]) -> FileTokenizerConfig:
    hub = HubTokenizer(models.WordLevel({"one": 0, "two": 1, "[UNK]": 2}, unk_token="[UNK]"))
    hub.pre_tokenizer = pre_tokenizers.Whitespace()
    hub.add_special_tokens(special)
    hub.enable_truncation(2)
    hub.enable_padding(length=8)
    if special:
        first = (special[0], hub.token_to_id(special[0]))
        hub.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[first])
    hub.save(str(file))
    return FileTokenizerConfig(kind="file", path=str(file))


def test_a_loaded_tokenizer_neither_truncates_nor_adds_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer_file(word_tokenizer(tmp_path / "t.json", ["</s>"]))
    assert tokenizer.encode("one two one two").tolist() == [0, 1, 0, 1]
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (3, 4)


def test_the_end_of_document_token_can_be_named(tmp_path: Path) -> None:
    config = word_tokenizer(tmp_path / "t.json", ["<stop>", "</s>"])
    named = load_tokenizer_file(config.model_copy(update={"eos_token": "<stop>"}))
    assert named.eos_id == 3
    with pytest.raises(ConfigError) as caught:
        load_tokenizer_file(config.model_copy(update={"eos_token": "<end>"}))
    (problem,) = caught.value.problems
    assert (problem.path, problem.value) == ("data.tokenizer.eos_token", "<end>")
    assert "<stop>, </s>" in problem.fix


@pytest.mark.parametrize(
    ("special", "found"), [(["<stop>"], "none"), (["</s>", "<eos>"], "</s>, <eos>"), ([], "none")]
)
def test_an_unclear_end_of_document_is_refused(tmp_path: Path, special: list[str], found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_tokenizer_file(word_tokenizer(tmp_path / "t.json", special))
    (problem,) = caught.value.problems
    assert problem.path == "data.tokenizer.eos_token"
    assert f"found: {found}" in problem.rule
    assert all(name in problem.fix for name in special)


@pytest.mark.parametrize(
    "content", [None, b"{", json.dumps({"model": {"type": "what"}}).encode(), b"\xff\xfe"]
)
def test_an_unusable_tokenizer_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer_file(FileTokenizerConfig(kind="file", path=str(file)))
    (problem,) = caught.value.problems
    assert (problem.path, problem.value) == ("data.tokenizer.path", str(file))


@pytest.mark.parametrize(
    ("vocab_size", "name"),
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32"), (2**32, "uint32")],
)
def test_tokens_take_the_smallest_type(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size).name == name
    assert token_dtype(vocab_size).newbyteorder("<") == token_dtype(vocab_size)


def test_a_vocabulary_must_fit_in_32_bits() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        token_dtype(2**32 + 1)
