"""One decoder for the Llama family and GPT-style sizes: a plain single-device module that knows no process group.

The model is a chain of units - embedding, blocks, head - each a function of the hidden state alone, so that a
pipeline stage is a slice of the chain and anything else is applied from outside. Attention reads the number of
its heads off its projections, so a tensor-parallel share of the heads is the same code. Shapes: B batch,
S sequence, H hidden, N heads, K key/value heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.models.config import ModelConfig

TENSOR_PLAN = {
    "embed.tokens": "vocabulary",
    "blocks.*.attention": "enter",
    "blocks.*.attention.query": "column",
    "blocks.*.attention.key": "column",
    "blocks.*.attention.value": "column",
    "blocks.*.attention.query_norm": "partial",
    "blocks.*.attention.key_norm": "partial",
    "blocks.*.attention.out": "row",
    "blocks.*.feed_forward": "enter",
    "blocks.*.feed_forward.gate": "column",
    "blocks.*.feed_forward.up": "column",
    "blocks.*.feed_forward.down": "row",
    "head.projection": "enter-column",
}
"""How tensor parallelism splits the decoder (see parallel/tensor/plan.py)."""


class Rotary:
    """Rotary position tables (RoFormer, arXiv:2104.09864), made once per length, type and device."""

    def __init__(self, head_dim: int, theta: float) -> None:
        self.head_dim, self.theta = head_dim, theta
        self._tables: tuple[Tensor, Tensor] | None = None

    def tables(self, like_BSND: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each of shape (S, 1, D)."""
        length = like_BSND.shape[1]
        made = self._tables
        if (
            made is None
            or made[0].shape[0] != length
            or made[0].dtype != like_BSND.dtype
            or made[0].device != like_BSND.device
        ):
            steps = torch.arange(0, self.head_dim, 2, device=like_BSND.device, dtype=torch.float32)
            angles_SD = torch.arange(length, device=like_BSND.device)[:, None] / self.theta ** (steps / self.head_dim)
            angles_SD = torch.cat((angles_SD, angles_SD), dim=-1)[:, None]
            self._tables = angles_SD.cos().to(like_BSND.dtype), angles_SD.sin().to(like_BSND.dtype)
        assert self._tables is not None
        return self._tables

    def __call__(self, x_BSND: Tensor) -> Tensor:
        """Rotate the two halves of every head by the position's angles."""
        cos, sin = self.tables(x_BSND)
        first, second = x_BSND.chunk(2, dim=-1)
        return x_BSND * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (arXiv:2305.13245) and optional query/key norms."""

    def __init__(self, config: ModelConfig, rotary: Rotary) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.hidden, config.heads * self.head_dim, bias=False)
        self.key = nn.Linear(config.hidden, config.key_value_heads * self.head_dim, bias=False)
        self.value = nn.Linear(config.hidden, config.key_value_heads * self.head_dim, bias=False)
        self.out = nn.Linear(config.heads * self.head_dim, config.hidden, bias=False)
        self.normalized = config.qk_norm
        if config.qk_norm:
            self.query_norm = nn.RMSNorm(self.head_dim, eps=config.norm_epsilon)
            self.key_norm = nn.RMSNorm(self.head_dim, eps=config.norm_epsilon)
        self.rotary = rotary

    def forward(self, x_BSH: Tensor) -> Tensor:
        batch, length, _ = x_BSH.shape
        heads = (batch, length, -1, self.head_dim)
        q_BSND, k_BSKD, v_BSKD = (part(x_BSH).view(heads) for part in (self.query, self.key, self.value))
        if self.normalized:
            q_BSND, k_BSKD = self.query_norm(q_BSND), self.key_norm(k_BSKD)
        q_BSND, k_BSKD = self.rotary(q_BSND), self.rotary(k_BSKD)
        o_BNSD = functional.scaled_dot_product_attention(
            q_BSND.transpose(1, 2),
            k_BSKD.transpose(1, 2),
            v_BSKD.transpose(1, 2),
            is_causal=True,
            enable_gqa=q_BSND.shape[2] != k_BSKD.shape[2],
        )
        output: Tensor = self.out(o_BNSD.transpose(1, 2).reshape(batch, length, -1))
        return output


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202) or GELU feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        if self.gated:
            self.gate = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.up = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.down = nn.Linear(config.feed_forward, config.hidden, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        if self.gated:
            output: Tensor = self.down(functional.silu(self.gate(x_BSH)) * self.up(x_BSH))
        else:
            output = self.down(functional.gelu(self.up(x_BSH), approximate="tanh"))
        return output


class Embedding(nn.Module):
    """Tokens (B, S) to hidden states (B, S, H)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        weight = torch.empty(config.vocab, config.hidden)
        if not weight.is_meta:  # a draw there, for values never used, imports torch's compiler: 1.5 s and 70 MiB
            nn.init.normal_(weight, std=config.init_std)
        self.tokens = nn.Embedding.from_pretrained(weight, freeze=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSH: Tensor = self.tokens(tokens_BS)
        return x_BSH


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig, rotary: Rotary) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, eps=config.norm_epsilon)
        self.attention = Attention(config, rotary)
        self.feed_forward_norm = nn.RMSNorm(config.hidden, eps=config.norm_epsilon)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH))
        output: Tensor = x_BSH + self.feed_forward(self.feed_forward_norm(x_BSH))
        return output


class Head(nn.Module):
    """Final norm and projection to logits (B, S, V)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_epsilon)
        self.projection = nn.Linear(config.hidden, config.vocab, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        logits_BSV: Tensor = self.projection(self.norm(x_BSH))
        return logits_BSV


class Decoder(nn.Module):
    """The whole model on one device: tokens (B, S) to logits (B, S, V)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        rotary = Rotary(config.head_dim, config.rope_theta)
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, rotary) for _ in range(config.layers))
        self.head = Head(config)
        if config.tied_embeddings:
            self.head.projection.weight = self.embed.tokens.weight

    def units(self) -> dict[str, nn.Module]:
        """The chain: unit names in the order of the forward pass."""
        blocks = {f"blocks.{index}": block for index, block in enumerate(self.blocks)}
        return {"embed": self.embed, **blocks, "head": self.head}

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x = tokens_BS
        for unit in self.units().values():
            x = unit(x)
        return x


def unit_builders(config: ModelConfig) -> dict[str, Callable[[], nn.Module]]:
    """How to make each unit alone: a pipeline stage builds its own share of the chain and nothing else."""
    rotary = Rotary(config.head_dim, config.rope_theta)
    builders: dict[str, Callable[[], nn.Module]] = {"embed": lambda: Embedding(config)}
    for index in range(config.layers):
        builders[f"blocks.{index}"] = lambda: Block(config, rotary)
    builders["head"] = lambda: Head(config)
    return builders
