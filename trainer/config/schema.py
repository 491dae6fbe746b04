"""The JSON schema of a config model: for editors, and as the map by which the loader finds its way.

pydantic derives the schema from the models, so the file that editors complete keys from, the suggestions for
unknown keys and the words for expected types all say the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

Fragment = dict[str, Any]


def editor_schema(model: type[BaseModel]) -> str:
    """The JSON schema of `model` as text, ready for a file that a `yaml-language-server` line names.

    Keys that must be given are not listed as required: a file may leave them to another file, a preset or an
    override. Only tags that tell the members of a union apart stay required, since they select the member.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
    for fragment in [schema, *schema.get("$defs", {}).values()]:
        properties = fragment.get("properties", {})
        tags = [key for key in fragment.pop("required", []) if "const" in properties[key]]
        if tags:
            fragment["required"] = tags
        if properties:
            fragment.setdefault("additionalProperties", False)
    return json.dumps(schema, indent=2) + "\n"


@dataclass(frozen=True)
class Shape:
    """What may stand at one place of a configuration: any of `alternatives`, parts of the schema `root`."""

    root: Fragment
    alternatives: tuple[Fragment, ...]

    @staticmethod
    def of(model: type[BaseModel]) -> Shape:
        """The shape of a whole configuration."""
        root = model.model_json_schema()
        return Shape(root, tuple(_flatten(root, root)))

    def narrow(self, value: Any) -> Shape:
        """Only the union members that `value` can mean: those of its kind and its tag, if any."""
        fitting = [fragment for fragment in self.alternatives if kind_of(value) in _kinds(fragment)]
        if isinstance(value, dict):
            fitting = [fragment for fragment in fitting if _tags_agree(fragment, value)] or fitting
        return Shape(self.root, tuple(fitting))

    def accepts(self, value: Any) -> bool:
        """Whether a value of this kind may stand here. Whole floats count as integers, integers as floats."""
        kinds = set().union(*(_kinds(fragment) for fragment in self.alternatives))
        kind = kind_of(value)
        if kind == "integer":
            return bool(kinds & {"integer", "number"})
        if kind == "number":
            return "number" in kinds or ("integer" in kinds and float(value).is_integer())
        return kind in kinds

    def child(self, part: str | int) -> Shape | None:
        """The shape below a key or index; None where no alternative knows it."""
        found: list[Fragment] = []
        for fragment in self.alternatives:
            inner = _below(fragment, part)
            if inner is not None:
                found += _flatten(self.root, inner)
        return Shape(self.root, tuple(found)) if found else None

    def at(self, path: Sequence[str | int], values: Any) -> Shape | None:
        """The shape at `path` of a configuration that holds `values`, which decide between union members."""
        here: Shape | None = self
        for part in path:
            here = here.narrow(values).child(part) if here is not None else None
            try:
                values = values[part]
            except (LookupError, TypeError):  # a path may end in a key that is not there yet
                values = None
        return here

    def keys(self) -> list[str]:
        """The keys that may stand in a mapping here."""
        return list(
            dict.fromkeys(key for fragment in self.alternatives for key in fragment.get("properties", ()))
        )

    def required(self) -> list[str]:
        """The keys that every mapping here must have."""
        mappings = [fragment for fragment in self.alternatives if "properties" in fragment]
        return [
            key for key in self.keys() if all(key in fragment.get("required", ()) for fragment in mappings)
        ]

    def choices(self) -> list[str]:
        """The words that may stand here, where there is a fixed choice of them."""
        found = [value for fragment in self.alternatives for value in _constants(fragment)]
        return [value for value in found if isinstance(value, str)]

    def paths(self, prefix: tuple[str, ...] = (), depth: int = 8) -> Iterator[tuple[str, ...]]:
        """Every key path of the schema, down to `depth` keys (a model may contain itself)."""
        for key in self.keys():
            yield (*prefix, key)
            below = self.child(key)
            if below is not None and depth > 1:
                yield from below.paths((*prefix, key), depth - 1)

    def describe(self) -> str:
        """The expected value in words, to follow "must be"."""
        words = list(dict.fromkeys(_describe(self.root, fragment) for fragment in self.alternatives))
        constants = [word for word in words if word.startswith("'")]
        others = [word for word in words if not word.startswith("'")]
        return " or ".join([*others, *constants])


def kind_of(value: Any) -> str:
    """The JSON-schema type name of a plain value."""
    if isinstance(value, bool):
        return "boolean"
    names = {
        int: "integer",
        float: "number",
        str: "string",
        dict: "object",
        list: "array",
        type(None): "null",
    }
    return names[type(value)]


_ALL_KINDS = frozenset({"boolean", "integer", "number", "string", "object", "array", "null"})


def _flatten(root: Fragment, fragment: Fragment) -> Iterator[Fragment]:
    """The alternatives of `fragment`, with references followed."""
    if "$ref" in fragment:
        yield from _flatten(root, root["$defs"][fragment["$ref"].removeprefix("#/$defs/")])
    elif members := fragment.get("anyOf") or fragment.get("oneOf") or fragment.get("allOf"):
        for member in members:
            yield from _flatten(root, member)
    else:
        yield fragment


def _kinds(fragment: Fragment) -> frozenset[str]:
    if "type" in fragment:
        kind = fragment["type"]
        return frozenset([kind] if isinstance(kind, str) else kind)
    constants = _constants(fragment)
    return frozenset(map(kind_of, constants)) if constants else _ALL_KINDS


def _constants(fragment: Fragment) -> list[Any]:
    return [fragment["const"]] if "const" in fragment else list(fragment.get("enum", ()))


def _tags_agree(fragment: Fragment, value: dict[str, Any]) -> bool:
    tags = {key: inner["const"] for key, inner in fragment.get("properties", {}).items() if "const" in inner}
    return all(value.get(key, tag) == tag for key, tag in tags.items())


def _below(fragment: Fragment, part: str | int) -> Fragment | None:
    if isinstance(part, int):
        leading = fragment.get("prefixItems", ())
        inner = leading[part] if part < len(leading) else fragment.get("items")
    elif part in fragment.get("properties", {}):
        inner = fragment["properties"][part]
    elif "properties" in fragment and "additionalProperties" not in fragment:
        return (
            None  # pydantic would ignore the key; a configuration that ignores what is written helps nobody
        )
    else:
        inner = fragment.get("additionalProperties", {} if "object" in _kinds(fragment) else None)
    if inner is True:
        return {}
    return inner if isinstance(inner, dict) else None


def _describe(root: Fragment, fragment: Fragment) -> str:
    constants = _constants(fragment)
    if constants:
        return " or ".join(repr(value) for value in constants)
    kinds = _kinds(fragment)
    if kinds == _ALL_KINDS:
        return "any value"
    words = {
        "integer": "an integer",
        "number": "a number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
        "array": _describe_list(root, fragment),
        "object": "a mapping",
    }
    text = " or ".join(words[kind] for kind in sorted(kinds))
    if keys := fragment.get("properties"):
        return f"{text} with keys among {', '.join(keys)}"
    return text + _describe_bounds(fragment)


def _describe_list(root: Fragment, fragment: Fragment) -> str:
    leading = fragment.get("prefixItems")
    if leading:
        items = [Shape(root, tuple(_flatten(root, item))).describe() for item in leading]
        return f"a list of {len(leading)} values ({', '.join(items)})"
    items_fragment = fragment.get("items")
    if not items_fragment:
        return "a list"
    return f"a list, each item {Shape(root, tuple(_flatten(root, items_fragment))).describe()}"


def _describe_bounds(fragment: Fragment) -> str:
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "more than",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
    }
    said = [f"{words} {fragment[name]}" for name, words in bounds.items() if name in fragment]
    return f" of {' and '.join(said)}" if said else ""
