"""Evaluation is the training program without everything that trains."""

from __future__ import annotations

from parallel.pipeline.actions import Op
from parallel.pipeline.program import Program

_KEPT = frozenset({Op.F, Op.SEND_F, Op.RECV_F})


def forward_only(program: Program) -> Program:
    """The forwards of `program` and the transfers between them, in their order.

    What is left of an order that is free of deadlock is free of deadlock: transfers keep their relative order on
    every rank, and no forward waits for anything that was removed.
    """
    return program.with_actions([action for action in listed if action.op in _KEPT] for listed in program.actions)
