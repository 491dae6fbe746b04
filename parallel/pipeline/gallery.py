"""The pictures of docs/schedules.md: every registered schedule at the same numbers.

    python -m parallel.pipeline.gallery docs/images/schedules

`make docs` runs it. F, I and W take 1 each and transfers nothing, so that a picture shows the order alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from parallel.pipeline.draw_svg import draw_svg
from parallel.pipeline.schedules.registry import schedules
from parallel.pipeline.study import Asked, drawing_of, study

RANKS, MICROBATCHES = 4, 8


def pictures() -> Iterator[tuple[str, str]]:
    """The name of every schedule, and its SVG."""
    for name in schedules():
        yield name, draw_svg(drawing_of(study(Asked(name, RANKS, MICROBATCHES))))


def main() -> None:
    """Write all pictures into a directory."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures():
        (directory / f"{name}.svg").write_text(picture)


if __name__ == "__main__":
    main()
