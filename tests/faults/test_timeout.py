"""Ranks do not wait for ever for one that has stopped: run.timeout_seconds holds along every axis."""

from __future__ import annotations

import re
import time

import pytest
import torch
import torch.distributed as dist

from parallel.comm.channel import Channel, Pending
from parallel.layout import Layout
from parallel.mesh import Mesh
from tests.ranks import RanksFailed, run_ranks

TIMEOUT_SECONDS = 2.0
LAYOUT = Layout(data_shard=2, pipeline=2)


def wait_for_nobody(axes: tuple[str, ...], operation: str) -> None:
    """Rank 0 waits for peers that never come, and says for how long it did."""
    mesh = Mesh(LAYOUT, "cpu", timeout_seconds=TIMEOUT_SECONDS)
    if dist.get_rank() != 0:
        time.sleep(4 * TIMEOUT_SECONDS)
        return
    start = time.monotonic()
    try:
        communicate(mesh.channel(*axes), operation)
    except RuntimeError as error:
        raise RuntimeError(f"gave up after {time.monotonic() - start:.2f} s") from error


def communicate(channel: Channel, operation: str) -> None:
    x = torch.zeros(64)
    if operation == "receive":
        channel.receive(x, 1).wait()
    else:
        Pending(getattr(channel, operation)(x)).finish()


@pytest.mark.parametrize(
    ("axes", "operation"),
    [
        (("pipeline",), "receive"),
        (("data_shard",), "reduce_scatter"),
        (("data_shard", "data_replicate"), "all_reduce"),
    ],
)
def test_a_wait_ends_at_the_timeout(axes: tuple[str, ...], operation: str) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(LAYOUT.world_size, wait_for_nobody, axes, operation)
    said = re.search(r"gave up after ([\d.]+) s", failed.value.reasons[0])
    assert said is not None, failed.value.reasons[0]
    assert 0.9 * TIMEOUT_SECONDS < float(said[1]) < 2 * TIMEOUT_SECONDS
