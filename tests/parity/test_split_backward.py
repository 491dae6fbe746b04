"""The two halves of a backward, I and W, on a stage of the real decoder.

Together they give bit for bit what B gives: the same work runs, later. Nothing runs twice - under recomputation every
block is computed again exactly once, in I - and nothing is kept longer than needed: I frees what autograd saved, W
frees the factors of each product when it has used them.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from parallel.comm.channel import Channel
from parallel.gradients import WeightGradients, attach_slot
from parallel.mesh import PaperChannel
from parallel.pipeline.executor import Executor
from parallel.pipeline.program import Program
from parallel.pipeline.stage import Stage
from parallel.tensor.plan import apply_plan
from tests.support import Slot
from trainer.build import Recomputed
from trainer.models.config import ModelConfig
from trainer.models.decoder import TENSOR_PLAN, unit_builders

BATCH, SEQUENCE = 2, 8
MICRO_BATCHES = 3
CONFIG = ModelConfig.model_validate(
    {"vocab": 40, "hidden": 32, "layers": 3, "heads": 4, "kv_heads": 2, "ffn_hidden": 48, "qk_norm": True}
)
UNITS = {
    "first": ("embed", "blocks.0", "blocks.1"),
    "middle": ("blocks.1",),
    "last": ("blocks.2", "head"),
    "whole": ("embed", "blocks.0", "blocks.1", "blocks.2", "head"),
}
MODES = ("none", "selective", "full")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The products are too small to be shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class AloneChannel:
    """A channel of one rank without a process group."""

    size, index = 1, 0

    def all_reduce(self, buffer: Tensor) -> Iterator[list[Any]]:
        yield from ()

    all_gather = all_reduce


class Sink:
    """Counts backward passes."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    def begin_backward(self, stage: int) -> None:
        self.begun += 1

    def end_backward(self, stage: int) -> None:
        self.ended += 1


class Kept:
    """Weak references to what autograd saved in the forwards of each micro-batch."""

    def __init__(self) -> None:
        self.saved: dict[int, list[weakref.ref[Tensor]]] = {}

    def __call__(self, stage: int, microbatch: int) -> AbstractContextManager[Any]:
        def pack(tensor: Tensor) -> Tensor:
            held = tensor.detach()  # an object of its own, which lives as long as autograd keeps it
            self.saved.setdefault(microbatch, []).append(weakref.ref(held))
            return held

        return saved_tensors_hooks(pack, lambda held: held)

    def alive(self, microbatch: int) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self.saved[microbatch])


class Part:
    """A stage of the real decoder, the same every time it is built, with its slots and counted forwards."""

    def __init__(self, which: str, mode: str = "none", *, hold: bool = False) -> None:
        torch.manual_seed(11)
        names = UNITS[which]
        self.gradients = WeightGradients(hold=hold)
        channel = cast(Channel, AloneChannel())
        self.forwards = 0
        self.slots: dict[str, Slot] = {}
        self.units: list[tuple[str, nn.Module]] = []
        for name in names:
            module = apply_plan(name, unit_builders(CONFIG)[name](), TENSOR_PLAN, channel, self.gradients)
            for local, parameter in module.named_parameters():
                nn.init.normal_(parameter, std=0.2)
                slot = self.slots[f"{name}.{local}"] = Slot(parameter)
                attach_slot(parameter, slot, self.gradients)
            if name.startswith("blocks."):
                # Before it runs: recomputation stops as soon as it has what the backward needs.
                module.get_submodule("feed_forward").register_forward_pre_hook(self._count)
                if mode == "full":
                    module = Recomputed(module)
                elif mode == "selective":
                    module.feed_forward = Recomputed(module.get_submodule("feed_forward"))
            self.units.append((name, module))
        self.first, self.last = names[0] == "embed", names[-1] == "head"
        self.sink, self.kept = Sink(), Kept()
        ending = self._loss if self.last else None
        self.stage = Stage(0, self.units, ending, self.gradients, self.sink, lambda unit: None, self.kept)

    def _count(self, *_: object) -> None:
        self.forwards += 1

    @staticmethod
    def _loss(logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def forward(self, microbatch: int) -> Tensor:
        generator = torch.Generator().manual_seed(microbatch)
        tokens = torch.randint(0, CONFIG.vocab, (BATCH, SEQUENCE), generator=generator)
        x = tokens if self.first else torch.randn(BATCH, SEQUENCE, CONFIG.hidden, generator=generator)
        return self.stage.forward(microbatch, x, tokens, train=True)

    def gradient(self, microbatch: int) -> Tensor | None:
        """Of the stage's output."""
        generator = torch.Generator().manual_seed(100 + microbatch)
        return None if self.last else torch.randn(BATCH, SEQUENCE, CONFIG.hidden, generator=generator)

    def whole(self, microbatch: int) -> Tensor | None:
        return self.stage.backward(microbatch, self.gradient(microbatch))

    def inputs(self, microbatch: int) -> Tensor | None:
        return self.stage.input_gradient(microbatch, self.gradient(microbatch))

    def weights(self, *microbatches: int) -> None:
        self.stage.weight_gradient(microbatches)

    def written(self) -> set[str]:
        return {name for name, slot in self.slots.items() if slot.writes}


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


Order = Callable[[Part], list[Tensor | None]]


def at_once(part: Part) -> list[Tensor | None]:
    """W right behind I."""
    found = []
    for microbatch in range(MICRO_BATCHES):
        found.append(part.inputs(microbatch))
        part.weights(microbatch)
    return found


def at_the_end(part: Part) -> list[Tensor | None]:
    """All W's together."""
    found = [part.inputs(microbatch) for microbatch in range(MICRO_BATCHES)]
    part.weights(*range(MICRO_BATCHES))
    return found


def mixed(part: Part) -> list[Tensor | None]:
    """A whole backward between the halves of others, before which their W's run."""
    found = [part.inputs(0), part.inputs(1)]
    part.weights(0)
    part.weights(1)
    return [*found, part.whole(2)]


def late(part: Part) -> list[Tensor | None]:
    """W's one by one when all I's have run."""
    found = [part.inputs(microbatch) for microbatch in range(MICRO_BATCHES)]
    for microbatch in range(MICRO_BATCHES):
        part.weights(microbatch)
    return found


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", UNITS)
@pytest.mark.parametrize("order", [at_once, at_the_end, mixed, late])
def test_the_halves_give_what_the_whole_gives(order: Order, which: str, mode: str, hold: bool) -> None:
    plain, split = Part(which, hold=hold), Part(which, mode, hold=hold)
    for part in (plain, split):
        outputs = [part.forward(microbatch) for microbatch in range(MICRO_BATCHES)]
        assert all(output.abs().max() > 0 for output in outputs)
    expected, found = [plain.whole(microbatch) for microbatch in range(MICRO_BATCHES)], order(split)
    assert [dx is None for dx in found] == [plain.first] * MICRO_BATCHES
    assert all(map(same, found, expected))
    for name, slot in plain.slots.items():
        assert torch.equal(split.slots[name].view, slot.view), name
        assert split.slots[name].writes == slot.writes == MICRO_BATCHES
        assert slot.view.abs().max() > 0
    assert split.sink.begun == split.sink.ended > 0


@pytest.mark.parametrize("order", [at_once, at_the_end, mixed, late])
@pytest.mark.parametrize("mode", MODES)
def test_a_block_is_recomputed_once_a_micro_batch(order: Order, mode: str) -> None:
    part = Part("whole", mode)
    blocks = sum(name.startswith("blocks.") for name, _ in part.units)
    for microbatch in range(MICRO_BATCHES):
        part.forward(microbatch)
    assert part.forwards == blocks * MICRO_BATCHES
    order(part)
    assert part.forwards == blocks * MICRO_BATCHES * (1 if mode == "none" else 2)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_is_in_the_first_half(mode: str) -> None:
    part = Part("middle", mode)
    part.forward(0)
    part.inputs(0)
    assert part.forwards == 2
    part.weights(0)
    assert part.forwards == 2


def test_every_weight_gradient_arrives_in_w() -> None:
    """Those of norms and embeddings, too, which are no matrix products; none of them stays behind as a tensor."""
    part = Part("whole")
    assert {"embed.tokens.weight", "head.norm.weight"} <= set(part.slots)
    assert any("norm" in name for name in part.slots if name.startswith("blocks."))
    part.forward(0)
    part.inputs(0)
    assert part.written() == set()
    assert part.sink.begun == 0
    part.weights(0)
    assert part.written() == set(part.slots)
    assert all(parameter.grad is None for _, module in part.units for parameter in module.parameters())


def test_w_of_one_micro_batch_leaves_the_others() -> None:
    part, other = Part("first"), Part("first")
    for microbatch in range(2):
        part.forward(microbatch)
        part.inputs(microbatch)
    part.weights(1)
    other.forward(1)
    other.whole(1)
    for name, slot in other.slots.items():
        assert torch.equal(part.slots[name].view, slot.view)
        assert part.slots[name].writes == 1


def factors(gradients: WeightGradients, microbatch: int) -> list[weakref.ref[Tensor]]:
    """References to the tensors that the work kept for a W holds, in its order."""
    found: list[weakref.ref[Tensor]] = []

    def look(thing: object) -> None:
        for cell in getattr(thing, "__closure__", None) or ():
            if isinstance(cell.cell_contents, Tensor):
                found.append(weakref.ref(cell.cell_contents))
            elif callable(cell.cell_contents) and not isinstance(cell.cell_contents, type):
                look(cell.cell_contents)

    for work in gradients._kept[microbatch]:
        look(work)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_the_first_half_frees_what_autograd_saved(mode: str) -> None:
    """But for the inputs of the products, which W needs; another micro-batch keeps what is its."""
    part = Part("middle", mode)
    for microbatch in range(2):
        part.forward(microbatch)
    saved = len(part.kept.saved[0])
    assert part.kept.alive(0) == part.kept.alive(1) == saved > 0
    part.inputs(0)
    products = sum(slot.view.dim() == 2 for slot in part.slots.values())
    # Under full recomputation what I used was saved a second time, in I itself, where this keeper does not look.
    assert part.kept.alive(0) <= (products if mode != "full" else 0) < saved
    assert part.kept.alive(1) == saved
    part.weights(0)
    assert part.kept.alive(0) == 0
    assert part.kept.alive(1) == saved
    assert not part.stage._under_way.keys() - {1}


def test_the_second_half_frees_factor_by_factor() -> None:
    part = Part("whole")
    part.forward(0)
    part.inputs(0)
    held = factors(part.gradients, 0)
    assert len(held) > 2 * sum(slot.view.dim() == 2 for slot in part.slots.values()) - 2
    left: list[int] = []

    def look() -> None:
        left.append(sum(reference() is not None for reference in held))

    for slot in part.slots.values():
        slot.told = look
    part.weights(0)
    assert left[0] <= len(held)
    assert left[-1] <= 3, "the factors of the last product, which is just being freed"
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > len(left) / 2, "memory falls all the way"
    look()
    assert left[-1] == 0


@contextmanager
def broken(gradients: WeightGradients, after: int) -> Iterator[None]:
    """The work of a later moment fails once, after so many pieces."""
    submit, count = gradients.submit, 0

    def failing(work: Callable[[], None], *more: Any) -> None:
        nonlocal count
        count += 1

        def fail() -> None:
            raise ZeroDivisionError

        submit(fail if count == after else work, *more)

    gradients.submit = failing  # type: ignore[method-assign]
    yield
    gradients.submit = submit  # type: ignore[method-assign]


PROGRAM = "0F0,0F1,0I0,0F2,0I1,0W0,0I2,0W1,0W2"


@pytest.mark.parametrize("where", ["0I1", "0W0", "0W1"])
def test_an_error_in_a_half_leaves_the_executor_able_to_run(where: str) -> None:
    """It says where; the next run gives what a run without an error gives."""
    program = Program.from_csv(PROGRAM)
    tokens = [torch.randint(0, CONFIG.vocab, (BATCH, SEQUENCE)) for _ in range(MICRO_BATCHES)]
    plain, part = Part("whole", "full"), Part("whole", "full")
    link = cast(Channel, PaperChannel(1, 0))
    border = torch.empty(BATCH, SEQUENCE, CONFIG.hidden)
    expected = Executor(program, {0: plain.stage}, link, border, {}).run(tokens, tokens)
    executor = Executor(program, {0: part.stage}, link, border, {})
    works = len(part.slots)
    if where == "0I1":
        handle = cast(Recomputed, part.units[1][1]).module.register_full_backward_pre_hook(_stop_at(2))
        with pytest.raises(ZeroDivisionError) as raised:
            executor.run(tokens, tokens)
        handle.remove()
    else:
        with broken(part.gradients, 5 if where == "0W0" else works + 5), pytest.raises(ZeroDivisionError) as raised:
            executor.run(tokens, tokens)
    assert raised.value.__notes__ == [f"while pipeline rank 0 executed {where} of 'csv'"]
    assert not part.stage._under_way
    assert not part.gradients._kept
    assert part.gradients._keeping is None
    for slot in part.slots.values():
        slot.writes = 0
    found = executor.run(tokens, tokens)
    assert all(map(same, found, expected))
    for name, slot in plain.slots.items():
        assert torch.equal(part.slots[name].view, slot.view), name


def _stop_at(count: int) -> Callable[..., None]:
    calls = iter(range(1, count + 1))

    def stop(*_: object) -> None:
        if next(calls) == count:
            raise ZeroDivisionError

    return stop
