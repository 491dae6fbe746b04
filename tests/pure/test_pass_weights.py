"""Gathering of sharded weights: where it stands, how much is whole at a time, what it costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.actions import PASS_OPS, WEIGHT_OPS, Action, Lane, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.reduce import add_reduce
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.passes.update import add_update
from parallel.pipeline.passes.weights import gather_weights
from parallel.pipeline.program import Program
from parallel.pipeline.rules import prerequisites
from parallel.pipeline.schedules.registry import generate
from parallel.pipeline.simulate import simulate
from parallel.pipeline.verify import verify

SECONDS = st.floats(0.25, 4.0)
READERS = (Op.F, Op.B, Op.I)
GATHERS = (Op.GATHER_F, Op.GATHER_I)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    name = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "breadth-first", "gis", "gis-h", "uniform"]))
    p, v = draw(st.integers(1, 4)), 1 if name in ("gpipe", "1f1b") else draw(st.integers(1, 4))
    return generate(name, p, p * draw(st.integers(1, 4)), chunks=v)


def row(program: Program, rank: int = 0) -> str:
    return " ".join(str(action) for action in program.actions[rank])


@pytest.mark.parametrize(
    ("before", "ahead", "hold", "after"),
    [
        # One stage: one run.
        ("0F0 0F1 0B0 0B1", 1, False, "0GATHER_F0 0F0 0F1 0B0 0B1 0RELEASE_I1"),
        # W reads no weights: it neither keeps nor brings them.
        ("0F0 0I0 0W0", 0, False, "0GATHER_F0 0F0 0I0 0RELEASE_I0 0W0"),
        # Two stages, breadth-first: two runs of the first, one of the last.
        (
            "0F0 0F1 1F0 1F1 1B0 1B1 0B0 0B1",
            0,
            False,
            "0GATHER_F0 0F0 0F1 0RELEASE_F1 1GATHER_F0 1F0 1F1 1B0 1B1 1RELEASE_I1 0GATHER_I0 0B0 0B1 0RELEASE_I1",
        ),
        (
            "0F0 0F1 1F0 1F1 1B0 1B1 0B0 0B1",
            1,
            False,
            "0GATHER_F0 0F0 1GATHER_F0 0F1 0RELEASE_F1 1F0 1F1 1B0 0GATHER_I0 1B1 1RELEASE_I1 0B0 0B1 0RELEASE_I1",
        ),
        # Four passes in between, gathered again three before: held.
        (
            "0F0 0F1 1F0 1F1 1B0 1B1 0B0 0B1",
            4,
            False,
            "0GATHER_F0 1GATHER_F0 0F0 0F1 1F0 1F1 1B0 1B1 1RELEASE_I1 0B0 0B1 0RELEASE_I1",
        ),
        (
            "0F0 0F1 1F0 1F1 1B0 1B1 0B0 0B1",
            1,
            True,
            "0GATHER_F0 0F0 1GATHER_F0 0F1 1F0 1F1 1B0 1B1 1RELEASE_I1 0B0 0B1 0RELEASE_I1",
        ),
        # A run that ends with a forward and one that begins with a backward, of the same micro-batch.
        (
            "0F0 1F0 1I0 1W0 0I0 0W0",
            0,
            False,
            "0GATHER_F0 0F0 0RELEASE_F0 1GATHER_F0 1F0 1I0 1RELEASE_I0 1W0 0GATHER_I0 0I0 0RELEASE_I0 0W0",
        ),
        # Behind the transfers of the pass before.
        ("1RECV_F0 1F0 1B0 1SEND_I0 0F0 0B0", 0, False, None),
    ],
)
def test_before_and_after(before: str, ahead: int, hold: bool, after: str | None) -> None:
    if after is None:
        after = "1RECV_F0 1GATHER_F0 1F0 1B0 1SEND_I0 1RELEASE_I0 0GATHER_F0 0F0 0B0 0RELEASE_I0"
    program = Program.from_csv(before.replace(" ", ","))
    assert row(gather_weights(program, ahead=ahead, hold=hold)) == after


@given(programs(), st.integers(0, 5), st.booleans(), st.booleans())
def test_gathers_are_right_whatever_else_is_placed(program: Program, ahead: int, hold: bool, first: bool) -> None:
    if first:
        gathered = pair_transfers(gather_weights(program, ahead=ahead, hold=hold))
    else:
        gathered = gather_weights(pair_transfers(program), ahead=ahead, hold=hold)
    step = add_update(add_reduce(gathered, per_microbatch=False))
    assert verify(step) == []
    passes = [[action for action in listed if action.op in PASS_OPS] for listed in gathered.actions]
    assert program.with_actions(passes) == program
    for rank, listed in enumerate(gathered.actions):
        whole: set[int] = set()
        for cell, action in enumerate(listed):
            if action.op in GATHERS:
                assert action.stage not in whole
                whole.add(action.stage)
            elif action.op in READERS:
                assert action.stage in whole
                upcoming = [each for each in listed[cell:] if each.op in PASS_OPS]
                if not hold:  # what is read now, and by the passes that follow
                    assert whole <= {each.stage for each in upcoming[: ahead + 1] if each.op in READERS}
            elif action.op in WEIGHT_OPS:
                whole.remove(action.stage)
        assert not whole
        if hold:
            assert sum(action.op in GATHERS for action in listed) == len(program.stages_of(rank))


@given(programs(), SECONDS, SECONDS, SECONDS, st.integers(1, 3), st.floats(0.0, 1.0))
def test_gathers_hide_behind_the_passes_before(
    program: Program, forward: float, inputs: float, weights: float, ahead: int, share: float
) -> None:
    """Gathers that are no longer than a pass are seen once, before the first pass."""
    costs = Costs(forward, inputs, weights, gather_seconds=share * min(forward, inputs, weights))
    gathered = simulate(gather_weights(program, ahead=ahead), costs)
    plain = simulate(program, costs).makespan_seconds
    late = gathered.makespan_seconds - plain
    # The gathers for the first pass, and for those that follow before there is a pass to hide them.
    assert costs.gather_seconds - 1e-9 <= late <= (ahead + 1) * costs.gather_seconds + 1e-9
    if ahead == 1:
        assert late <= costs.gather_seconds + 1e-9


@given(programs())
def test_weights_are_whole_only_around_their_passes(program: Program) -> None:
    """In time: a gather starts when the pass listed before it has ended, a release when its run has."""
    timeline = simulate(gather_weights(program, ahead=1), Costs(gather_seconds=0.5))
    for listed in timeline.spans:
        ended = 0.0
        for span in listed:
            if span.action.op in PASS_OPS:
                ended = span.end
            elif span.lane is Lane.DP_COMM:
                assert span.start >= ended


def test_what_waits_for_gathers() -> None:
    def waits(text: str) -> str:
        return " ".join(str(need.action) for need in prerequisites(Action.parse(text), program))

    program = Program.from_csv(
        "0GATHER_F0,0F0,0F1,0RELEASE_F1,0GATHER_I0,0I0,0W0,0B1,0RELEASE_I1,0REDUCE,0UPDATE,0GATHER"
    )
    assert waits("0F0") == "0GATHER_F0"
    assert waits("0F1") == ""  # the first pass of its run has waited
    assert waits("0RELEASE_F1") == "0F1"
    assert waits("0I0") == "0F0 0GATHER_I0"  # not for the weights of the next step
    assert waits("0W0") == "0I0"
    assert waits("0RELEASE_I1") == "0B1"
    assert waits("0GATHER_I0") == ""
    assert verify(program) == []


def test_bad_input() -> None:
    program = generate("1f1b", 2, 4)
    with pytest.raises(ValueError, match="ahead=-1 is negative; 0 gathers right before the pass"):
        gather_weights(program, ahead=-1)
    with pytest.raises(ValueError, match=r"gather_weights: .* already lists GATHER_F, RELEASE_I; apply it only once"):
        gather_weights(gather_weights(program))
