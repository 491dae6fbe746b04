"""`${NAME:default}` in text values: the environment decides, the default stands in.

`${NAME}` without a default must be set. `$${` stands for a literal `${`. A variable that is set to nothing is
set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_REFERENCE = re.compile(
    r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::(?P<default>[^{}]*))?\}|(?P<broken>\$\{)"
)


class InterpolationError(ValueError):
    """A reference that cannot be expanded; `fix` says what to do about it."""

    def __init__(self, rule: str, fix: str) -> None:
        super().__init__(rule)
        self.fix = fix


def expand(text: str, environment: Mapping[str, str]) -> str:
    """`text` with every reference replaced.

    Raises:
        InterpolationError: a variable is not set and has no default, or a reference is not well formed.
    """

    def replacement(match: re.Match[str]) -> str:
        if match["broken"]:
            rule = "must have the form ${NAME} or ${NAME:default} where it says ${"
            raise InterpolationError(rule, "close the brace, or write $${ for a literal ${")
        name, default = match["name"], match["default"]
        if name is None:
            return "${"
        if name not in environment and default is None:
            fix = f"export {name}=..., or give a default: ${{{name}:default}}"
            raise InterpolationError(f"the environment variable {name} must be set", fix)
        return environment.get(name, default or "")

    return _REFERENCE.sub(replacement, text)
