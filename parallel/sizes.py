"""Numbers of bytes as people write them: 24GB, 1.5GiB."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

UNITS: Mapping[str, int] = {
    **{unit: 1000**power for power, unit in enumerate(("B", "kB", "MB", "GB", "TB"))},
    **{unit: 1024**power for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), start=1)},
}
_LOWER = {unit.lower(): size for unit, size in UNITS.items()}
PATTERN = rf"\s*[0-9.]+(?:[eE][+-]?[0-9]+)?\s*(?i:{'|'.join(sorted(UNITS, key=len, reverse=True))})\s*"
"""What has the form of a number of bytes."""


def parse_bytes(text: str) -> float:
    """The number of bytes that a text with a unit names.

    Raises:
        ValueError: it names none, or nothing positive and finite.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]+)\s*", text.lower())
    try:
        size = float(match[1]) * _LOWER[match[2]] if match else math.nan
    except (ValueError, KeyError):
        size = math.nan
    if not (math.isfinite(size) and size > 0):
        raise ValueError(f"{text!r} must be a positive number with a unit of {', '.join(UNITS)}")
    return size
