"""What a worker process owes its launcher: not to outlive it.

A launcher that is killed outright cannot stop its workers, and workers that wait in a collective for each
other would hold their devices until its timeout. So each worker asks the kernel to be killed when its parent
dies.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

LAUNCHER_PID = "ATOLL_LAUNCHER_PID"
"""Environment variable in which the local launcher passes its own process id to its workers."""

_PR_SET_PDEATHSIG = 1


def die_with_parent(environment: Mapping[str, str] | None = None) -> bool:
    """Have this process killed when the launcher that started it dies; call it first thing in a worker.

    Only workers of a launcher are bound (atoll's own, or torchrun): one started by hand under `nohup` must
    survive its shell. Linux only; elsewhere nothing is done. Returns whether the process is now bound.

    Raises:
        SystemExit: the launcher is already gone.
    """
    given = os.environ if environment is None else environment
    launcher = given.get(LAUNCHER_PID)
    if not sys.platform.startswith("linux") or (launcher is None and "TORCHELASTIC_RUN_ID" not in given):
        return False
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The launcher may have died before the request: then nobody will send the signal.
    if launcher is not None and os.getppid() != int(launcher):
        raise SystemExit(f"the launcher (process {launcher}) is gone")
    return True
