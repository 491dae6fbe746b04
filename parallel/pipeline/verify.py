"""Is a program right? All violations at once, each with its rank and action.

Checked are sets, not counts: every (stage, micro-batch) has exactly one F and exactly one of {B} or {I, W},
on the rank of its stage; every send has its receive; every stage is reduced and updated once, if any is; the
program comes to its end (`simulate` finds deadlocks with the same rules the executor follows); and, under a
limit, how many activations are alive at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

from parallel.pipeline.actions import TRANSFER_OPS, Action, Op
from parallel.pipeline.costs import Costs
from parallel.pipeline.program import Program
from parallel.pipeline.render import render_grid
from parallel.pipeline.rules import receive_of
from parallel.pipeline.simulate import Sends, Timeline, peak_activations, simulate


class Fault(StrEnum):
    """The kinds of violations."""

    MISSING = "missing"  # an action that has to be there is not
    DUPLICATE = "duplicate"  # an action is listed more than once
    CONFLICT = "conflict"  # actions that exclude each other: B beside I or W, a REDUCE of what is reduced
    WRONG_RANK = "wrong rank"  # an action is listed by a rank that its stage is not on
    UNPAIRED = "unpaired"  # a send or receive without its other half, or where no data crosses
    DEADLOCK = "deadlock"  # a lane never comes to its end
    MEMORY = "memory"  # too many activations alive


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong: which rule, on which rank, at which action, in words."""

    fault: Fault
    rank: int
    action: Action
    message: str

    def __str__(self) -> str:
        return f"{self.fault}: {self.message}"


class ProgramError(ValueError):
    """A program that must not run. Its text: every violation, and the grid with the failing cells marked."""

    def __init__(self, program: Program, violations: list[Violation], text: str) -> None:
        super().__init__(text)
        self.program = program
        self.violations = violations


def verify(
    program: Program,
    memory_limit: float | None = None,
    *,
    costs: Costs | None = None,
    sends: Sends | str = Sends.RENDEZVOUS,
) -> list[Violation]:
    """All violations of a program; an empty list means that it may run.

    Args:
        program: with or without transfers; those are checked as soon as there is one.
        memory_limit: the most activations that may be alive on a rank, in the unit of `costs.activation`.
        costs: what activations weigh; None: one each, to their B or W.
        sends: how transfers hold their lane in the search for deadlocks, "buffered" or "rendezvous". A
            program without deadlock under "rendezvous" has none under "buffered" either.
    """
    return [
        *_misplaced(program),
        *_duplicates(program),
        *_passes(program),
        *_transfers(program),
        *_reductions(program),
        *_syncs(program),
        *_updates(program),
        *_validations(program),
        *_deadlocks(program, Sends(sends)),
        *_memory(program, memory_limit, costs),
    ]


def check(
    program: Program,
    memory_limit: float | None = None,
    *,
    costs: Costs | None = None,
    sends: Sends | str = Sends.RENDEZVOUS,
) -> None:
    """Raise a ProgramError unless the program may run; arguments as for `verify`."""
    violations = verify(program, memory_limit, costs=costs, sends=sends)
    if violations:
        raise ProgramError(program, violations, explain(program, violations))


def explain(
    program: Program,
    violations: Sequence[Violation],
    *,
    timeline: Timeline | None = None,
    columns: int | None = None,
) -> str:
    """The violations, and the grid with the failing cells marked; `timeline` and `columns` as for the grid."""
    marked = {(violation.rank, violation.action) for violation in violations}
    count = f"{len(violations)} violation{'' if len(violations) == 1 else 's'}"
    lines = [f"program {program.name!r} must not run, {count}:"]
    lines += [f"  {violation}" for violation in violations]
    lines.append(render_grid(program, marked, timeline=timeline, columns=columns))
    return "\n".join(lines)


def _misplaced(program: Program) -> Iterator[Violation]:
    for rank, listed in enumerate(program.actions):
        for action in listed:
            if action.microbatch is not None and not program.passes_through(action.stage, action.microbatch):
                message = (
                    f"{action} is listed on rank {rank}, micro-batch {action.microbatch} passes through copy "
                    f"{program.replica_of(action.microbatch)} of the model, stage {action.stage} is of another"
                )
                yield Violation(Fault.CONFLICT, rank, action, message)
            owner = program.rank_of(action.stage)
            if owner != rank:
                message = f"{action} is listed on rank {rank}, stage {action.stage} is on rank {owner}"
                yield Violation(Fault.WRONG_RANK, rank, action, message)


def _duplicates(program: Program) -> Iterator[Violation]:
    seen: dict[Action, int] = {}
    for rank, listed in enumerate(program.actions):
        for action in listed:
            if action in seen:
                message = f"{action} is listed on rank {rank}, and before that on rank {seen[action]}"
                yield Violation(Fault.DUPLICATE, rank, action, message)
            seen.setdefault(action, rank)


def _passes(program: Program) -> Iterator[Violation]:
    """One F and one of {B} or {I, W}."""
    for stage, microbatch in product(range(program.stages), range(program.microbatches)):
        if not program.passes_through(stage, microbatch):
            continue
        rank = program.rank_of(stage)
        forward, full, inputs, weights = (Action(op, stage, microbatch) for op in (Op.F, Op.B, Op.I, Op.W))
        has_full, has_inputs, has_weights = (action in program.listed for action in (full, inputs, weights))
        if forward not in program.listed:
            yield Violation(Fault.MISSING, rank, forward, f"{forward} is missing on rank {rank}")
        for half, has_half in ((inputs, has_inputs), (weights, has_weights)):
            if has_full and has_half:
                message = (
                    f"{half} on rank {rank} repeats a part of {full}; list {full} or {inputs} and {weights}"
                )
                yield Violation(Fault.CONFLICT, rank, half, message)
        if not has_full and not has_inputs and not has_weights:
            message = f"{full} is missing on rank {rank}, and so are its halves {inputs} and {weights}"
            yield Violation(Fault.MISSING, rank, full, message)
        elif not has_full and has_inputs != has_weights:
            present, absent = (inputs, weights) if has_inputs else (weights, inputs)
            message = f"{absent} is missing on rank {rank}, the other half {present} is listed"
            yield Violation(Fault.MISSING, rank, absent, message)


def _transfers(program: Program) -> Iterator[Violation]:
    """The listed transfers are those that the placement asks for, no fewer and no more."""
    if not program.has_transfers:
        return
    asked: dict[Action, Action] = {}  # each with its other half
    boundaries = [stage for stage, crosses in enumerate(program.crossings) if crosses]
    for stage, microbatch in product(boundaries, range(program.microbatches)):
        if not program.passes_through(stage, microbatch):
            continue
        for send, receive in (
            (Action(Op.SEND_F, stage, microbatch), Action(Op.RECV_F, stage + 1, microbatch)),
            (Action(Op.SEND_I, stage + 1, microbatch), Action(Op.RECV_I, stage, microbatch)),
        ):
            asked[send], asked[receive] = receive, send
    for action, other in asked.items():
        if action not in program.listed:
            rank, peer = program.rank_of(action.stage), program.rank_of(other.stage)
            lists = "lists" if other in program.listed else "does not list either"
            message = (
                f"{action} is missing on rank {rank}; its other half is {other}, which rank {peer} {lists}"
            )
            yield Violation(Fault.UNPAIRED, rank, action, message)
    for rank, listed in enumerate(program.actions):
        for action in listed:
            if action.op in TRANSFER_OPS and action not in asked:
                message = f"{action} on rank {rank} has no other half: nothing crosses between ranks there"
                yield Violation(Fault.UNPAIRED, rank, action, message)


def _reductions(program: Program) -> Iterator[Violation]:
    """Every gradient is reduced once, step by step or micro-batch by micro-batch, if any gradient is."""
    if Op.REDUCE not in program.ops:
        return
    for stage in range(program.stages):
        rank = program.rank_of(stage)
        step = Action(Op.REDUCE, stage)
        single = [Action(Op.REDUCE, stage, microbatch) for microbatch in program.microbatches_of(stage)]
        listed = [action for action in single if action in program.listed]
        if step in program.listed:
            for action in listed:
                message = f"{action} on rank {rank} reduces again what {step} reduces; list one or the other"
                yield Violation(Fault.CONFLICT, rank, action, message)
        elif not listed:
            message = f"{step} is missing on rank {rank}, other stages are reduced"
            yield Violation(Fault.MISSING, rank, step, message)
        else:
            for action in sorted(set(single) - set(listed)):
                message = f"{action} is missing on rank {rank}, other micro-batches of the stage are reduced"
                yield Violation(Fault.MISSING, rank, action, message)


def _syncs(program: Program) -> Iterator[Violation]:
    """Copies of a stage are synchronized once each, and two ranks meet in the same order."""
    if Op.SYNC not in program.ops:
        return
    for stage in range(program.stages):
        rank, action = program.rank_of(stage), Action(Op.SYNC, stage)
        if not program.twins_of(stage) and action in program.listed:
            message = f"{action} on rank {rank} has nothing to meet: there is no other copy of stage {stage}"
            yield Violation(Fault.UNPAIRED, rank, action, message)
        if program.twins_of(stage) and action not in program.listed:
            message = f"{action} is missing on rank {rank}, other stages have theirs"
            yield Violation(Fault.MISSING, rank, action, message)
    met: dict[tuple[int, int], list[tuple[int, Action]]] = {}
    for rank, listed in enumerate(program.actions):
        for action in listed:
            if action.op is Op.SYNC:
                for twin in program.twins_of(action.stage):
                    part, peer = program.part_of(action.stage), program.rank_of(twin)
                    met.setdefault((rank, peer), []).append((part, action))
    for (rank, peer), parts in met.items():
        others = [part for part, _ in met.get((peer, rank), [])]
        if rank < peer and sorted(part for part, _ in parts) == sorted(others):
            for (part, action), other in zip(parts, others, strict=True):
                if part != other:
                    message = f"{action} on rank {rank} meets part {other} of the model on rank {peer}; list both alike"
                    yield Violation(Fault.UNPAIRED, rank, action, message)
                    break


def _updates(program: Program) -> Iterator[Violation]:
    """If any stage is updated (or its updated weights gathered), all are."""
    for op in (Op.UPDATE, Op.GATHER):
        needed = [Action(op, stage) for stage in range(program.stages)]
        if any(action in program.listed for action in needed):
            for action in needed:
                if action not in program.listed:
                    rank = program.rank_of(action.stage)
                    message = f"{action} is missing on rank {rank}, other stages have theirs"
                    yield Violation(Fault.MISSING, rank, action, message)


def _validations(program: Program) -> Iterator[Violation]:
    """If any rank validates, all do, once, and what they repeat stands by itself (passes/validate.py)."""
    if Op.VALIDATE not in program.ops:
        return
    received: list[tuple[int, Action]] = []
    sent: set[Action] = set()
    for rank, listed in enumerate(program.actions):
        cells = [cell for cell, action in enumerate(listed) if action.op is Op.VALIDATE]
        if not cells and listed:
            action = Action(Op.VALIDATE, listed[0].stage)
            yield Violation(Fault.MISSING, rank, action, f"{action} is missing on rank {rank}, other ranks have theirs")
        for cell in cells[1:]:
            message = f"{listed[cell]} on rank {rank} validates again; list one VALIDATE a rank"
            yield Violation(Fault.CONFLICT, rank, listed[cell], message)
        for action in listed[: cells[0]] if cells else ():
            if action.op in (Op.B, Op.I, Op.W, Op.RECV_I):
                message = f"{action} is listed on rank {rank} before its VALIDATE, which has to come first"
                yield Violation(Fault.CONFLICT, rank, action, message)
            if action.op is Op.RECV_F:
                received.append((rank, action))
            elif action.op is Op.SEND_F and (receive := receive_of(action, program)) is not None:
                sent.add(receive.action)
    for rank, action in received:
        if action not in sent:
            message = f"{action} is listed on rank {rank} before its VALIDATE, its send behind that of the sender"
            yield Violation(Fault.CONFLICT, rank, action, message)


def _deadlocks(program: Program, sends: Sends) -> Iterator[Violation]:
    for stuck in simulate(program, sends=sends).blocked:
        yield Violation(Fault.DEADLOCK, stuck.rank, stuck.action, str(stuck))


def _memory(program: Program, limit: float | None, costs: Costs | None) -> Iterator[Violation]:
    if limit is None:
        return
    for rank in range(program.ranks):
        peak, action = peak_activations(program, rank, costs)
        if action is not None and peak > limit:
            message = f"rank {rank} holds {peak:g} activations at {action}, the limit is {limit:g}"
            yield Violation(Fault.MEMORY, rank, action, message)
