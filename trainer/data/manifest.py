"""The manifest of a dataset: what is in its directory, and what it was built from.

    manifest.json        this
    tokenizer.json       Hugging Face format, whatever the kind
    train-00000.bin      tokens, little-endian unsigned integers of the smallest type that holds the
    vocabulary train-00000.index    where each document begins: documents + 1 little-endian uint64 counts of
    tokens, the last
                         of which is the end of the shard; a document includes its end-of-document token
    eval-00000.bin ...   the same for the held-out documents

The same text and settings give the same bytes: nothing here tells the time or the machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.config.problems import MISSING, ConfigError, Problem
from trainer.data.config import BuildSettings

FORMAT_VERSION: Final = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
INDEX_ENTRY_BYTES = 8

SplitName = Literal["train", "eval"]
SPLITS: tuple[SplitName, ...] = ("train", "eval")

_FileName = Annotated[str, Field(pattern=r"^(train|eval)-\d{5,}\.(bin|index)$")]
_Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True)


class ShardEntry(_Entry):
    """One shard: a file of tokens and the index of its documents."""

    file: _FileName
    bytes: _Count
    sha256: _Checksum
    index: _FileName
    index_sha256: _Checksum
    tokens: int = Field(ge=1)
    documents: int = Field(ge=1)

    @property
    def index_bytes(self) -> int:
        """Size of the index file."""
        return (self.documents + 1) * INDEX_ENTRY_BYTES


class SplitEntry(_Entry):
    """The shards of a split. `text_bytes` counts the UTF-8 bytes of its documents."""

    tokens: _Count
    documents: _Count
    text_bytes: _Count
    shards: tuple[ShardEntry, ...]

    @property
    def tokens_per_byte(self) -> float:
        """Turns nats per token into nats per byte of text. End-of-document tokens count as tokens."""
        return self.tokens / max(1, self.text_bytes)


class TokenizerEntry(_Entry):
    """The tokenizer that made the tokens."""

    kind: Literal["byte", "bpe", "file"]
    vocab_size: int = Field(ge=1)
    eos_id: _Count
    sha256: _Checksum


class SourceReport(_Entry):
    """What was read: a description, and how many files or lines were left out, by reason."""

    description: str
    skipped: dict[str, int]


class Manifest(_Entry):
    """The contents of `manifest.json`."""

    version: Literal[1] = FORMAT_VERSION
    dtype: Literal["uint8", "uint16", "uint32"]
    tokenizer: TokenizerEntry
    train: SplitEntry
    eval: SplitEntry
    source: SourceReport
    settings: BuildSettings

    def split(self, name: SplitName) -> SplitEntry:
        """The entry of a split."""
        return self.train if name == "train" else self.eval

    def token_dtype(self) -> np.dtype[Any]:
        """The numpy type of the stored tokens."""
        return np.dtype(self.dtype).newbyteorder("<")

    def shards(self) -> Iterator[ShardEntry]:
        """The shards of all splits."""
        for name in SPLITS:
            yield from self.split(name).shards

    def total_bytes(self) -> int:
        """Size of all shards and indices."""
        return sum(shard.bytes + shard.index_bytes for shard in self.shards())

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Manifest:
        for shard in self.shards():
            if shard.bytes != shard.tokens * self.token_dtype().itemsize:
                raise ValueError(
                    f"{shard.file}: {shard.tokens} tokens of {self.dtype} are not {shard.bytes} bytes"
                )
        for name in SPLITS:
            split = self.split(name)
            for count in ("tokens", "documents"):
                if getattr(split, count) != sum(getattr(shard, count) for shard in split.shards):
                    raise ValueError(
                        f"the {count} of the {name} shards do not add up to {getattr(split, count)}"
                    )
        if self.token_dtype() != token_dtype(self.tokenizer.vocab_size):
            raise ValueError(
                f"a vocabulary of {self.tokenizer.vocab_size} tokens is not stored as {self.dtype}"
            )
        return self


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest little-endian unsigned type that holds every token id."""
    for name in ("uint8", "uint16", "uint32"):
        if vocab_size - 1 <= np.iinfo(name).max:
            return np.dtype(name).newbyteorder("<")
    raise ValueError(f"a vocabulary of {vocab_size} tokens does not fit in 32 bits")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the dataset in `directory`.

    Raises:
        ConfigError: it is not readable, not a manifest, or of a newer format.
    """
    file = directory / MANIFEST
    rebuild = "restore the file, or build the dataset again in another directory"
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        rule = "must be there, as in every directory that holds a dataset"
        fix = f"correct the path, or build a dataset with `atoll data build {directory} ...`"
        raise ConfigError(Problem(str(file), MISSING, rule, fix)) from error
    except OSError as error:
        raise ConfigError(Problem(str(file), error.strerror, "must be a readable file", rebuild)) from error
    except ValueError as error:
        raise ConfigError(Problem(str(file), str(error), "must be JSON text", rebuild)) from error
    version = values.get("version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        rule = f"this version of atoll reads datasets up to format version {FORMAT_VERSION}"
        fix = "upgrade atoll, or build the dataset again"
        raise ConfigError(Problem(str(file), {"version": version}, rule, fix))
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        details = (
            (".".join(map(str, detail["loc"])) or "manifest", detail["msg"]) for detail in error.errors()
        )
        found = "; ".join(f"{place}: {message}" for place, message in details)
        rule = "must be a manifest as `atoll data build` writes it"
        raise ConfigError(Problem(str(file), found, rule, rebuild)) from error
