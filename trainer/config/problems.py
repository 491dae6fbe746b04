"""What a refused configuration says: each problem names the place, the value, the rule and the fix.

Problems are collected, not thrown one at a time, so that a user mends a configuration in one round.
Everything in `trainer` and `launch` that refuses user input raises `ConfigError`; the command line prints it
without a traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final


class _Missing:
    """Type of `MISSING`: there is no value to show."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()
_LONGEST_VALUE = 200


@dataclass(frozen=True)
class Problem:
    """One reason why a configuration is refused.

    `path` is the dotted configuration path or the file it concerns, `value` the value found there (`MISSING`
    where there is none), `rule` what should hold ("must divide ..."), `fix` what to do about it, and `origin`
    where the value was written ("run.yaml:12", "command line"), empty when it is a default or computed.
    """

    path: str
    value: Any
    rule: str
    fix: str
    origin: str = ""

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.origin})" if self.origin else self.path]
        if self.value is not MISSING:
            lines.append(f"  value: {_shown(self.value)}")
        lines.append(f"  rule:  {_indented(self.rule)}")
        lines.append(f"  fix:   {_indented(self.fix)}")
        return "\n".join(lines)


class ConfigError(Exception):
    """A configuration (or a file it points to) that cannot be used; `problems` holds every reason found."""

    def __init__(self, problems: Iterable[Problem] | Problem) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        if not self.problems:
            raise ValueError("a ConfigError needs at least one Problem")
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        header = f"{count} problem{'s' if count > 1 else ''} in the configuration:"
        return "\n\n".join([header, *(str(problem) for problem in self.problems)])


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def _indented(text: str) -> str:
    return text.replace("\n", "\n         ")
