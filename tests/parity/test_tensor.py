"""Tensor-parallel layers and losses against the plain ones: outputs, input gradients, weight gradients.

In fp64 the two differ by rounding in the 16th digit, so a tolerance of 1e-10 leaves no room for a mistake. Only the
cross entropy computes its softmax in fp32 whatever it is given.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from parallel.comm.channel import Channel
from parallel.gradients import WeightGradients, attach_slot
from parallel.mesh import PaperChannel
from parallel.tensor.functions import cross_entropy
from parallel.tensor.plan import STYLES, apply_plan, parameter_specs
from tests.ranks import run_ranks
from tests.support import Slot
from trainer.models.config import ModelConfig
from trainer.models.decoder import TENSOR_PLAN, unit_builders

EXACT = 1e-10
MODELS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "gelu": {"activation": "gelu"},
    "grouped, qk-norm": {"kv_heads": 2, "qk_norm": True},
}


def model(**fields: Any) -> ModelConfig:
    sizes = {"vocab": 40, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 4, "ffn_hidden": 48}
    return ModelConfig.model_validate({**sizes, **fields})


def share(full: Tensor, dim: int | None, link: Channel) -> Tensor:
    """This rank's part of a full tensor."""
    if dim is None:
        return full
    length = full.shape[dim] // link.size
    return full.narrow(dim, link.index * length, length)


def compare_unit(unit: str, fields: dict[str, Any], hold: bool) -> None:
    """Two micro-batches through a plain unit and through its tensor-parallel form."""
    assert dist.group.WORLD is not None
    link, gradients = Channel(dist.group.WORLD), WeightGradients(hold=hold)
    config = model(**fields)
    torch.manual_seed(5)
    plain = unit_builders(config)[unit]().double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    parallel = apply_plan(unit, unit_builders(config)[unit]().double(), TENSOR_PLAN, link, gradients)
    full, slots = dict(plain.named_parameters()), {}
    for spec in parameter_specs(unit, parallel, link):
        local = spec.name.removeprefix(f"{unit}.")
        assert spec.full_shape == tuple(full[local].shape)
        parameter = parallel.get_parameter(local)
        with torch.no_grad():
            parameter.copy_(share(full[local], spec.shard_dim, link))
        slots[local] = (spec.shard_dim, Slot(parameter))
        attach_slot(parameter, slots[local][1], gradients)
    for _ in range(2):
        if unit == "embed":
            inputs = torch.randint(0, config.vocab, (2, 6))
            plain_input = parallel_input = inputs
        else:
            plain_input = torch.randn(2, 6, config.hidden, dtype=torch.float64, requires_grad=True)
            parallel_input = plain_input.detach().clone().requires_grad_()
        expected, found = plain(plain_input), parallel(parallel_input)
        if unit == "head":
            expected_part = share(expected, 2, link)
        else:
            expected_part = expected
        torch.testing.assert_close(found, expected_part, rtol=EXACT, atol=EXACT)
        weights = torch.randn(expected.shape, dtype=torch.float64)
        (expected * weights).sum().backward()
        (found * (share(weights, 2, link) if unit == "head" else weights)).sum().backward()
        gradients.drain()
        if unit != "embed":
            torch.testing.assert_close(parallel_input.grad, plain_input.grad, rtol=EXACT, atol=EXACT)
    for local, (dim, slot) in slots.items():
        gradient = full[local].grad
        assert gradient is not None
        assert gradient.abs().max() > 0
        torch.testing.assert_close(slot.view, share(gradient, dim, link), rtol=EXACT, atol=EXACT, msg=local)
        assert parallel.get_parameter(local).grad is None, "the gradient is in its slot and nowhere else"


def compare_units(models: dict[str, dict[str, Any]], hold: bool) -> None:
    for fields in models.values():
        compare_unit("blocks.1", fields, hold)
    for unit in ("embed", "head"):
        compare_unit(unit, {}, hold)


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_parallel_units_compute_what_plain_units_compute(ranks: int, hold: bool) -> None:
    run_ranks(ranks, compare_units, MODELS, hold)


def test_four_tensor_ranks() -> None:
    models = {name: fields for name, fields in MODELS.items() if "kv_heads" not in fields}
    run_ranks(4, compare_units, models, True)


def compare_cross_entropy(scale: float, dtype: torch.dtype, rtol: float, atol: float) -> None:
    assert dist.group.WORLD is not None
    link = Channel(dist.group.WORLD)
    torch.manual_seed(9)
    vocab, tokens = 12 * link.size, 50
    full = (torch.randn(tokens, vocab) * scale).to(dtype)
    # Every first and last id of every rank's rows is somebody's target.
    borders = [first + last for first in range(0, vocab, 12) for last in (0, 11)]
    targets = torch.cat([torch.tensor(borders), torch.randint(0, vocab, (tokens - len(borders),))])
    plain = full.float().clone().requires_grad_()
    expected = functional.cross_entropy(plain, targets, reduction="sum")
    mine = share(full, 1, link).clone().requires_grad_()
    start = 12 * link.index
    found = cross_entropy(mine, targets, start, link)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    (found / 7).backward()
    (expected / 7).backward()
    assert mine.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(mine.grad.float(), share(plain.grad, 1, link), rtol=rtol, atol=atol)


def compare_cross_entropies() -> None:
    for scale in (0.01, 1.0, 30.0):
        compare_cross_entropy(scale, torch.float32, 1e-5, 1e-6)
    # Whole ranks hold nothing but zero probability, and a naive exp would overflow at 88. fp32 rounds a rank's
    # log-sum-exp, which is about 900 here, by up to 3e-5, and as much is the error of the rank's share of the sum.
    compare_cross_entropy(300.0, torch.float32, 1e-4, 1e-6)
    # The gradient of bf16 logits is rounded to bf16.
    compare_cross_entropy(1.0, torch.bfloat16, 2**-8, 1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_cross_entropy_of_a_split_vocabulary(ranks: int) -> None:
    run_ranks(ranks, compare_cross_entropies)


def losses_of_ranks() -> float:
    assert dist.group.WORLD is not None
    link = Channel(dist.group.WORLD)
    torch.manual_seed(3)
    logits, targets = torch.randn(20, 8 * link.size), torch.randint(0, 8 * link.size, (20,))
    return float(cross_entropy(share(logits, 1, link).contiguous(), targets, 8 * link.index, link))


def test_every_tensor_rank_computes_the_same_loss_bitwise() -> None:
    """The first one reports it for all."""
    assert len(set(run_ranks(4, losses_of_ranks))) == 1


def paper(size: int) -> Any:
    return PaperChannel(size, 0)


@pytest.mark.parametrize(
    ("module", "style", "said"),
    [
        (
            nn.Linear(4, 4, bias=False),
            "colum",
            "module 'outer.0': unknown tensor-parallel style 'colum'; the styles are",
        ),
        (nn.Linear(4, 4), "column", "'column' needs a plain Linear without bias, not Linear with a bias"),
        (nn.Embedding(4, 4), "row", "'row' needs a plain Linear without bias, not Embedding"),
        (nn.Linear(4, 4, bias=False), "vocabulary", "'vocabulary' needs a plain Embedding without bias, not Linear"),
        (nn.LayerNorm(4), "partial", "'partial' needs a plain RMSNorm without bias, not LayerNorm with a bias"),
        (nn.Linear(4, 6, bias=False), "column", r"dimension 0 of a weight of shape \(6, 4\) cannot be split 4 ways"),
        (nn.Linear(6, 4, bias=False), "row", r"dimension 1 of a weight of shape \(4, 6\) cannot be split 4 ways"),
        (nn.Embedding(6, 4), "vocabulary", r"dimension 0 of a weight of shape \(6, 4\) cannot be split 4 ways"),
    ],
)
def test_what_a_plan_refuses(module: nn.Module, style: str, said: str) -> None:
    outer = nn.Sequential(module)
    with pytest.raises(ValueError, match=said):
        apply_plan("outer", outer, {"outer.0": style}, paper(4), WeightGradients())


def test_the_first_matching_pattern_decides_and_others_stay_plain() -> None:
    modules = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("a", "b", "c")})
    plan = {"m.a": "row", "m.[ab]": "column"}
    apply_plan("m", modules, plan, paper(2), WeightGradients())
    specs = {spec.name: spec for spec in parameter_specs("m", modules, paper(2))}
    assert [specs[f"m.{name}.weight"].shard_dim for name in "abc"] == [1, 0, None]
    assert [specs[f"m.{name}.weight"].shape for name in "abc"] == [(8, 4), (4, 8), (8, 8)]
    assert all(spec.full_shape == (8, 8) for spec in specs.values())


def test_every_style_of_the_decoders_plan_exists_and_is_used() -> None:
    assert set(TENSOR_PLAN.values()) == set(STYLES)


def test_held_weight_gradients_run_in_order_when_drained() -> None:
    done: list[int] = []
    at_once, held = WeightGradients(), WeightGradients(hold=True)
    at_once.submit(lambda: done.append(0))
    for number in (1, 2):
        held.submit(partial(done.append, number))
    assert done == [0]
    held.drain()
    held.drain()
    assert done == [0, 1, 2]
