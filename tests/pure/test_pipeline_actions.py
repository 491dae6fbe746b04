"""Actions: their text form, their lanes, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.actions import LANE_OF, PER_MICROBATCH_OPS, STEP_OPS, Action, Lane, Op


def actions() -> st.SearchStrategy[Action]:
    numbers = st.integers(0, 1000)
    one = st.builds(Action, st.sampled_from(sorted(set(Op) - STEP_OPS)), numbers, numbers)
    step = st.builds(Action, st.sampled_from(sorted(set(Op) - PER_MICROBATCH_OPS)), numbers)
    return one | step


@given(actions())
def test_text_has_an_exact_inverse(action: Action) -> None:
    assert Action.parse(str(action)) == action


@given(st.text(alphabet="0123456789FBIWSEND_RCVU ", max_size=10))
def test_whatever_parses_is_spelled_that_way(text: str) -> None:
    try:
        action = Action.parse(text)
    except ValueError:
        return
    assert str(action) == text


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (Action(Op.F, 2, 0), "2F0"),
        (Action(Op.RECV_I, 0, 13), "0RECV_I13"),
        (Action(Op.REDUCE, 2), "2REDUCE"),
        (Action(Op.REDUCE, 2, 5), "2REDUCE5"),
    ],
)
def test_text_puts_the_stage_first(action: Action, text: str) -> None:
    assert str(action) == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "write <stage><op><micro-batch>, for example 2F0"),
        ("F0", "'F0' is not an action"),
        ("02F0", "'02F0' is not an action"),
        ("2F00", "'2F00' is not an action"),
        ("2f0", "'2f0' is not an action"),
        ("2F0 ", "'2F0 ' is not an action"),
        ("2F0\n", "is not an action"),
        ("2F\u0661", "is not an action"),
        ("2X0", "no op 'X'; known are F, B, I, W"),
        ("2SEND0", "no op 'SEND'; did you mean SEND_"),
        ("2REDUC", "no op 'REDUC'; did you mean REDUCE?"),
        ("2F", "F of stage 2 names no micro-batch; write 2F0"),
        ("2UPDATE0", "UPDATE is once a step, not for micro-batch 0"),
    ],
)
def test_bad_text_is_explained(text: str, complaint: str) -> None:
    with pytest.raises(ValueError) as caught:
        Action.parse(text)
    assert complaint in str(caught.value)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="stage -1 of F is negative"):
        Action(Op.F, -1, 0)
    with pytest.raises(ValueError, match="micro-batch -1 of B is negative"):
        Action(Op.B, 0, -1)


def test_every_op_has_a_lane() -> None:
    assert set(LANE_OF) == set(Op)
    assert Action(Op.SEND_I, 1, 0).lane is Lane.P2P
    assert Action(Op.W, 1, 0).lane is Lane.COMPUTE


def test_actions_of_one_op_sort_by_stage_then_microbatch() -> None:
    ordered = [Action(Op.F, 0, 1), Action(Op.F, 0, 10), Action(Op.F, 1, 0)]
    assert sorted([ordered[2], ordered[0], ordered[1]]) == ordered
