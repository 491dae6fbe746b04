"""Building a dataset: all of it or nothing, once, however many processes ask for it.

    lock -> read, tokenize, write into a hidden sibling directory -> sync -> rename to its name

The rename is what makes a dataset appear, so a build that is killed leaves none; its remains are removed by
the next build on the same machine. The lock only spares the other processes the same work: where a network
file system does not honour it, several build, one rename wins, and the others use its result.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from trainer.config.problems import ConfigError, Problem
from trainer.data.check import is_occupied, settings_problems
from trainer.data.config import BpeTokenizerConfig, BuildSettings, ByteTokenizerConfig, DataConfig
from trainer.data.dataset import Dataset, open_dataset
from trainer.data.manifest import MANIFEST, TOKENIZER, Manifest, SourceReport, TokenizerEntry, token_dtype
from trainer.data.mixing import fraction_of
from trainer.data.shards import SplitWriter
from trainer.data.sources import describe, read_documents, source_problems, utf8_length
from trainer.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer_file, train_bpe
from trainer.files import sync_directory, write_synced

Progress = Callable[[int, int], None]  # documents and UTF-8 bytes so far

_log = logging.getLogger(__name__)
# Tokenized together: enough for all cores, little enough that a tokenizer's bookkeeping stays small.
_BATCH_BYTES = 2**20
_BATCH_DOCUMENTS = 1024


def ensure_dataset(config: DataConfig) -> Dataset:
    """The dataset of a run, built first where `path` holds none and there is a source.

    Any number of processes may call this at once; one builds and the others wait for it.

    Raises:
        ConfigError: there is no dataset and no source, the source cannot be read, `path` cannot be written,
            the dataset was built with other settings than the config's, or its files are not all there.
    """
    directory = _absolute(config.path)
    settings = config.build_settings()
    if settings is not None and not (directory / MANIFEST).exists():
        _build(directory, settings, _no_progress)  # or another process did, which is as good
    dataset = open_dataset(directory)
    problems = settings_problems(config, dataset.manifest)
    if problems:
        raise ConfigError(problems)
    return dataset


def build_dataset(directory: Path, settings: BuildSettings, progress: Progress | None = None) -> Dataset:
    """Build a dataset in a directory that does not exist or is empty.

    Raises:
        ConfigError: the directory is taken or cannot be written, or the source or tokenizer cannot be used.
    """
    directory = _absolute(directory)
    if not _build(directory, settings, progress or _no_progress):
        raise ConfigError(_taken(directory))
    return open_dataset(directory)


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))


def _no_progress(documents: int, text_bytes: int) -> None:
    """Says nothing."""


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds the lock of a dataset's name, which is a hidden file beside it."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory.parent / f".{directory.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.info("waiting for another process that builds %s", directory)
            lock.acquire()
    except OSError as error:
        raise ConfigError(_failed(directory, error)) from error
    try:
        yield
    finally:
        lock.release()


def _build(directory: Path, settings: BuildSettings, progress: Progress) -> bool:
    """Build and publish. False where a dataset of this name is there already, or by the time this one is."""
    problems = source_problems(settings.source)
    if problems:
        raise ConfigError(problems)
    with _locked(directory):
        if (directory / MANIFEST).exists():
            return False
        if is_occupied(directory):
            raise ConfigError(_taken(directory))
        prefix = f".{directory.name}.building-{socket.gethostname()}-"
        building = directory.parent / f"{prefix}{uuid.uuid4().hex}"
        try:
            for remains in directory.parent.iterdir():
                if remains.name.startswith(prefix):  # this process holds the lock, so their builder is gone
                    shutil.rmtree(remains)
            building.mkdir()
            _log.info("building the dataset %s from %s", directory, describe(settings.source))
            manifest = _write(building, settings, progress)
            write_synced(building / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
            sync_directory(building)
            return _publish(building, directory)
        except OSError as error:
            raise ConfigError(_failed(directory, error)) from error
        finally:
            # Renamed by now, or to be given up; what cannot be removed here the next build removes.
            shutil.rmtree(building, ignore_errors=True)


def _publish(building: Path, directory: Path) -> bool:
    """Give the finished dataset its name. False where there is one of that name already."""
    try:
        building.rename(directory)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    sync_directory(directory.parent)
    return True


def _write(directory: Path, settings: BuildSettings, progress: Progress) -> Manifest:
    """Everything but the manifest, which is returned."""
    tokenizer = _make_tokenizer(settings)
    dtype = token_dtype(tokenizer.vocab_size)
    train = SplitWriter(directory, "train", dtype, tokenizer.eos_id, settings.shard_tokens)
    held_out = SplitWriter(directory, "eval", dtype, tokenizer.eos_id, settings.shard_tokens)
    skipped: Counter[str] = Counter()
    shares: list[float] = [1.0, 0.0]  # the smallest and largest seen; only needed where a split stays empty
    number = text_bytes = 0
    try:
        for texts in _batches(read_documents(settings.source, skipped)):
            for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
                share = fraction_of(settings.seed, number)
                shares = [min(share, shares[0]), max(share, shares[1])]
                length = utf8_length(text)
                (held_out if share < settings.eval_fraction else train).add(tokens, length)
                number += 1
                text_bytes += length
            progress(number, text_bytes)
        if not train.documents or not held_out.documents:
            raise ConfigError(_empty_split(settings, number, shares, train.documents == 0))
        train_entry, eval_entry = train.finish(), held_out.finish()
    finally:
        train.abandon()
        held_out.abandon()
    tokenizer_json = tokenizer.to_json().encode()
    write_synced(directory / TOKENIZER, tokenizer_json)
    sha256 = hashlib.sha256(tokenizer_json).hexdigest()
    return Manifest(
        dtype=dtype.name,  # type: ignore[arg-type]  # one of the three by construction, and pydantic checks
        tokenizer=TokenizerEntry(
            kind=settings.tokenizer.kind,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            sha256=sha256,
        ),
        train=train_entry,
        eval=eval_entry,
        source=SourceReport(description=describe(settings.source), skipped=dict(sorted(skipped.items()))),
        settings=settings,
    )


def _make_tokenizer(settings: BuildSettings) -> Tokenizer:
    config = settings.tokenizer
    if isinstance(config, ByteTokenizerConfig):
        return ByteTokenizer()
    if isinstance(config, BpeTokenizerConfig):
        return train_bpe(config, _training_sample(settings, config.sample_bytes))
    return load_tokenizer_file(config)


def _training_sample(settings: BuildSettings, sample_bytes: int) -> Iterator[str]:
    """The first documents of the training split: what is held out must not shape the tokens either."""
    total = 0
    for number, text in enumerate(read_documents(settings.source, Counter())):
        if fraction_of(settings.seed, number) >= settings.eval_fraction:
            yield text
            total += utf8_length(text)
            if total >= sample_bytes:
                return


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_BYTES or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _taken(directory: Path) -> Problem:
    if (directory / MANIFEST).exists():
        fix = "use it as it is, or name another directory; atoll does not overwrite a dataset"
        return Problem("data.path", str(directory), "must not hold a dataset yet", fix)
    fix = "name a directory that does not exist yet; atoll does not remove what is there"
    rule = "must be free for a new dataset, but something else is there"
    return Problem("data.path", str(directory), rule, fix)


def _failed(directory: Path, error: OSError) -> Problem:
    fix = "name a directory on a file system with free space where this user may write"
    return Problem("data.path", str(directory), f"a dataset must be possible to build there ({error})", fix)


def _empty_split(settings: BuildSettings, documents: int, shares: list[float], train: bool) -> Problem:
    if documents < 2:
        rule = f"must give at least two documents, one to train on and one to hold out, but gives {documents}"
        fix = "add text, or raise max_bytes; a text file is cut into documents of document_bytes"
        return Problem("data.source", describe(settings.source), rule, fix)
    name = "train" if train else "eval"
    fraction = shares[1] * 0.999 if train else min(0.999, shares[0] * 1.001 + 1e-6)
    rule = f"each split must get a document; with seed {settings.seed}, {name} gets none of the {documents}"
    fix = f"set eval_fraction to {'at most' if train else 'at least'} {fraction:.4g}, or add documents"
    return Problem("data.eval_fraction", settings.eval_fraction, rule, fix)
