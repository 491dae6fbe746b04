"""Programs: shape checks and the CSV form."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.program import Program, refuse
from parallel.pipeline.schedules.registry import generate


def test_csv_is_readable() -> None:
    assert generate("1f1b", 2, 3).to_csv() == (
        "# name: 1f1b\n"
        "# microbatches: 3\n"
        "# placement: 0 1\n"
        "0F0,0F1,0B0,0F2,0B1,0B2\n"
        "1F0,1B0,1F1,1B1,1F2,1B2\n"
    )


def test_csv_round_trip() -> None:
    plain = generate("1f1b", 3, 4)
    paired = pair_transfers(plain)
    idle = Program("half idle: yes", 2, 1, 7, (1,), ((), (Action(Op.F, 0, 0),)))
    empty = idle.with_actions(((), ()))
    for program in (plain, paired, idle, empty):
        assert Program.from_csv(program.to_csv()) == program


def test_csv_without_comments_is_counted() -> None:
    program = generate("gpipe", 3, 4)
    rows = [line for line in program.to_csv().splitlines() if not line.startswith("#")]
    assert Program.from_csv("\n".join(rows)) == replace(program, name="csv")


def test_csv_placement_is_the_first_rank_that_lists_a_stage() -> None:
    program = Program.from_csv("0F0,1F0, ,1B0,,0B0\n-\n2F0,2B0")
    assert (program.ranks, program.stages, program.placement) == (3, 3, (0, 0, 2))
    assert program.actions[0] == tuple(map(Action.parse, ("0F0", "1F0", "1B0", "0B0")))
    assert program.stages_of(0) == (0, 1)
    assert program.crossings == (False, True, False)


def test_csv_arguments_win_over_comments() -> None:
    text = generate("gpipe", 2, 2).to_csv()
    program = Program.from_csv(text, name="mine", microbatches=5, placement=(1, 0))
    assert (program.name, program.microbatches, program.placement) == ("mine", 5, (1, 0))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no rows"),
        ("# name: nothing\n\n", "no rows"),
        ("0F0\n1F0,1X0", "rank 1, cell 1: '1X0' is not an action"),
        ("0F0,0B0\n2F0", "no rank lists an action of stage 1"),
        ("# microbatches: two\n0F0", "'# microbatches: two' must hold whole numbers"),
        ("# microbatches: 2 3\n0F0", "'# microbatches: 2 3' must hold one number"),
        ("# microbatches: 0\n0F0", "microbatches=0 must be at least 1"),
        ("# placement:\n0F0", "'# placement: ' must hold whole numbers"),
        ("# placement: 4\n0F0", "stage 0 is placed on rank 4 of 1 ranks"),
        ("# microbatches: 1\n0F0,0F1", "rank 0, cell 1: 0F1 is of micro-batch 1, the program has"),
        ("# placement: 0\n0F0,1F0", "rank 0, cell 1: 1F0 is of stage 1, the program has stages 0 to 0"),
    ],
)
def test_bad_csv_names_the_place(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        Program.from_csv(text)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"name": ""}, "one printable line"),
        ({"name": "two\nlines"}, "one printable line"),
        ({"name": " 1f1b"}, "one printable line"),
        ({"ranks": 0}, "ranks=0 must be at least 1"),
        ({"microbatches": -1}, "microbatches=-1 must be at least 1"),
        ({"placement": (0,)}, "placement (0,) must give a rank to each of 2 stages"),
        ({"placement": (0, 2)}, "stage 1 is placed on rank 2 of 2 ranks"),
        ({"actions": ((),)}, "1 lists of actions for 2 ranks"),
    ],
)
def test_shape_is_checked(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        replace(generate("1f1b", 2, 2), **change)  # type: ignore[arg-type]


def test_cells_are_actions() -> None:
    with pytest.raises(TypeError, match="rank 1, cell 0: '1F0' is not an Action"):
        generate("1f1b", 2, 2).with_actions([[], ["1F0"]])  # type: ignore[list-item]


def test_a_pass_is_refused_where_it_was_applied() -> None:
    with pytest.raises(ValueError, match="add_things: program '1f1b' already lists B; apply it only once"):
        refuse(generate("1f1b", 2, 2), [Op.B, Op.W], "add_things")
