"""Pipeline stages that sleep, for atoll and for torch.distributed.pipelining: what is measured is the runtime alone.

Every F, I and W of a stage sleeps for the same time and writes down when it began and ended. One clock counts
for all ranks of a machine (Linux: CLOCK_MONOTONIC), so the marks of all ranks can be laid side by side.

Each system gets the stage in the form that its split backward is made for. atoll's has one autograd node that
sleeps for I and submits the sleep of W as weight-gradient work. torch finds the halves by walking the graph, so
its stage has a node on the way to the input, one on the way to the weight, and one that joins them: I then runs
the first, W the second, a whole backward both. torch skips I on its first stage and runs a whole backward in
place of W there; `Marks` shows that everybody slept for the same passes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining

from benchmarks.parts.realtime import realtime_threads
from parallel.comm.channel import Channel
from parallel.gradients import WeightGradients
from parallel.pipeline.executor import Executor
from parallel.pipeline.program import Program
from parallel.pipeline.stage import Stage

V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
"""torch's schedules that put the first and the last stage on one rank; the others count on with the ranks."""

AWAKE_SECONDS = 2e-4
"""How long before its end a pass stops sleeping and counts: a sleep ends late by chance, a pass must not."""

Mark = tuple[str, float, float]
"""F, I or W; when it began and ended, in seconds on the machine's clock."""


class Passes:
    """The passes of one rank: how long they sleep, in how many layers of a stage, and the marks they leave."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.layers = 1
        self.marks: list[Mark] = []

    def sleep(self, op: str) -> None:
        start, seconds = time.perf_counter(), self.seconds / self.layers
        if seconds > AWAKE_SECONDS:
            time.sleep(seconds - AWAKE_SECONDS)
        while (end := time.perf_counter()) < start + seconds:
            pass
        self.marks.append((op, start, end))


class _Whole(torch.autograd.Function):
    """F; I, with W as submitted work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, passes: Passes, gradients: WeightGradients) -> Tensor:
        ctx.passes, ctx.gradients = passes, gradients
        passes.sleep("F")
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        passes: Passes = ctx.passes
        passes.sleep("I")
        ctx.gradients.submit(lambda: passes.sleep("W"))
        return gradient, None, None


class _TowardsInput(torch.autograd.Function):
    """F; its backward is I."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, passes: Passes) -> Tensor:
        ctx.passes = passes
        passes.sleep("F")
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.passes.sleep("I")
        return gradient, None, None


class _TowardsWeight(torch.autograd.Function):
    """Nothing; its backward is W."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, passes: Passes) -> Tensor:
        ctx.passes = passes
        return torch.empty_like(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.passes.sleep("W")
        return gradient, None


class _Join(torch.autograd.Function):
    """Where the two ways meet: gradients go both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_zeros(1)


class _Loss(torch.autograd.Function):
    """One element of the output; its gradient is the output's storage, so that it costs nothing to make."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.save_for_backward(output)
        return output.flatten()[0].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        gradient_like: Tensor = output.detach()
        return gradient_like


def loss(output: Tensor, targets: Tensor) -> Tensor:
    """The loss of both systems."""
    found: Tensor = _Loss.apply(output)  # type: ignore[no-untyped-call]
    return found


class AtollStage(nn.Module):
    """A stage's only unit, in atoll."""

    def __init__(self, passes: Passes, gradients: WeightGradients) -> None:
        super().__init__()
        self.passes, self.gradients = passes, gradients

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.passes.layers):
            x = _Whole.apply(x, self.passes, self.gradients)  # type: ignore[no-untyped-call]
        return x


class TorchStage(nn.Module):
    """A stage's module, in torch."""

    def __init__(self, passes: Passes, first: bool) -> None:
        super().__init__()
        self.passes = passes
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(passes.layers))
        # The first input needs no gradient, and autograd would leave out I there.
        self.anchor = nn.Parameter(torch.zeros(1)) if first else None

    def forward(self, x: Tensor) -> Tensor:
        for parameter in self.weights:
            weight = _TowardsWeight.apply(parameter, self.passes)  # type: ignore[no-untyped-call]
            x = _Join.apply(_TowardsInput.apply(x, self.anchor, self.passes), weight)  # type: ignore[no-untyped-call]
        return x


class _Sink:
    """Gradients that go nowhere."""

    def begin_backward(self, stage: int) -> None:
        pass

    def end_backward(self, stage: int) -> None:
        pass


Step = Callable[[], object]


def atoll_step(program: Program, passes: Passes, channel: Channel, activation: Tensor) -> Step:
    """A training step of atoll's executor over sleeping stages."""
    stages = {}
    for number in program.stages_of(channel.index):
        gradients = WeightGradients()
        units = [("sleep", AtollStage(passes, gradients))]
        ends = loss if program.after(number) is None else None
        stages[number] = Stage(number, units, ends, gradients, _Sink(), lambda unit: None)
    executor = Executor(program, stages, channel, activation, {})
    inputs, targets = ([torch.zeros_like(activation)] * program.microbatches for _ in range(2))
    return lambda: executor.run(inputs, targets)


def torch_step(name: str, chunks: int, microbatches: int, passes: Passes, channel: Channel, activation: Tensor) -> Step:
    """A training step of a schedule of torch, with one stage or two on a rank, over sleeping stages."""
    schedule: Any = getattr(pipelining, f"Schedule{name}")
    ranks, total = channel.size, channel.size * chunks
    second = total - 1 - channel.index if name in V_SHAPED else ranks + channel.index
    stages = [
        pipelining.PipelineStage(
            TorchStage(passes, number == 0), number, total, torch.device("cpu"), group=channel.group
        )
        for number in (channel.index, second)[:chunks]
    ]
    runs = schedule(stages if chunks > 1 else stages[0], microbatches, loss_fn=loss, scale_grads=False)
    batch = torch.zeros(microbatches * activation.shape[0], *activation.shape[1:])
    numbers = [stage.stage_index for stage in stages]
    inputs = [batch] if 0 in numbers else []
    target = {"target": batch} if total - 1 in numbers else {}
    return lambda: runs.step(*inputs, **target, return_outputs=False)


def warm_up(step: Step, passes: Passes) -> None:
    """A step without sleeps: connections are made, and torch infers the shapes of its stages."""
    passes.seconds, passes.marks = 0.0, []
    step()


def timed(step: Step, passes: Passes, seconds: float, channel: Channel, realtime: bool) -> list[Mark]:
    """The marks of a step that all ranks begin together; see `realtime_threads` for what may be asked."""
    passes.seconds, passes.marks = seconds, []
    with realtime_threads() if realtime else nullcontext():
        dist.barrier(channel.group)
        step()
    return passes.marks


def require_passes(name: str, marks: Sequence[Mark], each: int) -> None:
    """Raise a ValueError unless F, I and W slept `each` times: who did other work cannot be compared."""
    found = Counter(op for op, _, _ in marks)
    if found != dict.fromkeys("FIW", each):
        raise ValueError(f"{name} ran {dict(found)} on a rank, not {each} of each of F, I and W")
