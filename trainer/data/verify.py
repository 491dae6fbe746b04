"""Do the files of a dataset hold what its manifest says? Sizes are cheap, checksums read everything."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainer.config.problems import MISSING, Problem
from trainer.data.manifest import MANIFEST, TOKENIZER, Manifest

FULL_BELOW_BYTES = 2**28
_THREADS = 4  # hashing releases the interpreter lock; more threads only make a disk seek


@dataclass(frozen=True)
class _Expected:
    """A file as the manifest describes it; `size` is None where only the checksum is known."""

    file: Path
    size: int | None
    sha256: str


def file_problems(directory: Path, manifest: Manifest, full: bool) -> list[Problem]:
    """Every file that is missing, has another size, or (`full`) another checksum than the manifest says."""
    expected = list(_expected(directory, manifest))
    with ThreadPoolExecutor(_THREADS if full else 1) as pool:
        found = pool.map(lambda each: _problem(each, full), expected)
    return [problem for problem in found if problem is not None]


def _expected(directory: Path, manifest: Manifest) -> Iterator[_Expected]:
    yield _Expected(directory / TOKENIZER, None, manifest.tokenizer.sha256)
    for shard in manifest.shards():
        yield _Expected(directory / shard.file, shard.bytes, shard.sha256)
        yield _Expected(directory / shard.index, shard.index_bytes, shard.index_sha256)


def _problem(expected: _Expected, full: bool) -> Problem | None:
    path = str(expected.file)
    restore = "restore the file from a copy, or build the dataset again in another directory"
    try:
        size = expected.file.stat().st_size
        if expected.size is not None and size != expected.size:
            word = "truncated" if size < expected.size else "too long"
            rule = f"must have {expected.size} bytes, as {MANIFEST} says; it is {word}"
            return Problem(path, size, rule, restore)
        if full:
            with expected.file.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != expected.sha256:
                rule = f"must have the checksum sha256:{expected.sha256}, as {MANIFEST} says; it is corrupt"
                return Problem(path, f"sha256:{digest}", rule, restore)
    except FileNotFoundError:
        return Problem(path, MISSING, f"must be there, as {MANIFEST} lists it; it is missing", restore)
    except OSError as error:
        return Problem(path, error.strerror, "must be readable", "check its permissions and the file system")
    return None
