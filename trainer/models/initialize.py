"""Initial weights that do not depend on the layout.

Each parameter draws from a generator seeded by the run's seed and the parameter's full name. A rank draws the
full tensor (one at a time) and keeps its share, so the same seed gives the same model on every mesh.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from parallel.flat.space import ParameterSpec
from trainer.models.config import ModelConfig


def initial_weight(config: ModelConfig, spec: ParameterSpec, seed: int) -> Tensor:
    """This rank's share of the parameter, fp32 on the CPU, shape spec.shape.

    Norm weights are ones. Matrices are normal with `init_std`; those that write into the residual stream are
    scaled by 1 / sqrt(2 layers), so that its variance does not grow with depth (GPT-2, Radford et al. 2019).
    """
    if len(spec.full_shape) == 1:
        return torch.ones(spec.shape)
    name = spec.tied_to or spec.name
    std = config.init_std
    if name.endswith(("attention.out.weight", "feed_forward.down.weight")):
        std /= math.sqrt(2 * config.layers)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    full = torch.empty(spec.full_shape).normal_(0.0, std, generator=generator)
    if spec.shard_dim is None:
        return full
    length = spec.shape[spec.shard_dim]
    return full.narrow(spec.shard_dim, spec.shard_index * length, length)
