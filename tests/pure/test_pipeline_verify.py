"""The verifier: every class of violation, provoked by changing a program that is right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.passes.reduce import add_reduce
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.passes.update import add_update
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import generate
from parallel.pipeline.simulate import Sends
from parallel.pipeline.verify import Fault, ProgramError, check, verify

PLAIN = generate("1f1b", 3, 4)
WHOLE = add_update(add_reduce(pair_transfers(PLAIN), per_microbatch=True))


def halves(action: Action) -> list[Action]:
    """I and W in place of B."""
    ops = [Op.I, Op.W] if action.op is Op.B else [action.op]
    return [Action(op, action.stage, action.microbatch) for op in ops]


SPLIT = PLAIN.with_actions([half for action in listed for half in halves(action)] for listed in PLAIN.actions)


def without(program: Program, *texts: str) -> Program:
    gone = set(map(Action.parse, texts))
    assert gone <= program.listed
    return program.with_actions([a for a in listed if a not in gone] for listed in program.actions)


def inserted(program: Program, rank: int, cell: int, text: str) -> Program:
    rows = [list(listed) for listed in program.actions]
    rows[rank].insert(cell, Action.parse(text))
    return program.with_actions(rows)


def found(program: Program) -> set[tuple[str, int, str]]:
    """What is wrong beside the deadlocks that follow from it."""
    violations = [violation for violation in verify(program) if violation.fault is not Fault.DEADLOCK]
    return {(violation.fault.value, violation.rank, str(violation.action)) for violation in violations}


@pytest.mark.parametrize("program", [PLAIN, WHOLE, SPLIT, pair_transfers(SPLIT)])
@pytest.mark.parametrize("sends", ["buffered", "rendezvous"])
def test_right_programs_pass(program: Program, sends: str) -> None:
    assert verify(program, memory_limit=3, sends=sends) == []
    check(program, memory_limit=3, sends=sends)


@pytest.mark.parametrize(
    ("program", "violations"),
    [
        (without(PLAIN, "1F2"), {("missing", 1, "1F2")}),
        (without(PLAIN, "0B3"), {("missing", 0, "0B3")}),
        (without(SPLIT, "2W1"), {("missing", 2, "2W1")}),
        (without(SPLIT, "2I1"), {("missing", 2, "2I1")}),
        (without(SPLIT, "0I1", "0W1"), {("missing", 0, "0B1")}),
        (inserted(PLAIN, 1, 1, "1F0"), {("duplicate", 1, "1F0")}),
        (inserted(PLAIN, 1, 8, "1W3"), {("conflict", 1, "1W3")}),
        (
            inserted(inserted(PLAIN, 1, 8, "1W3"), 1, 8, "1I3"),
            {("conflict", 1, "1W3"), ("conflict", 1, "1I3")},
        ),
        (inserted(without(PLAIN, "0B3"), 2, 8, "0B3"), {("wrong rank", 2, "0B3")}),
        (inserted(PLAIN, 2, 8, "0B3"), {("wrong rank", 2, "0B3"), ("duplicate", 2, "0B3")}),
        (without(WHOLE, "0SEND_F1"), {("unpaired", 0, "0SEND_F1")}),
        (without(WHOLE, "1RECV_F1"), {("unpaired", 1, "1RECV_F1")}),
        (without(WHOLE, "0RECV_I1", "1SEND_I1"), {("unpaired", 0, "0RECV_I1"), ("unpaired", 1, "1SEND_I1")}),
        (inserted(WHOLE, 1, 3, "1RECV_F1"), {("duplicate", 1, "1RECV_F1")}),
        (inserted(WHOLE, 2, 0, "2RECV_I1"), {("unpaired", 2, "2RECV_I1")}),
        (inserted(WHOLE, 0, 0, "0SEND_I1"), {("unpaired", 0, "0SEND_I1")}),
        (without(WHOLE, "1REDUCE2"), {("missing", 1, "1REDUCE2")}),
        (without(WHOLE, *(f"1REDUCE{j}" for j in range(4))), {("missing", 1, "1REDUCE")}),
        (inserted(WHOLE, 0, 40, "0REDUCE"), {("conflict", 0, f"0REDUCE{j}") for j in range(4)}),
        (without(WHOLE, "2UPDATE"), {("missing", 2, "2UPDATE")}),
        (without(WHOLE, "2GATHER"), {("missing", 2, "2GATHER")}),
    ],
)
def test_each_violation_is_named(program: Program, violations: set[tuple[str, int, str]]) -> None:
    assert found(program) == violations


def test_all_violations_are_reported_at_once() -> None:
    broken = inserted(without(PLAIN, "1F2", "0B3"), 2, 0, "2F0")
    assert found(broken) == {("missing", 1, "1F2"), ("missing", 0, "0B3"), ("duplicate", 2, "2F0")}


@given(st.data())
def test_nothing_can_be_dropped_doubled_or_moved_unseen(data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, 2))
    cell = data.draw(st.integers(0, len(WHOLE.actions[rank]) - 1))
    action = WHOLE.actions[rank][cell]
    elsewhere = (rank + data.draw(st.integers(1, 2))) % 3
    dropped = without(WHOLE, str(action))
    changes: list[tuple[Program, Fault | None]] = [
        (dropped, None),
        (inserted(WHOLE, rank, cell, str(action)), Fault.DUPLICATE),
        (inserted(dropped, elsewhere, 0, str(action)), Fault.WRONG_RANK),
    ]
    for changed, fault in changes:
        named = {v.fault for v in verify(changed) if v.action == action}
        assert named if fault is None else fault in named


def swapped(program: Program, rank: int, first: str, second: str) -> Program:
    """Two actions of a rank in each other's place."""
    one, two = Action.parse(first), Action.parse(second)
    rows = [list(listed) for listed in program.actions]
    rows[rank] = [two if action == one else one if action == two else action for action in rows[rank]]
    return program.with_actions(rows)


def test_deadlock_says_who_waits_for_what() -> None:
    violations = verify(swapped(PLAIN, 2, "2F0", "2B0"))
    assert {v.fault for v in violations} == {Fault.DEADLOCK}
    assert {v.rank: str(v.action) for v in violations} == {0: "0B0", 1: "1B0", 2: "2B0"}
    assert "2B0 waits for 2F0 on rank 2 (its forward has run)" in violations[2].message


def test_sends_may_be_buffered_or_rendezvous() -> None:
    program = Program.from_csv(
        "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_I0,0B0,0RECV_I1,0B1\n"
        "1RECV_F0,1F0,1B0,1SEND_I0,1RECV_F1,1F1,1B1,1SEND_I1"
    )
    assert verify(program, sends="buffered") == verify(program, sends=Sends.BUFFERED) == []
    assert {v.fault for v in verify(program)} == {Fault.DEADLOCK}


def test_memory_limit() -> None:
    (violation,) = verify(PLAIN, memory_limit=2)
    assert (violation.fault, violation.rank) == (Fault.MEMORY, 0)
    assert violation.message == "rank 0 holds 3 activations at 0F2, the limit is 2"
    assert len(verify(PLAIN, memory_limit=0)) == 3


def test_error_shows_violations_grid_and_waits() -> None:
    broken = without(generate("1f1b", 2, 3), "0F2")
    with pytest.raises(ProgramError) as caught:
        check(broken, memory_limit=1)
    waits = "waits for 0F2 on rank 0"
    absent = "rank 0 does not list it"
    assert str(caught.value) == (
        "program '1f1b' must not run, 4 violations:\n"
        "  missing: 0F2 is missing on rank 0\n"
        f"  deadlock: rank 0, lane compute: 0B2 {waits} (its forward has run; {absent})"
        " and 1B2 on rank 1 (the stage after has its input gradient)\n"
        f"  deadlock: rank 1, lane compute: 1F2 {waits} (the stage before has its output; {absent})\n"
        "  memory: rank 0 holds 2 activations at 0F1, the limit is 1\n"
        "1f1b: 2 ranks, 2 stages, 3 micro-batches\n"
        "rank 0 | F0   !F1! .    .    B0   ---- .    B1   ---- | never runs: !B2! | not listed: !F2!\n"
        "rank 1 | .    F0   B0   ---- F1   B1   ---- .    .    | never runs: !F2! B2\n"
    )
    assert caught.value.program == broken
    assert len(caught.value.violations) == 4


@pytest.mark.parametrize("call", [verify, check])
def test_unknown_send_mode_is_refused(call: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="'eager' is not a valid Sends"):
        call(PLAIN, sends="eager")
