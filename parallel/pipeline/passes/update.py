"""Close the step: the optimizer, and the updated weights back to every rank that reads them.

Every UPDATE waits for all gradients of its rank (the norm for clipping is over all of them), so there is
nothing to gain from placing one earlier. The order among stages matters: the weights that the next step reads
first come first, and the GATHER of one stage runs beside the UPDATE of the next.
"""

from __future__ import annotations

from collections.abc import Sequence

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.program import Program, refuse


def add_update(program: Program) -> Program:
    """The program with UPDATE and GATHER of each stage at the end, in the order of the stages' first F.

    Raises:
        ValueError: the program already has updates or gathers.
    """
    refuse(program, [Op.UPDATE, Op.GATHER], "add_update")
    return program.with_actions((*listed, *_closing(listed)) for listed in program.actions)


def _closing(listed: Sequence[Action]) -> list[Action]:
    stages = dict.fromkeys(action.stage for action in listed if action.op is Op.F)
    return [Action(op, stage) for stage in stages for op in (Op.UPDATE, Op.GATHER)]
