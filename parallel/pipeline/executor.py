"""Runs a rank's program: what was verified, drawn and simulated is exactly what happens here.

The rank walks its list of actions. Compute runs in the calling thread (on a GPU: in its stream). A receive only
posts its buffer, a send only starts; the transfers proceed in the back end while compute goes on, and an action
waits for what the rule table says it needs: a forward for its input, a backward for the gradient of its output.
Everything that is not compute or transfer - reductions, updates, gathers - is a handler given by whoever owns
that part, so a new op is a new entry and not a branch here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from parallel.comm.channel import Channel, Waitable
from parallel.pipeline.actions import Action, Op
from parallel.pipeline.program import Program
from parallel.pipeline.stage import Stage

Handler = Callable[[Action], None]
Observer = Callable[[str, Action], AbstractContextManager[None]]
"""Called as observer(kind, action) around every "run" of an action and every "wait" for its inputs."""

_SENDS_UNDER_WAY = 4
"""Sends whose buffers are kept before the oldest is awaited; the verified order makes any number safe."""


def unobserved(kind: str, action: Action) -> AbstractContextManager[None]:
    """The observer that sees nothing."""
    return nullcontext()


class Executor:
    """Interprets a program on one rank.

    Args:
        program: Verified, with transfers.
        stages: This rank's stages by number.
        channel: The pipeline axis; ranks of the program are indices in it.
        activation: An empty tensor whose shape (B, S, H), type and device the stage borders have.
        handlers: What to do for ops that are neither compute nor transfer.

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
    ) -> None:
        self.program, self.stages, self.channel, self.activation = program, stages, channel, activation
        self.observer = observer
        self.actions = program.actions[channel.index]
        self.handlers: dict[Op, Handler] = {
            Op.F: self._forward,
            Op.B: self._backward,
            Op.SEND_F: self._send_forward,
            Op.SEND_I: self._send_gradient,
            Op.RECV_F: self._receive_forward,
            Op.RECV_I: self._receive_gradient,
            **{op: self._observed(handler) for op, handler in handlers.items()},
        }
        unknown = sorted({action.op for action in self.actions} - set(self.handlers))
        if unknown:
            raise ValueError(f"program {program.name!r} has ops that nothing here handles: {', '.join(unknown)}")
        # (op of the consumer, stage, micro-batch) -> tensor and the transfer that fills it.
        self._ready: dict[tuple[Op, int, int], tuple[Tensor, Waitable | None]] = {}
        self._outgoing: dict[tuple[Op, int, int], Tensor] = {}
        self._sends: deque[tuple[Waitable, Tensor]] = deque()
        self._losses: dict[int, Tensor] = {}
        self._train = True

    def run(self, tokens: Sequence[Tensor], targets: Sequence[Tensor], *, train: bool = True) -> list[Tensor]:
        """Execute the program once.

        Args:
            tokens, targets: One (B, S) tensor per micro-batch; read by the first and by the last stage.
            train: False for a program of forwards only: nothing is kept for a backward.

        Returns:
            The loss of each micro-batch, in order, on the rank of the last stage; nothing elsewhere.
        """
        self._train, self._losses, self._targets = train, {}, targets
        for microbatch, batch in enumerate(tokens):
            self._ready[Op.F, 0, microbatch] = (batch, None)
        for action in self.actions:
            try:
                self.handlers[action.op](action)
            except Exception as error:
                error.add_note(f"while pipeline rank {self.channel.index} executed {action} of {self.program.name!r}")
                for stage in self.stages.values():
                    stage.abandon()
                raise
        self._await_sends(0)
        self._ready.clear()
        return [self._losses[microbatch] for microbatch in sorted(self._losses)]

    def _observed(self, handler: Handler) -> Handler:
        def handle(action: Action) -> None:
            with self.observer("run", action):
                handler(action)

        return handle

    def _take(self, op: Op, action: Action) -> Tensor:
        """The tensor that a compute action consumes, once it has arrived."""
        tensor, work = self._ready.pop((op, action.stage, _microbatch(action)))
        if work is not None:
            with self.observer("wait", action):
                work.wait()
        return tensor

    def _hand_over(self, consumer: Op, stage: int, microbatch: int, tensor: Tensor, producer: Action) -> None:
        """A result goes to the neighbouring stage: at once on this rank, or when its send comes up."""
        if stage in self.stages:
            self._ready[consumer, stage, microbatch] = (tensor, None)
        else:
            self._outgoing[producer.op, producer.stage, microbatch] = tensor

    def _forward(self, action: Action) -> None:
        microbatch = _microbatch(action)
        x = self._take(Op.F, action)
        last = action.stage == self.program.stages - 1
        with self.observer("run", action):
            targets = self._targets[microbatch] if last else None
            output = self.stages[action.stage].forward(microbatch, x, targets, train=self._train)
        if last:
            self._losses[microbatch] = output
        else:
            self._hand_over(Op.F, action.stage + 1, microbatch, output, action)

    def _backward(self, action: Action) -> None:
        microbatch = _microbatch(action)
        last = action.stage == self.program.stages - 1
        gradient = None if last else self._take(Op.B, action)
        with self.observer("run", action):
            dx = self.stages[action.stage].backward(microbatch, gradient, self.program.microbatches)
        if action.stage > 0:
            assert dx is not None
            self._hand_over(Op.B, action.stage - 1, microbatch, dx, action)

    def _send_forward(self, action: Action) -> None:
        self._send(self._outgoing.pop((Op.F, action.stage, _microbatch(action))), action.stage + 1)

    def _send_gradient(self, action: Action) -> None:
        self._send(self._outgoing.pop((Op.B, action.stage, _microbatch(action))), action.stage - 1)

    def _send(self, tensor: Tensor, stage: int) -> None:
        tensor = tensor.contiguous()
        self._sends.append((self.channel.send(tensor, self.program.rank_of(stage)), tensor))
        self._await_sends(_SENDS_UNDER_WAY)

    def _await_sends(self, allowed: int) -> None:
        while len(self._sends) > allowed:
            self._sends.popleft()[0].wait()

    def _receive_forward(self, action: Action) -> None:
        self._receive(Op.F, action, action.stage - 1)

    def _receive_gradient(self, action: Action) -> None:
        self._receive(Op.B, action, action.stage + 1)

    def _receive(self, consumer: Op, action: Action, stage: int) -> None:
        buffer = torch.empty_like(self.activation)
        work = self.channel.receive(buffer, self.program.rank_of(stage))
        self._ready[consumer, action.stage, _microbatch(action)] = (buffer, work)


def _microbatch(action: Action) -> int:
    assert action.microbatch is not None, f"{action} belongs to a micro-batch"
    return action.microbatch
