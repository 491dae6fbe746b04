"""Model sizes: presets against published parameter counts, and initial weights that know no layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from parallel.flat.space import ParameterSpec
from trainer.models.config import PRESETS, ModelConfig
from trainer.models.decoder import TENSOR_PLAN, Decoder
from trainer.models.initialize import initial_weight
from trainer.models.partition import unit_names

PUBLISHED_PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3.2-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
}
"""Of the published checkpoints."""


def decoder(preset: str) -> Decoder:
    with torch.device("meta"):
        return Decoder(ModelConfig.model_validate({"preset": preset}))


def parameters(preset: str) -> int:
    return sum(parameter.numel() for parameter in decoder(preset).parameters())


@pytest.mark.parametrize("preset", PUBLISHED_PARAMETERS)
def test_llama_presets_have_the_published_parameters(preset: str) -> None:
    assert parameters(preset) == PUBLISHED_PARAMETERS[preset]


@pytest.mark.parametrize(
    ("preset", "millions"), [("gpt2-124m", 124), ("gpt2-355m", 355), ("gpt2-774m", 774), ("gpt2-1.5b", 1558)]
)
def test_gpt_presets_have_about_the_published_parameters(preset: str, millions: int) -> None:
    """Without learned positions (1024 x hidden) and biases, and with the vocabulary rounded up to 50304."""
    assert parameters(preset) / 1e6 == pytest.approx(millions, rel=0.015)


def test_gpt3_has_175_billion_parameters() -> None:
    assert parameters("gpt3-175b") / 1e9 == pytest.approx(175, rel=0.01)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_model(preset: str) -> None:
    config = ModelConfig.model_validate({"preset": preset})
    assert config.problems() == []
    assert config.head_dim * config.heads == config.hidden


def test_fields_beside_a_preset_win() -> None:
    config = ModelConfig.model_validate({"preset": "llama3-8b", "layers": 2, "vocab": 512})
    assert (config.layers, config.vocab, config.hidden, config.rope_theta) == (2, 512, 4096, 500000.0)


def test_defaults_of_derived_sizes() -> None:
    config = ModelConfig(vocab=8, hidden=64, layers=1, heads=4)
    assert (config.key_value_heads, config.feed_forward, config.head_dim) == (4, 256, 16)
    assert ModelConfig(vocab=8, hidden=64, layers=1, heads=4, kv_heads=2).key_value_heads == 2


def test_an_unknown_preset_gets_a_suggestion() -> None:
    with pytest.raises(ValidationError, match=r"did you mean 'llama3-8b'\?.*the presets are tiny, small"):
        ModelConfig.model_validate({"preset": "llama3-8B"})
    with pytest.raises(ValidationError, match="must be one of the presets; the presets are"):
        ModelConfig.model_validate({"preset": "zzz"})


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"hidden": 66}, "hidden"), ({"hidden": 60}, "heads"), ({"heads": 4, "kv_heads": 3}, "heads")],
)
def test_rules_between_fields(fields: dict[str, Any], key: str) -> None:
    sizes = {"vocab": 8, "hidden": 64, "layers": 1, "heads": 4}
    assert [found[0] for found in ModelConfig.model_validate({**sizes, **fields}).problems()] == [key]


def test_the_units_are_the_model() -> None:
    model = decoder("tiny")
    units = model.units()
    assert tuple(units) == unit_names(model.config)
    names = {f"{unit}.{name}" for unit, module in units.items() for name, _ in module.named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}


def test_the_tensor_plan_names_modules_that_exist() -> None:
    with torch.device("meta"):
        model = Decoder(ModelConfig.model_validate({"preset": "tiny", "qk_norm": True}))
    modules = {name.replace(".0.", ".*.", 1) for name, _ in model.named_modules()}
    assert set(TENSOR_PLAN) <= modules


CONFIG = ModelConfig(vocab=64, hidden=64, layers=8, heads=4)


def spec(name: str, full: tuple[int, ...], dim: int | None = None, index: int = 0, count: int = 1) -> ParameterSpec:
    shape = list(full)
    if dim is not None:
        shape[dim] //= count
    return ParameterSpec(name, tuple(shape), full, dim, index)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_shares_of_an_initial_weight_are_the_whole(dim: int, count: int) -> None:
    name, full = "blocks.3.feed_forward.up.weight", (256, 64)
    whole = initial_weight(CONFIG, spec(name, full), 1)
    shares = [initial_weight(CONFIG, spec(name, full, dim, index, count), 1) for index in range(count)]
    assert torch.equal(torch.cat(shares, dim), whole)


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    state = torch.random.get_rng_state()
    first = initial_weight(CONFIG, spec("blocks.0.attention.key.weight", (64, 64)), 1)
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator is left alone"
    torch.manual_seed(99)
    assert torch.equal(initial_weight(CONFIG, spec("blocks.0.attention.key.weight", (64, 64)), 1), first)
    for name, seed in (("blocks.0.attention.key.weight", 2), ("blocks.1.attention.key.weight", 1)):
        assert not torch.equal(initial_weight(CONFIG, spec(name, (64, 64)), seed), first)


def test_a_tied_copy_starts_as_its_original() -> None:
    original = initial_weight(CONFIG, spec("embed.tokens.weight", (64, 64)), 1)
    copy = ParameterSpec("head.copy", (64, 64), (64, 64), tied_to="embed.tokens.weight")
    assert torch.equal(initial_weight(CONFIG, copy, 1), original)


def test_the_spread_of_initial_weights() -> None:
    """init_std, and 1 / sqrt(2 layers) of it for what is added to the residual stream; norms are ones."""
    for name, std in {
        "blocks.0.attention.query.weight": 0.02,
        "blocks.0.attention.out.weight": 0.02 / math.sqrt(16),
        "blocks.0.feed_forward.down.weight": 0.02 / math.sqrt(16),
        "head.projection.weight": 0.02,
    }.items():
        weight = initial_weight(CONFIG, spec(name, (512, 512)), 1)
        assert weight.std().item() == pytest.approx(std, rel=0.01)
        assert abs(weight.mean().item()) < std / 100
    assert torch.equal(initial_weight(CONFIG, spec("head.norm.weight", (64,)), 1), torch.ones(64))
