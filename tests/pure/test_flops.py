"""FLOPs per token and MFU against counts made by hand and by torch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.metrics.flops import PEAK_BF16_FLOPS, flops_per_token, peak_flops
from trainer.models.config import ModelConfig
from trainer.models.decoder import Decoder


def model(**fields: object) -> ModelConfig:
    sizes = {"vocab": 128, "hidden": 64, "layers": 3, "heads": 4, "kv_heads": 2, "ffn_hidden": 96}
    return ModelConfig.model_validate({**sizes, **fields})


@pytest.mark.parametrize("fields", [{}, {"activation": "gelu"}, {"tied_embeddings": True}, {"kv_heads": 4}])
def test_flops_of_the_matrices_are_those_that_torch_counts(fields: dict[str, object]) -> None:
    """Forward and backward of the real model: every product of a weight, and attention without its mask."""
    config, sequence = model(**fields), 32
    tokens = torch.randint(0, config.vocab, (1, sequence))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        Decoder(config)(tokens).sum().backward()
    counted = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for op, count in counted.items() if op == "aten.mm")
    batched = sum(count for op, count in counted.items() if op == "aten.bmm")
    assert products + batched == sum(counted.values())
    expected = flops_per_token(config, sequence) * sequence
    # The formula counts half of the square of scores, torch computes all of it.
    assert products + batched / 2 == expected


def test_written_out() -> None:
    """6 FLOPs per matrix element and token; 6 x sequence x width for causal attention."""
    config = model(layers=1)
    block = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert flops_per_token(config, 100) == 6 * (block + 128 * 64) + 6 * 100 * 64


def test_a_published_model() -> None:
    """Llama 3 8B: 8.03e9 parameters, 0.53e9 of which are the embedding, which is read and not multiplied."""
    config = ModelConfig.model_validate({"preset": "llama3-8b"})
    assert flops_per_token(config, 1) / 6 == pytest.approx(8.03e9 - 0.525e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("AMD Instinct MI250X", 191.5e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA GeForce RTX 3090", None),
        ("", None),
    ],
)
def test_the_peak_of_a_device_by_its_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_every_known_peak_is_found_under_its_own_name() -> None:
    """No entry hides another one."""
    for words, peak in PEAK_BF16_FLOPS.items():
        assert peak_flops(f"Maker {words} 80GB") == peak
