"""Updates without a barrier: each pipeline rank updates with what it knows, and takes it back if that was wrong.

The global norm decides whether gradients are clipped or a step is skipped, and it needs every rank's gradients: a
barrier between the last backward of one step and the first forward of the next, which a zero-bubble schedule would
pay for with its whole ramp. Post-validation (zero-bubble paper, arXiv:2401.10241, section on bypassing optimizer
synchronizations) goes around it, in three phases:

1. At the end of a step the sum of squares travels along the pipeline. A rank adds its own to what the ranks before it
   have; sends that on; and updates as if no more would come - without clipping if the norm so far does not ask for it,
   not at all if a NaN or infinity is in it. If the norm so far is already too large it does not guess but leaves the
   update for later. The last rank knows everything, and tells all others at once.
2. During the warm-up of the next step a rank takes the whole sum (VALIDATE), before its first backward, which would
   overwrite the gradients.
3. If the guess was right, that was all. If not, it goes back to the copy of its owned range that it made before the
   update, updates with what is now known, gathers, and the executor repeats the forwards that used wrong weights.

All ranks must agree on repeating, for they have sent each other what those forwards gave. The sums only grow, so the
first rank's guess is the boldest: all guesses are right if and only if the first one's was. Its sum travels along.

The copy is of master weights, moments and counts; undoing AdamW by arithmetic would not give the same bits. The
gradient needs none: a rank updates on a guess only with divisor 1, so kernels that divide in place leave it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.comm.channel import Channel, Waitable
from parallel.pipeline.actions import Action
from parallel.zero.copies import CopiedGradients
from parallel.zero.norm import GradientNorm
from parallel.zero.optimizer import ShardedOptimizer
from trainer.optim.step import Decision, OptimizerStep, decide


@dataclass
class _Sums:
    """Two numbers under way between neighbours: the sum of squares so far or in all, and that of the first rank."""

    table: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    work: Waitable | None = None

    def wait(self) -> tuple[float, float]:
        if self.work is not None:
            self.work.wait()
            self.work = None
        return float(self.table[0]), float(self.table[1])


@dataclass
class _Guess:
    """What a rank did at the end of a step, until it is known whether rightly.

    Attributes:
        lr: The learning rate of the step.
        acts: What it updated with; None: it left the update for later.
        whole: The sums over all ranks, once they have arrived.
        known: The right decision, once it is known.
    """

    lr: float
    acts: Decision | None
    whole: _Sums
    known: Decision | None = None


class PostValidation(OptimizerStep):
    """The handlers of a step's tail, without a barrier; the numbers are those of `OptimizerStep`, bit for bit.

    Args:
        channel: The pipeline axis, beside the transfers of programs.
    """

    def __init__(
        self,
        norm: GradientNorm,
        optimizer: ShardedOptimizer,
        copies: CopiedGradients,
        clip: float | None,
        channel: Channel,
    ) -> None:
        super().__init__(norm, optimizer, copies, clip)
        self.channel = channel
        self.device = optimizer.first_moment.device
        self.stages = tuple(dict.fromkeys(owned.unit.stage for owned in optimizer.ranges.values()))
        self.rollbacks = 0
        self._guess: _Guess | None = None  # of the step under way
        self._open: _Guess | None = None  # of the last step, not validated yet
        self._sent: list[_Sums] = []

    def begin(self, lr: float) -> None:
        """A step begins; the last one may still have to be validated."""
        self._open, self._guess = self._guess or self._open, None
        super().begin(lr)

    def update(self, action: Action) -> None:
        """Update the owned ranges of a stage with what is known, or leave it."""
        acts = self._guessed().acts
        if acts is not None:
            acts = acts.to(self.device)
            self.optimizer.update(action.stage, self.lr, acts.divisor, acts.skip)

    def gather(self, action: Action) -> None:
        """Start to make the updated weights of a stage whole, if they were updated."""
        if self._guessed().acts is not None:
            self.optimizer.gather(action.stage)

    def conclude(self) -> Callable[[], Decision]:
        """Asking before the next step has validated this one validates it."""
        guess = self._guessed()

        def decision() -> Decision:
            if guess.known is None:
                self.settle()
            assert guess.known is not None, "a step is settled before the one after the next begins"
            return guess.known

        return decision

    def validate(self, action: Action) -> bool:
        """Learn whether the last step's updates were right, and make them so; false if they were not."""
        guess, self._open = self._open, None
        return guess is None or guess.known is not None or self._learn(guess)

    def settle(self) -> None:
        """Make the updates of the last step final, between two steps."""
        guess, self._guess = self._guess, None
        if guess is not None and guess.known is None:
            self._learn(guess)
        self._await_sent()

    def _guessed(self) -> _Guess:
        if self._guess is None:
            self._guess = self._make_guess()
        return self._guess

    def _make_guess(self) -> _Guess:
        """Phase 1: the sum so far comes, goes on, and decides what this rank does."""
        channel, last = self.channel, self.channel.index == self.channel.size - 1
        self._await_sent()  # of the step before: long gone
        self.copies.finish()
        own = float(self.norm.own())
        so_far, first = own, own
        if channel.index:
            arriving = self._receive(channel.index - 1)
            before, first = arriving.wait()
            so_far = before + own
        if last:
            whole = _Sums(torch.tensor([so_far, first], dtype=torch.float64))
            for peer in range(channel.index):
                self._send(so_far, first, peer)
            decision = self._decide(so_far)
            return _Guess(self.lr, decision, whole, known=decision if channel.size == 1 else None)
        self._send(so_far, first, channel.index + 1)
        decision = self._decide(so_far)
        acts = None if float(decision.divisor) > 1.0 and not bool(decision.skip) else decision
        if acts is not None and not bool(acts.skip):
            self.optimizer.save()
        return _Guess(self.lr, acts, self._receive(channel.size - 1))

    def _learn(self, guess: _Guess) -> bool:
        """Phases 2 and 3: the whole sum is there; wrong updates are made again."""
        last = self.channel.index == self.channel.size - 1
        whole, first = guess.whole.wait()
        right, boldest = self._decide(whole), self._decide(first)
        guess.known = right
        if bool(right.skip):
            agreed = bool(boldest.skip)
        else:
            agreed = float(right.divisor) == 1.0
        if agreed:
            return True
        self.rollbacks += 1
        if not last:
            if guess.acts is not None and not bool(guess.acts.skip):
                self.optimizer.finish_gathers()
                self.optimizer.restore()
            moved = right.to(self.device)
            for stage in self.stages:
                self.optimizer.update(stage, guess.lr, moved.divisor, moved.skip)
            for stage in self.stages:
                self.optimizer.gather(stage)
        return False

    def _decide(self, squared: float) -> Decision:
        """On the host, where the sums are: asking a GPU would wait for the forwards that it has been given."""
        return decide(torch.tensor(squared, dtype=torch.float64), self.clip)

    def _receive(self, peer: int) -> _Sums:
        sums = _Sums()
        sums.work = self.channel.receive(sums.table, peer)
        return sums

    def _send(self, whole: float, first: float, peer: int) -> None:
        sums = _Sums(torch.tensor([whole, first], dtype=torch.float64))
        sums.work = self.channel.send(sums.table, peer)
        self._sent.append(sums)

    def _await_sent(self) -> None:
        """Until the neighbour has what was sent to it; it has posted its receive."""
        for sums in self._sent:
            sums.wait()
        self._sent.clear()
