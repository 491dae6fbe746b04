"""Passes: what each adds, and where. Pairing of arbitrary programs: test_pipeline_random."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.actions import SEND_OPS, TRANSFER_OPS, Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.backward import merge_backward
from parallel.pipeline.passes.reduce import add_reduce
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.passes.update import add_update
from parallel.pipeline.program import Program
from parallel.pipeline.rules import prerequisites
from parallel.pipeline.schedules.registry import generate, schedules
from parallel.pipeline.simulate import simulate
from parallel.pipeline.verify import ProgramError, verify
from tests.programs import generate_from, possible_ranks

SECONDS = st.floats(0.0, 10.0)
COSTS = st.builds(Costs, SECONDS, SECONDS, SECONDS, SECONDS)


@st.composite
def generated(draw: st.DrawFn) -> Program:
    name = draw(st.sampled_from(sorted(schedules())))
    return generate_from(name, draw(st.sampled_from(possible_ranks(name, 6))), draw(st.integers(1, 12)))


def row(program: Program, rank: int) -> str:
    return " ".join(str(action) for action in program.actions[rank])


def without_transfers(program: Program) -> Program:
    return program.with_actions(
        [action for action in listed if action.op not in TRANSFER_OPS] for listed in program.actions
    )


def test_transfers_of_two_ranks() -> None:
    program = pair_transfers(generate("1f1b", 2, 3))
    # Rank 0 lists SEND_F2 before RECV_I1, and rank 1 its ends in the same order: each send meets its receive.
    assert row(program, 0) == "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_I0 0B0 0F2 0SEND_F2 0RECV_I1 0RECV_I2 0B1 0B2"
    assert row(program, 1) == "1RECV_F0 1RECV_F1 1F0 1B0 1SEND_I0 1F1 1RECV_F2 1B1 1SEND_I1 1F2 1B2 1SEND_I2"


def test_a_single_rank_sends_nothing() -> None:
    program = generate("1f1b", 1, 4)
    assert pair_transfers(program) == program


@given(generated(), COSTS)
def test_paired_programs_run_with_any_sends(program: Program, costs: Costs) -> None:
    paired = pair_transfers(program, costs)
    assert verify(paired, sends="rendezvous") == []
    assert verify(paired, sends="buffered") == []
    assert without_transfers(paired) == program


@given(generated(), COSTS)
def test_transfers_change_no_times(program: Program, costs: Costs) -> None:
    plain, paired = simulate(program, costs), simulate(pair_transfers(program, costs), costs)
    for before, after in zip(plain.spans, paired.spans, strict=True):
        assert before == tuple(span for span in after if span.action.op not in TRANSFER_OPS)


@given(generated())
def test_sends_stand_behind_their_producer_and_receives_before_their_consumer(program: Program) -> None:
    for listed in pair_transfers(program).actions:
        for cell, action in enumerate(listed):
            forward, *backward = (Action(op, action.stage, action.microbatch) for op in (Op.F, Op.B, Op.I))
            if action.op in SEND_OPS:
                assert listed[cell - 1] in ([forward] if action.op is Op.SEND_F else backward)
            elif action.op in TRANSFER_OPS:
                consumers = [forward] if action.op is Op.RECV_F else backward
                assert set(consumers) & set(listed[cell:])


@given(st.integers(1, 8), st.integers(1, 16))
def test_1f1b_keeps_few_receives_open(p: int, m: int) -> None:
    for listed in pair_transfers(generate("1f1b", p, m)).actions:
        waiting = most = 0
        for action in listed:
            waiting += action.op in (Op.RECV_F, Op.RECV_I)
            waiting -= (action.op is Op.F and action.stage > 0) or (
                action.op is Op.B and action.stage < p - 1
            )
            most = max(most, waiting)
        assert most <= 3


@given(generated(), COSTS)
def test_a_rank_may_walk_its_list(program: Program, costs: Costs) -> None:
    """As a rank without streams does: post each transfer when its turn comes, wait only before compute."""
    program = pair_transfers(program, costs)
    posted: set[Action] = set()
    cells = [0] * program.ranks

    def may_run(action: Action) -> bool:
        needs = [need.action for need in prerequisites(action, program)]
        sent = [need.action for receive in needs for need in prerequisites(receive, program)]
        return action.op in TRANSFER_OPS or posted.issuperset(needs + sent)

    moved = True
    while moved:
        moved = False
        for rank, listed in enumerate(program.actions):
            while cells[rank] < len(listed) and may_run(listed[cells[rank]]):
                posted.add(listed[cells[rank]])
                cells[rank] += 1
                moved = True
    assert cells == [len(listed) for listed in program.actions]


def test_a_program_that_gets_stuck_cannot_be_paired() -> None:
    with pytest.raises(ProgramError, match="1B0 waits for 1F0"):
        pair_transfers(Program.from_csv("0F0,0B0\n1B0,1F0"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("0F0,0I0,0W0", "0F0,0B0"),
        ("0F0,0F1,0I0,0I1,0W0,0W1", "0F0,0F1,0I0,0I1,0W0,0W1"),
        ("0F0,0F1,0I0,0I1,0W1,0W0", "0F0,0F1,0I0,0B1,0W0"),
        ("0F0,1F0,1I0,0I0,0W0,1W0", "0F0,1F0,1I0,0B0,1W0"),
        ("0F0,0I0,0SEND_I0,0W0", "0F0,0I0,0SEND_I0,0W0"),
        ("0F0,0B0", "0F0,0B0"),
    ],
)
def test_merge_backward(before: str, after: str) -> None:
    assert merge_backward(Program.from_csv(before)) == Program.from_csv(after)


def test_reduce_once_a_stage() -> None:
    program = add_reduce(generate("1f1b", 2, 2), per_microbatch=False)
    assert row(program, 0) == "0F0 0F1 0B0 0B1 0REDUCE"
    split = Program.from_csv("0F0,1F0,1I0,1W0,0I0,0F1,1F1,1I1,0I1,0W0,1W1,0W1")
    assert row(add_reduce(split, per_microbatch=False), 0) == (
        "0F0 1F0 1I0 1W0 0I0 0F1 1F1 1I1 0I1 0W0 1W1 1REDUCE 0W1 0REDUCE"
    )


def test_reduce_every_microbatch() -> None:
    program = add_reduce(generate("1f1b", 2, 2), per_microbatch=True)
    assert row(program, 0) == "0F0 0F1 0B0 0REDUCE0 0B1 0REDUCE1"
    split = Program.from_csv("0F0,0I0,0F1,0I1,0W0,0W1")
    assert row(add_reduce(split, per_microbatch=True), 0) == "0F0 0I0 0F1 0I1 0W0 0REDUCE0 0W1 0REDUCE1"


@given(generated(), st.booleans())
def test_reductions_stand_behind_transfers_whichever_pass_comes_first(program: Program, each: bool) -> None:
    assert pair_transfers(add_reduce(program, each)) == add_reduce(pair_transfers(program), each)


def test_update_follows_the_order_of_the_next_step() -> None:
    program = Program.from_csv("2F0,0F0,2B0,0B0\n1F0,1B0,3F0,3B0")
    updated = add_update(program)
    assert row(updated, 0) == "2F0 0F0 2B0 0B0 2UPDATE 2GATHER 0UPDATE 0GATHER"
    assert row(updated, 1) == "1F0 1B0 3F0 3B0 1UPDATE 1GATHER 3UPDATE 3GATHER"


@given(generated(), st.booleans())
def test_the_whole_step_is_right(program: Program, each: bool) -> None:
    step = add_update(add_reduce(pair_transfers(program), each))
    assert verify(step) == []
    ops = Counter(action.op for action in step.listed)
    assert ops[Op.UPDATE] == ops[Op.GATHER] == program.stages
    passes = sum(len(program.microbatches_of(stage)) for stage in range(program.stages))
    assert ops[Op.REDUCE] == (passes if each else program.stages)


def test_no_pass_applies_twice() -> None:
    step = add_update(add_reduce(pair_transfers(generate("1f1b", 2, 2)), per_microbatch=False))
    with pytest.raises(ValueError, match=r"pair_transfers: .* already lists RECV_F, RECV_I, SEND_F, SEND_I"):
        pair_transfers(step)
    with pytest.raises(ValueError, match=r"add_reduce: .* already lists REDUCE"):
        add_reduce(step, per_microbatch=True)
    with pytest.raises(ValueError, match=r"add_update: .* already lists GATHER, UPDATE"):
        add_update(step)
