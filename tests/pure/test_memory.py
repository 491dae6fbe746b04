"""The memory estimate against what autograd and the flat space really hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from parallel.mesh import PaperMesh
from parallel.zero.config import ThreeNumbers
from trainer.build import build_modules, build_space_of
from trainer.check import report
from trainer.config.problems import ConfigError
from trainer.config.run import BatchSizes, ResolvedRun, RunConfig
from trainer.memory import estimate_memory
from trainer.models.decoder import Block, Head, Rotary
from trainer.program import build_program, numbers_of
from trainer.sizes import activation_bytes

EXAMPLES = Path(__file__).parents[2] / "examples"


def make_run(world_size: int = 1, **sections: object) -> ResolvedRun:
    values: dict[str, object] = {
        "run": {"directory": "runs/x", "device": "cpu"},
        "model": {"vocab": 320, "hidden": 64, "layers": 4, "heads": 4, "kv_heads": 2, "ffn_hidden": 160},
        "data": {"path": "data/x"},
        "train": {"steps": 1, "sequence": 32, "global_batch": 8, "micro_batch": 2},
        **sections,
    }
    config = RunConfig.model_validate(values)
    layout = config.parallel.layout(world_size)
    batch = BatchSizes.solve(config.train, layout.data)
    assert isinstance(batch, BatchSizes)
    return ResolvedRun(config, layout, batch)


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storage that the backward of module(x) keeps, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(x)
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_activations_of_a_block_are_what_autograd_keeps(activation: str) -> None:
    model = {"vocab": 320, "hidden": 64, "layers": 1, "heads": 4, "kv_heads": 2, "ffn_hidden": 160}
    run = make_run(model={**model, "activation": activation})
    config = run.config.model
    block = Block(config, Rotary(config.head_dim, config.rope_theta))
    x = torch.randn(2, 64, config.hidden, requires_grad=True)
    block(x)  # makes the rotary tables, which belong to no micro-batch
    predicted = 2 * 64 * activation_bytes(run, "blocks.0")
    # The operations also keep small things: row norms, log-sum-exps, the rotary tables.
    assert predicted == pytest.approx(saved_bytes(block, x), rel=0.04)


def test_head_keeps_its_norm_and_input() -> None:
    run = make_run()
    config = run.config.model
    head = Head(config)
    x = torch.randn(2, 64, config.hidden, requires_grad=True)
    softmax = 2 * 64 * config.vocab * 4
    assert 2 * 64 * activation_bytes(run, "head") - softmax == pytest.approx(saved_bytes(head, x), rel=0.05)


def test_recomputation_keeps_less() -> None:
    kept = {
        mode: activation_bytes(
            make_run(
                train={"steps": 1, "sequence": 32, "global_batch": 8, "micro_batch": 2, "recompute": mode},
            ),
            "blocks.0",
        )
        for mode in ("none", "selective", "full")
    }
    assert kept["none"] > kept["selective"] > kept["full"] == 64 * 4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_parameters_of_all_ranks_add_up(tied: bool, qk_norm: bool) -> None:
    model = {"vocab": 320, "hidden": 64, "layers": 4, "heads": 4, "kv_heads": 2, "ffn_hidden": 160}
    parts = {"model": {**model, "tied_embeddings": tied, "qk_norm": qk_norm}}
    whole = make_run(1, **parts)
    split = make_run(4, **parts, parallel={"tensor": 2, "pipeline": {"stages": 2}})

    def elements(run: ResolvedRun) -> int:
        total = 0
        for rank in range(run.layout.world_size):
            mesh = PaperMesh(run.layout, rank)
            space = build_space_of(run, mesh, build_modules(run, mesh, build_program(run)))
            for unit in space.units:
                for slot in unit.slots:
                    first = mesh.position["tensor"] == 0 or slot.spec.shard_dim is not None
                    total += slot.spec.numel if first and slot.spec.tied_to is None else 0
        return total

    assert elements(whole) == elements(split)


def test_state_bytes_follow_the_three_numbers() -> None:
    run = make_run(4, zero={"stage": 2}, parallel={"data_shard": 4})
    assert numbers_of(run) == ThreeNumbers(1, 4, 4)
    mesh = PaperMesh(run.layout, 0)
    program = build_program(run)
    space = build_space_of(run, mesh, build_modules(run, mesh, program))
    memory = estimate_memory(run, space, numbers_of(run), 17)
    assert memory.parameters_bytes == 4 * space.numel
    assert memory.activations_bytes == 17
    assert memory.optimizer_bytes == 8 * space.numel // 4
    assert memory.gradients_bytes == 4 * (space.numel // 4 + 3 * max(unit.numel for unit in space.units))


def test_report_has_every_part(tmp_path: Path) -> None:
    overrides = [f"run.directory={tmp_path}/run", f"data.path={tmp_path}/data"]
    text = report([str(EXAMPLES / "quickstart.yaml"), *overrides], ranks=4, rank=3)
    assert "data-shard 2 x pipeline 2" in text
    assert "gradient_accumulation: 4" in text
    assert "rank 3 built: tensor 0, context 0, data_shard 1, pipeline 1" in text
    assert "rank 1 | .  F0 B0" in text


def test_report_refuses_a_world_that_does_not_fit(tmp_path: Path) -> None:
    overrides = [f"run.directory={tmp_path}/run", f"data.path={tmp_path}/data"]
    with pytest.raises(ConfigError, match="the world size, 6, must be the product of the degrees"):
        report([str(EXAMPLES / "quickstart.yaml"), *overrides], ranks=6)


def test_any_rank_of_a_large_world_is_built_on_paper(tmp_path: Path) -> None:
    overrides = [
        f"run.directory={tmp_path}/run",
        f"data.path={tmp_path}/data",
        "model.preset=llama3-70b",
        *("model.hidden=8192", "model.heads=64", "model.kv_heads=8", "model.ffn_hidden=28672"),
        *("parallel.tensor=8", "parallel.pipeline.stages=4", "parallel.data_shard=auto", "train.global_batch=256"),
        "train.micro_batch=1",
    ]
    text = report([str(EXAMPLES / "quickstart.yaml"), *overrides], ranks=1024, rank=1017)
    assert "rank 1017 built: tensor 1, context 0, data_shard 31, pipeline 3" in text
    assert "... and 1008 more ranks" in text
