"""One rank's engine: its stages, flat space, optimizer, and the programs that run them.

The engine is the composition of the parts of `parallel`; it has one verb for each thing that a loop wants: train
on a global batch, or evaluate one. How it is put together is trainer/build.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parallel.comm.channel import Pending
from parallel.flat.buffers import FlatParameters
from parallel.flat.space import FlatSpace, Range, Slot
from parallel.layout import AXES
from parallel.mesh import Mesh
from parallel.pipeline.actions import Action
from parallel.pipeline.executor import Executor
from parallel.pipeline.program import Program
from parallel.zero.copies import CopiedGradients
from parallel.zero.optimizer import ShardedOptimizer


@dataclass(frozen=True)
class StepResult:
    """What a training step gives, the same on every rank.

    Attributes:
        loss: Mean loss per token of the global batch, nats.
        grad_norm: Global gradient norm before clipping.
        skipped: Whether the update was skipped because the norm was not finite.
        reports: What each rank reported, shape (ranks, values), in rank order.
    """

    loss: float
    grad_norm: float
    skipped: bool
    reports: np.ndarray


class OptimizerStep:
    """The tail of a step's program: the handlers of `REDUCE`, `SYNC`, `UPDATE` and `GATHER`.

    The global norm, and with it the decision to clip or to skip, is made once, by the first UPDATE of the step.
    """

    def __init__(
        self, mesh: Mesh, optimizer: ShardedOptimizer, space: FlatSpace, copies: CopiedGradients, clip: float | None
    ) -> None:
        self.gradients, self.optimizer, self.copies, self.clip = optimizer.gradients, optimizer, copies, clip
        axes = ("tensor", "data_shard", "pipeline") if optimizer.sharded else ("tensor", "pipeline")
        self.norm_channel = mesh.channel(*axes)
        self.counted = {unit.name: counted_ranges(unit.slots, mesh.position["tensor"]) for unit in space.units}
        self.lr = 0.0
        self._decision: tuple[Tensor, Tensor, Tensor] | None = None

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
        _, divisor, skip = self.decision()
        self.optimizer.update(action.stage, self.lr, divisor, skip)

    def gather(self, action: Action) -> None:
        """Start to make the updated weights of a stage whole."""
        self.optimizer.gather(action.stage)

    def decision(self) -> tuple[Tensor, Tensor, Tensor]:
        """Global gradient norm, what the gradients are divided by, and 1 if the step is skipped; each shape ()."""
        if self._decision is None:
            self.copies.finish()
            squared = self.optimizer.norm_squared(self.counted).view(1)
            Pending(self.norm_channel.all_reduce(squared)).finish()
            norm = squared.sqrt()[0]
            divisor = torch.ones_like(norm)
            if self.clip is not None:
                divisor = ((norm + 1e-6) / self.clip).clamp_(min=1.0)
            self._decision = norm, divisor, (~torch.isfinite(norm)).float()
        return self._decision


def counted_ranges(slots: Sequence[Slot], tensor_index: int) -> list[Range]:
    """The ranges of a unit that this rank counts in the global norm.

    Weights that every tensor rank holds whole are counted by the first; copies of tied weights are not counted.
    Neighbouring slots are joined, padding between them (zeros) included.
    """
    ranges: list[Range] = []
    joinable = False
    for slot in slots:
        counts = slot.spec.tied_to is None and (slot.spec.shard_dim is not None or tensor_index == 0)
        if counts and joinable:
            ranges[-1] = Range(ranges[-1].start, slot.range.stop)
        elif counts:
            ranges.append(slot.range)
        joinable = counts
    return ranges


@dataclass
class Engine:
    """Everything that one rank trains with.

    Attributes:
        mesh: The rank's place among the others.
        space: Its flat space.
        parameters: Its weights.
        optimizer: Its share of the optimizer state.
        step: Handlers of the optimizer part of the program.
        train_program, train_executor: The program of a training step and what runs it.
        eval_executor: Runs forwards only.
    """

    mesh: Mesh
    space: FlatSpace
    parameters: FlatParameters
    optimizer: ShardedOptimizer
    step: OptimizerStep
    train_program: Program
    train_executor: Executor
    eval_executor: Executor

    def train(self, batches: Sequence[np.ndarray], lr: float, report: Sequence[float] = ()) -> StepResult:
        """One optimizer step on this rank's micro-batches, each of shape (B, S + 1).

        `report` are values of this rank that every rank is to know; they travel with the loss.
        """
        self.step.begin(lr)
        losses = self.train_executor.run(*self._on_device(batches))
        norm, _, skip = self.step.decision()
        reports = self._exchange([self._own_loss(losses), *report])
        return StepResult(float(reports[:, 0].sum()), float(norm), bool(skip), reports[:, 1:])

    def evaluate(self, batches: Sequence[np.ndarray]) -> float:
        """Mean loss per token over this global batch; no weights change."""
        losses = self.eval_executor.run(*self._on_device(batches), train=False)
        return float(self._exchange([self._own_loss(losses)]).sum())

    def finish(self) -> None:
        """Wait until the weights are whole on every rank; needed before anything else reads them."""
        self.optimizer.finish_gathers()

    def _on_device(self, batches: Sequence[np.ndarray]) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens and targets of each micro-batch, (B, S) each."""
        device = self.parameters.buffer.device
        moved = [torch.from_numpy(np.ascontiguousarray(batch)).to(device, non_blocking=True) for batch in batches]
        return [batch[:, :-1] for batch in moved], [batch[:, 1:] for batch in moved]

    def _own_loss(self, losses: Sequence[Tensor]) -> float:
        """The sum of this rank's micro-batch losses, each already divided by the tokens of the global batch.

        Tensor ranks compute the same losses; the first one counts them.
        """
        if not losses or self.mesh.position["tensor"]:
            return 0.0
        return float(torch.stack(list(losses)).double().sum())

    def _exchange(self, values: Sequence[float]) -> np.ndarray:
        """Every rank's values, shape (ranks, values), fp64: one small message per step."""
        world = self.mesh.channel(*AXES)
        table = torch.zeros((world.size, len(values)), dtype=torch.float64, device=self.parameters.buffer.device)
        table[world.index] = torch.tensor(values, dtype=torch.float64)
        Pending(world.all_gather(table.view(-1))).finish()
        return table.cpu().numpy()
