"""Prefetching: order, depth, errors, shutdown."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from trainer.data.prefetch import Prefetch


def wait_for(condition: threading.Event) -> None:
    assert condition.wait(10)


def test_results_come_in_order_and_end() -> None:
    with Prefetch(lambda number: number * 2, range(20)) as results:
        assert list(results) == list(range(0, 40, 2))
        with pytest.raises(StopIteration):
            next(results)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_produces_depth_ahead_and_no_further(depth: int) -> None:
    produced: list[int] = []
    with Prefetch(lambda number: produced.append(number) or number, itertools.count(), depth) as results:
        for expected in range(5):
            assert next(results) == expected
        deadline = time.monotonic() + 10
        while len(produced) < 5 + depth and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert produced == list(range(5 + depth))


def test_works_while_the_consumer_does() -> None:
    started = threading.Event()

    def produce(number: int) -> int:
        if number == 1:
            started.set()
        return number

    with Prefetch(produce, range(3), depth=1) as results:
        assert next(results) == 0
        wait_for(started)  # nobody asked for result 1 yet


def test_an_error_is_raised_where_its_result_is_due_and_ends_the_iteration() -> None:
    def produce(number: int) -> int:
        if number == 2:
            raise OSError("shard is gone")
        return number

    results = Prefetch(produce, itertools.count(), depth=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="shard is gone") as caught:
        next(results)
    assert "in produce" in "".join(str(entry) for entry in caught.traceback)
    with pytest.raises(StopIteration):
        next(results)


def test_close_waits_for_the_running_call_and_drops_the_rest() -> None:
    before = set(threading.enumerate())
    entered, release, finished = threading.Event(), threading.Event(), []

    def produce(number: int) -> int:
        entered.set()
        wait_for(release)
        finished.append(number)
        return number

    results = Prefetch(produce, itertools.count(), depth=2)
    wait_for(entered)
    threading.Timer(0.05, release.set).start()
    results.close()
    assert finished == [0]
    results.close()
    assert not [thread for thread in set(threading.enumerate()) - before if "prefetch" in thread.name]
    with pytest.raises(StopIteration):
        next(results)


def test_leaving_with_an_error_ends_the_thread() -> None:
    def one_step() -> None:
        with Prefetch(str, itertools.count()) as results:
            raise RuntimeError(f"step {next(results)} failed")

    with pytest.raises(RuntimeError, match="step 0 failed"):
        one_step()
    assert not [thread for thread in threading.enumerate() if "prefetch" in thread.name]


def test_depth_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Prefetch(str, [1], depth=0)
