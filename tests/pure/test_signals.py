"""What a rank remembers of the signals it gets."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from trainer.signals import Signals

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in HEARD}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_reported_until_the_end(number: signal.Signals) -> None:
    signals = Signals()
    assert signals.report() == (0.0, 0.0)
    send(number)
    assert signals.report() == (1.0, 0.0)
    assert signals.report() == (1.0, 0.0), "the step that acts on it may be a later one"


def test_a_save_is_reported_once() -> None:
    signals = Signals()
    send(signal.SIGUSR1)
    send(signal.SIGUSR1)
    assert signals.report() == (0.0, 1.0)
    assert signals.report() == (0.0, 0.0)
    send(signal.SIGUSR1)
    assert signals.report() == (0.0, 1.0)


def test_stop_and_save_together() -> None:
    signals = Signals()
    send(signal.SIGUSR1)
    send(signal.SIGTERM)
    assert signals.report() == (1.0, 1.0)


def test_a_second_interrupt_does_not_wait() -> None:
    signals = Signals()
    send(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert signals.stop


def test_a_second_sigterm_changes_nothing() -> None:
    """Schedulers send it more than once."""
    signals = Signals()
    send(signal.SIGTERM)
    send(signal.SIGTERM)
    assert signals.report() == (1.0, 0.0)


def test_other_threads_leave_the_handlers_alone() -> None:
    before = [signal.getsignal(number) for number in HEARD]
    made: list[Signals] = []
    thread = threading.Thread(target=lambda: made.append(Signals()))
    thread.start()
    thread.join()
    assert made[0].report() == (0.0, 0.0)
    assert [signal.getsignal(number) for number in HEARD] == before
