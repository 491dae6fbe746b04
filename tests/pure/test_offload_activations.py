"""The store of saved activations: what it moves, what it leaves, what it counts; on small graphs, without a model."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from offload.activations import ActivationStore
from offload.host import MOST_BUFFERS, HostPool, buffer_sizes, places, room
from offload.meter import ActivationMeter

CPU = torch.device("cpu")
ROWS, WIDTH = 64, 64
PIECE = ROWS * WIDTH * 4
"""Bytes of one fp32 tensor of these tests."""


def make_store(weights: list[Tensor], *passes: tuple[int, int], smallest: int = 0) -> ActivationStore:
    return ActivationStore(CPU, weights, passes, smallest)


def make_weights(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(WIDTH, WIDTH, generator=generator).div(8).requires_grad_() for _ in range(count)]


def chain(x: Tensor, weights: list[Tensor]) -> Tensor:
    for weight in weights:
        x = torch.tanh(x @ weight)
    return x.square().sum()


def inputs(seed: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def there_and_back(store: ActivationStore, stage: int, microbatch: int) -> None:
    store.offload(stage, microbatch)
    store.finish(stage, microbatch)
    store.reload(stage, microbatch)


def gradients(weights: list[Tensor]) -> list[Tensor]:
    found = []
    for weight in weights:
        assert weight.grad is not None
        found.append(weight.grad.clone())
        weight.grad = None
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, other, strict=True))


def test_gradients_are_bitwise_those_without_the_store() -> None:
    weights = make_weights()
    chain(inputs(0), weights).backward()
    expected = gradients(weights)
    store = make_store(weights, (0, 0))
    with store.keeper(0, 0):
        loss = chain(inputs(0), weights)
    there_and_back(store, 0, 0)
    loss.backward()
    assert store.moved_bytes > 0
    assert same(gradients(weights), expected)


def test_device_memory_falls_when_the_copy_is_finished_and_not_before() -> None:
    weights = make_weights()
    store = make_store(weights, (0, 0))
    with store.keeper(0, 0):
        loss = chain(inputs(0), weights)
    saved = store.meter.alive_bytes
    assert saved == 4 * PIECE  # the input, and each tanh, which the next product saves too
    store.offload(0, 0)
    assert store.meter.alive_bytes == saved
    store.finish(0, 0)
    assert store.meter.alive_bytes == 0
    store.reload(0, 0)
    assert store.meter.alive_bytes == saved
    loss.backward()
    assert store.meter.alive_bytes == 0
    assert store.meter.take_peak() == saved


def test_weights_stay() -> None:
    weights = make_weights()
    store = make_store(weights, (0, 0))
    with store.keeper(0, 0):
        loss = chain(inputs(0), weights)
    there_and_back(store, 0, 0)
    assert store.moved_bytes == 4 * PIECE, "activations only"
    loss.backward()


def test_views_of_one_storage_are_moved_once_and_come_back_as_the_same_views() -> None:
    seen: list[tuple[tuple[int, ...], tuple[int, ...], int, int]] = []

    class Spread(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x, x.t(), x[3:9, ::2], x.view(-1)[5:].view(torch.int32))
            return x.sum()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            x, turned, part, bits = ctx.saved_tensors
            seen.extend(
                (tuple(each.shape), each.stride(), int(each.storage_offset()), each.untyped_storage()._cdata)
                for each in (x, turned, part, bits)
            )
            assert torch.equal(turned, x.t())
            assert torch.equal(part, x[3:9, ::2])
            assert torch.equal(bits.view(torch.float32), x.view(-1)[5:])
            return gradient.expand_as(x)

    x = inputs(1).requires_grad_()
    store = make_store([], (0, 0))
    with store.keeper(0, 0):
        total = Spread.apply(x * 1.0)  # type: ignore[no-untyped-call]
    there_and_back(store, 0, 0)
    total.backward()
    assert store.moved_bytes == PIECE
    assert [each[:3] for each in seen] == [
        ((ROWS, WIDTH), (WIDTH, 1), 0),
        ((WIDTH, ROWS), (1, WIDTH), 0),
        ((6, WIDTH // 2), (WIDTH, 2), 3 * WIDTH),
        ((ROWS * WIDTH - 5,), (1,), 5),
    ]
    assert len({each[3] for each in seen}) == 1, "one storage on the way back too"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.int64])
def test_types_and_bits_survive(dtype: torch.dtype) -> None:
    original = torch.randint(0, 255, (3001 * dtype.itemsize,), dtype=torch.uint8)
    original = original.bitwise_and_(1).view(dtype) if dtype == torch.bool else original.view(dtype)
    copy = original.clone()
    back: list[Tensor] = []

    class Hold(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, held: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.save_for_backward(held)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
            back.extend(ctx.saved_tensors)
            return gradient, None

    store = make_store([], (0, 0))
    with store.keeper(0, 0):
        total = Hold.apply(torch.zeros(1, requires_grad=True), original).sum()  # type: ignore[no-untyped-call]
    store.offload(0, 0)
    store.finish(0, 0)
    original.zero_()  # what is read later is the copy
    store.reload(0, 0)
    total.backward()
    assert back[0].dtype == dtype
    assert torch.equal(back[0].view(torch.uint8), copy.view(torch.uint8))


def test_small_tensors_stay_and_are_counted() -> None:
    store = make_store([], (0, 0), smallest=PIECE)
    small, large = torch.ones(7, requires_grad=True), inputs(2).requires_grad_()
    with store.keeper(0, 0):
        loss = (small * 1.0).square().sum() + (large * 1.0).square().sum()
    before = store.meter.alive_bytes
    store.offload(0, 0)
    store.finish(0, 0)
    assert store.moved_bytes == PIECE
    assert before - store.meter.alive_bytes == PIECE
    assert store.meter.alive_bytes == 7 * 4
    store.reload(0, 0)
    loss.backward()
    assert torch.equal(small.grad, torch.full((7,), 2.0))  # type: ignore[arg-type]


def test_empty_tensors_stay() -> None:
    store = make_store([], (0, 0))
    x = torch.empty(0, requires_grad=True)
    with store.keeper(0, 0):
        loss = (x * 1.0).square().sum()
    there_and_back(store, 0, 0)
    assert store.moved_bytes == 0
    loss.backward()


def test_only_what_is_named_is_moved() -> None:
    weights = make_weights()
    store = make_store(weights, (1, 0))
    with store.keeper(0, 0):
        first = chain(inputs(0), weights)
    with store.keeper(1, 0):
        second = chain(inputs(1), weights)
    there_and_back(store, 1, 0)
    assert store.meter.alive_bytes == 8 * PIECE
    assert store.moved_bytes == 4 * PIECE
    second.backward()
    first.backward()
    assert store.meter.alive_bytes == 0


def test_a_table_that_every_forward_saves_is_neither_counted_nor_moved() -> None:
    table = inputs(9)
    store = make_store([], (0, 1))
    losses = []
    for microbatch in range(2):
        x = inputs(microbatch).requires_grad_()
        with store.keeper(0, microbatch):
            losses.append(((x * 1.0).exp() * table).sum())
    assert store.meter.alive_bytes == 2 * PIECE, "the two exponentials"
    there_and_back(store, 0, 1)
    assert store.moved_bytes == PIECE
    for loss in losses:
        loss.backward()


def test_what_two_stages_save_counts_once() -> None:
    meter = ActivationMeter()
    x = inputs(0)
    assert meter.save(x.untyped_storage(), 0, 1)
    assert meter.save(x.untyped_storage(), 1, 2)
    assert meter.alive_bytes == PIECE
    del x
    assert meter.alive_bytes == 0


def test_memory_that_is_used_again_is_counted_again() -> None:
    meter = ActivationMeter()
    for forward in range(50):
        x = torch.empty(1 << 16)
        assert meter.save(x.untyped_storage(), 0, forward)
        assert meter.alive_bytes == 4 << 16
        del x
    assert meter.alive_bytes == 0
    assert meter.take_peak() == 4 << 16
    assert meter.take_peak() == 0


def test_recomputation_saves_its_input_through_the_store() -> None:
    weights = make_weights()

    def loss_of(x: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: torch.tanh(torch.tanh(x @ weights[0]) @ weights[1]), x, use_reentrant=False)
        total: Tensor = (hidden @ weights[2]).square().sum()
        return total

    loss_of(inputs(0)).backward()
    expected = gradients(weights)
    store = make_store(weights, (0, 0))
    with store.keeper(0, 0):
        loss = loss_of(inputs(0))
    assert store.meter.alive_bytes == 3 * PIECE  # its input and output, and what is squared
    there_and_back(store, 0, 0)
    assert store.moved_bytes == 3 * PIECE
    loss.backward()
    assert same(gradients(weights), expected)
    assert store.meter.alive_bytes == 0


def test_a_backward_without_reload_says_what_is_missing() -> None:
    weights = make_weights()
    store = make_store(weights, (2, 5))
    with store.keeper(2, 5):
        loss = chain(inputs(0), weights)
    store.offload(2, 5)
    store.finish(2, 5)
    with pytest.raises(RuntimeError, match=r"micro-batch 5 on stage 2 are in host memory.*RELOAD"):
        loss.backward()


def test_buffers_are_used_again_and_do_not_grow() -> None:
    weights = make_weights()
    passes = [(0, 0), (0, 1), (0, 2)]
    store = make_store(weights, *passes)
    allocated = []
    for step in range(4):
        losses = []
        for _, microbatch in passes:
            with store.keeper(0, microbatch):
                losses.append(chain(inputs(step), weights))
            store.offload(0, microbatch)
            store.finish(0, microbatch)
        for (_, microbatch), loss in zip(passes, losses, strict=True):
            store.reload(0, microbatch)
            loss.backward()
        allocated.append(store.host.allocated_bytes)
    assert allocated == [3 * 4 * PIECE] * 4


def test_a_forward_that_is_repeated_lets_go_of_the_first() -> None:
    weights = make_weights()
    store = make_store(weights, (0, 0))
    for _ in range(3):
        with store.keeper(0, 0):
            loss = chain(inputs(0), weights)
        store.offload(0, 0)
        del loss
    with store.keeper(0, 0):
        loss = chain(inputs(0), weights)
    assert store.meter.alive_bytes == 4 * PIECE
    there_and_back(store, 0, 0)
    loss.backward()
    assert store.host.allocated_bytes == 4 * PIECE


def test_no_garbage_collection_is_needed() -> None:
    weights = make_weights()
    gc.disable()
    try:
        store = make_store(weights, (0, 0))
        for _ in range(2):
            with store.keeper(0, 0):
                loss = chain(inputs(0), weights)
            there_and_back(store, 0, 0)
            loss.backward()
            del loss
            assert store.meter.alive_bytes == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("pages", [1, 2, 3, 5, 7, 13, 15, 17, 31, 100, 1000, 12345])
def test_buffers_are_few_and_hold_enough_with_little_waste(pages: int) -> None:
    for total in (pages * 4096, pages * 4096 - 1):
        sizes = buffer_sizes(total)
        assert len(sizes) <= MOST_BUFFERS
        assert sizes == sorted(sizes, reverse=True)
        assert all(size & (size - 1) == 0 for size in sizes)
        assert total <= sum(sizes) < 1.25 * total + 4096


@pytest.mark.parametrize("sizes", [[5000], [1, 2, 3], [4096, 4096, 1], [10_000, 70, 40_000, 64, 129], [300_000, 1]])
def test_places_do_not_overlap(sizes: list[int]) -> None:
    pool = HostPool(pinned=False)
    buffers = pool.take(room(sizes))
    found = places(sizes, buffers)
    assert [sum(view.numel() for view in views) for views in found] == sizes
    for buffer in buffers:
        buffer.zero_()
    for views in found:
        for view in views:
            assert not view.any()
            view.fill_(1)


def test_nothing_takes_no_room() -> None:
    assert buffer_sizes(0) == []
    assert places([], []) == []


CALLS: list[Callable[[ActivationStore], None]] = [
    lambda store: store.offload(0, 7),
    lambda store: store.reload(0, 7),
]


@pytest.mark.parametrize("call", CALLS)
def test_a_pass_without_forward_is_an_error(call: Callable[[ActivationStore], None]) -> None:
    with pytest.raises(KeyError):
        call(make_store([], (0, 7)))
