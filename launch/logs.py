"""One log file per rank, and the console that follows some of them.

A rank's standard output and error go, in the order they were written, to the end of `rank-N.log`: a resumed
or restarted run continues its logs. The console is a reader of those files, so that a slow terminal never
holds up a rank, and what the console does not show is in the file.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

_POLL_SECONDS = 0.1


def rank_log(directory: Path, rank: int) -> Path:
    """The file with everything that a rank wrote."""
    return directory / f"rank-{rank}.log"


class Console:
    """While open, copies what is appended to the logs of `ranks` to `stream`, whole lines only.

    Lines carry the prefix `[N] ` where several ranks are shown.
    """

    def __init__(self, directory: Path, ranks: Iterable[int], stream: TextIO | None = None) -> None:
        shown = sorted(set(ranks))
        prefixes = {rank: f"[{rank}] " if len(shown) > 1 else "" for rank in shown}
        self._followed = [_Follower(rank_log(directory, rank), prefixes[rank]) for rank in shown]
        self._stream = stream or sys.stdout
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="console", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished.set()
        self._thread.join()

    def _follow(self) -> None:
        last = False
        try:
            while not last:
                last = self._finished.wait(_POLL_SECONDS)
                for follower in self._followed:
                    follower.copy(self._stream, unfinished=last)
                self._stream.flush()
        except BrokenPipeError:
            # Nobody reads any more (`atoll train ... | head`): the run goes on, its files have everything.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _Follower:
    """Reads what is appended to one file from now on."""

    def __init__(self, file: Path, prefix: str) -> None:
        self._file = file
        self._prefix = prefix
        self._position = file.stat().st_size if file.exists() else 0
        self._rest = b""

    def copy(self, stream: TextIO, unfinished: bool) -> None:
        """Copy the new lines; the last one also when it is `unfinished`, as nothing will follow it."""
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            file.seek(self._position)
            new = file.read()
        self._position += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        if unfinished and self._rest:
            lines.append(self._rest)
        stream.writelines(f"{self._prefix}{line.decode(errors='replace')}\n" for line in lines)


def parse_ranks(text: str, ranks: int) -> list[int]:
    """`0,3` or `all` as rank numbers below `ranks`.

    Raises:
        ValueError: the text names no rank, or one that will not be started.
    """
    if text == "all":
        return list(range(ranks))
    chosen = []
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) >= ranks:
            raise ValueError(f"{part.strip()!r} must be one of the ranks 0 to {ranks - 1}: write 0,3 or all")
        chosen.append(int(part))
    return chosen
