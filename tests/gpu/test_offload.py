"""Activations leave a GPU and come back in streams of their own. Needs a GPU; skipped elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offload.activations import ActivationStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that this torch can use"),
]
ROWS, WIDTH, LAYERS, MICROBATCHES = 4096, 1024, 6, 4


def train(store: ActivationStore | None, dtype: torch.dtype) -> tuple[list[Tensor], list[int]]:
    """Weight gradients of some micro-batches, all forwards first; and the memory allocated behind each forward."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(5)
    weights = [
        torch.randn(WIDTH, WIDTH, generator=generator, device=device, dtype=dtype).div_(32).requires_grad_()
        for _ in range(LAYERS)
    ]
    losses, allocated = [], []
    for microbatch in range(MICROBATCHES):
        x = torch.randn(ROWS, WIDTH, generator=generator, device=device, dtype=dtype)
        if store is None:
            losses.append(loss_of(x, weights))
            continue
        with store.keeper(0, microbatch):
            losses.append(loss_of(x, weights))
        del x
        store.offload(0, microbatch)
        if microbatch:
            store.finish(0, microbatch - 1)
        allocated.append(torch.cuda.memory_allocated())
    for microbatch, loss in enumerate(losses):
        if store is not None:
            store.reload(0, microbatch)
        loss.backward()
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    return gradients, allocated


def loss_of(x: Tensor, weights: list[Tensor]) -> Tensor:
    for weight in weights:
        x = torch.tanh(x @ weight)
    return x.float().square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_the_same_and_memory_is_free(dtype: torch.dtype) -> None:
    expected, _ = train(None, dtype)
    for _ in range(3):  # order alone makes it right: a race would not show every time
        store = ActivationStore(torch.device("cuda"), [], [(0, each) for each in range(MICROBATCHES)], 1 << 20)
        found, allocated = train(store, dtype)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        activation = ROWS * WIDTH * dtype.itemsize * LAYERS
        # Behind each forward but the first, the micro-batch before has left.
        assert allocated[-1] - allocated[1] < activation
        assert store.meter.alive_bytes == 0
