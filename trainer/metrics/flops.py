"""Model FLOPs utilization: the FLOPs that the model needs per second over what the devices could do.

    MFU = tokens_per_second x FLOPs per token / (ranks x peak FLOP/s)

FLOPs per token count every matrix product of forward and backward once (trainer/models/partition.py); computing
activations again is the runtime's choice and does not count as useful work (PaLM, arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from trainer.models.config import ModelConfig
from trainer.models.partition import unit_flops

PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "MI250X": 191.5e12,
    "MI300X": 1307e12,
}
"""Dense bf16 peak by words of the device's name, as its maker publishes it; MI250X per GCD."""


def flops_per_token(model: ModelConfig, sequence: int) -> float:
    """FLOPs of forward and backward per token."""
    return sum(unit_flops(model, sequence).values())


def peak_flops(device_name: str) -> float | None:
    """The published peak of a device, or None if it is not known."""
    for words, peak in PEAK_BF16_FLOPS.items():
        if all(word in device_name for word in words.split()):
            return peak
    return None
