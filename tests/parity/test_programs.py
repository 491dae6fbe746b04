"""The executor runs what programs say: any right order of passes, on any placement, gives the plain result.

The stages are toys - an embedding, then linear layers in fp64 - so that hundreds of actions take no time and every
number can be compared with the plain chain of all stages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.comm.channel import Channel
from parallel.gradients import WeightGradients, attach_slot
from parallel.pipeline.actions import PASS_OPS, SEND_OPS, TRANSFER_OPS, Action, Op
from parallel.pipeline.executor import Executor, Observer, unobserved
from parallel.pipeline.passes.forward import forward_only
from parallel.pipeline.passes.reduce import add_reduce
from parallel.pipeline.passes.sync import add_sync
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.passes.update import add_update
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import generate, schedules
from parallel.pipeline.stage import Stage
from parallel.pipeline.verify import check
from parallel.tensor.functions import linear
from tests.programs import generate_from, possible_ranks, random_program
from tests.ranks import run_ranks
from tests.support import Slot

HIDDEN, VOCAB, BATCH, SEQUENCE = 3, 7, 2, 4
HANDLED = (Op.REDUCE, Op.SYNC, Op.UPDATE, Op.GATHER)


def completed(program: Program, *, per_microbatch: bool = False) -> Program:
    """A schedule with all that a step has."""
    return add_update(add_sync(add_reduce(pair_transfers(program), per_microbatch)))


class Sink:
    """Remembers what it is told about backward passes."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []

    def begin_backward(self, stage: int) -> None:
        self.begun.append(stage)

    def end_backward(self, stage: int) -> None:
        self.ended.append(stage)


class Toy(nn.Module):
    """A linear layer as the model has them, and a parameter whose gradient autograd computes."""

    def __init__(self, gradients: WeightGradients) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN).double())
        self.scale = nn.Parameter(torch.randn(HIDDEN).double())
        self.gradients = gradients

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(linear(x, self.weight, self.gradients)) * self.scale


class Part:
    """A part of the toy model: one module, with slots for its gradients."""

    def __init__(self, module: nn.Module, gradients: WeightGradients) -> None:
        self.module, self.gradients = module, gradients
        self.slots = {name: Slot(parameter) for name, parameter in module.named_parameters()}
        for name, parameter in module.named_parameters():
            attach_slot(parameter, self.slots[name], gradients)


def parts(depth: int) -> list[Part]:
    """The toy model, the same on every rank and in every copy."""
    torch.manual_seed(depth)
    queues = [WeightGradients() for _ in range(depth)]
    chain: list[nn.Module] = [nn.Embedding(VOCAB, HIDDEN).double(), *map(Toy, queues[1:])]
    return [Part(module, gradients) for module, gradients in zip(chain, queues, strict=True)]


def loss(output: Tensor, targets: Tensor) -> Tensor:
    return (output.sum(-1) * targets).square().mean()


def batches(microbatches: int) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(100 + microbatches)
    draw = partial(torch.randint, 0, VOCAB, (BATCH, SEQUENCE))
    return [draw() for _ in range(microbatches)], [draw() for _ in range(microbatches)]


class Setup:
    """An executor of this rank for the toy model, and what it left behind."""

    def __init__(self, program: Program, observer: Observer = unobserved) -> None:
        assert dist.group.WORLD is not None
        channel, self.sink = Channel(dist.group.WORLD), Sink()
        self.handled: list[Action] = []
        self.parts: dict[int, Part] = {}
        stages = {}
        for stage in program.stages_of(channel.index):
            part = self.parts[stage] = parts(program.depth)[program.part_of(stage)]
            units = [(f"unit {stage}", part.module)]
            ending = loss if program.after(stage) is None else None
            stages[stage] = Stage(stage, units, ending, part.gradients, self.sink, lambda unit: None)
        border = torch.empty(BATCH, SEQUENCE, HIDDEN, dtype=torch.float64)
        handlers = dict.fromkeys(HANDLED, self.handled.append)
        self.executor = Executor(program, stages, channel, border, handlers, observer)


def plain_run(program: Program, copy: int) -> tuple[list[Tensor], list[Part]]:
    """Losses of one copy's micro-batches through the plain chain of its stages, which has the gradients then."""
    chain, losses = parts(program.depth), []
    tokens, targets = batches(program.microbatches)
    for microbatch in program.microbatches_of(copy * program.depth):
        each = loss(nn.Sequential(*(part.module for part in chain))(tokens[microbatch]), targets[microbatch])
        each.backward()
        losses.append(each.detach())
    return losses, chain


def execute(program: Program) -> None:
    """One run on this rank against the plain chain: losses, gradients, evaluation, what was told to whom."""
    check(program)
    setup = Setup(program)
    executor, sink = setup.executor, setup.sink
    batch = batches(program.microbatches)
    found = executor.run(*batch)
    listed = program.actions[executor.channel.index]
    expected = []
    for copy in range(program.replicas):
        losses, chain = plain_run(program, copy)
        if program.rank_of((copy + 1) * program.depth - 1) == executor.channel.index:
            expected += losses
        for stage, part in setup.parts.items():
            if stage // program.depth != copy:
                continue
            for name, slot in chain[program.part_of(stage)].slots.items():
                # Micro-batches are added in the order of the program's backwards.
                torch.testing.assert_close(part.slots[name].view, slot.view, rtol=1e-12, atol=1e-14)
                assert part.slots[name].writes == len(program.microbatches_of(stage))
                assert part.module.get_parameter(name).grad is None
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert sink.begun == sink.ended
    if Op.W not in program.ops:
        assert sink.begun == [action.stage for action in listed if action.op is Op.B]
    assert setup.handled == [action for action in listed if action.op in HANDLED]
    evaluation = Setup(forward_only(program)).executor
    again = evaluation.run(*batch, train=False)
    assert len(again) == len(found)
    assert all(torch.equal(one, other) for one, other in zip(again, found, strict=True))
    for stage in [*executor.stages.values(), *evaluation.stages.values()]:
        assert not stage._under_way
        assert not stage.gradients._kept


def execute_random(seeds: range) -> int:
    ranks = dist.get_world_size()
    for seed in seeds:
        program = random_program(seed, ranks, replicas=2 if ranks > 1 and seed % 3 == 0 else 1)
        execute(completed(program, per_microbatch=seed % 2 == 0))
    return len(seeds)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_right_program_gives_the_plain_result(ranks: int) -> None:
    """Any placement and order, backwards whole and split, the model once or twice."""
    assert run_ranks(ranks, execute_random, range(100 * ranks, 100 * ranks + 24)) == [24] * ranks


def execute_schedules() -> None:
    ranks = dist.get_world_size()
    for name in schedules():
        if ranks in possible_ranks(name):
            for microbatches in {1, ranks - 1, 2 * ranks + 1} - {0}:
                execute(completed(generate_from(name, ranks, microbatches)))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_schedule_gives_the_plain_result(ranks: int) -> None:
    run_ranks(ranks, execute_schedules)


WRITTEN = """
0F0,0F1,0SEND_F0,0SEND_F1,0RECV_I1,0RECV_I0,0B1,0B0
1RECV_F0,1RECV_F1,1F0,1F1,1B1,1SEND_I1,1B0,1SEND_I0
"""


def execute_text(text: str) -> None:
    execute(Program.from_csv(text))


def test_a_program_from_a_file_runs() -> None:
    """Backwards in reverse order of the forwards, as neither gpipe nor 1f1b has them."""
    run_ranks(2, execute_text, WRITTEN)


SPLIT = """
0F0,0F1,0F2,0I0,0I1,0W0,0I2,0W1,0W2
1F0,1I0,1F1,1I1,1W0,1F2,1I2,1W2,1W1
"""


def observe(text: str) -> list[tuple[str, str]]:
    """What an observer of a two-stage program sees on this rank: every pass and handled action, in order."""
    program = completed(Program.from_csv(text))
    seen: list[tuple[str, str]] = []

    @contextmanager
    def observer(kind: str, action: Action) -> Iterator[None]:
        seen.append((kind, str(action)))
        yield

    Setup(program, observer).executor.run(*batches(program.microbatches))
    runs = [Action.parse(text) for kind, text in seen if kind == "run"]
    listed = program.actions[dist.get_rank()]
    assert runs == [action for action in listed if action.op in PASS_OPS or action.op in HANDLED]
    return seen


@pytest.mark.parametrize("text", [generate("1f1b", 2, 3).to_csv(), SPLIT], ids=["whole", "split"])
def test_an_observer_sees_runs_and_waits(text: str) -> None:
    """W waits for nothing: what it needs is on its rank."""
    first, last = run_ranks(2, observe, text)
    waits = [cell for cell in text.replace("\n", ",").split(",") if cell[:2] in ("0B", "0I", "1F")]
    assert [text for kind, text in [*first, *last] if kind == "wait"] == waits


def started() -> tuple[list[tuple[int, int]], list[list[int]], list[str]]:
    """On this rank: sends and receives that started together, micro-batches of each W, writes in order."""
    text = "0F0,0F1,0F2,0I0,0W0,0I1,0I2,0W1,0W2\n1F0,1F1,1F2,1B0,1I1,1W1,1I2,1W2"
    program = add_reduce(pair_transfers(Program.from_csv(text)), per_microbatch=False)
    setup = Setup(program)
    transfers, weights, writes = [], [], []
    transfer, executor = setup.executor.channel.transfer, setup.executor

    def start(sends: Any, receives: Any) -> Any:
        transfers.append((len(sends), len(receives)))
        return transfer(sends, receives)

    executor.channel.transfer = start  # type: ignore[method-assign]
    for stage, part in setup.parts.items():
        run = part.gradients.run
        part.gradients.run = lambda listed, run=run: weights.append(list(listed)) or run(listed)  # type: ignore
        for name, slot in part.slots.items():
            slot.told = lambda stage=stage, name=name: writes.append(f"{stage} {name}")  # type: ignore[misc]
    executor.run(*batches(program.microbatches))
    kinds = ["S" if action.op in SEND_OPS else "R" if action.op in TRANSFER_OPS else "-" for action in executor.actions]
    groups = re.findall("SR|S|R", "".join(kinds))
    assert transfers == [(group.count("S"), group.count("R")) for group in groups]
    return transfers, weights, writes


def test_what_starts_together() -> None:
    """A send and the receive behind it, with one neighbour; and a stage's last W's, parameter by parameter."""
    first, last = run_ranks(2, started)
    assert (1, 1) in first[0]
    assert max(sends + receives for sends, receives in first[0] + last[0]) == 2
    assert first[1] == [[0], [1, 2]]
    assert last[1] == [[1], [2]]
    assert last[2] == ["1 scale", "1 weight"] * 3


def fail(stop: Callable[[], None]) -> None:
    """A stage that fails once: the error says where, and the executor can run again."""
    setup = Setup(generate("gpipe", 1, 2))
    batch = batches(2)
    broken = setup.parts[0].module.register_forward_hook(lambda *_: stop())
    with pytest.raises(ZeroDivisionError) as raised:
        setup.executor.run(*batch)
    assert raised.value.__notes__ == ["while pipeline rank 0 executed 0F0 of 'gpipe'"]
    broken.remove()
    assert len(setup.executor.run(*batch)) == 2


def divide() -> None:
    raise ZeroDivisionError


def test_an_error_says_which_action_failed() -> None:
    run_ranks(1, fail, divide)


def refuse() -> None:
    assert dist.group.WORLD is not None
    program = add_update(generate("gpipe", 1, 1))
    with pytest.raises(ValueError, match="'gpipe' has ops that nothing here handles: GATHER, UPDATE"):
        Executor(program, {}, Channel(dist.group.WORLD), torch.empty(1), {})


def test_a_program_with_an_op_that_nobody_handles_is_refused() -> None:
    run_ranks(1, refuse)
