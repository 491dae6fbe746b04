"""Merge the halves of a backward that run one right after the other.

A split backward costs a little more than a whole one, so I and W of one (stage, micro-batch) are merged to B
where nothing lies between them. Apply it before transfers are placed: a SEND_I between the halves is a reason
for the split.
"""

from __future__ import annotations

from collections.abc import Iterable

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.program import Program


def merge_backward(program: Program) -> Program:
    """The program with every I that is directly followed by its W replaced by one B."""
    return program.with_actions(_merged(listed) for listed in program.actions)


def _merged(listed: Iterable[Action]) -> list[Action]:
    merged: list[Action] = []
    for action in listed:
        if action.op is Op.W and merged and merged[-1] == Action(Op.I, action.stage, action.microbatch):
            merged[-1] = Action(Op.B, action.stage, action.microbatch)
        else:
            merged.append(action)
    return merged
