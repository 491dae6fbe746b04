"""Documents, one at a time and in an order that depends on the source alone.

What a user names (a text file, a JSONL line) must be readable, or the build stops and says where; what is
merely found (a file in a tree) and is no text is left out and counted.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import IO

from trainer.config.problems import ConfigError, Problem
from trainer.data.config import DirectorySource, JsonlSource, SourceConfig, StdlibSource, TextSource

Skipped = Counter[str]

_TREE_DOCUMENT_BYTES = 2**23  # a larger file of a tree becomes several documents, which bounds the memory
_UNDECODABLE = "not UTF-8 text"
_EMPTY = "empty"
# Tests are a third of some installations and absent from others; installed packages are not the standard
# library.
_STDLIB_EXCLUDE = tuple(
    pattern
    for name in ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
    for pattern in (f"{name}/*", f"*/{name}/*")
)


def read_documents(source: SourceConfig, skipped: Skipped) -> Iterator[str]:
    """The documents of a source; none is empty. What is left out is counted in `skipped`, by reason.

    Raises:
        ConfigError: a named file cannot be read or is not what it should be.
    """
    if isinstance(source, TextSource):
        documents = _text(source)
    elif isinstance(source, JsonlSource):
        documents = _jsonl(source, skipped)
    elif isinstance(source, DirectorySource):
        documents = _tree(Path(source.path), source.include, source.exclude, skipped)
    else:
        documents = _tree(_stdlib(), ("*.py",), _STDLIB_EXCLUDE, skipped)
    total = 0
    for document in documents:
        if not document:
            skipped[_EMPTY] += 1
            continue
        total += utf8_length(document)
        if source.max_bytes is not None and total > source.max_bytes:
            return
        yield document


def describe(source: SourceConfig) -> str:
    """What the source is, for people."""
    if isinstance(source, StdlibSource):
        return f"standard library of {platform.python_implementation()} {platform.python_version()}"
    if isinstance(source, DirectorySource):
        return f"directory {source.path}"
    others = f" and {len(source.paths) - 3} more" if len(source.paths) > 3 else ""
    return f"{source.kind} {', '.join(source.paths[:3])}{others}"


def source_problems(source: SourceConfig) -> list[Problem]:
    """The files and directories of the source that are not there. Reads none of them."""
    problems = []
    if isinstance(source, DirectorySource) and not Path(source.path).is_dir():
        fix = "correct the path; to read single files, use the kind text or jsonl"
        problems.append(Problem("data.source.path", source.path, "must be an existing directory", fix))
    if isinstance(source, TextSource | JsonlSource):
        for path in source.paths:
            if not _matches(path):
                rule = "must be an existing file, or match one"
                problems.append(Problem("data.source.paths", path, rule, "correct the path"))
            elif os.path.isdir(path):
                fix = "name the files in it, or use the kind directory"
                problems.append(Problem("data.source.paths", path, "must be a file, not a directory", fix))
    return problems


def utf8_length(text: str) -> int:
    """Bytes of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _matches(path: str) -> list[str]:
    """The files that a path names: itself, or those that match it, sorted."""
    if os.path.exists(path):
        return [path]
    return sorted(glob.glob(path, recursive=True))


def _open(path: str | Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        fix = "correct the path or the permissions"
        raise ConfigError(Problem(str(path), error.strerror, "must be a readable file", fix)) from error


def _text(source: TextSource) -> Iterator[str]:
    for path in chain.from_iterable(map(_matches, source.paths)):
        offset = 0
        with _open(path) as file:
            for piece in _pieces(file, source.document_bytes):
                try:
                    yield piece.decode()
                except UnicodeDecodeError as error:
                    found = f"byte 0x{piece[error.start]:02x} at offset {offset + error.start}"
                    fix = "convert the file to UTF-8, for example with iconv"
                    rule = f"must be UTF-8 text ({error.reason})"
                    raise ConfigError(Problem(path, found, rule, fix)) from error
                offset += len(piece)


def _jsonl(source: JsonlSource, skipped: Skipped) -> Iterator[str]:
    for path in chain.from_iterable(map(_matches, source.paths)):
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                text = _text_of(line, f"{path}:{number}", source.text_field)
                try:
                    utf8_length(text)
                except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no character
                    skipped[_UNDECODABLE] += 1
                else:
                    yield text


def _text_of(line: bytes, place: str, field: str) -> str:
    excerpt = line[:80].decode(errors="replace").rstrip("\n")
    try:
        values = json.loads(line)
    except ValueError as error:
        rule = f"must be a JSON object on one line ({error})"
        raise ConfigError(Problem(place, excerpt, rule, "correct or remove the line")) from error
    if not isinstance(values, dict):
        raise ConfigError(Problem(place, excerpt, "must be a JSON object", "correct or remove the line"))
    if not isinstance(values.get(field), str):
        rule = f"must have text under the key {field!r} (text_field)"
        texts = [key for key, value in values.items() if isinstance(value, str)]
        fix = f"set text_field to a key that holds text: {', '.join(texts)}" if texts else "correct the line"
        raise ConfigError(Problem(place, excerpt, rule, fix))
    text: str = values[field]
    return text


def _tree(top: Path, include: Sequence[str], exclude: Sequence[str], skipped: Skipped) -> Iterator[str]:
    for path in _walk(top, include, exclude):
        with _open(path) as file:
            for piece in _pieces(file, _TREE_DOCUMENT_BYTES):
                try:
                    document = piece.decode()
                except UnicodeDecodeError:
                    skipped[_UNDECODABLE] += 1
                else:
                    yield document


def _walk(top: Path, include: Sequence[str], exclude: Sequence[str]) -> Iterator[Path]:
    """Regular files below `top`, sorted by name at every level."""

    def fail(error: OSError) -> None:
        fix = "correct the path or the permissions, or exclude it"
        raise ConfigError(Problem(str(error.filename), error.strerror, "must be a readable directory", fix))

    # A pattern that ends in * and matches "name/" matches everything below, which need not be visited.
    pruning = [pattern for pattern in exclude if pattern.endswith("*")]
    for place, directories, files in os.walk(top, onerror=fail):
        below = Path(place).relative_to(top)
        kept = (name for name in directories if not _any((below / name).as_posix() + "/", pruning))
        directories[:] = sorted(kept)
        for name in sorted(files):
            path = (below / name).as_posix()
            if _any(path, include) and not _any(path, exclude) and (top / path).is_file():
                yield top / path


def _any(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _pieces(file: IO[bytes], limit: int) -> Iterator[bytes]:
    """The file in pieces of about `limit` bytes that end at line ends, or else between characters."""
    rest = b""
    while block := file.read(limit):
        rest += block
        if len(rest) < limit:
            continue
        cut = rest.rfind(b"\n") + 1 or _character_end(rest)
        yield rest[:cut]
        rest = rest[cut:]
    if rest:
        yield rest


def _character_end(data: bytes) -> int:
    """Where to cut so that no UTF-8 character is cut: before the last byte that begins one."""
    for back in range(1, 5):
        if data[-back] & 0xC0 != 0x80:
            return len(data) - back
    return len(data)


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))
