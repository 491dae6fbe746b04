"""Collect sharded parameters when a stage needs them, and drop them when it does not for a while.

A rank whose parameters are spread over its neighbours holds only its part of each stage. Forwards and the
input-gradient halves of backwards read whole weights; W reads activations and gradients only. So the passes of a
stage that follow each other closely make a run: its weights are gathered before the run and released behind it.
How many runs there are is up to the schedule. Breadth-first has two a chunk, forwards and backwards; with one
chunk a rank there is a single run, from the first pass to the last.

The gather of a run is listed `ahead` passes before the run, whatever those are of, and hides behind them. That is
also what closely means: where the weights would be gathered again as soon as they are released, they stay. At any
time a rank holds the weights of the stage it works on and of those that the next `ahead` passes need, no more:
releases and gathers share a lane, and a gather begins in its turn.

Two collectives of one lane meet their peers in the order of the list, which is the same on every rank of a
data-parallel group: they run the same program.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from parallel.pipeline.actions import PASS_OPS, WEIGHT_OPS, Action, Op
from parallel.pipeline.program import Program, refuse


class _Run(NamedTuple):
    """Passes of one stage: the first and the last, and their numbers on the rank."""

    begins: int
    first: Action
    ends: int
    last: Action


def gather_weights(program: Program, *, ahead: int = 1, hold: bool = False) -> Program:
    """The program with a GATHER_F or GATHER_I before every run of passes of a stage, and a RELEASE behind it.

    Args:
        ahead: passes between the start of a gather and the pass that waits for it.
        hold: one run a stage, from its first pass to its last: a gather is paid once a step, not the least memory.

    Raises:
        ValueError: the program already has gathers for passes, or `ahead` is negative.
    """
    refuse(program, WEIGHT_OPS, "gather_weights")
    if ahead < 0:
        raise ValueError(f"gather_weights: ahead={ahead} is negative; 0 gathers right before the pass")
    return program.with_actions(_woven(listed, ahead, hold) for listed in program.actions)


def _woven(listed: Sequence[Action], ahead: int, hold: bool) -> Iterator[Action]:
    """The releases and gathers right before a pass: other ranks wait for the transfers behind the pass before."""
    passes = [action for action in listed if action.op in PASS_OPS]
    released: dict[int, Action] = {}
    gathered: dict[int, list[Action]] = {}
    for run in _runs(passes, ahead, hold):
        op = Op.GATHER_F if run.first.op is Op.F else Op.GATHER_I
        gathered.setdefault(max(0, run.begins - ahead), []).append(Action(op, run.first.stage, run.first.microbatch))
        op = Op.RELEASE_F if run.last.op is Op.F else Op.RELEASE_I
        released[run.ends + 1] = Action(op, run.last.stage, run.last.microbatch)
    number = 0
    for action in listed:
        if action.op in PASS_OPS:
            if number in released:
                yield released[number]
            yield from gathered.get(number, ())
            number += 1
        yield action
    if number in released:
        yield released[number]


def _runs(passes: Sequence[Action], ahead: int, hold: bool) -> list[_Run]:
    """In the order of their first passes."""
    open_runs: dict[int, _Run] = {}
    runs: list[_Run] = []
    for number, action in enumerate(passes):
        if action.op is Op.W:
            continue
        run = open_runs.get(action.stage)
        if run is not None and (hold or number - run.ends <= ahead + 1):
            open_runs[action.stage] = run._replace(ends=number, last=action)
        else:
            if run is not None:
                runs.append(run)
            open_runs[action.stage] = _Run(number, action, number, action)
    return sorted([*runs, *open_runs.values()])
