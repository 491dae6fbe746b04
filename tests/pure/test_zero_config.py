"""ZeRO stages and the three numbers they stand for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from parallel.zero.config import ThreeNumbers, ZeroConfig


@given(st.integers(1, 64))
def test_the_classic_stages(degree: int) -> None:
    assert ZeroConfig(stage=0).numbers(degree) == ThreeNumbers(1, 1, 1)
    assert ZeroConfig(stage=1).numbers(degree) == ThreeNumbers(1, 1, degree)
    assert ZeroConfig(stage=2).numbers(degree) == ThreeNumbers(1, degree, degree)
    assert ZeroConfig().numbers(degree) == ZeroConfig(stage=1).numbers(degree)


@given(st.integers(1, 64))
def test_numbers_say_the_same_as_stages(degree: int) -> None:
    assert ZeroConfig(optim="all").numbers(degree) == ZeroConfig(stage=1).numbers(degree)
    assert ZeroConfig(grads="all", optim="all").numbers(degree) == ZeroConfig(stage=2).numbers(degree)
    assert ZeroConfig(grads=1, optim=1).numbers(degree) == ZeroConfig(stage=0).numbers(degree)
    assert ZeroConfig(grads=1, optim=degree).numbers(degree) == ZeroConfig(stage=1).numbers(degree)


@given(
    st.sampled_from([None, 0, 1, 2]),
    st.sampled_from([None, "all", 1, 2, 3, 4]),
    st.sampled_from([None, "all", 1, 2, 3, 4]),
    st.integers(1, 4),
)
def test_numbers_exist_where_there_are_no_problems_and_ascend(stage: Any, grads: Any, optim: Any, degree: int) -> None:
    config = ZeroConfig(stage=stage, grads=grads, optim=optim)
    problems = config.problems(degree)
    if problems:
        with pytest.raises(ValueError) as raised:
            config.numbers(degree)
        assert all(rule in str(raised.value) for _, _, rule, _ in problems)
        assert all(key in ("stage", "grads", "optim") and fix for key, _, _, fix in problems)
    else:
        numbers = config.numbers(degree)
        assert 1 == numbers.params <= numbers.grads <= numbers.optim <= degree
        assert degree % numbers.optim == 0
        assert numbers.optim % numbers.grads == 0


@pytest.mark.parametrize(
    ("config", "degree", "key", "value", "rule"),
    [
        (ZeroConfig(stage=1, optim="all"), 4, "stage", 1, "a stage and numbers cannot both be given"),
        (ZeroConfig(optim=2), 4, "optim", 2, "must be 1 or the data-shard degree, 4"),
        (ZeroConfig(grads=3, optim="all"), 4, "grads", 3, "must be 1 or the data-shard degree, 4"),
        (ZeroConfig(grads="all"), 4, "grads", 4, "more ranks than the optimizer state (1)"),
    ],
)
def test_problems_name_key_value_and_rule(config: ZeroConfig, degree: int, key: str, value: int, rule: str) -> None:
    found = config.problems(degree)
    assert [(each[0], each[1]) for each in found] == [(key, value)]
    assert rule in found[0][2]


def test_several_problems_at_once() -> None:
    keys = [key for key, _, _, _ in ZeroConfig(grads=3, optim=2).problems(4)]
    assert keys == ["grads", "optim", "grads"]


@pytest.mark.parametrize("fields", [{"stage": 3}, {"stage": "2"}, {"optim": 0}, {"grads": -1}, {"optim": "some"}])
def test_values_that_do_not_exist(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ZeroConfig.model_validate(fields)
