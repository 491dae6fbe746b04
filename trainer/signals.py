"""Signals a run answers to: SIGTERM and SIGINT mean "save and stop", SIGUSR1 means "save and go on".

A signal may reach the ranks at different moments, even in different steps. So a handler only remembers it; each
rank reports what it remembers with its step, and all act on the first step in which any of them reported it.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Signals:
    """What this process has been asked for since the last `take`."""

    def __init__(self) -> None:
        self.stop = False
        self.save = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_stop)
            signal.signal(signal.SIGUSR1, self._on_save)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.stop:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self.stop = True

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.save = True

    def report(self) -> tuple[float, float]:
        """(stop, save) as numbers for the step's report; a save is asked for once."""
        save = self.save
        if save:  # a request that comes right now must not be cleared unseen
            self.save = False
        return float(self.stop), float(save)
