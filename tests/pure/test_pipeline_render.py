"""The text grid."""

from __future__ import annotations

import inspect

import pytest

from parallel.pipeline.actions import Action
from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.passes.update import add_update
from parallel.pipeline.program import Program
from parallel.pipeline.render import render_grid
from parallel.pipeline.schedules.registry import generate, schedules
from parallel.pipeline.simulate import simulate


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


def rows(name: str, costs: Costs, columns: int | None = None) -> list[str]:
    program = generate(name, 2, 3, costs=costs)
    return render_grid(program, timeline=simulate(program, costs), columns=columns).splitlines()


def test_time_is_that_of_the_costs() -> None:
    assert rows("zb-h1", Costs(2.0, 1.0, 1.0)) == [
        "zb-h1: 2 ranks, 2 stages, 3 micro-batches",
        "rank 0 | F0 -- F1 -- .  I0 W0 F2 -- I1 W1 .  I2 W2",
        "rank 1 | .  .  F0 -- I0 F1 -- I1 W0 F2 -- I2 W1 W2",
    ]


@pytest.mark.parametrize(
    ("costs", "slot", "first"),
    [
        (Costs(18.5, 18.1, 9.3), "one slot is 9.3", "F0 -- F1"),  # 9.3 shows 18.1 and 18.5 as two slots
        (Costs(1.5, 1.0, 1.0), "one slot is 0.5", "F0 -- -- F1"),  # 1.5 is neither one nor two times 1
        (Costs(3.0, 3.0, 3.0), "one slot is 3", "F0 F1"),
        (Costs(100.0, 100.0, 1.0), "one slot is 8.333", "F0 -- -- -- -- -- -- -- -- -- -- -- F1"),
        (Costs(1.0, 1.0, 1.0, transfer_seconds=0.4), "3 micro-batches", "F0 F1"),
        (Costs(0.0, 0.0, 0.0), "3 micro-batches", ""),
    ],
)
def test_slots_show_passes_in_proportion(costs: Costs, slot: str, first: str) -> None:
    title, rank, _ = rows("zb-h1", costs)
    assert title.endswith(slot)
    assert rank.startswith(f"rank 0 | {first}".rstrip())


def test_wide_grids_lose_their_middle() -> None:
    whole, cut = rows("1f1b", Costs()), rows("1f1b", Costs(), columns=40)
    assert cut == [
        "1f1b: 2 ranks, 2 stages, 3 micro-batches; slots 5 to 7 of 12 are left out",
        "rank 0 | F0 F1 .  .  B0 ... -- .  B2 --",
        "rank 1 | .  F0 B0 -- F1 ... B2 -- .  .",
    ]
    assert max(map(len, cut[1:])) <= 40
    assert rows("1f1b", Costs(), columns=len(whole[1]) + 1) == whole


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_schedules_draw_themselves_in_their_docstrings(name: str) -> None:
    grid = render_grid(generate(name, 2, 3)).splitlines()[1:]
    drawn = inspect.getdoc(inspect.getmodule(schedules()[name].generator))
    assert drawn is not None
    assert grid == [line.strip() for line in drawn.splitlines() if line.strip().startswith("rank ")]
