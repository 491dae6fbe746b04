"""Ranks that go before the other work of a machine while they are measured.

A rank of sleeping stages that wakes up on a busy machine waits for its turn, and the wait of one is passed on to all;
it would be all that is seen. Such ranks need little of the cores, so letting them go first takes little from others.
Linux lets root do it, and whoever may raise priorities.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def may_be_realtime() -> bool:
    """Whether the system lets this user's processes go before all others."""
    try:
        with realtime_threads():
            return True
    except (PermissionError, AttributeError):  # not allowed in here; no such scheduling on this system
        return False


@contextmanager
def realtime_threads() -> Iterator[None]:
    """All threads of this process go before every thread of others that is not real-time."""
    _schedule(os.SCHED_RR, 1)
    try:
        yield
    finally:
        _schedule(os.SCHED_OTHER, 0)


def _schedule(policy: int, priority: int) -> None:
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # ended in the meantime
            os.sched_setscheduler(int(thread), policy, os.sched_param(priority))
