"""Everything that can be wrong with the data of a run, found before any process group exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.config.problems import ConfigError, Problem
from trainer.data.config import BpeTokenizerConfig, ByteTokenizerConfig, DataConfig, SourceConfig
from trainer.data.dataset import TokenSplit
from trainer.data.manifest import MANIFEST, SPLITS, Manifest, read_manifest
from trainer.data.sources import source_problems
from trainer.data.tokenizer import ByteTokenizer, load_tokenizer_file
from trainer.data.verify import FULL_BELOW_BYTES, file_problems


def check_dataset(config: DataConfig, model_vocab: int, sequence: int) -> list[Problem]:
    """All that keeps a model of `model_vocab` tokens from training on the dataset in windows of `sequence`.

    Builds nothing: where there is no dataset yet but a source, only what the source and tokenizer need is
    checked.
    """
    directory = Path(config.path)
    try:
        if not (directory / MANIFEST).exists():
            if config.source is None:
                return _absent(config, directory)
            return _unbuilt(config, config.source, directory, model_vocab)
        manifest = read_manifest(directory)
    except ConfigError as error:
        return list(error.problems)
    except OSError as error:
        fix = "check its permissions and the file system"
        return [Problem("data.path", config.path, f"must be readable ({error.strerror})", fix)]
    full = config.verify == "full" or (config.verify == "auto" and manifest.total_bytes() < FULL_BELOW_BYTES)
    return [
        *settings_problems(config, manifest),
        *file_problems(directory, manifest, full),
        *_vocabulary(manifest.tokenizer.vocab_size, model_vocab, f"the dataset {config.path}"),
        *_windows(directory, manifest, sequence),
    ]


def settings_problems(config: DataConfig, manifest: Manifest) -> list[Problem]:
    """Where the dataset was built otherwise than the config asks; without a source it asks for nothing."""
    settings = config.build_settings()
    if settings is None:
        return []
    # How the tokens are cut into files changes no sample.
    asked, built = ({**each.model_dump(), "shard_tokens": None} for each in (settings, manifest.settings))
    return [
        Problem(
            f"data.{path}",
            wanted,
            f"must be as the dataset {config.path} was built: {found!r}",
            f"set data.{path} to {found!r}, or name another data.path to build a second dataset there, "
            "or remove data.source to use the dataset as it is",
        )
        for path, wanted, found in _differences(asked, built)
    ]


def is_occupied(directory: Path) -> bool:
    """Whether something is in the place of a new dataset; an empty directory is not."""
    if directory.is_dir():
        return any(directory.iterdir())
    return directory.exists() or directory.is_symlink()


def _differences(
    asked: dict[str, Any], built: dict[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    if asked.get("kind") != built.get("kind"):  # the other keys then have different meanings
        return [(f"{prefix}kind", asked["kind"], built["kind"])]
    differences: list[tuple[str, Any, Any]] = []
    for key, wanted in asked.items():
        if isinstance(wanted, dict):
            differences += _differences(wanted, built[key], f"{prefix}{key}.")
        elif wanted != built[key]:
            differences.append((prefix + key, wanted, built[key]))
    return differences


def _absent(config: DataConfig, directory: Path) -> list[Problem]:
    there = f"the directory has no {MANIFEST}" if directory.is_dir() else "there is no such directory"
    fix = f"build it with `atoll data build {config.path} ...`, or set data.source to build it on first use"
    return [Problem("data.path", config.path, f"must be the directory of a dataset; {there}", fix)]


def _unbuilt(config: DataConfig, source: SourceConfig, directory: Path, model_vocab: int) -> list[Problem]:
    problems = source_problems(source)
    if is_occupied(directory):
        rule = f"must be a dataset or free for a new one, but something without a {MANIFEST} is there"
        problems.append(Problem("data.path", config.path, rule, "name a directory that does not exist yet"))
    try:
        size = _asked_vocabulary(config)
    except ConfigError as error:
        return [*problems, *error.problems]
    return [*problems, *_vocabulary(size, model_vocab, "data.tokenizer")]


def _asked_vocabulary(config: DataConfig) -> int:
    if isinstance(config.tokenizer, ByteTokenizerConfig):
        return ByteTokenizer.vocab_size
    if isinstance(config.tokenizer, BpeTokenizerConfig):
        return config.tokenizer.vocab_size
    return load_tokenizer_file(config.tokenizer).vocab_size


def _vocabulary(size: int, model_vocab: int, whose: str) -> list[Problem]:
    if size <= model_vocab:
        return []
    rule = f"must be at least the vocabulary of {whose}, {size} tokens"
    fix = f"set model.vocab to {size} or more; {-(-size // 64) * 64} divides evenly"
    return [Problem("model.vocab", model_vocab, rule, fix)]


def _windows(directory: Path, manifest: Manifest, sequence: int) -> list[Problem]:
    problems = []
    for name in SPLITS:
        split = TokenSplit(directory, manifest.split(name), manifest.token_dtype(), sequence)
        if not split.windows:
            rule = (
                f"the {name} split of {directory} must hold a window of sequence + 1 = {sequence + 1} "
                f"tokens, but has {split.tokens}"
            )
            more = "a larger" if name == "eval" else "a smaller"
            fix = f"build with more text or {more} eval_fraction"
            if split.tokens > 1:
                fix = f"set train.sequence to at most {split.tokens - 1}, or {fix}"
            problems.append(Problem("train.sequence", sequence, rule, fix))
    return problems
