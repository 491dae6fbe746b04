"""`atoll data`: build a dataset from text, look at one, verify one.

What reads data is imported where it is used: every `atoll` command loads this module.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trainer.config.problems import ConfigError

if TYPE_CHECKING:
    from trainer.data.config import BuildSettings
    from trainer.data.manifest import Manifest

app = typer.Typer(no_args_is_help=True, help="Build datasets of tokens, look at them, verify them.")

_USAGE, _INVALID = 2, 1


@app.command()
def build(
    out: Annotated[Path, typer.Argument(help="Directory of the new dataset.")],
    text: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Text file; may be repeated.")
    ] = None,
    jsonl: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="JSONL file; may be repeated.")
    ] = None,
    directory: Annotated[str | None, typer.Option(metavar="DIR", help="Tree of text files.")] = None,
    python_stdlib: Annotated[
        bool, typer.Option("--python-stdlib", help="Source text of the installed Python standard library.")
    ] = False,
    text_field: Annotated[
        str | None, typer.Option(help="JSONL: key of the text in each object. [text]")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Directory: paths to take; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Directory: paths to leave out; may be repeated."),
    ] = None,
    document_bytes: Annotated[
        int | None, typer.Option(help="Text: cut longer files into documents of about so many bytes. [65536]")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Read at most so many bytes of text.")] = None,
    tokenizer: Annotated[
        str, typer.Option(metavar="byte|bpe|FILE", help="Bytes, BPE learned here, or a tokenizer.json.")
    ] = "byte",
    vocab_size: Annotated[int | None, typer.Option(help="bpe: tokens to learn.")] = None,
    eos_token: Annotated[str | None, typer.Option(help="FILE: special token that ends a document.")] = None,
    eval_fraction: Annotated[float | None, typer.Option(help="Share of documents held out. [0.05]")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides which documents are held out. [0]")] = None,
    shard_tokens: Annotated[
        int | None, typer.Option(help="Tokens after which a shard is closed. [2^27]")
    ] = None,
) -> None:
    """Build a dataset from text files, JSONL, a directory tree or the Python standard library."""
    from trainer.data.build import build_dataset

    sources: list[dict[str, Any]] = [
        {"kind": "text", "paths": text} if text else {},
        {"kind": "jsonl", "paths": jsonl} if jsonl else {},
        {"kind": "directory", "path": directory} if directory is not None else {},
        {"kind": "python-stdlib"} if python_stdlib else {},
    ]
    chosen = [source for source in sources if source]
    if len(chosen) != 1:
        raise typer.BadParameter("give exactly one of --text, --jsonl, --directory and --python-stdlib")
    options = {
        "text_field": text_field,
        "include": include,
        "exclude": exclude,
        "document_bytes": document_bytes,
        "max_bytes": max_bytes,
    }
    settings = _settings(
        source=chosen[0] | _given(options),
        tokenizer=_tokenizer(tokenizer) | _given({"vocab_size": vocab_size, "eos_token": eos_token}),
        **_given({"eval_fraction": eval_fraction, "seed": seed, "shard_tokens": shard_tokens}),
    )
    began = time.perf_counter()
    with _errors_in_words(_USAGE), _progress() as progress:
        dataset = build_dataset(out, settings, progress)
    _describe(dataset.manifest, f"built {out} in {time.perf_counter() - began:.1f} s")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Directory of the dataset.")],
    split: Annotated[
        Literal["train", "eval"], typer.Option(help="Which split to show a sample of.")
    ] = "train",
    sample: Annotated[int, typer.Option(min=0, help="Which sample, in plain order.")] = 0,
    sequence: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 256,
) -> None:
    """Show what a dataset holds, and a sample as text."""
    from trainer.data.dataset import open_dataset

    with _errors_in_words(_USAGE):
        dataset = open_dataset(path)
        decoder = dataset.tokenizer()
    _describe(dataset.manifest, str(path))
    windows = dataset.split(split, max(1, min(sequence, dataset.manifest.split(split).tokens - 1)))
    if sample >= windows.windows:
        limit = f"{split} has {windows.windows} samples of {windows.sequence} tokens, counted from 0"
        raise typer.BadParameter(limit, param_hint="--sample")
    typer.echo(f"\n{split} sample {sample} of {windows.windows}, {windows.sequence} tokens:")
    typer.echo(decoder.decode(windows.sample(sample)))


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="Directory of the dataset.")]) -> None:
    """Compare every file of a dataset with the checksums in its manifest."""
    from trainer.data.manifest import SPLITS, read_manifest
    from trainer.data.verify import file_problems

    with _errors_in_words(_INVALID):
        manifest = read_manifest(path)
        problems = file_problems(path, manifest, full=True)
        if problems:
            raise ConfigError(problems)
    shards = sum(len(manifest.split(name).shards) for name in SPLITS)
    typer.echo(f"{path}: {shards} shards, {manifest.total_bytes():,} bytes, all as the manifest says")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _tokenizer(choice: str) -> dict[str, Any]:
    return {"kind": choice} if choice in ("byte", "bpe") else {"kind": "file", "path": choice}


def _settings(**values: Any) -> BuildSettings:
    from pydantic import ValidationError

    from trainer.data.config import BuildSettings

    try:
        return BuildSettings.model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
    option = "--" + str(found["loc"][-1]).replace("_", "-")
    reasons = {
        "missing": "is required with this kind of source or tokenizer",
        "extra_forbidden": "does not apply to this kind of source or tokenizer",
    }
    raise typer.BadParameter(reasons.get(found["type"], found["msg"]), param_hint=option)


@contextmanager
def _errors_in_words(status: int) -> Iterator[None]:
    """Print what is refused, without a traceback, and exit with `status`."""
    try:
        yield
    except ConfigError as error:
        typer.echo("\n\n".join(map(str, error.problems)), err=True)
        raise typer.Exit(status) from error


@contextmanager
def _progress() -> Iterator[Any]:
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("reading") as status:  # shows nothing where standard error is no terminal
        yield lambda documents, size: status.update(f"{documents:,} documents, {size / 1e6:,.0f} MB of text")


def _describe(manifest: Manifest, title: str) -> None:
    from trainer.data.manifest import SPLITS

    settings, tokenizer = manifest.settings, manifest.tokenizer
    skipped = ", ".join(f"{count} {reason}" for reason, count in manifest.source.skipped.items()) or "nothing"
    typer.echo(title)
    typer.echo(f"source     {manifest.source.description}; left out: {skipped}")
    typer.echo(f"tokenizer  {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, stored as {manifest.dtype}")
    typer.echo(f"held out   {settings.eval_fraction:g} of the documents, seed {settings.seed}")
    rows: list[tuple[str, ...]] = [("split", "documents", "tokens", "text bytes", "tokens/byte", "shards")]
    for name in SPLITS:
        split = manifest.split(name)
        counts = (f"{count:,}" for count in (split.documents, split.tokens, split.text_bytes))
        rows.append((name, *counts, f"{split.tokens_per_byte:.3f}", str(len(split.shards))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        typer.echo("   ".join([row[0].ljust(widths[0]), *cells]))
