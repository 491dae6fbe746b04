"""Programs for tests: of registered schedules, and arbitrary right ones."""

from __future__ import annotations

import random

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import ScheduleError, generate


def generate_from(name: str, ranks: int, microbatches: int, *, chunks: int | None = None) -> Program:
    """The program of a schedule for the fewest micro-batches, `microbatches` or more, that it can do.

    Some need the pipeline filled (2 x ranks) or a multiple of the ranks. Raises what the schedule raises if it can do
    none of so many: that is no matter of micro-batches.
    """
    refused: ScheduleError | None = None
    for count in range(microbatches, microbatches + 2 * ranks + 1):
        try:
            return generate(name, ranks, count, chunks=chunks, time_limit_seconds=1.0)
        except ScheduleError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def random_program(seed: int, ranks: int, replicas: int = 1) -> Program:
    """Up to 6 stages of each copy of the model placed at random, up to 4 micro-batches for each copy, backwards whole
    or split at random, all passes in a random order that can run."""
    chance = random.Random(seed)
    depth, share = chance.randint(1, 6), chance.randint(1, 4)
    stages, microbatches = depth * replicas, share * replicas
    placement = tuple(chance.randrange(ranks) for _ in range(stages))
    shape = Program(f"random {seed}", ranks, stages, microbatches, placement, ((),) * ranks, replicas)
    needs = _needs(shape, chance)
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    done: set[Action] = set()
    while len(done) < len(needs):
        action = chance.choice([each for each, needed in needs.items() if each not in done and needed <= done])
        rows[placement[action.stage]].append(action)
        done.add(action)
    return shape.with_actions(rows)


def _needs(shape: Program, chance: random.Random) -> dict[Action, set[Action]]:
    """Every pass of the program and what comes before it."""
    needs: dict[Action, set[Action]] = {}
    for stage in reversed(range(shape.stages)):
        before, after = shape.before(stage), shape.after(stage)
        for microbatch in shape.microbatches_of(stage):
            forward = Action(Op.F, stage, microbatch)
            needs[forward] = set() if before is None else {Action(Op.F, before, microbatch)}
            backward = Action(chance.choice((Op.B, Op.I)), stage, microbatch)
            behind = {Action(op, after, microbatch) for op in (Op.B, Op.I)} if after is not None else set()
            needs[backward] = {forward} | (behind & needs.keys())
            if backward.op is Op.I:
                needs[Action(Op.W, stage, microbatch)] = {backward}
    return needs
