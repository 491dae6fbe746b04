"""What an action waits for, as one table, which is what a program means.

The simulator and the verifier read it, passes keep to it, and the executor waits where it says.

Three kinds of waiting make up the meaning of a program. First, actions on one lane of one rank run in the order
in which the rank lists them. Second, an action waits for other actions, on its own rank or elsewhere, by the
rules below. Third, what fills memory ahead of a pass (`IN_TURN`) waits for the pass that its rank lists before
it: a RELOAD could run as soon as its OFFLOAD has, a gather at once, and only their places in the list say when the
memory is to be filled. Nothing else orders anything: lanes of one rank run beside each other.

A boundary between two stages is crossed in one of two ways. Where the program has transfers and the stages
are on different ranks, data arrives by RECV and the consumer waits for that. Where both stages share a rank,
or where sends and receives have not been placed yet, the consumer waits for the producer directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import NamedTuple

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.program import Program


class Requirement(NamedTuple):
    """That `action` is finished on `rank`, and why it has to be."""

    rank: int
    action: Action
    reason: str

    def __str__(self) -> str:
        return f"{self.action} on rank {self.rank} ({self.reason})"


class At(Enum):
    """The stages whose actions a rule means, seen from the waiting action."""

    OWN = auto()  # the same stage
    BEFORE = auto()  # the stage before
    AFTER = auto()  # the stage after
    BEFORE_DIRECT = auto()  # the stage before, where its output is read directly
    AFTER_DIRECT = auto()  # the stage after, where its gradient is read directly
    OWN_FED_BEFORE = auto()  # the same stage, where a transfer brings the output of the stage before
    OWN_FED_AFTER = auto()  # the same stage, where a transfer brings the gradient of the stage after
    RANK = auto()  # every stage of the same rank
    TWINS = auto()  # the stages of other copies of the model that hold the same part


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table.

    Attributes:
        needs: the ops that end the wait. The program lists one of them for each (stage, micro-batch); where
            it lists none, the first is demanded, so that what is missing can be named.
        reason: why, in words that complete "waits until ...".
        at: at which stages.
        if_listed: wait for all of `needs` that the program lists, and demand none.
        once: what is waited for is listed once for all micro-batches.
    """

    needs: tuple[Op, ...]
    reason: str
    at: At = At.OWN
    if_listed: bool = False
    once: bool = False


_BACKWARD = (
    Rule((Op.F,), "its forward has run"),
    Rule((Op.RECV_I,), "its output gradient has arrived", At.OWN_FED_AFTER),
    Rule((Op.B, Op.I), "the stage after has its input gradient", At.AFTER_DIRECT),
    Rule((Op.RELOAD,), "its activations are back on the device", if_listed=True),
    Rule((Op.GATHER_I,), "its weights are whole", if_listed=True),
    # A backward overwrites the gradients that a wrong update would have to be made again with.
    Rule((Op.VALIDATE,), "the weights are known to be right", At.RANK, if_listed=True, once=True),
)

# An action of one micro-batch waits for actions of that micro-batch, a step-level one for those of all.
RULES: Mapping[Op, tuple[Rule, ...]] = MappingProxyType(
    {
        Op.F: (
            Rule((Op.RECV_F,), "its input has arrived", At.OWN_FED_BEFORE),
            Rule((Op.F,), "the stage before has its output", At.BEFORE_DIRECT),
            Rule((Op.GATHER_F,), "its weights are whole", if_listed=True),
        ),
        Op.B: _BACKWARD,
        Op.I: _BACKWARD,
        Op.W: (Rule((Op.I,), "its input-gradient half has run"),),
        Op.SEND_F: (Rule((Op.F,), "the output exists"),),
        Op.RECV_F: (Rule((Op.SEND_F,), "the stage before has sent", At.BEFORE),),
        Op.SEND_I: (Rule((Op.B, Op.I), "the input gradient exists"),),
        Op.RECV_I: (Rule((Op.SEND_I,), "the stage after has sent", At.AFTER),),
        Op.REDUCE: (Rule((Op.B, Op.W), "the gradient is complete"),),
        Op.SYNC: (
            Rule((Op.B, Op.W), "the gradient is complete"),
            Rule((Op.B, Op.W), "the gradient of the other copy is complete", At.TWINS),
            Rule((Op.REDUCE,), "the gradient is reduced", if_listed=True),
            Rule((Op.REDUCE,), "the gradient of the other copy is reduced", At.TWINS, if_listed=True),
        ),
        # Clipping scales by the norm over all gradients of the model: no update before that is known.
        Op.UPDATE: (
            Rule((Op.B, Op.W), "the norm needs every gradient of the rank", At.RANK),
            Rule((Op.REDUCE,), "the norm needs every gradient of the rank reduced", At.RANK, if_listed=True),
            Rule((Op.SYNC,), "the norm needs every gradient of the rank whole", At.RANK, if_listed=True),
            Rule((Op.FETCH,), "the optimizer state is here", if_listed=True),
        ),
        Op.VALIDATE: (),  # for something of the step before
        # Without an UPDATE before it, a GATHER collects weights that are as they were; nothing is waited for.
        Op.GATHER: (Rule((Op.UPDATE,), "the weights are updated", if_listed=True),),
        Op.GATHER_F: (),
        Op.GATHER_I: (),
        Op.RELEASE_F: (Rule((Op.F,), "the weights are no longer read"),),
        Op.RELEASE_I: (Rule((Op.B, Op.I), "the weights are no longer read"),),
        Op.OFFLOAD: (Rule((Op.F,), "the activations exist"),),
        Op.RELOAD: (Rule((Op.OFFLOAD,), "the activations are in host memory"),),
        Op.FETCH: (),
        Op.FLUSH: (Rule((Op.UPDATE,), "the optimizer state is updated", if_listed=True),),
    }
)


IN_TURN: frozenset[Op] = frozenset({Op.OFFLOAD, Op.RELOAD, Op.GATHER_F, Op.GATHER_I})
"""Ops that wait for the last F, B, I or W listed before them."""


class Source(NamedTuple):
    """A rule as it applies to one op of one stage: where what it needs is listed."""

    rank: int
    stage: int
    rule: Rule


def sources(op: Op, stage: int, program: Program) -> tuple[Source, ...]:
    """What every action of `op` on `stage` waits for, whatever its micro-batch."""
    found: list[Source] = []
    for rule in RULES[op]:
        if rule.if_listed and program.ops.isdisjoint(rule.needs):
            continue
        found += [Source(program.placement[at], at, rule) for at in _stages(rule.at, stage, program)]
    return tuple(found)


def needed(source: Source, microbatch: int | None, program: Program) -> Iterator[tuple[Op, int | None]]:
    """The (op, micro-batch) pairs on `source.stage` that an action of `microbatch` waits for.

    A pair may name an action that the program does not list: then the action can never run.
    """
    rule, stage, listed = source.rule, source.stage, program.keys
    if rule.if_listed:
        for op in rule.needs:
            if microbatch is None:
                yield from ((op, each.microbatch) for each in program.by_stage.get((op, stage), ()))
            else:
                key = op, None if rule.once else microbatch
                if (op, stage, key[1]) in listed:
                    yield key
        return
    # For each micro-batch, the first of the rule's ops that the program lists, or the first of all.
    for each in program.microbatches_of(stage) if microbatch is None else (microbatch,):
        first = rule.needs[0]
        if len(rule.needs) > 1 and (first, stage, each) not in listed:
            first = next((op for op in rule.needs[1:] if (op, stage, each) in listed), first)
        yield first, each


def prerequisites(action: Action, program: Program) -> tuple[Requirement, ...]:
    """What the action waits for beyond its turn on its lane; each requirement on the rank of its stage.

    A requirement may name an action that the program does not list: then the action can never run.
    """
    return tuple(
        Requirement(source.rank, Action(op, source.stage, microbatch), source.rule.reason)
        for source in sources(action.op, action.stage, program)
        for op, microbatch in needed(source, action.microbatch, program)
    )


def receive_of(send: Action, program: Program) -> Requirement | None:
    """The receive that a send meets, on its rank; None at the end of the pipeline, where nothing is met."""
    stage = program.after(send.stage) if send.op is Op.SEND_F else program.before(send.stage)
    if stage is None:
        return None
    op = Op.RECV_F if send.op is Op.SEND_F else Op.RECV_I
    return Requirement(program.placement[stage], Action(op, stage, send.microbatch), "the receiver is ready")


def _stages(at: At, stage: int, program: Program) -> tuple[int, ...]:
    """The stages that `at` means; none without such a neighbour, or if the boundary is crossed otherwise."""
    if at is At.OWN:
        return (stage,)
    if at is At.RANK:
        return program.stages_of(program.placement[stage])
    if at is At.TWINS:
        return program.twins_of(stage)
    before = at in (At.BEFORE, At.BEFORE_DIRECT, At.OWN_FED_BEFORE)
    neighbour = program.before(stage) if before else program.after(stage)
    if neighbour is None:
        return ()
    if at in (At.BEFORE, At.AFTER):
        return (neighbour,)
    transferred = program.has_transfers and program.crossings[min(stage, neighbour)]
    if at in (At.BEFORE_DIRECT, At.AFTER_DIRECT):
        return () if transferred else (neighbour,)
    return (stage,) if transferred else ()
