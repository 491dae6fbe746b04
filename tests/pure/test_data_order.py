"""The order of samples: a permutation per epoch, the same for every way to ask for it."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.mixing import fraction_of, mix, mix_array
from trainer.data.order import PlainOrder, ShuffledOrder

SEEDS = st.integers(0, 2**63 - 1)


def epoch(order: ShuffledOrder, number: int) -> list[int]:
    start = number * order.windows
    return order.windows_of(np.arange(start, start + order.windows)).tolist()


@given(windows=st.integers(1, 3000), seed=SEEDS, number=st.integers(0, 10**6))
def test_every_epoch_visits_every_window_once(windows: int, seed: int, number: int) -> None:
    assert sorted(epoch(ShuffledOrder(windows, seed), number)) == list(range(windows))


@given(windows=st.integers(1, 2**62), seed=SEEDS, data=st.data())
def test_a_sample_does_not_depend_on_what_else_is_asked_for(
    windows: int, seed: int, data: st.DataObject
) -> None:
    samples = np.array(
        data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20)), dtype=np.int64
    )
    order = ShuffledOrder(windows, seed)
    together = order.windows_of(samples)
    assert together.min() >= 0
    assert together.max() < windows
    alone = [int(ShuffledOrder(windows, seed).windows_of(samples[i : i + 1])[0]) for i in range(len(samples))]
    assert together.tolist() == alone


def test_large_neighbours_stay_distinct() -> None:
    order = ShuffledOrder(10**15 + 37, seed=4)
    windows = order.windows_of(np.arange(10**15 - 2000, 10**15 + 37))
    assert len(set(windows.tolist())) == 2037


def test_a_batch_may_reach_over_the_end_of_an_epoch() -> None:
    order = ShuffledOrder(10, seed=1)
    across = order.windows_of(np.arange(5, 25).reshape(4, 5))
    assert across.shape == (4, 5)
    assert across.ravel().tolist() == [*epoch(order, 0)[5:], *epoch(order, 1), *epoch(order, 2)[:5]]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [epoch(ShuffledOrder(100, seed), number) for seed in range(10) for number in range(10)]
    orders.append(list(range(100)))
    assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.parametrize("windows", [3, 4])
def test_all_orders_are_equally_frequent(windows: int) -> None:
    trials = 3000
    counts = Counter(tuple(epoch(ShuffledOrder(windows, 11), number)) for number in range(trials))
    expected = trials / math.factorial(windows)
    chi_squared = (
        sum((counts[each] - expected) ** 2 for each in itertools.permutations(range(windows))) / expected
    )
    freedom = math.factorial(windows) - 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)


def test_positions_and_windows_are_uncorrelated() -> None:
    order = np.array(epoch(ShuffledOrder(20000, 5), 3))
    along = np.corrcoef(order, np.arange(20000))[0, 1]
    neighbours = np.corrcoef(order[1:], order[:-1])[0, 1]
    assert abs(along) < 0.03  # four standard deviations of 1 / sqrt(20000)
    assert abs(neighbours) < 0.03


def test_the_order_is_the_same_in_every_version() -> None:
    """Checkpoints hold a sample number; what it means must never change."""
    assert ShuffledOrder(1000, 7).windows_of(np.arange(998, 1003)).tolist() == [405, 337, 406, 474, 170]
    assert [index for index in range(12) if fraction_of(3, index) < 0.25] == [11]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_mixing_is_the_same_in_python_and_numpy(words: list[int]) -> None:
    assert mix_array(np.array(words, dtype=np.uint64)).tolist() == [mix(word) for word in words]


def test_held_out_fraction_is_as_asked() -> None:
    shares = np.array([fraction_of(9, index) for index in range(20000)])
    assert shares.min() >= 0
    assert shares.max() < 1
    assert abs((shares < 0.1).mean() - 0.1) < 0.01


def test_plain_order_repeats_from_the_start() -> None:
    assert PlainOrder(3).windows_of(np.arange(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("order", [PlainOrder, lambda windows: ShuffledOrder(windows, 0)])
def test_no_windows_no_order(order: type[PlainOrder]) -> None:
    with pytest.raises(ValueError, match="at least one window, not 0"):
        order(0)
