"""From a tree of settings to a model: every objection, in a user's words and with the path they wrote.

Two passes. The first follows the schema over the tree, and finds unknown keys and values of the wrong kind in
all sections, also in those that a model's own validator would give up on; it also refuses what pydantic would
quietly turn into something else ("50" or true into a number). The second lets pydantic build the model, and
rewords its objections; those that the first pass already made are left out.
"""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trainer.config.problems import MISSING, Problem
from trainer.config.schema import Shape
from trainer.config.tree import Path, Tree, dotted

M = TypeVar("M", bound=BaseModel)

_BY_SCHEMA = (
    "_type",
    "_parsing",
    "_from_float",
    "greater_than",
    "less_than",
    "literal_error",
    "enum",
    "too_long",
    "too_short",
)


def check_keys_and_kinds(tree: Tree, shape: Shape) -> dict[Path, Problem]:
    """Unknown keys and values of the wrong kind, by the path of each."""
    problems: dict[Path, Problem] = {}
    pending: list[tuple[Path, Any, Shape]] = [((), tree.values, shape)]
    while pending:
        path, value, expected = pending.pop(0)
        if not expected.accepts(value):
            problems[path] = _wrong_kind(tree, path, value, expected)
            continue
        inner = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        narrowed = expected.narrow(value) if inner else expected
        for part, item in inner:
            below = narrowed.child(part)
            if below is not None:
                pending.append(((*path, part), item, below))
            elif isinstance(part, str):
                problems[*path, part] = _unknown_key(tree, (*path, part), item, narrowed, shape)
    return problems


def build(model: type[M], tree: Tree, shape: Shape, known: dict[Path, Problem]) -> M | dict[Path, Problem]:
    """The model, or what is wrong with the tree beside the problems already `known`."""
    try:
        return model.model_validate(tree.values)
    except ValidationError as error:
        found = [(*_locate(tree, detail), detail) for detail in error.errors()]
    deepest = [path for path, _, _ in found]
    problems: dict[Path, Problem] = {}
    for path, in_union, detail in found:
        covered = any(path[: len(other)] == other for other in known)
        elsewhere = in_union and any(
            len(other) > len(path) and other[: len(path)] == path for other in deepest
        )
        if not covered and not elsewhere and path not in problems:
            problems[path] = _reworded(tree, path, detail, shape)
    return problems


def _wrong_kind(tree: Tree, path: Path, value: Any, expected: Shape) -> Problem:
    name = dotted(path)
    fix = f"write {name}: followed by {expected.describe()}"
    if isinstance(value, str) and expected.accepts(_unquoted(value)):
        fix = f"write {_unquoted(value)!r} without quotes".replace("True", "true").replace("False", "false")
    elif isinstance(value, bool | int | float) and expected.accepts(""):
        fix = "put the value in quotes to make it text"
    return Problem(name, value, f"must be {expected.describe()}", fix, tree.origin(path))


def _unquoted(text: str) -> Any:
    """What a text would be without quotes; the words of YAML 1.1 for true and false included."""
    if text.lower() in ("yes", "on", "true"):
        return True
    if text.lower() in ("no", "off", "false"):
        return False
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _unknown_key(tree: Tree, path: Path, value: Any, siblings: Shape, root: Shape) -> Problem:
    key, section = str(path[-1]), dotted(path[:-1])
    known = siblings.keys()
    near = difflib.get_close_matches(key, known, n=1)
    elsewhere = [dotted(other) for other in root.paths() if other[-1] == key and dotted(other) != dotted(path)]
    if near:
        fix = f"did you mean {dotted((*path[:-1], near[0]))}?"
    elif elsewhere:
        fix = f"did you mean {' or '.join(elsewhere[:3])}?"
    else:
        fix = f"remove it; the keys here are {', '.join(known)}" if known else "remove it"
    rule = f"is not a key of {section}" if section else "is not a section of the configuration"
    return Problem(dotted(path), value, rule, fix, tree.origin(path))


def _locate(tree: Tree, detail: ErrorDetails) -> tuple[Path, bool]:
    """The path in the user's tree that pydantic objects to, and whether the objection is one union member's.

    pydantic's location also names the union member it tried, which is no key; a missing key is the last part.
    """
    value: Any = tree.values
    path: Path = ()
    in_union = False
    for depth, part in enumerate(detail["loc"]):
        last_missing = detail["type"] == "missing" and depth == len(detail["loc"]) - 1
        if isinstance(value, dict) and (part in value or last_missing):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part] if part < len(value) else None
        else:
            in_union = True
            continue
        path = (*path, part)
    key = _context(detail).get("key")
    return ((*path, key) if isinstance(key, str) else path), in_union


def _reworded(tree: Tree, path: Path, detail: ErrorDetails, shape: Shape) -> Problem:
    expected = shape.at(path, tree.values)
    name, kind, context = dotted(path) or "configuration", detail["type"], _context(detail)
    value = context.get("value", detail["input"])
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    rule = message.replace("Input should be", "must be", 1).replace("Input should", "must", 1)
    fix = str(context.get("fix", f"change {name}"))
    if kind == "missing":
        value, rule, fix = MISSING, "is required", _how_to_give(name, expected)
    elif kind.startswith("union_tag"):
        path = (*path, str(context["discriminator"]).strip("'"))
        name, value = dotted(path), context.get("tag", MISSING)
        expected = shape.at(path, tree.values)
        choices = " or ".join(map(repr, expected.choices() if expected is not None else ()))
        rule = f"must be {choices}" if "tag" in context else "is required"
        fix = f"add {name}: followed by {choices}"
    elif expected is not None and any(words in kind for words in _BY_SCHEMA):
        rule = f"must be {expected.describe()}"
        near = difflib.get_close_matches(str(value), expected.choices(), n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"write {name}: followed by {expected.describe()}"
    return Problem(name, value, rule, fix, tree.origin(path))


def _how_to_give(name: str, expected: Shape | None) -> str:
    if expected is None:
        return f"add {name}"
    required = expected.required()
    if required:
        return f"add a section {name} with {', '.join(required)}"
    return f"add {name}: followed by {expected.describe()}, or give {name}=... on the command line"


def _context(detail: ErrorDetails) -> dict[str, Any]:
    return detail.get("ctx", {})
