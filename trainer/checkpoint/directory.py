"""The directory of a run's checkpoints: what is complete, what is newest, and how one more is added.

    checkpoints/
        step-00000100/            complete: it appears under this name by a rename, all of it or nothing
        step-00000200/
        latest                    the name of the one to resume from
        .step-00000300.partial/   being written, or left behind by a save that did not end
        .step-00000100.removed/   being deleted

A step that is saved again (after going back to an older checkpoint) takes the place of the old one, which lies
aside as `.step-N.replaced` for the moment between the two renames and is found there if that moment is the last.
No torch, no process group: everything here can be asked before a run starts.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from trainer.checkpoint.manifest import MANIFEST
from trainer.files import sync_directory, write_synced

LATEST = "latest"
_COMPLETE = re.compile(r"step-(\d{8,})")
_HIDDEN = re.compile(r"\.(step-(\d{8,}))\.(partial|removed|replaced)")
_log = logging.getLogger(__name__)


def step_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies once it is complete."""
    return directory / f"step-{step:08d}"


def partial_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written."""
    return _hidden(step_path(directory, step), "partial")


def find_latest(directory: Path) -> Path | None:
    """The checkpoint to resume from: the one that `latest` names or, if that is not there, the newest complete one.

    Whether it fits the run, and whether its files are undamaged, is what `check_compatible` tells.
    """
    complete = complete_checkpoints(directory)
    if not complete:
        return None
    newest = complete[max(complete)]
    named = _COMPLETE.fullmatch(_read_latest(directory))
    return complete.get(int(named[1]), newest) if named else newest


def complete_checkpoints(directory: Path) -> dict[int, Path]:
    """All complete checkpoints by step, oldest first."""
    found: dict[int, Path] = {}
    for path in _entries(directory):
        shown, hidden = _COMPLETE.fullmatch(path.name), _HIDDEN.fullmatch(path.name)
        if not (path / MANIFEST).is_file():
            continue
        if shown:
            found[int(shown[1])] = path
        elif hidden and hidden[3] == "replaced":
            found.setdefault(int(hidden[2]), path)
    return dict(sorted(found.items()))


def begin(directory: Path, step: int) -> Path:
    """Clear what unfinished saves and deletions left behind and make an empty directory to write `step` into.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in _entries(directory):
        hidden = _HIDDEN.fullmatch(path.name)
        if hidden and hidden[3] == "replaced" and not (directory / hidden[1]).exists():
            path.rename(directory / hidden[1])
        elif hidden:
            remove(path)
    partial = partial_path(directory, step)
    partial.mkdir()
    return partial


def commit(partial: Path, keep: int | None) -> Path:
    """Give a completely written checkpoint its name, point `latest` to it, and prune the oldest.

    Every file in `partial` must be on the disk already.

    Args:
        keep: How many of the newest checkpoints stay, this one included; None: all.
    """
    directory, hidden = partial.parent, _HIDDEN.fullmatch(partial.name)
    assert hidden is not None, f"{partial} was not made by begin()"
    final = directory / hidden[1]
    sync_directory(partial)
    replaced = _hidden(final, "replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync_directory(directory)
    _write_latest(directory, final.name)
    if replaced.exists():
        remove(replaced)
    if keep is not None:
        _prune(directory, final, keep)
    return final


def remove(path: Path) -> None:
    """Delete a directory tree. What cannot be deleted is logged: it must not end a run that was saved."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        _log.warning("cannot remove %s: %s", path, error)


def _prune(directory: Path, newest: Path, keep: int) -> None:
    others = [path for path in complete_checkpoints(directory).values() if path != newest]
    for path in others[: max(0, len(others) - (keep - 1))]:
        # A deletion that is cut short must not leave something that looks like a checkpoint.
        removed = _hidden(path, "removed")
        path.rename(removed)
        remove(removed)


def _write_latest(directory: Path, name: str) -> None:
    temporary = directory / f".{LATEST}.partial"
    write_synced(temporary, f"{name}\n".encode())
    temporary.replace(directory / LATEST)
    sync_directory(directory)


def _read_latest(directory: Path) -> str:
    try:
        return (directory / LATEST).read_text().strip()
    except FileNotFoundError:
        return ""


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _hidden(final: Path, state: str) -> Path:
    return final.with_name(f".{final.name}.{state}")
