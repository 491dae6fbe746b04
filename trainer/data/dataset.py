"""Reading a dataset: the shards of a split as one stream of tokens, cut into windows, mapped rather than
read.

Windows of `sequence + 1` tokens begin every `sequence` tokens, so each token but the first is a target
exactly once; they run over the ends of documents and of shards.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.config.problems import ConfigError
from trainer.data.manifest import TOKENIZER, Manifest, SplitEntry, SplitName, read_manifest
from trainer.data.order import Int64s
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.data.verify import file_problems

_OPEN_SHARDS = 256  # a mapping holds a file descriptor, of which a process commonly has 1024


class Dataset:
    """An opened dataset directory. `open_dataset` makes one."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.manifest.tokenizer.vocab_size

    @property
    def eos_id(self) -> int:
        """The token that ends every document."""
        return self.manifest.tokenizer.eos_id

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return load_tokenizer(self.manifest.tokenizer, self.directory / TOKENIZER)

    def split(self, name: SplitName, sequence: int) -> TokenSplit:
        """The windows of a split, of `sequence` inputs each."""
        return TokenSplit(self.directory, self.manifest.split(name), self.manifest.token_dtype(), sequence)


class TokenSplit:
    """One split as a stream of tokens in windows of `sequence + 1`; nothing is copied but the window asked
    for.

    Attributes:
        sequence: Inputs per window; windows begin this many tokens apart.
        windows: How many whole windows there are; the tail that fills none is left out.
        tokens: Length of the stream.
        documents: How many documents it holds.
    """

    def __init__(self, directory: Path, entry: SplitEntry, dtype: np.dtype[Any], sequence: int) -> None:
        if sequence < 1:
            raise ValueError(f"sequence must be at least 1, not {sequence}")
        self.sequence = sequence
        self.tokens = entry.tokens
        self.documents = entry.documents
        self.windows = max(0, entry.tokens - 1) // sequence
        self._directory = directory
        self._dtype = dtype
        self._shards = entry.shards
        self._starts = [0, *accumulate(shard.tokens for shard in entry.shards)]
        self._first_documents = [0, *accumulate(shard.documents for shard in entry.shards)]
        self._map = lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    def sample(self, index: int) -> Int64s:
        """Window `index`, shape (sequence + 1,).

        Raises:
            IndexError: there is no such window.
        """
        window = np.empty(self.sequence + 1, dtype=np.int64)
        self.read(index, window)
        return window

    def read(self, index: int, out: Int64s) -> None:
        """Write window `index` to `out`, shape (sequence + 1,)."""
        if not 0 <= index < self.windows:
            raise IndexError(f"window {index} of {self.windows}")
        self._copy(index * self.sequence, out)

    def document(self, index: int) -> Int64s:
        """The tokens of document `index`, the end-of-document token included.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} of {self.documents}")
        shard = bisect_right(self._first_documents, index) - 1
        offsets = np.fromfile(self._directory / self._shards[shard].index, dtype="<u8")
        position = index - self._first_documents[shard]
        begin, end = int(offsets[position]), int(offsets[position + 1])
        tokens = np.empty(end - begin, dtype=np.int64)
        self._copy(self._starts[shard] + begin, tokens)
        return tokens

    def _copy(self, start: int, out: Int64s) -> None:
        """Fill `out` with the stream from token `start` on, over as many shards as it takes."""
        filled = 0
        shard = bisect_right(self._starts, start) - 1
        while filled < len(out):
            offset = start + filled - self._starts[shard]
            piece = self._map(shard)[offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1

    def _open(self, shard: int) -> npt.NDArray[Any]:
        entry = self._shards[shard]
        mapped = np.memmap(self._directory / entry.file, dtype=self._dtype, mode="r", shape=(entry.tokens,))
        return mapped.view(np.ndarray)  # slicing a plain view of it is ten times as fast as slicing a memmap


def open_dataset(directory: Path) -> Dataset:
    """The dataset in `directory`, its files present and of the right size.

    Raises:
        ConfigError: every file that is missing or of another size, or what is wrong with the manifest.
    """
    manifest = read_manifest(directory)
    problems = file_problems(directory, manifest, full=False)
    if problems:
        raise ConfigError(problems)
    return Dataset(directory, manifest)
