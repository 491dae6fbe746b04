"""Collectives over a channel: both algorithms, every type and awkward size, against the sums they stand for."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm.channel import Channel, Pending
from parallel.layout import AXES, Layout
from parallel.mesh import GROUPS, Mesh
from tests.ranks import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LENGTHS = (1, 3, 16, 4099)


def channel(algorithm: str = "auto") -> Channel:
    assert dist.group.WORLD is not None
    return Channel(dist.group.WORLD, algorithm)  # type: ignore[arg-type]


def whole_numbers(rank: int, length: int, dtype: torch.dtype) -> Tensor:
    """From -8 to 8, so that sums over a few ranks are exact in bf16 too."""
    generator = torch.Generator().manual_seed(1000 * rank + length)
    return torch.randint(-8, 9, (length,), generator=generator).to(dtype)


def fractions(rank: int, length: int) -> Tensor:
    """Numbers of very different sizes, whose fp32 sum depends on the order of adding."""
    generator = torch.Generator().manual_seed(77 + 1000 * rank + length)
    exponents = torch.randint(-12, 12, (length,), generator=generator)
    return torch.randn(length, generator=generator) * 2.0**exponents


def finish(steps: object) -> None:
    Pending(steps).finish()  # type: ignore[arg-type]


def check_every_operation(algorithm: str) -> None:
    link = channel(algorithm)
    size, index = link.size, link.index
    for dtype, length in product(DTYPES, LENGTHS):
        where = (algorithm, dtype, length)
        inputs = [whole_numbers(rank, size * length, dtype) for rank in range(size)]
        total = torch.stack(inputs).sum(0)
        mine = slice(index * length, (index + 1) * length)

        buffer = inputs[index].clone()
        finish(link.reduce_scatter(buffer))
        assert torch.equal(link.share(buffer, index), total[mine]), ("reduce_scatter", *where)

        buffer = torch.full((size * length,), 99, dtype=dtype)
        buffer[mine] = inputs[index][mine]
        finish(link.all_gather(buffer))
        expected = torch.cat([link.share(inputs[rank], rank) for rank in range(size)])
        assert torch.equal(buffer, expected), ("all_gather", *where)

        for odd in (length, size * length, size * length + 1):
            parts = [whole_numbers(rank, odd, dtype) for rank in range(size)]
            buffer = parts[index].clone()
            finish(link.all_reduce(buffer))
            assert torch.equal(buffer, torch.stack(parts).sum(0)), ("all_reduce", odd, *where)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("algorithm", ["native", "direct"])
def test_every_operation_gives_the_mathematical_result(algorithm: str, ranks: int) -> None:
    run_ranks(ranks, check_every_operation, algorithm)


def check_order_of_sums() -> None:
    link = channel("direct")
    size, index = link.size, link.index
    for length in (1, 5, 64, 1000):
        inputs = [fractions(rank, size * length) for rank in range(size)]
        in_rank_order = inputs[0].clone()
        for other in inputs[1:]:
            in_rank_order += other
        backwards = inputs[-1].clone()
        for other in reversed(inputs[:-1]):
            backwards += other
        if length == 1000 and size > 2:
            assert not torch.equal(in_rank_order, backwards), "the order would not show"

        scattered = inputs[index].clone()
        finish(link.reduce_scatter(scattered))
        assert torch.equal(link.share(scattered, index), link.share(in_rank_order, index))
        reduced = inputs[index].clone()
        finish(link.all_reduce(reduced))
        assert torch.equal(reduced, in_rank_order)
        # The same elements in two smaller buffers, as with other units or buckets.
        half = size * length // 2 // size * size
        for part in (slice(0, half), slice(half, size * length)):
            piece = inputs[index][part].clone()
            finish(link.all_reduce(piece))
            assert torch.equal(piece, in_rank_order[part])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_direct_sums_in_rank_order_whatever_the_buffer(ranks: int) -> None:
    run_ranks(ranks, check_order_of_sums)


def reduced_everywhere(algorithm: str) -> list[bytes]:
    """The bits of a few reduced buffers on this rank."""
    link = channel(algorithm)
    found = []
    for length in (1, 2, 30, 1201):
        buffer = fractions(link.index, length)
        finish(link.all_reduce(buffer))
        found.append(buffer.numpy().tobytes())
    return found


@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize("algorithm", ["native", "direct"])
def test_all_ranks_get_the_same_bits(algorithm: str, ranks: int) -> None:
    """Decisions such as clipping are taken by each rank from its own copy of a sum."""
    first, *others = run_ranks(ranks, reduced_everywhere, algorithm)
    assert all(other == first for other in others)


def check_several_under_way(algorithm: str) -> None:
    """Six operations launched before any is finished, advanced in turns and finished last first."""
    link = channel(algorithm)
    size, index, length = link.size, link.index, 257
    inputs = [
        [whole_numbers(10 * rank + number, size * length, torch.float32) for number in range(6)] for rank in range(size)
    ]
    buffers = [each.clone() for each in inputs[index]]
    operations = (link.all_reduce, link.reduce_scatter, link.all_gather) * 2
    pending = [Pending(operation(buffer)) for operation, buffer in zip(operations, buffers, strict=True)]
    assert not any(each.done for each in pending)
    for each in pending[::2]:
        each.advance()
    for each in reversed(pending):
        each.finish()
    assert all(each.done for each in pending)
    for number, buffer in enumerate(buffers):
        column = [inputs[rank][number] for rank in range(size)]
        total, mine = torch.stack(column).sum(0), slice(index * length, (index + 1) * length)
        if number % 3 == 0:
            assert torch.equal(buffer, total)
        elif number % 3 == 1:
            assert torch.equal(buffer[mine], total[mine])
        else:
            assert torch.equal(buffer, torch.cat([link.share(each, rank) for rank, each in enumerate(column)]))


@pytest.mark.parametrize("algorithm", ["native", "direct"])
def test_several_operations_under_way_at_once(algorithm: str) -> None:
    run_ranks(3, check_several_under_way, algorithm)


def check_send_and_receive() -> None:
    """Around the ring, two messages each way; they arrive in the order in which they were sent."""
    link = channel()
    size, index = link.size, link.index
    following, before = (index + 1) % size, (index - 1) % size
    arrived = [torch.empty(5) for _ in range(2)]
    works = [link.receive(buffer, before) for buffer in arrived]
    works += [link.send(torch.full((5,), 10.0 * index + number), following) for number in range(2)]
    for work in works:
        work.wait()
    assert [buffer.tolist() for buffer in arrived] == [[10.0 * before + number] * 5 for number in range(2)]


def test_messages_arrive_in_order() -> None:
    run_ranks(3, check_send_and_receive)


def check_transfers_of_any_size() -> None:
    """Both ways at once; a large message leaves from another thread, and what is sent behind it stays behind it."""
    link = channel()
    lengths = (3, 1 << 20, 1, 1 << 17, 2)
    peer = 1 - link.index
    waiting = []
    for number, length in enumerate(lengths):
        sent = torch.full((length,), float(10 * link.index + number))
        received = torch.zeros(length)
        waiting.append((number, sent, received, link.transfer([(sent, peer)], [(received, peer)])))
    for number, _, received, works in waiting:
        for work in works:
            work.wait()
        assert bool((received == 10 * peer + number).all()), f"message {number}"


def test_transfers_of_any_size_arrive_in_order() -> None:
    run_ranks(2, check_transfers_of_any_size)


def check_scratch_is_reused() -> None:
    """A second reduction of the same size takes no fresh memory, and two at once do not share theirs."""
    link = channel("direct")
    finish(link.reduce_scatter(torch.ones(link.size * 8)))
    assert len(link._scratch) == 1
    finish(link.reduce_scatter(torch.ones(link.size * 8)))
    assert len(link._scratch) == 1
    both = [Pending(link.reduce_scatter(torch.ones(link.size * 8))) for _ in range(2)]
    for pending in both:
        pending.finish()
    assert len(link._scratch) == 2


def test_scratch_memory_is_reused() -> None:
    run_ranks(2, check_scratch_is_reused)


def check_mesh(layout: Layout) -> None:
    """Every channel of the mesh is the group that the layout says, in rank order, and sums over it."""
    mesh = Mesh(layout, "cpu")
    rank = dist.get_rank()
    for axes in GROUPS:
        link, group = mesh.channel(*axes), layout.group_of(rank, *axes)
        assert tuple(dist.get_process_group_ranks(link.group)) == group, axes
        assert (link.size, link.index) == (len(group), group.index(rank))
        buffer = torch.tensor([float(2**rank)])
        finish(link.all_reduce(buffer))
        assert buffer.item() == sum(2**other for other in group), axes
    assert mesh.channel(*reversed(AXES)) is mesh.channel(*AXES)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2, pipeline=2),
        Layout(data_shard=2, data_replicate=2),
        Layout(tensor=2, data_shard=2),
        Layout(pipeline=2, island=2),
        Layout(context=4),
    ],
    ids=Layout.describe,
)
def test_the_groups_of_a_mesh(layout: Layout) -> None:
    run_ranks(4, check_mesh, layout)


def check_single() -> None:
    """A group of one rank communicates nothing and changes nothing."""
    for algorithm in ("native", "direct"):
        link = channel(algorithm)
        for operation in (link.all_reduce, link.reduce_scatter, link.all_gather):
            buffer = torch.arange(5.0)
            pending = Pending(operation(buffer))
            assert pending.done
            assert torch.equal(buffer, torch.arange(5.0))
    with pytest.raises(ValueError, match="1 ranks were started for a layout of 2"):
        Mesh(Layout(tensor=2), "cpu")


def test_a_group_of_one_rank() -> None:
    run_ranks(1, check_single)
