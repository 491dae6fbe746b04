"""Text to token ids and back: bytes, or byte-level BPE by Hugging Face's `tokenizers`.

All kinds are stored as a Hugging Face tokenizer.json, so that other tools can read any dataset; the byte
tokenizer itself is plain numpy. Text never turns into special tokens: a document that contains the words
"<|endoftext|>" is encoded as those words, and only the end of a document is the end-of-document token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HubTokenizer

from trainer.config.problems import MISSING, ConfigError, Problem
from trainer.data.config import BpeTokenizerConfig, FileTokenizerConfig
from trainer.data.manifest import TokenizerEntry, token_dtype

EOS = "<|endoftext|>"
_USUAL_EOS = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>", "[EOS]")
_BYTES = 256

Tokens = npt.NDArray[Any]


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    @property
    def eos_id(self) -> int:
        """The token that ends a document; `encode` never gives it."""
        ...

    def encode(self, text: str) -> Tokens:
        """The tokens of a text, of the smallest unsigned type that holds the vocabulary."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """`encode` of each text."""
        ...

    def decode(self, tokens: Tokens) -> str:
        """The text of tokens; what is not UTF-8 becomes U+FFFD, the end of a document "<|endoftext|>"."""
        ...

    def to_json(self) -> str:
        """The tokenizer in Hugging Face's tokenizer.json format."""
        ...


class ByteTokenizer:
    """Token i is the byte i, and token 256 ends a document."""

    vocab_size = _BYTES + 1
    eos_id = _BYTES

    def encode(self, text: str) -> Tokens:
        """The bytes of the text."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(token_dtype(self.vocab_size))

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Tokens) -> str:
        """The text of the bytes."""
        pieces = np.split(tokens, np.flatnonzero(tokens == self.eos_id))
        data = (piece[piece != self.eos_id].astype(np.uint8).tobytes() for piece in pieces)
        return EOS.join(each.decode(errors="replace") for each in data)

    def to_json(self) -> str:
        """The same tokenizer as a byte-level BPE without merges."""
        vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
        hub = HubTokenizer(models.BPE(vocab=vocabulary, merges=[]))
        hub.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        hub.decoder = decoders.ByteLevel()
        hub.add_special_tokens([AddedToken(EOS, special=True)])
        return hub.to_str(pretty=True)


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` package."""

    def __init__(self, hub: HubTokenizer, eos_id: int) -> None:
        hub.no_truncation()
        hub.no_padding()
        hub.encode_special_tokens = True
        self._hub = hub
        # Ids may have gaps; what matters is how many rows an embedding needs.
        self.vocab_size = max(hub.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = eos_id

    def encode(self, text: str) -> Tokens:
        """The tokens of the text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """`encode` of each text, on all cores."""
        dtype = token_dtype(self.vocab_size)
        encodings = self._hub.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=dtype) for encoding in encodings]

    def decode(self, tokens: Tokens) -> str:
        """The text of the tokens."""
        return self._hub.decode(tokens.tolist(), skip_special_tokens=False)

    def to_json(self) -> str:
        """The tokenizer.json text."""
        return self._hub.to_str(pretty=True)


def train_bpe(config: BpeTokenizerConfig, documents: Iterable[str]) -> SubwordTokenizer:
    """Byte-level BPE learned from the documents; fewer than `config.vocab_size` tokens if they are small."""
    hub = HubTokenizer(models.BPE())
    hub.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    hub.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[AddedToken(EOS, special=True)],
        initial_alphabet=_byte_characters(),
        show_progress=False,
    )
    hub.train_from_iterator(documents, trainer)
    eos_id = hub.token_to_id(EOS)
    assert eos_id is not None
    return SubwordTokenizer(hub, eos_id)


def load_tokenizer_file(config: FileTokenizerConfig) -> SubwordTokenizer:
    """The tokenizer of a tokenizer.json file.

    Raises:
        ConfigError: the file cannot be read, or it does not tell which token ends a document.
    """
    hub = _read_hub(Path(config.path), "data.tokenizer.path")
    special = [token.content for token in hub.get_added_tokens_decoder().values() if token.special]
    if config.eos_token is not None:
        eos_id = hub.token_to_id(config.eos_token)
        if eos_id is None:
            rule = f"must be a token of {config.path}"
            fix = f"choose one of its special tokens: {', '.join(special) or 'it has none'}"
            raise ConfigError(Problem("data.tokenizer.eos_token", config.eos_token, rule, fix))
        return SubwordTokenizer(hub, eos_id)
    usual = [name for name in _USUAL_EOS if name in special]
    if len(usual) != 1:
        found = ", ".join(usual) or "none"
        rule = f"{config.path} must have one special token of a usual end-of-document name; found: {found}"
        fix = (
            f"set data.tokenizer.eos_token to one of {', '.join(special)}"
            if special
            else "add one to the file"
        )
        raise ConfigError(Problem("data.tokenizer.eos_token", MISSING, rule, fix))
    eos_id = hub.token_to_id(usual[0])
    assert eos_id is not None
    return SubwordTokenizer(hub, eos_id)


def load_tokenizer(entry: TokenizerEntry, file: Path) -> Tokenizer:
    """The tokenizer of a dataset.

    Raises:
        ConfigError: its tokenizer.json cannot be read.
    """
    if entry.kind == "byte":
        return ByteTokenizer()
    return SubwordTokenizer(_read_hub(file, str(file)), entry.eos_id)


def _read_hub(file: Path, path: str) -> HubTokenizer:
    fix = "name a tokenizer.json that the Hugging Face package `tokenizers` has saved"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem(path, str(file), f"must be a readable text file ({error})", fix)) from error
    try:
        return HubTokenizer.from_str(text)
    except Exception as error:  # the package raises bare Exception
        raise ConfigError(Problem(path, str(file), f"must be a tokenizer in JSON ({error})", fix)) from error


def _byte_characters() -> list[str]:
    """The printable character by which byte-level BPE (GPT-2) stands for each of the 256 bytes.

    Bytes that are printable in Latin-1 stand for themselves; the others take the characters from 256 on, in
    order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(_BYTES, 2 * _BYTES))
    return [chr(byte if byte in printable else next(others)) for byte in range(_BYTES)]
