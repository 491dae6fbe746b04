"""Place gradient reductions right behind the gradients, so that they hide behind the rest of the backward.

A REDUCE stands behind the transfers that follow its backward: another rank waits for those, nobody for the
reduction before the step ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from parallel.pipeline.actions import TRANSFER_OPS, Action, Op
from parallel.pipeline.program import Program, refuse


def add_reduce(program: Program, per_microbatch: bool) -> Program:
    """The program with a REDUCE behind the last B or W of each stage, or `per_microbatch` behind each.

    Per micro-batch is for gradients that are not kept whole between micro-batches (ZeRO stage 2).

    Raises:
        ValueError: the program already has reductions.
    """
    refuse(program, [Op.REDUCE], "add_reduce")
    return program.with_actions(_with_reductions(listed, per_microbatch) for listed in program.actions)


def _with_reductions(listed: Sequence[Action], per_microbatch: bool) -> list[Action]:
    last = {action.stage: cell for cell, action in enumerate(listed) if action.op in (Op.B, Op.W)}
    actions: list[Action] = []
    due: list[Action] = []
    for cell, action in enumerate(listed):
        if action.op not in TRANSFER_OPS:
            actions += due
            due = []
        actions.append(action)
        if action.op in (Op.B, Op.W) and (per_microbatch or cell == last[action.stage]):
            due.append(Action(Op.REDUCE, action.stage, action.microbatch if per_microbatch else None))
    return actions + due
