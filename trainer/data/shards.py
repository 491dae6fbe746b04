"""Writing the shards of one split: tokens and document offsets, hashed as they are written."""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.manifest import ShardEntry, SplitEntry, SplitName
from trainer.files import sync_file, write_synced

_BUFFER_BYTES = 2**20


class SplitWriter:
    """Appends documents to the shards of a split. A document is never divided between shards."""

    def __init__(
        self, directory: Path, split: SplitName, dtype: np.dtype[Any], eos_id: int, shard_tokens: int
    ) -> None:
        self.documents = 0
        self.tokens = 0
        self._directory = directory
        self._split = split
        self._dtype = dtype
        self._eos = np.array([eos_id], dtype=dtype).tobytes()
        self._shard_tokens = shard_tokens
        self._text_bytes = 0
        self._finished: list[ShardEntry] = []
        self._shard: _Shard | None = None

    def add(self, tokens: npt.NDArray[Any], text_bytes: int) -> None:
        """Append a document of so many UTF-8 bytes; the end-of-document token is added to its tokens."""
        if self._shard is None:
            name = f"{self._split}-{len(self._finished):05d}"
            self._shard = _Shard(self._directory, name, self._dtype)
        self._shard.add(np.ascontiguousarray(tokens, dtype=self._dtype), self._eos)
        self.documents += 1
        self.tokens += len(tokens) + 1
        self._text_bytes += text_bytes
        if self._shard.tokens >= self._shard_tokens:
            self._close_shard()

    def finish(self) -> SplitEntry:
        """Close the last shard; what the split holds."""
        self._close_shard()
        return SplitEntry(
            tokens=self.tokens,
            documents=self.documents,
            text_bytes=self._text_bytes,
            shards=tuple(self._finished),
        )

    def abandon(self) -> None:
        """Close the file that is open, where the build failed."""
        if self._shard is not None:
            self._shard.file.close()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._finished.append(self._shard.finish())
            self._shard = None


class _Shard:
    """One shard while it is written."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype[Any]) -> None:
        self.file = open(directory / f"{name}.bin", "wb", buffering=_BUFFER_BYTES)  # noqa: SIM115 - finish closes it
        self.tokens = 0
        self._directory = directory
        self._name = name
        self._itemsize = dtype.itemsize
        self._hash = hashlib.sha256()
        self._offsets = array("Q", [0])

    def add(self, tokens: npt.NDArray[Any], eos: bytes) -> None:
        for data in (tokens.data, eos):
            self.file.write(data)
            self._hash.update(data)
        self.tokens += len(tokens) + 1
        self._offsets.append(self.tokens)

    def finish(self) -> ShardEntry:
        with self.file:
            sync_file(self.file)
        index = np.asarray(self._offsets, dtype="<u8").tobytes()
        index_name = f"{self._name}.index"
        write_synced(self._directory / index_name, index)
        return ShardEntry(
            file=f"{self._name}.bin",
            bytes=self.tokens * self._itemsize,
            sha256=self._hash.hexdigest(),
            index=index_name,
            index_sha256=hashlib.sha256(index).hexdigest(),
            tokens=self.tokens,
            documents=len(self._offsets) - 1,
        )
