"""Properties of arbitrary programs: any placement, any order of passes, right or broken."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.actions import PASS_OPS, TRANSFER_OPS, Action, Lane, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.backward import merge_backward
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.program import Program
from parallel.pipeline.render import render_grid
from parallel.pipeline.rules import prerequisites
from parallel.pipeline.simulate import Sends, simulate
from parallel.pipeline.verify import ProgramError, check, verify

SECONDS = st.floats(0.0, 4.0)
COSTS = st.builds(Costs, SECONDS, SECONDS, SECONDS, SECONDS)


@st.composite
def right_programs(draw: st.DrawFn) -> Program:
    """Random placement, random order that keeps dependencies, backwards split at random."""
    ranks, stages, microbatches = (draw(st.integers(1, most)) for most in (4, 6, 4))
    placement = tuple(draw(st.lists(st.integers(0, ranks - 1), min_size=stages, max_size=stages)))
    chance = random.Random(draw(st.integers(0, 2**32)))
    needs: dict[Action, set[Action]] = {}
    for microbatch in range(microbatches):
        behind: set[Action] = set()  # the input gradient of the stage after
        for stage in reversed(range(stages)):
            forward = Action(Op.F, stage, microbatch)
            needs[forward] = {Action(Op.F, stage - 1, microbatch)} if stage else set()
            inputs = Action(chance.choice((Op.B, Op.I)), stage, microbatch)
            needs[inputs] = {forward} | behind
            if inputs.op is Op.I:
                needs[Action(Op.W, stage, microbatch)] = {inputs}
            behind = {inputs}
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    done: set[Action] = set()
    while len(done) < len(needs):
        action = chance.choice([a for a, needed in needs.items() if a not in done and needed <= done])
        rows[placement[action.stage]].append(action)
        done.add(action)
    return Program("random", ranks, stages, microbatches, placement, tuple(map(tuple, rows)))


@st.composite
def any_programs(draw: st.DrawFn) -> Program:
    """Any actions anywhere."""
    ranks, stages, microbatches = (draw(st.integers(1, 3)) for _ in range(3))
    placement = tuple(draw(st.lists(st.integers(0, ranks - 1), min_size=stages, max_size=stages)))
    single = st.builds(
        Action,
        st.sampled_from(sorted(PASS_OPS | TRANSFER_OPS | {Op.REDUCE, Op.OFFLOAD, Op.RELOAD})),
        st.integers(0, stages - 1),
        st.integers(0, microbatches - 1),
    )
    step_ops = st.sampled_from([Op.REDUCE, Op.SYNC, Op.GATHER, Op.FETCH, Op.UPDATE, Op.VALIDATE, Op.FLUSH])
    step = st.builds(Action, step_ops, st.integers(0, stages - 1))
    rows = draw(st.lists(st.lists(single | step, max_size=12), min_size=ranks, max_size=ranks))
    return Program("any", ranks, stages, microbatches, placement, tuple(map(tuple, rows)))


@given(right_programs(), COSTS)
def test_pairing_is_right_for_any_program(program: Program, costs: Costs) -> None:
    assert verify(program) == []
    paired = pair_transfers(program, costs)
    assert verify(paired, sends="rendezvous") == []
    assert verify(paired, sends="buffered") == []
    assert verify(pair_transfers(program, costs, late=True), sends="blocking") == []


def sends_of(program: Program) -> dict[Action, Action]:
    """For each receive that a program may list, its send."""
    halves: dict[Action, Action] = {}
    for stage in range(program.stages - 1):
        for microbatch in range(program.microbatches):
            halves[Action(Op.RECV_F, stage + 1, microbatch)] = Action(Op.SEND_F, stage, microbatch)
            halves[Action(Op.RECV_I, stage, microbatch)] = Action(Op.SEND_I, stage + 1, microbatch)
    return halves


@given(right_programs(), COSTS)
def test_transfers_between_two_ranks_match_without_tags(program: Program, costs: Costs) -> None:
    """Between two ranks, in one direction, sends and receives are in the same order."""
    paired = pair_transfers(program, costs)
    halves = sends_of(paired)
    for rank, listed in enumerate(paired.actions):
        received = [halves[action] for action in listed if action in halves]
        for peer, others in enumerate(paired.actions):
            expected = set(received) & set(others)
            assert [a for a in received if a in expected] == [a for a in others if a in expected], (
                rank,
                peer,
            )


@given(right_programs(), COSTS, st.sampled_from(Sends))
def test_every_action_starts_as_early_as_it_can(program: Program, costs: Costs, sends: Sends) -> None:
    """Start times are the least that lane order and rules allow; here by relaxing until nothing moves."""
    blocking = sends is Sends.BLOCKING
    program = pair_transfers(program, late=blocking)
    timeline = simulate(program, costs, sends=sends)
    halves = sends_of(program)
    meets = halves | {send: receive for receive, send in halves.items()} if sends is Sends.RENDEZVOUS else {}
    seconds = {
        action: costs.transfer_seconds if action in meets else costs.seconds(action)
        for action in program.listed
    }
    if blocking:  # the send takes the time, the receive only waits for it
        seconds |= {send: costs.transfer_seconds for send in halves.values() if send in seconds}
        seconds |= {receive: 0.0 for receive in halves if receive in seconds}
    start = dict.fromkeys(program.listed, 0.0)
    moved = True
    while moved:
        moved = False
        for listed in program.actions:
            free = dict.fromkeys(Lane, 0.0)
            for action in listed:
                lane = Lane.COMPUTE if blocking and action.lane is Lane.P2P else action.lane
                free_lane = 0.0 if sends is Sends.LATENCY and lane is Lane.P2P else free[lane]
                needs = [need.action for need in prerequisites(action, program)]
                bounds = [start[need] + seconds[need] for need in needs if meets.get(action) != need]
                earliest = max([free_lane, *bounds, start[meets.get(action, action)]])
                if earliest > start[action]:
                    start[action], moved = earliest, True
                free[lane] = start[action] + seconds[action]
    assert len(timeline.order) == len(program.listed)
    for span in timeline.order:
        assert span.start == pytest.approx(start[span.action], abs=1e-9)
        assert span.end == pytest.approx(start[span.action] + seconds[span.action], abs=1e-9)


@given(right_programs())
def test_the_order_of_a_timeline_respects_every_requirement(program: Program) -> None:
    program = pair_transfers(program)
    done: set[tuple[int, Action]] = set()
    for span in simulate(program).order:
        assert {(need.rank, need.action) for need in prerequisites(span.action, program)} <= done
        done.add((span.rank, span.action))
    assert len(done) == len(program.listed)


@given(right_programs())
def test_merging_keeps_programs_right(program: Program) -> None:
    assert verify(merge_backward(program)) == []


@given(right_programs() | any_programs())
def test_csv_gives_the_same_program_back(program: Program) -> None:
    assert Program.from_csv(program.to_csv()) == program


@given(any_programs(), st.sampled_from(Sends))
def test_no_program_is_too_broken_to_be_explained(program: Program, sends: Sends) -> None:
    simulate(program, sends=sends)
    violations = verify(program, memory_limit=1, sends=sends)
    grid = render_grid(program, [(violation.rank, violation.action) for violation in violations])
    assert grid.count("\n") >= program.ranks + 1
    for violation in violations:
        text = str(violation.action).lstrip("0123456789")
        assert f"{text}!" in grid
    if violations:
        with pytest.raises(ProgramError) as caught:
            check(program, memory_limit=1, sends=sends)
        assert caught.value.violations == violations
        assert all(violation.message in str(caught.value) for violation in violations)
    else:
        check(program, memory_limit=1, sends=sends)
