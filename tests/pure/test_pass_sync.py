"""The exchange of gradients between the copies of a model: where it is placed, and in which order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.passes.reduce import add_reduce
from parallel.pipeline.passes.sync import add_sync
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.passes.update import add_update
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import generate
from parallel.pipeline.simulate import Sends, simulate
from parallel.pipeline.verify import ProgramError, verify

# Two stages, two copies: the up copy's parts are stages 2 and 3, on ranks 1 and 0.
CHIMERA = """\
# name: chimera
# microbatches: 2
# placement: 0 1 1 0
# replicas: 2
0F0,3F1,3B1,0B0
2F1,1F0,1B0,2B1
"""


def rows(program: Program) -> list[str]:
    return [",".join(map(str, listed)) for listed in program.actions]


def test_a_sync_stands_where_both_copies_are_complete() -> None:
    program = add_sync(Program.from_csv(CHIMERA))
    # Part 1 (stages 1 and 3) is complete after 2 + 2 seconds on both ranks, part 0 at the end.
    assert rows(program) == ["0F0,3F1,3B1,3SYNC,0B0,0SYNC", "2F1,1F0,1B0,1SYNC,2B1,2SYNC"]
    assert verify(program) == []


def test_a_sync_stands_behind_the_reduction_of_its_stage() -> None:
    program = add_sync(add_reduce(Program.from_csv(CHIMERA), per_microbatch=False))
    assert rows(program) == [
        "0F0,3F1,3B1,3REDUCE,3SYNC,0B0,0REDUCE,0SYNC",
        "2F1,1F0,1B0,1REDUCE,1SYNC,2B1,2REDUCE,2SYNC",
    ]


def test_a_sync_stands_behind_the_passes_that_start_before_the_other_copy_is_complete() -> None:
    # Both reductions of part 1 run from 4 to 5 seconds, and 0B0 starts at 4.
    costs = Costs(reduce_seconds=1.0)
    program = add_sync(add_reduce(Program.from_csv(CHIMERA), per_microbatch=False), costs)
    assert rows(program)[0] == "0F0,3F1,3B1,3REDUCE,0B0,3SYNC,0REDUCE,0SYNC"


def test_a_sync_stands_behind_transfers() -> None:
    program = add_sync(pair_transfers(Program.from_csv(CHIMERA)))
    for listed in program.actions:
        texts = [str(action) for action in listed]
        for sync, send in (("3SYNC", "3SEND_I1"), ("1SYNC", "1SEND_I0")):
            if sync in texts:
                assert texts.index(send) < texts.index(sync)


def test_all_ranks_keep_one_order() -> None:
    # Without it, rank 0 would list part 1 first, and rank 1 part 0.
    text = CHIMERA.replace("3B1,0B0", "0B0,3B1")
    program = add_sync(Program.from_csv(text), Costs(input_gradient_seconds=(9.0, 1.0)))
    parts = [[program.part_of(a.stage) for a in listed if a.op is Op.SYNC] for listed in program.actions]
    assert parts[0] == parts[1]
    swapped = program.with_actions([program.actions[0], _swap(program.actions[1])])
    assert any("meets part" in str(violation) for violation in verify(swapped))


def _swap(listed: tuple[Action, ...]) -> list[Action]:
    syncs = iter(reversed([action for action in listed if action.op is Op.SYNC]))
    return [next(syncs) if action.op is Op.SYNC else action for action in listed]


def test_a_program_without_copies_comes_back_unchanged() -> None:
    program = generate("1f1b", 2, 4)
    assert add_sync(program) is program


def test_what_cannot_be_synchronized_is_refused() -> None:
    program = add_sync(Program.from_csv(CHIMERA))
    with pytest.raises(ValueError, match="add_sync: program 'chimera' already lists SYNC; apply it only once"):
        add_sync(program)
    with pytest.raises(ProgramError, match="1B0 is missing"):
        add_sync(Program.from_csv(CHIMERA.replace("1B0,", "")))


@settings(max_examples=25)
@given(
    st.sampled_from([2, 4, 6]),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([Costs(), Costs(1.0, 2.0, 0.5, 0.3, reduce_seconds=2.0, sync_seconds=1.5)]),
)
def test_whole_programs_are_right(p: int, units: int, per_microbatch: bool, costs: Costs) -> None:
    program = pair_transfers(generate("bitpipe", p, units * p, costs=costs), costs)
    program = add_update(add_sync(add_reduce(program, per_microbatch), costs))
    assert verify(program) == []
    for sends in (Sends.BUFFERED, Sends.RENDEZVOUS):
        assert simulate(program, costs, sends=sends).blocked == ()
    for stage in range(program.stages):
        listed = program.actions[program.rank_of(stage)]
        assert listed.count(Action(Op.SYNC, stage)) == 1
        reductions = [cell for cell, action in enumerate(listed) if action.op is Op.REDUCE and action.stage == stage]
        assert max(reductions) < listed.index(Action(Op.SYNC, stage)) < listed.index(Action(Op.UPDATE, stage))


def test_it_hides_most_of_the_exchange() -> None:
    costs = Costs(sync_seconds=2.0)
    program = generate("bitpipe", 8, 8)
    eager = simulate(add_sync(program, costs), costs).makespan_seconds
    last = program.with_actions(
        (*listed, *(Action(Op.SYNC, stage) for stage in sorted(program.stages_of(rank), key=program.part_of)))
        for rank, listed in enumerate(program.actions)
    )
    assert verify(last) == []
    alone = simulate(program, costs).makespan_seconds
    assert eager < simulate(last, costs).makespan_seconds
    assert eager - alone <= 2 * costs.sync_seconds  # of four a rank


def test_updates_that_are_there_already_stay_behind() -> None:
    program = add_sync(add_update(generate("bitpipe", 4, 4)))
    assert verify(program) == []
    for listed in program.actions:
        ops = [action.op for action in listed]
        assert max(cell for cell, op in enumerate(ops) if op is Op.SYNC) < ops.index(Op.UPDATE)
