"""Place the validation of the last step's updates (optimizer post-validation) in the warm-up of a step.

Without a barrier between steps, a rank begins a step with weights that may turn out wrong. VALIDATE is where it
learns that, as late as it can: before the first action of a backward, since that overwrites the gradients a wrong
update has to be made again with. Then the actions before VALIDATE are repeated. That works rank by rank if what a
rank receives before its VALIDATE was sent before the sender's: otherwise the VALIDATE moves forward, before that
receive.
"""

from __future__ import annotations

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.program import Program, refuse
from parallel.pipeline.rules import receive_of

BACKWARD_OPS = frozenset({Op.B, Op.I, Op.RECV_I})
"""What a VALIDATE must come before. The gradient of another rank is received behind all forwards of it that are
repeated, since messages between two ranks match by their order."""


def add_validation(program: Program) -> Program:
    """The program with one VALIDATE on every rank; with one rank there is nothing to validate.

    Args:
        program: with transfers.

    Raises:
        ValueError: the program already has validations.
    """
    refuse(program, [Op.VALIDATE], "add_validation")
    if program.ranks == 1:
        return program
    cuts = [_first_backward(listed) for listed in program.actions]
    while moved := _earlier(program, cuts):
        cuts = moved
    actions = []
    for rank, listed in enumerate(program.actions):
        stages = program.stages_of(rank)
        check = [Action(Op.VALIDATE, stages[0])] if stages else []
        actions.append([*listed[: cuts[rank]], *check, *listed[cuts[rank] :]])
    return program.with_actions(actions)


def _first_backward(listed: tuple[Action, ...]) -> int:
    return next((cell for cell, action in enumerate(listed) if action.op in BACKWARD_OPS), len(listed))


def _earlier(program: Program, cuts: list[int]) -> list[int] | None:
    """The cuts moved before every receive whose send is behind its rank's cut; None if there is none."""
    sent = set()
    for listed, cut in zip(program.actions, cuts, strict=True):
        for action in listed[:cut]:
            if action.op is Op.SEND_F and (receive := receive_of(action, program)) is not None:
                sent.add(receive.action)
    moved = [
        next((cell for cell, each in enumerate(listed[:cut]) if each.op is Op.RECV_F and each not in sent), cut)
        for listed, cut in zip(program.actions, cuts, strict=True)
    ]
    return None if moved == cuts else moved
