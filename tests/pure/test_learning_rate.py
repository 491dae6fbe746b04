"""Learning-rate schedules: first and last values, shape, continuity."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.optim.config import LearningRateConfig
from trainer.optim.learning_rate import learning_rate_factor

SHAPES = ("cosine", "linear", "wsd", "constant")


def factors(steps: int, **settings: Any) -> list[float]:
    config = LearningRateConfig(**settings)
    return [learning_rate_factor(config, step, steps) for step in range(steps)]


@given(st.sampled_from(SHAPES), st.integers(0, 20), st.integers(1, 60), st.floats(0, 1))
def test_a_schedule_rises_to_the_peak_and_never_rises_again(
    schedule: Any, warmup: int, after: int, final: float
) -> None:
    found = factors(warmup + after, schedule=schedule, warmup_steps=warmup, final_fraction=final)
    peak = found[: warmup + 1]
    assert peak[:warmup] == [(step + 1) / (warmup + 1) for step in range(warmup)]
    assert all(one < other for one, other in pairwise(peak) if after > 1)
    later = found[warmup:]
    assert all(one >= other for one, other in pairwise(later))
    assert all(0 <= factor <= 1 for factor in found)
    if after > 1:
        assert later[0] == 1.0
    if schedule != "constant" and after > 1:
        assert found[-1] == pytest.approx(final, abs=1e-12)


@given(st.sampled_from(("cosine", "linear")), st.integers(0, 10), st.integers(3, 80))
def test_no_step_is_steeper_than_the_shape(schedule: Any, warmup: int, after: int) -> None:
    """Continuity: a linear fall of 0.9 over `after - 1` steps; a cosine's is at most pi / 2 times as steep."""
    found = factors(warmup + after, schedule=schedule, warmup_steps=warmup)[warmup:]
    steepest = 0.9 / (after - 1) * (math.pi / 2 if schedule == "cosine" else 1)
    falls = [one - other for one, other in pairwise(found)]
    assert max(falls) <= steepest + 1e-12


def test_written_out() -> None:
    assert factors(5, schedule="linear", final_fraction=0.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = factors(5, schedule="cosine", final_fraction=0.0)
    assert cosine == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0])
    assert factors(4, schedule="constant", warmup_steps=3) == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("decay", [1, 2, 3, 5, 8])
def test_wsd_holds_the_peak_and_falls_over_its_decay_steps(decay: int) -> None:
    found = factors(12, schedule="wsd", warmup_steps=2, decay_steps=decay, final_fraction=0.0)
    stable = 12 - decay
    assert found[2:stable] == [1.0] * (stable - 2)
    assert found[stable:] == pytest.approx([1 - step / decay for step in range(1, decay + 1)])


def test_wsd_decays_over_a_tenth_of_the_run_by_default() -> None:
    found = factors(50, schedule="wsd")
    assert found[:45] == [1.0] * 45
    assert found[45:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])
    assert factors(5, schedule="wsd") == [1.0, 1.0, 1.0, 1.0, pytest.approx(0.1)]


def test_wsd_whose_decay_fills_what_warmup_leaves() -> None:
    found = factors(10, schedule="wsd", warmup_steps=4, decay_steps=6, final_fraction=0.0)
    assert found[:4] == [0.2, 0.4, 0.6, 0.8]
    assert found[-1] == 0.0
    falls = [one - other for one, other in pairwise(found[4:])]
    assert falls == pytest.approx([falls[0]] * len(falls))
