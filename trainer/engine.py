"""One rank's engine: its stages, flat space, optimizer, and the programs that run them.

The engine is the composition of the parts of `parallel`; it has one verb for each thing that a loop wants: train
on a global batch, or evaluate one. How it is put together is trainer/build.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from parallel.comm.channel import Pending
from parallel.flat.buffers import FlatParameters
from parallel.flat.space import FlatSpace
from parallel.layout import AXES
from parallel.mesh import Mesh
from parallel.pipeline.costs import Costs
from parallel.pipeline.executor import Executor
from parallel.pipeline.passes.forward import forward_only
from parallel.pipeline.program import Program
from parallel.zero.optimizer import ShardedOptimizer
from trainer.activations import ActivationCopies
from trainer.optim.step import Decision, OptimizerStep


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


class UnderWay:
    """A step whose outcome may not be known yet: its decision, and the exchange of what the ranks report."""

    def __init__(self, decision: Callable[[], Decision], exchange: Pending, table: Tensor) -> None:
        self._decision, self._exchange, self._table = decision, exchange, table

    def arrive(self) -> None:
        """Wait for what the other ranks report of the step."""
        self._exchange.finish()

    def result(self) -> StepResult:
        """What came of the step; waits until it is known. Every rank must ask at the same point of the run."""
        decision = self._decision()
        self.arrive()
        reports = self._table.cpu().numpy()
        return StepResult(float(reports[:, 0].sum()), float(decision.norm), bool(decision.skip), reports[:, 1:])


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
        activations: What moves and measures activations, if that is asked for.
    """

    mesh: Mesh
    space: FlatSpace
    parameters: FlatParameters
    optimizer: ShardedOptimizer
    step: OptimizerStep
    train_program: Program
    train_executor: Executor
    eval_executor: Executor
    activations: ActivationCopies | None = None
    _last: UnderWay | None = field(default=None, init=False)

    def train(self, batches: Sequence[np.ndarray], lr: float, report: Sequence[float] = ()) -> StepResult:
        """One optimizer step on this rank's micro-batches, each of shape (B, S + 1), and what came of it.

        `report` are values of this rank that every rank is to know; they travel with the loss.
        """
        return self.launch(batches, lr, report).result()

    def launch(self, batches: Sequence[np.ndarray], lr: float, report: Sequence[float] = ()) -> UnderWay:
        """As `train`, but what came of it may be asked later, so that no rank waits for all others in between."""
        self.step.begin(lr)
        losses = self.train_executor.run(*self._on_device(batches))
        exchange, table = self._exchange([self._own_loss(losses), *report])
        before, self._last = self._last, UnderWay(self.step.conclude(), exchange, table)
        if before is not None:  # arrived long ago; somebody has to take it, whether the outcome is asked for or not
            before.arrive()
        return self._last

    def evaluate(self, batches: Sequence[np.ndarray]) -> float:
        """Mean loss per token over this global batch; no weights change."""
        self.step.settle()
        losses = self.eval_executor.run(*self._on_device(batches), train=False)
        exchange, table = self._exchange([self._own_loss(losses)])
        exchange.finish()
        return float(table.sum())

    def finish(self) -> None:
        """Wait until the weights are final and whole on every rank; needed before anything else reads them."""
        self.step.settle()
        self.optimizer.finish_gathers()
        if self._last is not None:
            self._last.arrive()

    def adopt(self, program: Program, costs: Costs) -> None:
        """Run another program, planned for these costs, from the next step on: the same stages on the same ranks."""
        self.train_program = program
        self.train_executor = self.train_executor.with_program(program)
        self.eval_executor = self.eval_executor.with_program(forward_only(program))
        if self.activations is not None:
            self.activations.plan(program, costs)

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

    def _exchange(self, values: Sequence[float]) -> tuple[Pending, Tensor]:
        """Every rank's values, shape (ranks, values), fp64, once the exchange has ended: one small message a step."""
        world = self.mesh.channel(*AXES)
        table = torch.zeros((world.size, len(values)), dtype=torch.float64, device=self.parameters.buffer.device)
        table[world.index] = torch.tensor(values, dtype=torch.float64)
        return Pending(world.all_gather(table.view(-1))), table
