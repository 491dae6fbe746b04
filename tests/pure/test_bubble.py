"""The measured bubble is the simulated one where the times are the same; the timer sees what ran, and when."""

from __future__ import annotations

import random
import time

import pytest
import torch

from parallel.pipeline.actions import PASS_OPS, Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.schedules.registry import generate, schedules
from parallel.pipeline.simulate import Timeline, simulate
from trainer.metrics.passes import Interval, PassTimer, bubble_rate, span_and_busy
from trainer.metrics.spans import spans_of


def timer() -> PassTimer:
    return PassTimer(torch.device("cpu"))


def intervals(timeline: Timeline, rank: int, offset: float) -> list[Interval]:
    """What a rank's timer would have seen, on a clock of its own."""
    return [
        Interval("run", (span.action,), span.start + offset, span.end + offset)
        for span in timeline.spans[rank]
        if span.action.op in PASS_OPS
    ]


@pytest.mark.parametrize("name", [name for name in schedules() if name != "zb-ilp"])
def test_it_is_the_bubble_of_the_simulation(name: str) -> None:
    chance = random.Random(name)
    ranks, microbatches = 4, 8
    chunks = schedules()[name].default_chunks
    seconds = [tuple(chance.uniform(0.5, 2) for _ in range(ranks * chunks)) for _ in range(3)]
    costs = Costs(*seconds, transfer_seconds=chance.uniform(0, 0.5))
    timeline = simulate(generate(name, ranks, microbatches, costs=costs), costs)
    measured = [span_and_busy(intervals(timeline, rank, offset=100.0 * rank)) for rank in range(ranks)]
    assert bubble_rate(measured) == pytest.approx(timeline.bubble_rate, abs=1e-9)


def test_the_rank_with_the_longest_span_decides() -> None:
    assert bubble_rate([(10.0, 1.0), (8.0, 8.0), (11.0, 10.0)]) == pytest.approx(1 / 11)
    assert bubble_rate([(0.0, 0.0), (0.0, 0.0)]) is None, "nothing ran yet"


def test_only_passes_count() -> None:
    one, other = Action(Op.F, 0, 0), Action(Op.B, 0, 0)
    listed = [
        Interval("wait", (one,), 0.0, 1.0),
        Interval("run", (one,), 1.0, 2.0),
        Interval("wait", (other,), 2.0, 5.0),
        Interval("run", (other,), 5.0, 7.0),
        Interval("run", (Action(Op.UPDATE, 0),), 7.0, 9.0),
    ]
    assert span_and_busy(listed) == (6.0, 3.0)
    assert span_and_busy(listed[:1]) == (0.0, 0.0)


def test_the_timer_sees_passes_and_for_a_trace_the_rest() -> None:
    observer = timer()
    for everything in (False, True):
        observer.begin(7, everything=everything)
        with observer("wait", Action(Op.F, 0, 0)):
            time.sleep(0.01)
        with observer("run", Action(Op.F, 0, 0)):
            time.sleep(0.02)
        with observer("run", Action(Op.UPDATE, 0)):
            pass
        observer.end()
        with observer("run", Action(Op.F, 0, 1)):
            pass  # an evaluation between two steps
        seen = [(interval.kind, str(interval.actions[0])) for interval in observer.read()]
        rest = [("wait", "0F0"), ("run", "0F0"), ("run", "0UPDATE")]
        assert seen == (rest if everything else [("run", "0F0")])
        span, busy = span_and_busy(observer.read())
        assert span == busy == pytest.approx(0.02, abs=0.015)
    wait, run, _ = observer.read()
    assert 0 <= wait.start <= wait.end - 0.01 <= run.start <= run.end - 0.02
    assert [span.name for span in spans_of(observer)] == ["0F0", "0F0", "0UPDATE"]
    assert all(span.step == 7 and abs(span.start - time.time()) < 5 for span in spans_of(observer))


def test_on_a_gpu_moments_are_events_of_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that a stream would reach later than the host records them; made once, recorded in every step."""
    stream, made = iter(range(1000, 2000, 10)), []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            made.append(self)
            self.reached = self.awaited = 0

        def record(self) -> None:
            self.reached = next(stream)

        def synchronize(self) -> None:
            self.awaited += 1

        def elapsed_time(self, other: Event) -> float:
            assert made[-1].awaited, "nothing is read before the last one has been reached"
            return other.reached - self.reached

    monkeypatch.setattr(torch.cuda, "Event", Event)
    observer = PassTimer(torch.device("cuda"))
    assert observer.read() == []  # the loop reads before the first step
    for _ in range(2):
        observer.begin(1)
        for microbatch in range(2):
            with observer("wait", Action(Op.F, 0, microbatch)):
                pass
            with observer("run", Action(Op.F, 0, microbatch)):
                pass
        observer.end()
        first, second = observer.read()
        assert (first.start, first.end, second.start, second.end) == pytest.approx((0.01, 0.02, 0.03, 0.04))
    assert len(made) == 5


def test_actions_that_run_as_one_share_their_time() -> None:
    observer = timer()
    observer.begin(1)
    first, second = Action(Op.W, 3, 4), Action(Op.W, 3, 5)
    with observer("run", first), observer("run", second):
        time.sleep(0.01)
    (interval,) = observer.read()
    assert interval.actions == (first, second)
    half = (interval.end - interval.start) / 2
    assert list(interval.shares()) == [
        (first, interval.start, pytest.approx(interval.start + half)),
        (second, pytest.approx(interval.start + half), pytest.approx(interval.end)),
    ]


def test_a_step_that_broke_off_leaves_nothing_behind() -> None:
    observer = timer()
    observer.begin(1)
    with pytest.raises(ZeroDivisionError), observer("run", Action(Op.F, 0, 0)):
        raise ZeroDivisionError
    observer("run", Action(Op.F, 0, 1)).__enter__()
    observer.begin(2)
    with observer("run", Action(Op.F, 0, 2)):
        pass
    assert [str(interval.actions[0]) for interval in observer.read()] == ["0F2"]


def test_it_costs_next_to_nothing() -> None:
    """About 1 us an action; the bound leaves room for a busy machine."""
    observer, actions = timer(), [Action(Op.F, 0, microbatch) for microbatch in range(100)]
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        observer.begin(1)
        for action in actions:
            with observer("run", action):
                pass
        observer.end()
        span_and_busy(observer.read())
        seconds.append(time.perf_counter() - start)
    assert min(seconds) / len(actions) < 20e-6
