"""The executor runs what programs say: any right order of passes, on any placement, gives the plain result.

The stages are toys - an embedding, then linear layers in fp64 - so that hundreds of actions take no time and every
number can be compared with the plain chain of all stages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.comm.channel import Channel
from parallel.gradients import WeightGradients
from parallel.pipeline.actions import PASS_OPS, Action, Op
from parallel.pipeline.executor import Executor, Observer, unobserved
from parallel.pipeline.passes.forward import forward_only
from parallel.pipeline.passes.reduce import add_reduce
from parallel.pipeline.passes.transfers import pair_transfers
from parallel.pipeline.passes.update import add_update
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import generate, schedules
from parallel.pipeline.stage import Stage
from parallel.pipeline.verify import check
from tests.ranks import run_ranks

HIDDEN, VOCAB, BATCH, SEQUENCE = 3, 7, 2, 4
HANDLED = (Op.REDUCE, Op.UPDATE, Op.GATHER)


def random_program(seed: int, ranks: int) -> Program:
    """Random placement of up to 6 stages, up to 4 micro-batches, passes in a random order that can run."""
    chance = random.Random(seed)
    stages, microbatches = chance.randint(1, 6), chance.randint(1, 4)
    placement = tuple(chance.randrange(ranks) for _ in range(stages))
    needs: dict[Action, set[Action]] = {}
    for microbatch in range(microbatches):
        for stage in range(stages):
            forward, backward = Action(Op.F, stage, microbatch), Action(Op.B, stage, microbatch)
            needs[forward] = {Action(Op.F, stage - 1, microbatch)} if stage else set()
            needs[backward] = {forward} | ({Action(Op.B, stage + 1, microbatch)} if stage + 1 < stages else set())
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    done: set[Action] = set()
    while len(done) < len(needs):
        action = chance.choice([each for each, needed in needs.items() if each not in done and needed <= done])
        rows[placement[action.stage]].append(action)
        done.add(action)
    program = Program(f"random {seed}", ranks, stages, microbatches, placement, tuple(map(tuple, rows)))
    return add_update(add_reduce(pair_transfers(program), per_microbatch=chance.random() < 0.5))


class Sink:
    """Remembers what it is told about backward passes."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, bool]] = []
        self.ended: list[int] = []

    def begin_backward(self, stage: int, last: bool) -> None:
        self.begun.append((stage, last))

    def end_backward(self, stage: int) -> None:
        self.ended.append(stage)


def modules(stages: int) -> list[nn.Module]:
    """One module per stage, the same on every rank."""
    torch.manual_seed(stages)
    chain: list[nn.Module] = [nn.Embedding(VOCAB, HIDDEN).double()]
    chain += [nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh()).double() for _ in range(stages - 1)]
    return chain


def loss(output: Tensor, targets: Tensor) -> Tensor:
    return (output.sum(-1) * targets).square().mean()


def batches(microbatches: int) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(100 + microbatches)
    draw = partial(torch.randint, 0, VOCAB, (BATCH, SEQUENCE))
    return [draw() for _ in range(microbatches)], [draw() for _ in range(microbatches)]


def build(
    program: Program, chain: list[nn.Module], sink: Sink, handled: list[Action], observer: Observer = unobserved
) -> Executor:
    """The executor of this rank for a toy chain; other actions than passes and transfers are noted in `handled`."""
    assert dist.group.WORLD is not None
    link = Channel(dist.group.WORLD)
    last = program.stages - 1
    mine = {
        stage: Stage(
            stage,
            [(f"unit {stage}", chain[stage])],
            loss if stage == last else None,
            WeightGradients(),
            sink,
            lambda unit: None,
        )
        for stage in program.stages_of(link.index)
    }
    border = torch.empty(BATCH, SEQUENCE, HIDDEN, dtype=torch.float64)
    return Executor(program, mine, link, border, dict.fromkeys(HANDLED, handled.append), observer)


def execute(program: Program) -> None:
    """One run on this rank against the plain chain: losses, gradients, evaluation, what was told to whom."""
    check(program)
    chain, plain = modules(program.stages), modules(program.stages)
    sink = Sink()
    handled: list[Action] = []
    executor = build(program, chain, sink, handled)
    tokens, targets = batches(program.microbatches)
    found = executor.run(tokens, targets)
    expected = []
    for batch, target in zip(tokens, targets, strict=True):
        each = loss(nn.Sequential(*plain)(batch), target)
        each.backward()
        expected.append(each.detach())
    rank = executor.channel.index
    mine = program.stages_of(rank)
    if program.stages - 1 in mine:
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    else:
        assert found == []
    for stage in mine:
        for one, other in zip(chain[stage].parameters(), plain[stage].parameters(), strict=True):
            # Micro-batches are added in the order of the program's backwards.
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14)
        order = [last for told, last in sink.begun if told == stage]
        assert order == [False] * (program.microbatches - 1) + [True]
    assert sink.ended == [stage for stage, _ in sink.begun]
    assert handled == [action for action in program.actions[rank] if action.op in HANDLED]
    evaluation = build(forward_only(program), chain, Sink(), [])
    again = evaluation.run(tokens, targets, train=False)
    assert len(again) == len(found)
    assert all(torch.equal(one, other) for one, other in zip(again, found, strict=True))
    assert not any(stage._under_way for stage in [*executor.stages.values(), *evaluation.stages.values()])


def execute_random(seeds: range) -> int:
    for seed in seeds:
        execute(random_program(seed, dist.get_world_size()))
    return len(seeds)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_right_program_gives_the_plain_result(ranks: int) -> None:
    assert run_ranks(ranks, execute_random, range(100 * ranks, 100 * ranks + 25)) == [25] * ranks


def execute_schedules() -> None:
    ranks = dist.get_world_size()
    for name in schedules():
        for microbatches in (1, ranks - 1, ranks, 2 * ranks + 1):
            program = pair_transfers(generate(name, ranks, max(1, microbatches)))
            execute(add_update(add_reduce(program, per_microbatch=False)))


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


def observe() -> list[tuple[str, str]]:
    """What an observer of a two-stage program sees on this rank."""
    program = add_update(add_reduce(pair_transfers(generate("1f1b", 2, 2)), per_microbatch=False))
    seen: list[tuple[str, str]] = []

    @contextmanager
    def observer(kind: str, action: Action) -> Iterator[None]:
        yield
        seen.append((kind, str(action)))

    tokens, targets = batches(2)
    build(program, modules(2), Sink(), [], observer).run(tokens, targets)
    runs = [Action.parse(text) for kind, text in seen if kind == "run"]
    listed = program.actions[dist.get_rank()]
    assert runs == [action for action in listed if action.op in PASS_OPS or action.op in HANDLED]
    return seen


def test_an_observer_sees_runs_and_waits() -> None:
    first, last = run_ranks(2, observe)
    assert [text for kind, text in first if kind == "wait"] == ["0B0", "0B1"]
    assert [text for kind, text in last if kind == "wait"] == ["1F0", "1F1"]


def fail(stop: Callable[[], None]) -> None:
    """A stage that fails once: the error says where, and the executor can run again."""
    program = generate("gpipe", 1, 2)
    chain = modules(1)
    executor = build(program, chain, Sink(), [])
    tokens, targets = batches(2)
    broken = chain[0].register_forward_hook(lambda *_: stop())
    with pytest.raises(ZeroDivisionError) as raised:
        executor.run(tokens, targets)
    assert raised.value.__notes__ == ["while pipeline rank 0 executed 0F0 of 'gpipe'"]
    broken.remove()
    assert len(executor.run(tokens, targets)) == 2


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
