"""YAML files and command-line overrides -> one validated model, or every problem at once.

    files, left to right -> overrides -> ${ENV:default} -> keys and kinds -> the model's own rules

Nothing here knows what a run is: any pydantic model can be loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import TypeVar

from pydantic import BaseModel

from trainer.config.interpolation import InterpolationError, expand
from trainer.config.overrides import apply_overrides
from trainer.config.problems import ConfigError, Problem
from trainer.config.schema import Shape
from trainer.config.sources import read_file, read_value
from trainer.config.tree import Path, Tree, dotted
from trainer.config.validation import build, check_keys_and_kinds

M = TypeVar("M", bound=BaseModel)


def load(
    model: type[M],
    files: Sequence[FilePath],
    overrides: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> M:
    """The model that the merged files and overrides describe.

    `files` are YAML, merged left to right: mappings merge key by key, lists and scalars replace. `overrides`
    are `a.b.c=value` with a YAML value. `${NAME:default}` in text values is replaced from `environment` (the
    process's own by default).

    Raises:
        ConfigError: all that is wrong: unreadable files, bad syntax, duplicate and unknown keys, unset
            variables, wrong types, missing keys, broken rules of the models.
    """
    shape = Shape.of(model)
    tree, problems = Tree(), []
    for file in files:
        read, wrong = read_file(FilePath(file))
        tree.merge(read)
        problems += wrong
    problems += apply_overrides(tree, overrides)
    incomplete = bool(problems)  # what could not be read would otherwise be reported as missing as well
    unexpanded = _interpolate(tree, shape, os.environ if environment is None else environment)
    objections = check_keys_and_kinds(tree, shape) | unexpanded
    if not incomplete:
        built = build(model, tree, shape, objections)
        if isinstance(built, BaseModel) and not objections:
            return built
        if isinstance(built, dict):
            objections |= built
    said = {problem.path for problem in problems}
    raise ConfigError([*problems, *(problem for problem in objections.values() if problem.path not in said)])


def _interpolate(tree: Tree, shape: Shape, environment: Mapping[str, str]) -> dict[Path, Problem]:
    """Expand the references in all text of `tree`; where no text may stand, the outcome is read as YAML."""
    problems: dict[Path, Problem] = {}
    for path, text in list(tree.strings()):
        if "${" not in text:
            continue
        try:
            value = expand(text, environment)
        except InterpolationError as error:
            problems[path] = Problem(dotted(path), text, str(error), error.fix, tree.origin(path))
            continue
        expected = shape.at(path, tree.values)
        origin = f"{tree.origin(path)}, from {text}"
        if expected is not None and not expected.accepts(value):
            typed, wrong = read_value(value, path)
            tree.set(path, value if wrong else typed, origin)
        else:
            tree.set(path, value, origin)
    return problems
