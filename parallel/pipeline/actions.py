"""The words of a program: operations, the lanes they run on, and actions.

An *action* is one operation on one pipeline stage, mostly for one micro-batch. Its text form puts the stage
first: `2F0` is the forward of micro-batch 0 on stage 2, `2REDUCE` the gradient reduction of stage 2 after all
micro-batches. A *lane* is something a rank does one thing at a time on (a stream, a copy engine, a worker
thread); lanes of one rank run beside each other.

The zero-bubble paper (arXiv:2401.10241) splits the backward pass into two halves. We call the input-gradient
half `I` and the weight-gradient half `W`; `B` is both in one (the paper's "B" is our `I`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Op(StrEnum):
    """What an action does. Sends and receives are named from the stage that lists them."""

    F = "F"  # forward
    B = "B"  # full backward: I and W in one
    I = "I"  # noqa: E741 - input-gradient half of the backward; the published schedules use one letter too
    W = "W"  # weight-gradient half of the backward
    SEND_F = "SEND_F"  # the output of this stage goes to the stage after
    RECV_F = "RECV_F"  # the input of this stage comes from the stage before
    SEND_I = "SEND_I"  # the input gradient of this stage goes to the stage before
    RECV_I = "RECV_I"  # the output gradient of this stage comes from the stage after
    REDUCE = "REDUCE"  # gradients summed over the data-parallel ranks
    SYNC = "SYNC"  # reduced gradients summed over the copies of the stage on other pipeline ranks
    GATHER = "GATHER"  # parameters collected from the data-parallel ranks
    # Parameters that are whole only for a while (passes/weights.py); named after the first pass of that while ...
    GATHER_F = "GATHER_F"  # collected for a run of passes that begins with a forward
    GATHER_I = "GATHER_I"  # likewise, with a backward
    # ... and after the last.
    RELEASE_F = "RELEASE_F"  # dropped behind a forward
    RELEASE_I = "RELEASE_I"  # dropped behind a backward
    OFFLOAD = "OFFLOAD"  # activations of a micro-batch to host memory
    RELOAD = "RELOAD"  # and back
    FETCH = "FETCH"  # optimizer state in
    UPDATE = "UPDATE"  # optimizer step
    VALIDATE = "VALIDATE"  # the step before made its updates with what it knew; now it is known whether rightly
    FLUSH = "FLUSH"  # optimizer state out


class Lane(StrEnum):
    """What a rank does one thing at a time on."""

    COMPUTE = "compute"
    P2P = "p2p"
    DP_COMM = "dp_comm"
    H2D = "h2d"
    D2H = "d2h"
    DISK = "disk"
    HOST = "host"


# The lane of an op. With optimizer state on the device, UPDATE is device work.
LANE_OF: Mapping[Op, Lane] = MappingProxyType(
    {
        Op.F: Lane.COMPUTE,
        Op.B: Lane.COMPUTE,
        Op.I: Lane.COMPUTE,
        Op.W: Lane.COMPUTE,
        Op.SEND_F: Lane.P2P,
        Op.RECV_F: Lane.P2P,
        Op.SEND_I: Lane.P2P,
        Op.RECV_I: Lane.P2P,
        Op.REDUCE: Lane.DP_COMM,
        Op.SYNC: Lane.DP_COMM,
        Op.GATHER: Lane.DP_COMM,
        Op.GATHER_F: Lane.DP_COMM,
        Op.GATHER_I: Lane.DP_COMM,
        Op.RELEASE_F: Lane.DP_COMM,
        Op.RELEASE_I: Lane.DP_COMM,
        Op.OFFLOAD: Lane.D2H,
        Op.RELOAD: Lane.H2D,
        Op.FETCH: Lane.DISK,
        Op.UPDATE: Lane.COMPUTE,
        Op.VALIDATE: Lane.HOST,
        Op.FLUSH: Lane.DISK,
    }
)

# What a schedule author writes, and what the bubble rate counts as work.
PASS_OPS: frozenset[Op] = frozenset({Op.F, Op.B, Op.I, Op.W})
SEND_OPS: frozenset[Op] = frozenset({Op.SEND_F, Op.SEND_I})
TRANSFER_OPS: frozenset[Op] = SEND_OPS | {Op.RECV_F, Op.RECV_I}
WEIGHT_OPS: frozenset[Op] = frozenset({Op.GATHER_F, Op.GATHER_I, Op.RELEASE_F, Op.RELEASE_I})
PER_MICROBATCH_OPS: frozenset[Op] = PASS_OPS | TRANSFER_OPS | WEIGHT_OPS | {Op.OFFLOAD, Op.RELOAD}
STEP_OPS: frozenset[Op] = frozenset({Op.SYNC, Op.FETCH, Op.UPDATE, Op.VALIDATE, Op.FLUSH})  # never of one micro-batch

_NUMBER = "0|[1-9][0-9]*"  # no leading zeros: the text form has one spelling
_TEXT = re.compile(rf"({_NUMBER})([A-Z]+(?:_[A-Z]+)?)({_NUMBER})?")


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One operation on one stage, for one micro-batch or (`microbatch=None`) for the whole step.

    The order is that of (op, stage, microbatch); a step-level action cannot be ordered against one of a
    micro-batch of the same op and stage.

    Raises:
        ValueError: a negative stage or micro-batch, or an op that needs (or cannot have) a micro-batch.
    """

    op: Op
    stage: int
    microbatch: int | None = None

    def __post_init__(self) -> None:
        if self.stage < 0:
            raise ValueError(f"stage {self.stage} of {self.op} is negative; stages count from 0")
        if self.microbatch is None:
            if self.op in PER_MICROBATCH_OPS:
                raise ValueError(
                    f"{self.op} of stage {self.stage} names no micro-batch; write {self.stage}{self.op}0"
                )
        elif self.op in STEP_OPS:
            raise ValueError(
                f"{self.op} is once a step, not for micro-batch {self.microbatch}; drop the micro-batch"
            )
        elif self.microbatch < 0:
            raise ValueError(
                f"micro-batch {self.microbatch} of {self.op} is negative; micro-batches count from 0"
            )

    @property
    def lane(self) -> Lane:
        """The lane this action runs on."""
        return LANE_OF[self.op]

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{'' if self.microbatch is None else self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The exact inverse of `str(action)`.

        Raises:
            ValueError: the text is not that of an action.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not an action; write <stage><op><micro-batch>, for example 2F0 or 2REDUCE"
            )
        stage, op, microbatch = match.groups()
        if op not in Op.__members__:
            near = difflib.get_close_matches(op, list(Op), n=1)
            known = f"did you mean {near[0]}?" if near else f"known are {', '.join(Op)}"
            raise ValueError(f"{text!r} is not an action: there is no op {op!r}; {known}")
        return cls(Op(op), int(stage), None if microbatch is None else int(microbatch))
