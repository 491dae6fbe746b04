"""YAML text -> plain values with their origins, and every objection to the text as a `Problem`.

YAML is read by the 1.2 core schema, in which `3e-4` is a number and `yes`, `off` and `12:30` are text;
PyYAML's own resolver follows 1.1, where it is the other way round. One addition: digits may be grouped, as in
`1_000_000`. Duplicate keys, keys that are not text, and tags outside the core schema are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from trainer.config.problems import MISSING, Problem
from trainer.config.tree import Path, Tree, dotted

_TAG = "tag:yaml.org,2002:"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
_NOT_FINITE = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_NOT_FOUND = "check the path and the working directory; an override has the form section.key=value"
_CORE_SCHEMA = [
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    ("float", f"{_FLOAT}|{_NOT_FINITE}", [*"-+.0123456789"]),
    ("merge", r"<<", ["<"]),
]


class _Loader(yaml.SafeLoader):
    """Composes nodes; values are made from them here, where their lines are still known."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML keeps its resolvers on the class


for _name, _pattern, _first in _CORE_SCHEMA:  # in order: "float" also matches what "int" is asked for first
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


def read_file(file: FilePath) -> tuple[Tree, list[Problem]]:
    """What one YAML file says, and what is wrong with its text. An unreadable file gives an empty tree."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Tree(), [Problem(str(file), MISSING, "the file must exist", _NOT_FOUND)]
    except UnicodeDecodeError as error:
        return Tree(), [Problem(str(file), MISSING, f"must be UTF-8 text: {error}", "save the file as UTF-8")]
    except OSError as error:
        return Tree(), [Problem(str(file), MISSING, f"must be readable: {error.strerror}", "check the path")]
    tree, reader = Tree(), _Reader(str(file))
    root = reader.compose(text)
    if reader.problems:
        return tree, reader.problems
    if not isinstance(root, MappingNode):
        found = MISSING if root is None else reader.value(root, (), {})
        rule = (
            "is empty; it must hold a mapping of settings"
            if root is None
            else "must hold a mapping of settings"
        )
        fix = "begin with a section, such as `train:`, or leave the file out"
        return tree, [*reader.problems, Problem(str(file), found, rule, fix)]
    tree.values = reader.value(root, (), tree.origins)
    return tree, reader.problems


def read_value(text: str, path: Path) -> tuple[Any, list[Problem]]:
    """The value that `text` has as a YAML scalar or flow collection; problems name the config `path`."""
    reader = _Reader("")
    root = reader.compose(text)
    if reader.problems:
        rule = f"{text!r} must be a YAML value: {reader.problems[0].rule.splitlines()[0]}"
        fix = "put text with special characters in quotes (and those in the shell's quotes)"
        return None, [Problem(dotted(path), MISSING, rule, fix)]
    value = None if root is None else reader.value(root, path, {})
    return value, [Problem(dotted(path), text, problem.rule, problem.fix) for problem in reader.problems]


class _Reader:
    """Turns the text of one source into values, collecting problems on the way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.problems: list[Problem] = []
        self._open: list[Node] = []

    def compose(self, text: str) -> Node | None:
        """The node tree of the only document in `text`; None when it is empty or cannot be parsed."""
        try:
            loader = _Loader(text)
            try:
                return loader.get_single_node()
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = error.problem or error.context or "it cannot be parsed"
            line, column = (mark.line, mark.column) if mark else (0, 0)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position)
            column = error.position - (text.rfind("\n", 0, error.position) + 1)
            what = f"{error.reason} ({error.character!r})"
        shown = [*text.splitlines(), ""][min(line, text.count("\n"))].replace("\t", " ")
        rule = f"must be valid YAML: {what}\n{shown}\n{' ' * column}^"
        fix = "indent with spaces, not with tabs" if "\\t" in what else "mend this line, or the one before it"
        self.problems.append(Problem(f"{self.name}:{line + 1}:{column + 1}", MISSING, rule, fix))
        return None

    def value(self, node: Node, path: Path, origins: dict[Path, str]) -> Any:
        """The plain value of `node`; its origin and those of everything inside it go to `origins`."""
        if path:
            origins[path] = self._place(node)
        if any(node is outer for outer in self._open):
            self._object(path, node, "must not contain itself", "remove the alias")
            return None
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        self._open.append(node)
        try:
            if isinstance(node, MappingNode):
                return self._mapping(node, path, origins)
            assert isinstance(node, SequenceNode)
            return [self.value(item, (*path, index), origins) for index, item in enumerate(node.value)]
        finally:
            self._open.pop()

    def _mapping(self, node: MappingNode, path: Path, origins: dict[Path, str]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                continue
            if not isinstance(key_node, ScalarNode) or key_node.tag != _TAG + "str":
                self._object(path, key_node, "must have keys that are text", "write the key in quotes")
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in values:
                rule = f"is set twice in this mapping, first in line {lines[key]}"
                self._object((*path, key), key_node, rule, "keep one of the two")
                continue
            lines[key] = line
            values[key] = self.value(value_node, (*path, key), origins)
            origins[(*path, key)] = self._place(key_node)
        for merged in self._merged(node, path):
            inherited: dict[Path, str] = {}
            for key, value in self.value(merged, path, inherited).items():
                if key not in values:
                    values[key] = value
                    here = (*path, key)
                    origins |= {
                        place: line for place, line in inherited.items() if place[: len(here)] == here
                    }
        return values

    def _merged(self, node: MappingNode, path: Path) -> Iterator[MappingNode]:
        """The mappings that `<<` names, the one that wins first."""
        for key_node, value_node in node.value:
            if key_node.tag != _TAG + "merge":
                continue
            for base in value_node.value if isinstance(value_node, SequenceNode) else [value_node]:
                if isinstance(base, MappingNode) and not any(base is outer for outer in self._open):
                    yield base
                else:
                    self._object(
                        path, value_node, "`<<` must name mappings outside this one", "use `<<: *anchor`"
                    )

    def _scalar(self, node: ScalarNode, path: Path) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        try:
            if kind == "int":
                return int(text, 0) if text.startswith(("0o", "0x")) else int(text.replace("_", ""))
            if kind == "float":
                return float(re.sub(r"^([-+]?)\.(?=[a-zA-Z])", r"\1", text).replace("_", ""))
        except ValueError:
            self._object(path, node, f"is tagged as {kind} but {text!r} is none", "remove the tag")
            return None
        if kind not in ("str", "merge"):
            self._object(
                path, node, f"has the tag {node.tag}, which is not understood here", "remove the tag"
            )
        return text

    def _place(self, node: Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def _object(self, path: Path, node: Node, rule: str, fix: str) -> None:
        self.problems.append(Problem(dotted(path) or self.name, MISSING, rule, fix, self._place(node)))
