"""Settings on the command line: `train.steps=50`, laid over what the files say, left to right."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path as FilePath

from trainer.config.problems import MISSING, Problem
from trainer.config.sources import read_value
from trainer.config.tree import Path, Tree

ORIGIN = "command line"
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def split_arguments(arguments: Iterable[str]) -> tuple[list[FilePath], list[str]]:
    """Positional arguments as (files, overrides): an override has a `=` and no path separator before it."""
    files: list[FilePath] = []
    overrides: list[str] = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if equals and "/" not in key:
            overrides.append(argument)
        else:
            files.append(FilePath(argument))
    return files, overrides


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> list[Problem]:
    """Set every `a.b.c=value` in `tree`, the value being YAML for a scalar or flow collection."""
    problems: list[Problem] = []
    for text in overrides:
        key, equals, value_text = text.partition("=")
        if not equals or not _KEY.fullmatch(key):
            rule = "an override must have the form section.key=value"
            problems.append(Problem(text, MISSING, rule, "for example train.steps=50", ORIGIN))
            continue
        if not value_text.strip():
            fix = f"write {key}=null to unset it, or {key}='\"\"' for empty text"
            problems.append(Problem(key, value_text, "must have a value after the `=`", fix, ORIGIN))
            continue
        path: Path = tuple(key.split("."))
        value, wrong = read_value(value_text, path)
        problems += [Problem(found.path, found.value, found.rule, found.fix, ORIGIN) for found in wrong]
        if not wrong:
            try:
                tree.set(path, value, ORIGIN)
            except IndexError as error:
                fix = "address an item that is there, or set the whole list"
                problems.append(Problem(key, value, str(error), fix, ORIGIN))
    return problems
