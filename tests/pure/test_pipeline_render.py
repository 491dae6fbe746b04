"""The text grid."""

from __future__ import annotations

import inspect

import pytest

from parallel.pipeline.actions import Action
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.passes.update import add_update
from parallel.pipeline.program import Program
from parallel.pipeline.render import render_grid
from parallel.pipeline.schedules.registry import generate, schedules


def test_1f1b() -> None:
    assert render_grid(generate("1f1b", 4, 5)) == (
        "1f1b: 4 ranks, 4 stages, 5 micro-batches\n"
        "rank 0 | F0 F1 F2 F3 .  .  .  .  .  .  B0 -- F4 B1 -- .  B2 -- .  B3 -- .  B4 --\n"
        "rank 1 | .  F0 F1 F2 .  .  .  .  B0 -- F3 B1 -- F4 B2 -- .  B3 -- .  B4 -- .  .\n"
        "rank 2 | .  .  F0 F1 .  .  B0 -- F2 B1 -- F3 B2 -- F4 B3 -- .  B4 -- .  .  .  .\n"
        "rank 3 | .  .  .  F0 B0 -- F1 B1 -- F2 B2 -- F3 B3 -- F4 B4 -- .  .  .  .  .  .\n"
    )


def test_one_rank() -> None:
    assert render_grid(add_update(generate("1f1b", 1, 2))) == (
        "1f1b: 1 rank, 1 stage, 2 micro-batches\nrank 0 | F0 B0 -- F1 B1 --\n"
    )


def test_the_stage_is_shown_where_a_rank_has_several() -> None:
    program = Program.from_csv("0F0,3F0,3I0,0I0,3W0,0W0\n1F0,1B0\n2F0,2B0", placement=(0, 1, 2, 0), name="v")
    assert render_grid(pair_transfers(program)) == (
        "v: 3 ranks, 4 stages, 1 micro-batch\n"
        "rank 0 | 0F0 .   .   3F0 3I0 .   .   .   .   0I0 3W0 0W0\n"
        "rank 1 | .   F0  .   .   .   .   .   B0  --- .   .   .\n"
        "rank 2 | .   .   F0  .   .   B0  --- .   .   .   .   .\n"
    )


def test_marks_reach_every_lane_and_what_is_not_listed() -> None:
    program = add_update(pair_transfers(generate("gpipe", 2, 2)))
    texts = ((0, "0B1"), (0, "0UPDATE"), (1, "1RECV_F1"), (1, "1REDUCE"))
    assert render_grid(program, [(rank, Action.parse(text)) for rank, text in texts]) == (
        "gpipe: 2 ranks, 2 stages, 2 micro-batches\n"
        "rank 0 | F0   F1   .    .    .    B0   ---- !B1! ----\n"
        "       | compute: !UPDATE!\n"
        "rank 1 | .    F0   F1   B0   ---- B1   ---- .    .    | not listed: !REDUCE!\n"
        "       | p2p: RECV_F0 !RECV_F1! SEND_I0 SEND_I1\n"
    )


def test_a_stuck_program_is_shown_as_far_as_it_runs() -> None:
    assert render_grid(Program.from_csv("0F0,0B0\n1B0,1F0", name="stuck")) == (
        "stuck: 2 ranks, 2 stages, 1 micro-batch\n"
        "rank 0 | F0 | never runs: B0\n"
        "rank 1 | .  | never runs: B0 F0\n"
    )


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_schedules_draw_themselves_in_their_docstrings(name: str) -> None:
    grid = render_grid(generate(name, 2, 3)).splitlines()[1:]
    drawn = inspect.getdoc(inspect.getmodule(schedules()[name].generator))
    assert drawn is not None
    assert grid == [line.strip() for line in drawn.splitlines() if line.strip().startswith("rank ")]
