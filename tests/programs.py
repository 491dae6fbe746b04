"""Programs for tests: of registered schedules, and arbitrary right ones."""

from __future__ import annotations

import random
from functools import cache

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


@cache
def possible_ranks(name: str, most: int = 8) -> tuple[int, ...]:
    """Numbers of ranks that a schedule can do; 2, 4 and 8 are among those of every schedule."""

    def possible(ranks: int) -> bool:
        try:
            return bool(generate_from(name, ranks, ranks))
        except ScheduleError:
            return False

    return tuple(ranks for ranks in range(1, most + 1) if possible(ranks))


def random_program(seed: int, ranks: int, replicas: int = 1) -> Program:
    """Up to 6 stages of each copy of the model placed at random, no two copies of one on the same rank, up to 4
    micro-batches for each copy, backwards whole or split at random, all passes in a random order that can run."""
    chance = random.Random(seed)
    depth, share = chance.randint(1, 6), chance.randint(1, 4)
    stages, microbatches = depth * replicas, share * replicas
    placements = [chance.sample(range(ranks), replicas) for _ in range(depth)]
    placement = tuple(copies[copy] for copy in range(replicas) for copies in placements)
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
