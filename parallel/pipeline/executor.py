"""Runs a rank's program: what was verified, drawn and simulated is exactly what happens here.

The rank walks its list of actions. Compute runs in the calling thread (on a GPU: in its stream). A receive only
posts its buffer, a send only starts; the transfers proceed in the back end while compute goes on, and an action
waits for what the rule table says it needs: a forward for its input, a backward for the gradient of its output.
Everything that is not compute or transfer - reductions, updates, gathers, copies of activations - is a handler given
by whoever owns that part, so a new op is a new entry and not a branch here.

Two things are decided once, when the program is read: a send and a receive that exchange with a neighbour start as one
(`Channel.transfer`), and the W's that close a stage's step without anything between them run as one, parameter by
parameter (`WeightGradients.run`).

A VALIDATE may find that the weights were not right yet. Then everything before it is done once more, on all ranks:
what has been sent in vain is received and dropped first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.comm.channel import Channel, Waitable
from parallel.pipeline.actions import PASS_OPS, SEND_OPS, TRANSFER_OPS, Action, Op
from parallel.pipeline.program import Program
from parallel.pipeline.rules import receive_of
from parallel.pipeline.stage import Stage

Handler = Callable[[Action], None]
Observer = Callable[[str, Action], AbstractContextManager[None]]
"""Called as observer(kind, action) around every "run" of an action and every "wait" for its inputs."""

_SENDS_UNDER_WAY = 8
"""Sends whose buffers are kept before the oldest is awaited; the verified order makes any number safe."""


def unobserved(kind: str, action: Action) -> AbstractContextManager[None]:
    """The observer that sees nothing."""
    return nullcontext()


class _Arriving(NamedTuple):
    """What a pass consumes, and the transfer that fills it."""

    tensor: Tensor
    work: Waitable | None


class Executor:
    """Interprets a program on one rank.

    Args:
        program: Verified, with transfers.
        stages: This rank's stages by number.
        channel: The pipeline axis; ranks of the program are indices in it.
        activation: An empty tensor whose shape (B, S, H), type and device the stage borders have.
        handlers: What to do for ops that are neither compute nor transfer.
        validate: What VALIDATE asks: whether the weights used so far are right; if not, they are from then on.

    Raises:
        ValueError: the program has an op that nobody handles.
    """

    def __init__(
        self,
        program: Program,
        stages: Mapping[int, Stage],
        channel: Channel,
        activation: Tensor,
        handlers: Mapping[Op, Handler],
        observer: Observer = unobserved,
        validate: Callable[[Action], bool] | None = None,
    ) -> None:
        self.program, self.stages, self.channel, self.activation = program, stages, channel, activation
        self.handlers, self.observer, self.validate = handlers, observer, validate
        self.actions = program.actions[channel.index]
        known = {*PASS_OPS, *TRANSFER_OPS, *handlers, *([] if validate is None else [Op.VALIDATE])}
        unknown = sorted({action.op for action in self.actions} - known)
        if unknown:
            raise ValueError(f"program {program.name!r} has ops that nothing here handles: {', '.join(unknown)}")
        self._groups = _groups(program, channel.index)
        # Keyed by (stage, micro-batch) of the pass that consumes or has produced the tensor.
        self._inputs: dict[tuple[int, int], _Arriving] = {}
        self._gradients: dict[tuple[int, int], _Arriving] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._input_gradients: dict[tuple[int, int], Tensor] = {}
        self._sends: deque[_Arriving] = deque()
        self._losses: dict[int, Tensor] = {}
        self._tokens: Sequence[Tensor] = ()
        self._targets: Sequence[Tensor] = ()
        self._train = True

    def with_program(self, program: Program) -> Executor:
        """An executor of another program for the same stages of this rank."""
        return Executor(
            program, self.stages, self.channel, self.activation, self.handlers, self.observer, self.validate
        )

    def run(self, tokens: Sequence[Tensor], targets: Sequence[Tensor], *, train: bool = True) -> list[Tensor]:
        """Execute the program once.

        Args:
            tokens, targets: One (B, S) tensor per micro-batch; read by the first and by the last stages.
            train: False for a program of forwards only: nothing is kept for a backward.

        Returns:
            The losses of the micro-batches that end on this rank, in order.
        """
        self._train, self._tokens, self._targets = train, tokens, targets
        self._begin()
        for cell, group in enumerate(self._groups):
            try:
                if group[0].op is not Op.VALIDATE:
                    self._execute(group)
                elif not self._is_valid(group[0]):
                    self._repeat(cell)
            except Exception as error:
                error.add_note(f"while pipeline rank {self.channel.index} executed {group[0]} of {self.program.name!r}")
                self._abandon()
                raise
        self._await_sends(0)
        self._inputs.clear()
        return [self._losses[microbatch] for microbatch in sorted(self._losses)]

    def _begin(self) -> None:
        """The micro-batches are at the start of the model."""
        self._losses.clear()
        for stage in self.stages:
            if self.program.before(stage) is None:
                for microbatch in self.program.microbatches_of(stage):
                    self._inputs[stage, microbatch] = _Arriving(self._tokens[microbatch], None)

    def _abandon(self) -> None:
        """Forget everything that is under way on this rank."""
        for stage in self.stages.values():
            stage.abandon()
        for under_way in (self._inputs, self._gradients, self._outputs, self._input_gradients):
            under_way.clear()

    def _is_valid(self, action: Action) -> bool:
        assert self.validate is not None, "checked when the program was read"
        with self.observer("run", action):
            return self.validate(action)

    def _repeat(self, cell: int) -> None:
        """Do once more what comes before group `cell`, with the right weights."""
        for arriving in self._inputs.values():
            if arriving.work is not None:
                arriving.work.wait()  # a buffer that is still being filled must not go
        self._abandon()
        for peer, count in _sent_in_vain(self.program, self.channel.index).items():
            for _ in range(count):
                for work in self.channel.transfer([], [(torch.empty_like(self.activation), peer)]):
                    work.wait()
        self._begin()
        for group in self._groups[:cell]:
            self._execute(group)

    def _execute(self, group: tuple[Action, ...]) -> None:
        """One action, or several that start together."""
        action = group[0]
        match action.op:
            case Op.F:
                self._forward(action)
            case Op.B | Op.I:
                self._backward(action)
            case Op.W:
                self._weight_gradients(group)
            case op if op in TRANSFER_OPS:
                self._transfer(group)
            case _:
                with self.observer("run", action):
                    self.handlers[action.op](action)

    def _take(self, arriving: dict[tuple[int, int], _Arriving], action: Action) -> Tensor:
        """The tensor that a pass consumes, once it has arrived."""
        tensor, work = arriving.pop((action.stage, _microbatch(action)))
        if work is not None:
            with self.observer("wait", action):
                work.wait()
        return tensor

    def _forward(self, action: Action) -> None:
        microbatch = _microbatch(action)
        x = self._take(self._inputs, action)
        after = self.program.after(action.stage)
        with self.observer("run", action):
            targets = self._targets[microbatch] if after is None else None
            output = self.stages[action.stage].forward(microbatch, x, targets, train=self._train)
        if after is None:
            self._losses[microbatch] = output
        elif after in self.stages:
            self._inputs[after, microbatch] = _Arriving(output, None)
        else:
            self._outputs[action.stage, microbatch] = output

    def _backward(self, action: Action) -> None:
        """B or I: both take the output's gradient and give the input's."""
        microbatch, stage = _microbatch(action), self.stages[action.stage]
        gradient = None if self.program.after(action.stage) is None else self._take(self._gradients, action)
        with self.observer("run", action):
            if action.op is Op.B:
                dx = stage.backward(microbatch, gradient)
            else:
                dx = stage.input_gradient(microbatch, gradient)
        before = self.program.before(action.stage)
        if before is None:
            return
        assert dx is not None, "the input of a stage behind the first has a gradient"
        if before in self.stages:
            self._gradients[before, microbatch] = _Arriving(dx, None)
        else:
            self._input_gradients[action.stage, microbatch] = dx

    def _weight_gradients(self, group: tuple[Action, ...]) -> None:
        with ExitStack() as observed:
            for action in group:
                observed.enter_context(self.observer("run", action))
            self.stages[group[0].stage].weight_gradient([_microbatch(action) for action in group])

    def _transfer(self, group: tuple[Action, ...]) -> None:
        sends, receives = [], []
        for action in group:
            if action.op in SEND_OPS:
                place = self._outputs if action.op is Op.SEND_F else self._input_gradients
                sends.append((place.pop((action.stage, _microbatch(action))).contiguous(), _peer(self.program, action)))
            else:
                receives.append((torch.empty_like(self.activation), _peer(self.program, action)))
        works = self.channel.transfer(sends, receives)
        arriving = iter(zip(receives, works[len(sends) :], strict=True))
        for action in group:
            if action.op not in SEND_OPS:
                (buffer, _), work = next(arriving)
                arrivals = self._inputs if action.op is Op.RECV_F else self._gradients
                arrivals[action.stage, _microbatch(action)] = _Arriving(buffer, work)
        self._sends += [_Arriving(tensor, work) for (tensor, _), work in zip(sends, works, strict=False)]
        self._await_sends(_SENDS_UNDER_WAY)

    def _await_sends(self, allowed: int) -> None:
        while len(self._sends) > allowed:
            work = self._sends.popleft().work
            assert work is not None, "a send has its work"
            work.wait()


def _groups(program: Program, rank: int) -> list[tuple[Action, ...]]:
    """The rank's list cut into what starts together: exchanges with a neighbour, and the last W's of a stage.

    Only a send and the receive behind it, with one neighbour, are an exchange. One work stands for a whole batch on
    NCCL, so in a larger one a pass would wait for transfers that it does not need.
    """
    actions = program.actions[rank]
    last = {action.stage: cell for cell, action in enumerate(actions) if action.op is Op.W}
    groups: list[tuple[Action, ...]] = []
    cell = 0
    while cell < len(actions):
        first, end = actions[cell], cell + 1
        if first.op in SEND_OPS and end < len(actions) and actions[end].op in TRANSFER_OPS - SEND_OPS:
            end += _peer(program, first) == _peer(program, actions[end])
        elif first.op is Op.W:
            while end < len(actions) and actions[end].op is Op.W and actions[end].stage == first.stage:
                end += 1
            if end <= last[first.stage]:
                end = cell + 1  # more are to come: no gradient would be complete earlier
        groups.append(tuple(actions[cell:end]))
        cell = end
    return groups


def _peer(program: Program, action: Action) -> int:
    """The rank at the other end of a transfer."""
    forwards = action.op in (Op.SEND_F, Op.RECV_I)
    other = program.after(action.stage) if forwards else program.before(action.stage)
    assert other is not None, "a transfer has another end"
    return program.rank_of(other)


def _sent_in_vain(program: Program, rank: int) -> dict[int, int]:
    """Per rank that sends to `rank` before its VALIDATE, how many of those messages are received behind ours."""
    unreceived: dict[int, int] = {}
    before = [set(takewhile(lambda action: action.op is not Op.VALIDATE, listed)) for listed in program.actions]
    for sender, listed in enumerate(before):
        for action in listed:
            meeting = receive_of(action, program) if action.op in SEND_OPS else None
            if meeting is not None and meeting.rank == rank and meeting.action not in before[rank]:
                unreceived[sender] = unreceived.get(sender, 0) + 1
    return unreceived


def _microbatch(action: Action) -> int:
    assert action.microbatch is not None, f"{action} belongs to a micro-batch"
    return action.microbatch
