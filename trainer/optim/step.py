"""The tail of a step's program: what `REDUCE`, `SYNC`, `UPDATE`, `GATHER` and `VALIDATE` do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.pipeline.actions import Action
from parallel.zero.copies import CopiedGradients
from parallel.zero.norm import GradientNorm
from parallel.zero.optimizer import ShardedOptimizer


@dataclass(frozen=True)
class Decision:
    """What the global norm means for the updates; tensors of shape (), fp32.

    Attributes:
        norm: Global gradient norm before clipping.
        divisor: What the gradients are divided by.
        skip: 1 if the norm is not finite and nothing may be updated, else 0.
    """

    norm: Tensor
    divisor: Tensor
    skip: Tensor


    def to(self, device: torch.device) -> Decision:
        """The same on another device."""
        return Decision(self.norm.to(device), self.divisor.to(device), self.skip.to(device))


def decide(squared: Tensor, clip: float | None) -> Decision:
    """The decision for a sum of squares (fp64, shape ()) and the largest norm that is allowed."""
    norm = squared.sqrt().float()
    divisor = torch.ones_like(norm)
    if clip is not None:
        # By a tensor: a GPU divides by a number through its reciprocal, and all devices must come to the same bits.
        divisor = ((norm + 1e-6) / torch.full_like(norm, clip)).clamp_(min=1.0)
    return Decision(norm, divisor, (~torch.isfinite(norm)).float())


class OptimizerStep:
    """The handlers of a step's tail. One decision for the whole model, before its first update."""

    def __init__(
        self, norm: GradientNorm, optimizer: ShardedOptimizer, copies: CopiedGradients, clip: float | None
    ) -> None:
        self.gradients, self.optimizer, self.copies = optimizer.gradients, optimizer, copies
        self.norm, self.clip = norm, clip
        self.lr = 0.0
        self._decision: Decision | None = None

    def begin(self, lr: float) -> None:
        """A step begins; its updates will use learning rate `lr`."""
        self.lr, self._decision = lr, None
        self.gradients.begin_step()
        self.copies.begin_step()

    def reduce(self, action: Action) -> None:
        """A stage's units were reduced as they became ready, inside its last backward; move on what is under way."""
        if action.microbatch is None:
            self.gradients.close(action.stage)
        else:
            self.gradients.advance()

    def sync(self, action: Action) -> None:
        """Start to sum a stage's reduced gradients with those of the stage's copy."""
        self.copies.sync(action.stage)

    def update(self, action: Action) -> None:
        """Update the owned ranges of a stage."""
        decision = self._decided()
        self.optimizer.update(action.stage, self.lr, decision.divisor, decision.skip)

    def gather(self, action: Action) -> None:
        """Start to make the updated weights of a stage whole."""
        self.optimizer.gather(action.stage)

    def conclude(self) -> Callable[[], Decision]:
        """After the step: what to call to learn what was decided."""
        decision = self._decided()
        return lambda: decision

    def validate(self, action: Action) -> bool:
        """Whether the weights that this step has used so far are right. Here they always are."""
        return True

    def settle(self) -> None:
        """Make the updates of the last step final."""

    def _decided(self) -> Decision:
        if self._decision is None:
            self.copies.finish()
            self._decision = decide(self.norm.total(), self.clip)
        return self._decision
