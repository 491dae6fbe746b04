"""Settings as they were written: plain values, and where each of them comes from.

A `Tree` is what a YAML file or an override says before any type is known. It remembers the origin
("run.yaml:12", "command line") of every value, so that a problem found much later still points at the line.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Path = tuple[str | int, ...]


def dotted(path: Path) -> str:
    """The path as a user writes it: `("data", "sources", 0)` is `data.sources.0`."""
    return ".".join(str(part) for part in path)


@dataclass
class Tree:
    """Nested mappings, lists and scalars in `values`, and the origin of each by its path."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path, str] = field(default_factory=dict)

    def merge(self, other: Tree) -> None:
        """Lay `other` over this tree: mappings merge key by key, lists and scalars replace what was there."""
        self._merge(self.values, other.values, (), other.origins)

    def origin(self, path: Path) -> str:
        """Where the value at `path`, or the nearest one around it, was written; empty if nobody wrote it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return ""

    def get(self, path: Path) -> Any:
        """The value at `path`.

        Raises:
            LookupError: there is none.
        """
        value: Any = self.values
        for part in path:
            if not isinstance(value, dict | list):
                raise KeyError(part)
            value = value[part]  # type: ignore[index]  # a missing key or a foreign index is the LookupError
        return value

    def set(self, path: Path, value: Any, origin: str) -> None:
        """Lay one value over what is at `path`, as `merge` would: mappings merge, the rest replaces.

        Mappings on the way are made; items of a list are addressed by their number, from 0.

        Raises:
            IndexError: the path goes through a list that has no such item.
        """
        holder: Any = self.values
        place: Path = ()
        for part in path[:-1]:
            key = _key(holder, part)
            place = (*place, key)
            if not isinstance(holder[key] if isinstance(holder, list) else holder.get(key), dict | list):
                self._forget(place)
                holder[key] = {}
                self.origins[place] = origin
            holder = holder[key]
        key = _key(holder, path[-1])
        place = (*place, key)
        there = holder[key] if isinstance(holder, list) else holder.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            for inner, item in value.items():
                self.set((*place, inner), item, origin)
            return
        self._forget(place)
        holder[key] = value
        self.origins[place] = origin

    def strings(self) -> Iterator[tuple[Path, str]]:
        """Every text value with its path, mapping keys excluded."""
        pending: list[tuple[Path, Any]] = [((), self.values)]
        while pending:
            path, value = pending.pop()
            if isinstance(value, str):
                yield path, value
            elif isinstance(value, dict):
                pending += [((*path, key), item) for key, item in value.items()]
            elif isinstance(value, list):
                pending += [((*path, index), item) for index, item in enumerate(value)]

    def _merge(self, mine: dict[str, Any], other: dict[str, Any], at: Path, origins: dict[Path, str]) -> None:
        for key, value in other.items():
            path = (*at, key)
            if isinstance(value, dict) and isinstance(mine.get(key), dict):
                self._merge(mine[key], value, path, origins)
                continue
            self._forget(path)
            mine[key] = copy.deepcopy(value)
            self.origins |= {place: origin for place, origin in origins.items() if place[: len(path)] == path}

    def _forget(self, path: Path) -> None:
        for place in [place for place in self.origins if place[: len(path)] == path]:
            del self.origins[place]


def _key(holder: dict[str, Any] | list[Any], part: str | int) -> Any:
    """`part` as the key or index that `holder` knows it by."""
    if isinstance(holder, dict):
        return part
    index = int(part) if str(part).isdecimal() else len(holder)
    if index >= len(holder):
        raise IndexError(
            f"{part!r} must be the number of an item: the list has {len(holder)}, counted from 0"
        )
    return index
