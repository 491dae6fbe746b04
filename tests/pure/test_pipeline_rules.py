"""The rule table: what each action waits for."""

from __future__ import annotations

import pytest

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.passes.reduce import add_reduce
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.passes.update import add_update
from parallel.pipeline.program import Program
from parallel.pipeline.rules import RULES, prerequisites, receive_of
from parallel.pipeline.schedules.registry import generate

PLAIN = generate("1f1b", 3, 2)
PAIRED = pair_transfers(PLAIN)
STEP = add_update(add_reduce(PAIRED, per_microbatch=False))
PIECES = add_update(add_reduce(PAIRED, per_microbatch=True))
# Stages 0 and 3 on rank 0, 1 and 2 on rank 1: the turn from 1 to 2 stays on its rank.
FOLDED = pair_transfers(
    Program.from_csv("0F0,3F0,3I0,0I0,3W0,0W0\n1F0,2F0,2B0,1B0", placement=(0, 1, 1, 0), name="folded")
)
OFFLOADED = Program.from_csv("0F0,0OFFLOAD0,0RELOAD0,0B0,0FETCH,0UPDATE,0FLUSH")


def waits(program: Program, text: str) -> str:
    """Requirements as "action@rank", in the order of the table."""
    return " ".join(f"{need.action}@{need.rank}" for need in prerequisites(Action.parse(text), program))


@pytest.mark.parametrize(
    ("program", "action", "expected"),
    [
        # without transfers, a pass waits for the neighbour's
        (PLAIN, "0F1", ""),
        (PLAIN, "1F1", "0F1@0"),
        (PLAIN, "1B1", "1F1@1 2B1@2"),
        (PLAIN, "2B1", "2F1@2"),
        # with transfers, for its own receive
        (PAIRED, "0F1", ""),
        (PAIRED, "1F1", "1RECV_F1@1"),
        (PAIRED, "1B1", "1F1@1 1RECV_I1@1"),
        (PAIRED, "2B1", "2F1@2"),
        (PAIRED, "0SEND_F1", "0F1@0"),
        (PAIRED, "1RECV_F1", "0SEND_F1@0"),
        (PAIRED, "2SEND_I1", "2B1@2"),
        (PAIRED, "1RECV_I1", "2SEND_I1@2"),
        # where two stages share a rank nothing is sent, and a split backward counts by its halves
        (FOLDED, "2F0", "1F0@1"),
        (FOLDED, "1B0", "1F0@1 2B0@1"),
        (FOLDED, "3F0", "3RECV_F0@0"),
        (FOLDED, "3I0", "3F0@0"),
        (FOLDED, "3W0", "3I0@0"),
        (FOLDED, "3SEND_I0", "3I0@0"),
        # the step
        (STEP, "1REDUCE", "1B0@1 1B1@1"),
        (PIECES, "1REDUCE1", "1B1@1"),
        (STEP, "1UPDATE", "1B0@1 1B1@1 1REDUCE@1"),
        (PIECES, "1UPDATE", "1B0@1 1B1@1 1REDUCE0@1 1REDUCE1@1"),
        (STEP, "1GATHER", "1UPDATE@1"),
        (PAIRED, "1GATHER", ""),
        # clipping: the update of one stage needs the gradients of all stages of the rank
        (FOLDED, "0UPDATE", "0W0@0 3W0@0"),
        (OFFLOADED, "0OFFLOAD0", "0F0@0"),
        (OFFLOADED, "0RELOAD0", "0OFFLOAD0@0"),
        (OFFLOADED, "0B0", "0F0@0 0RELOAD0@0"),
        (OFFLOADED, "0UPDATE", "0B0@0 0FETCH@0"),
        (OFFLOADED, "0FLUSH", "0UPDATE@0"),
    ],
)
def test_prerequisites(program: Program, action: str, expected: str) -> None:
    assert waits(program, action) == expected


def test_every_op_has_a_row() -> None:
    assert set(RULES) == set(Op)


def test_what_is_missing_is_still_demanded() -> None:
    program = Program.from_csv("0F0\n1B0", placement=(0, 1))
    assert waits(program, "0B0") == "0F0@0 1B0@1"
    assert waits(program, "1B0") == "1F0@1"
    assert waits(program, "1W0") == "1I0@1"
    assert waits(program, "1REDUCE") == "1B0@1"


def test_requirements_say_why() -> None:
    (need,) = prerequisites(Action.parse("1F1"), PAIRED)
    assert str(need) == "1RECV_F1 on rank 1 (its input has arrived)"


def test_sends_meet_receives() -> None:
    def meeting(text: str) -> str | None:
        met = receive_of(Action.parse(text), PAIRED)
        return met and f"{met.action}@{met.rank}"

    assert meeting("1SEND_F0") == "2RECV_F0@2"
    assert meeting("1SEND_I0") == "0RECV_I0@0"
    assert meeting("2SEND_F0") is None
    assert meeting("0SEND_I0") is None
