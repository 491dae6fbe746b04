"""Offloading of activations: where the copies stand, what they cost (nothing), and what they save."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.pipeline.actions import PASS_OPS, Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.offload import offload_activations, plan_copies
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import generate
from parallel.pipeline.simulate import Timeline, simulate
from parallel.pipeline.verify import ProgramError, verify

COPIES = {Op.OFFLOAD, Op.RELOAD}
SECONDS = st.floats(0.25, 4.0)
SHARES = st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.7, 4.0])  # of a copy in the time of a pass
FRACTIONS = st.sampled_from([0.25, 0.5, 1.0])


@st.composite
def programs(draw: st.DrawFn) -> Program:
    name = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "breadth-first", "gis", "gis-h", "uniform"]))
    p, v = draw(st.integers(1, 4)), 1 if name in ("gpipe", "1f1b") else draw(st.integers(1, 4))
    return generate(name, p, p * draw(st.integers(1, 4)), chunks=v)


@st.composite
def timed(draw: st.DrawFn) -> tuple[Program, Costs]:
    program = draw(programs())
    forward, inputs, weights = (tuple(draw(SECONDS) for _ in range(program.stages)) for _ in range(3))
    copies = {"offload_seconds": draw(SHARES), "reload_seconds": draw(SHARES)}
    return program, Costs(forward, inputs, weights, draw(st.floats(0.0, 1.0)), **copies)


def row(program: Program, rank: int = 0) -> str:
    return " ".join(str(action) for action in program.actions[rank])


def passes(timeline: Timeline) -> list[list[tuple[Action, float, float]]]:
    return [[(s.action, s.start, s.end) for s in listed if s.action.op in PASS_OPS] for listed in timeline.spans]


@pytest.mark.parametrize(
    ("before", "costs", "fraction", "after"),
    [
        # Free copies: out right behind the forward, back right before the backward; not where nothing lies between.
        ("0F0,0F1,0B0,0B1", Costs(), 1.0, "0F0,0OFFLOAD0,0F1,0OFFLOAD1,0RELOAD0,0B0,0RELOAD1,0B1"),
        ("0F0,0B0,0F1,0B1", Costs(), 1.0, "0F0,0B0,0F1,0B1"),
        # The halves of a backward: back before the first.
        ("0F0,0F1,0I0,0I1,0W0,0W1", Costs(), 1.0, "0F0,0OFFLOAD0,0F1,0OFFLOAD1,0RELOAD0,0I0,0RELOAD1,0I1,0W0,0W1"),
        # Of two stages the one that lives longer.
        ("0F0,1F0,1B0,0B0", Costs(), 0.5, "0F0,0OFFLOAD0,1F0,1B0,0RELOAD0,0B0"),
        ("0F0,1F0,1B0,0B0", Costs(), 1.0, "0F0,0OFFLOAD0,1F0,1B0,0RELOAD0,0B0"),
        # Three seconds between forward and backward: copies of one second fit, copies of two do not.
        ("0F0,1F0,1B0,0B0", Costs(offload_seconds=1.0, reload_seconds=1.0), 0.5, "0F0,0OFFLOAD0,1F0,0RELOAD0,1B0,0B0"),
        ("0F0,1F0,1B0,0B0", Costs(offload_seconds=2.0, reload_seconds=2.0), 0.5, "0F0,1F0,1B0,0B0"),
        # Only one direction takes time: slots are as long as the longer copy.
        ("0F0,1F0,1B0,0B0", Costs(offload_seconds=1.0), 0.5, "0F0,0OFFLOAD0,1F0,1B0,0RELOAD0,0B0"),
        ("0F0,1F0,1B0,0B0", Costs(offload_seconds=2.0), 0.5, "0F0,1F0,1B0,0B0"),
        # Copies as long as a forward. The engine: out 1 and 2, back 1 at 4 s, out 3, back 2 at 7 s, back 3 at 9 s.
        (
            "0F0,0F1,0F2,0F3,0B0,0B1,0B2,0B3",
            Costs(offload_seconds=1.0, reload_seconds=1.0),
            1.0,
            "0F0,0F1,0OFFLOAD1,0F2,0OFFLOAD2,0F3,0RELOAD1,0OFFLOAD3,0B0,0RELOAD2,0B1,0RELOAD3,0B2,0B3",
        ),
        # Behind the transfers, for which other ranks wait.
        (
            "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_I0,0B0,0RECV_I1,0B1\n1RECV_F0,1F0,1RECV_F1,1B0,1SEND_I0,1F1,1B1,1SEND_I1",
            Costs(),
            1.0,
            "0F0,0SEND_F0,0OFFLOAD0,0F1,0SEND_F1,0RECV_I0,0OFFLOAD1,0RELOAD0,0B0,0RECV_I1,0RELOAD1,0B1\n"
            "1RECV_F0,1F0,1RECV_F1,1B0,1SEND_I0,1F1,1B1,1SEND_I1",
        ),
    ],
)
def test_before_and_after(before: str, costs: Costs, fraction: float, after: str) -> None:
    assert offload_activations(Program.from_csv(before), costs, fraction=fraction) == Program.from_csv(after)


@given(timed(), FRACTIONS)
def test_copies_are_right_and_cost_no_time(program_and_costs: tuple[Program, Costs], fraction: float) -> None:
    program, costs = program_and_costs
    offloaded = offload_activations(program, costs, fraction=fraction)
    assert verify(offloaded) == []
    assert verify(pair_transfers(offloaded, costs)) == []
    assert verify(offload_activations(pair_transfers(program, costs), costs, fraction=fraction)) == []
    without = [[action for action in listed if action.op not in COPIES] for listed in offloaded.actions]
    assert program.with_actions(without) == program
    before, after = simulate(program, costs), simulate(offloaded, costs)
    for old, new in zip(passes(before), passes(after), strict=True):
        assert [action for action, *_ in new] == [action for action, *_ in old]
        assert [end for *_, end in new] == pytest.approx([end for *_, end in old])
    for old_peak, new_peak in zip(before.peak_activations, after.peak_activations, strict=True):
        assert new_peak <= old_peak
    for rank, listed in enumerate(offloaded.actions):
        out = {(action.stage, action.microbatch) for action in listed if action.op is Op.OFFLOAD}
        assert out == {(action.stage, action.microbatch) for action in listed if action.op is Op.RELOAD}
        assert len({stage for stage, _ in out}) <= math.ceil(fraction * len(program.stages_of(rank)))


@given(timed(), FRACTIONS)
def test_one_copy_engine_serves(program_and_costs: tuple[Program, Costs], fraction: float) -> None:
    """At the planned times the copies of a rank do not overlap; out behind the forward, back before the backward."""
    program, costs = program_and_costs
    for listed in simulate(program, costs).spans:
        plan = plan_copies(listed, costs, fraction)
        copies = []
        for life, offload, reload in plan:
            out, back = (costs.seconds(Action(op, life.stage, 0)) for op in (Op.OFFLOAD, Op.RELOAD))
            assert life.start - 1e-6 <= offload < offload + out <= reload + 1e-6 or not out
            assert reload + back <= life.end + 1e-6
            copies += [(offload, offload + out), (reload, reload + back)]
        copies.sort()
        assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(copies))


@given(programs(), SECONDS, SECONDS, SECONDS)
def test_with_fast_copies_all_but_the_short_lives_leave(
    program: Program, forward: float, inputs: float, weights: float
) -> None:
    seconds = min(forward, inputs, weights) / 4
    costs = Costs(forward, inputs, weights, offload_seconds=seconds, reload_seconds=seconds)
    for listed in simulate(program, costs).spans:
        gone = {(life.stage, life.microbatch) for life, *_ in plan_copies(listed, costs, 1.0)}
        starts = {(s.action.stage, s.action.microbatch): s.end for s in listed if s.action.op is Op.F}
        for span in listed:
            key = span.action.stage, span.action.microbatch
            if span.action.op in (Op.B, Op.I) and key not in gone:
                # A slot begins within one slot's time, and one of the right kind within another.
                assert span.start - starts[key] < 6 * seconds


# PipeOffload's figures for uniform repetition, d = 8: half of the stages leaves (v+2)/8v of M = vd, the activations
# of the whole model; all of them leaves a number that does not grow with v.
@pytest.mark.parametrize("v", [2, 4, 8, 16])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_peaks_fall_as_published(v: int, ratio: float) -> None:
    """`ratio` is the paper's k: the time of both copies in units of F + I + W."""
    d = 8
    costs = Costs(offload_seconds=1.5 * ratio, reload_seconds=1.5 * ratio)
    program = generate("uniform", d, 4 * d, chunks=v)
    half, full = (simulate(offload_activations(program, costs, fraction=fraction), costs) for fraction in (0.5, 1.0))
    # What is on its way counts as here: the pass that runs, and the copies under way.
    on_the_way = 1 if not ratio else 3
    assert (v + 2) * d / 8 <= max(half.peak_activations) <= (v + 2) * d / 8 + on_the_way
    assert max(full.peak_activations) <= (1 if not ratio else 2 + 4 * ratio)
    assert half.bubble_rate == pytest.approx(simulate(program, costs).bubble_rate)


def test_half_of_the_stages_takes_three_quarters_away() -> None:
    program = generate("uniform", 8, 32, chunks=16)
    costs = Costs(offload_seconds=0.5, reload_seconds=0.5)
    before = max(simulate(program, costs).peak_activations)
    after = max(simulate(offload_activations(program, costs, fraction=0.5), costs).peak_activations)
    assert 0.25 <= after / before <= 0.3


def test_a_copy_waits_for_its_turn() -> None:
    """A RELOAD could run right behind its OFFLOAD; its place in the list says that it does not."""
    program = Program.from_csv("0F0,0OFFLOAD0,0F1,0B1,0RELOAD0,0B0")
    timeline = simulate(program)
    assert {str(span.action): span.start for span in timeline.spans[0]}["0RELOAD0"] == 4.0
    assert timeline.memory(0) == [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (4.0, 0.0), (4.0, 1.0), (6.0, 0.0)]
    stuck = simulate(Program.from_csv("0F0,0OFFLOAD0,1B0,0RELOAD0,0B0"))
    assert "rank 0, lane h2d: 0RELOAD0 waits for 1B0 on rank 0 (it is listed before the copy)" in map(
        str, stuck.blocked
    )


def test_bad_input() -> None:
    program = generate("1f1b", 2, 4)
    for fraction in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"fraction=.* must be above 0 and at most 1"):
            offload_activations(program, fraction=fraction)
    with pytest.raises(ValueError, match="already lists OFFLOAD, RELOAD"):
        offload_activations(offload_activations(program))
    with pytest.raises(ProgramError, match="1B0 waits for 1F0"):
        offload_activations(Program.from_csv("0F0,0B0\n1B0,1F0"))


def test_large_programs_are_fast() -> None:
    costs = Costs(offload_seconds=1.0, reload_seconds=1.0)
    program = generate("uniform", 16, 128, chunks=4)
    begun = time.perf_counter()
    simulate(program, costs)
    alone = time.perf_counter() - begun
    offload_activations(program, costs)
    assert time.perf_counter() - begun < 2.0 + 5 * alone
