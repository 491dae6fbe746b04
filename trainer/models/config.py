"""Sizes of decoder models: the configuration, and presets from tiny to published models.

A preset is nothing but default values: any field given beside it wins. Published sizes are those of the named
models' own papers and configuration files (Llama 2: arXiv:2307.09288; Llama 3: arXiv:2407.21783; GPT-2: Radford
et al. 2019; GPT-3: arXiv:2005.14165). GPT sizes use this decoder (RMSNorm, rotary positions), not the
original LayerNorm and learned positions.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

_LLAMA: dict[str, Any] = {"activation": "swiglu", "tied_embeddings": False}
_GPT: dict[str, Any] = {"activation": "gelu", "tied_embeddings": True, "vocab": 50304}


def _llama(vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, **other: Any) -> dict[str, Any]:
    sizes = {"vocab": vocab, "hidden": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads}
    return {**_LLAMA, **sizes, "ffn_hidden": ffn, **other}


def _gpt(hidden: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    sizes = {"hidden": hidden, "layers": layers, "heads": heads, "kv_heads": heads, "ffn_hidden": 4 * hidden}
    return {**_GPT, **sizes, **other}


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _llama(320, 128, 4, 4, 2, 384),
    "small": _llama(8192, 512, 8, 8, 8, 1024),
    "gpt2-124m": _gpt(768, 12, 12),
    "gpt2-355m": _gpt(1024, 24, 16),
    "gpt2-774m": _gpt(1280, 36, 20),
    "gpt2-1.5b": _gpt(1600, 48, 25),
    "gpt3-175b": _gpt(12288, 96, 96, tied_embeddings=False),
    "llama2-7b": _llama(32000, 4096, 32, 32, 32, 11008),
    "llama2-13b": _llama(32000, 5120, 40, 40, 40, 13824),
    "llama2-70b": _llama(32000, 8192, 80, 64, 8, 28672),
    "llama3.2-1b": _llama(128256, 2048, 16, 32, 8, 8192, rope_theta=500000.0, tied_embeddings=True),
    "llama3-8b": _llama(128256, 4096, 32, 32, 8, 14336, rope_theta=500000.0),
    "llama3-70b": _llama(128256, 8192, 80, 64, 8, 28672, rope_theta=500000.0),
    "llama3-405b": _llama(128256, 16384, 126, 128, 8, 53248, rope_theta=500000.0),
}


class ModelConfig(BaseModel):
    """One decoder: embedding, blocks of attention and feed-forward, norm and head."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str | None = Field(default=None, description="Named sizes that the other fields start from.")
    vocab: int = Field(ge=2, description="Rows of the embedding; at least the tokenizer's vocabulary.")
    hidden: int = Field(ge=1, description="Width of the residual stream.")
    layers: int = Field(ge=1, description="Number of transformer blocks.")
    heads: int = Field(ge=1, description="Query heads; hidden / heads is the head dimension.")
    kv_heads: int | None = Field(default=None, ge=1, description="Key and value heads; null: as many as heads.")
    ffn_hidden: int | None = Field(default=None, ge=1, description="Width of the feed-forward; null: 4 x hidden.")
    activation: Literal["swiglu", "gelu"] = Field(default="swiglu", description="Feed-forward non-linearity.")
    qk_norm: bool = Field(default=False, description="RMS-normalize queries and keys per head.")
    tied_embeddings: bool = Field(default=False, description="Use the embedding as the head's weight.")
    rope_theta: float = Field(default=10000.0, gt=0, description="Base of the rotary position frequencies.")
    norm_epsilon: float = Field(default=1e-5, gt=0, description="Epsilon of the RMS norms.")
    init_std: float = Field(default=0.02, gt=0, description="Standard deviation of the initial weights.")

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("preset"), str):
            return values
        name = values["preset"]
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise PydanticCustomError(
                "unknown_preset",
                "must be one of the presets; {hint}the presets are {names}",
                {"key": "preset", "value": name, "hint": hint, "names": ", ".join(PRESETS)},
            )
        return {**PRESETS[name], **values}

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def feed_forward(self) -> int:
        return self.ffn_hidden or 4 * self.hidden

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def problems(self) -> list[tuple[str, object, str, str]]:
        """Rules between the fields that are broken, each as (key, value, rule, fix)."""
        found: list[tuple[str, object, str, str]] = []
        if self.hidden % self.heads:
            rule = f"must be divisible by the number of heads ({self.heads})"
            found.append(("hidden", self.hidden, rule, f"set model.hidden to a multiple of {self.heads}"))
        elif self.head_dim % 2:
            rule = f"hidden / heads must be even for rotary positions, not {self.head_dim}"
            found.append(("heads", self.heads, rule, "choose heads so that hidden / heads is even"))
        if self.heads % self.key_value_heads:
            rule = f"must be divisible by kv_heads ({self.key_value_heads})"
            found.append(("heads", self.heads, rule, "set model.kv_heads to a divisor of model.heads"))
        return found
