"""Rules between the sections of a config: the batch equation, and every cross-field rule with what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.layout import Layout
from tests.support import make_config
from trainer.config.problems import ConfigError, Problem
from trainer.config.rules import resolve
from trainer.config.run import BatchSizes, TrainSection, local_ranks

sizes = st.integers(1, 12)


def solve(data_ranks: int, **given: int | None) -> BatchSizes | str:
    return BatchSizes.solve(TrainSection.model_validate({"steps": 1, "sequence": 1, **given}), data_ranks)


@given(sizes, sizes, sizes)
def test_any_two_batch_sizes_give_the_third(micro: int, accumulation: int, data_ranks: int) -> None:
    expected = BatchSizes(micro * accumulation * data_ranks, micro, accumulation)
    total = expected.global_batch
    assert solve(data_ranks, micro_batch=micro, gradient_accumulation=accumulation) == expected
    assert solve(data_ranks, global_batch=total, micro_batch=micro) == expected
    assert solve(data_ranks, global_batch=total, gradient_accumulation=accumulation) == expected
    assert solve(data_ranks, global_batch=total, micro_batch=micro, gradient_accumulation=accumulation) == expected


@given(st.one_of(st.none(), st.integers(1, 100)), st.one_of(st.none(), sizes), st.one_of(st.none(), sizes), sizes)
def test_a_solution_satisfies_the_equation_and_what_was_given(
    total: int | None, micro: int | None, accumulation: int | None, data_ranks: int
) -> None:
    given = {"global_batch": total, "micro_batch": micro, "gradient_accumulation": accumulation}
    solved = solve(data_ranks, **given)
    if isinstance(solved, str):
        possible = [
            (one, other)
            for one in range(1, 101)
            for other in range(1, 101)
            if micro in (None, one) and accumulation in (None, other) and total in (None, one * other * data_ranks)
        ]
        assert not possible or sum(value is not None for value in given.values()) < 2
    else:
        assert solved.global_batch == solved.micro_batch * solved.gradient_accumulation * data_ranks
        assert min(solved.global_batch, solved.micro_batch, solved.gradient_accumulation) >= 1
        for name, value in given.items():
            assert value in (None, getattr(solved, name))


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({}, "two of train.global_batch, train.micro_batch and train.gradient_accumulation must be given"),
        ({"global_batch": 8}, "two of train.global_batch, train.micro_batch and"),
        ({"global_batch": 10, "micro_batch": 2}, "divisible by micro_batch x data-parallel ranks = 2 x 4 = 8"),
        ({"global_batch": 2, "micro_batch": 1}, "divisible by micro_batch x data-parallel ranks = 1 x 4 = 4"),
        (
            {"global_batch": 8, "gradient_accumulation": 3},
            "divisible by gradient_accumulation x data-parallel ranks = 3 x 4 = 12",
        ),
        (
            {"global_batch": 16, "micro_batch": 2, "gradient_accumulation": 3},
            "must equal micro_batch x gradient_accumulation x data-parallel ranks = 2 x 3 x 4 = 24",
        ),
    ],
)
def test_every_contradiction_of_batch_sizes(given: dict[str, int], rule: str) -> None:
    solved = solve(4, **given)
    assert isinstance(solved, str)
    assert rule in solved


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """A case that resolves on any number of ranks that divides 8."""
    return {
        "run.directory": str(tmp_path / "run"),
        "data.path": str(tmp_path / "data"),
        "data.source": {"kind": "python-stdlib"},
        "model.vocab": 320,
    }


def problems(case: dict[str, Any], ranks: int = 4) -> list[Problem]:
    with pytest.raises(ConfigError) as raised:
        resolve(make_config(case), ranks)
    return list(raised.value.problems)


def test_a_config_that_holds(base: dict[str, Any]) -> None:
    run = resolve(make_config({**base, "parallel.tensor": 2}), 4)
    assert run.layout == Layout(tensor=2, data_shard=2)
    assert run.batch == BatchSizes(8, 2, 2)
    assert not Path(base["run.directory"]).exists(), "checking creates nothing"


@pytest.mark.parametrize(
    ("case", "path", "value", "rule", "fix"),
    [
        (
            {"parallel.tensor": 3},
            "parallel",
            "tensor 3 x pipeline.stages 1 x data_shard auto x data_replicate 1",
            "the world size, 4, must be the product of the degrees: 4 ranks cannot be divided by 3",
            "start 3 ranks or a multiple of 3, or change the degrees",
        ),
        (
            {"parallel.data_shard": 2, "parallel.pipeline.stages": 4},
            "parallel",
            "tensor 1 x pipeline.stages 4 x data_shard 2 x data_replicate 1",
            "the world size, 4, must be the product of the degrees: the degrees multiply to 8, not to 4",
            "start 8 ranks, or change the degrees",
        ),
        (
            {"train.global_batch": 6},
            "train.global_batch",
            6,
            "must be divisible by gradient_accumulation x data-parallel ranks = 2 x 4 = 8",
            "set two of the three",
        ),
        (
            {"model.heads": 6, "model.kv_heads": 4, "model.hidden": 48},
            "model.heads",
            6,
            "must be divisible by kv_heads (4)",
            "set model.kv_heads to a divisor of model.heads",
        ),
        (
            {"model.hidden": 66},
            "model.hidden",
            66,
            "must be divisible by the number of heads (4)",
            "set model.hidden to a multiple of 4",
        ),
        (
            {"model.hidden": 60},
            "model.heads",
            4,
            "hidden / heads must be even for rotary positions, not 15",
            "choose heads so that hidden / heads is even",
        ),
        (
            {"parallel.tensor": 4, "model.kv_heads": 2},
            "model.kv_heads",
            2,
            "must be divisible by parallel.tensor (4)",
            "set model.kv_heads to a multiple of 4, e.g. 4, or lower parallel.tensor",
        ),
        (
            {"parallel.tensor": 4, "model.ffn_hidden": 90},
            "model.ffn_hidden",
            90,
            "must be divisible by parallel.tensor (4)",
            "e.g. 92",
        ),
        ({"parallel.tensor": 4, "model.vocab": 321}, "model.vocab", 321, "must be divisible by parallel.tensor", "324"),
        (
            {"parallel.pipeline.stages": 4, "model.layers": 1},
            "parallel.pipeline.stages",
            4,
            "cuts the model into 4 parts, it has 3 units (embedding, blocks, head)",
            "set parallel.pipeline.stages to at most 3, or fewer chunks",
        ),
        (
            {"parallel.pipeline.stages": 4, "parallel.pipeline.schedule": "zb-v"},
            "parallel.pipeline.stages",
            4,
            "cuts the model into 8 parts, it has 6 units (embedding, blocks, head)",
            "set parallel.pipeline.stages to at most 3, or fewer chunks",
        ),
        (
            {"parallel.pipeline.stages": 2, "parallel.pipeline.chunks": 2},
            "parallel.pipeline.chunks",
            2,
            "1f1b puts 1 part of the model on each rank",
            "set chunks to 1, or choose another schedule",
        ),
        (
            {"parallel.pipeline.stages": 2, "parallel.pipeline.memory_limit": 2.0},
            "parallel.pipeline.memory_limit",
            2.0,
            "1f1b has a fixed order that no limit changes",
            "leave the limit out, or choose one of",
        ),
        (
            {"parallel.pipeline.stages": 2, "parallel.pipeline.schedule": "dualpipe-v"},
            "train.gradient_accumulation",
            2,
            "micro-batches: dualpipe-v needs at least 2 x ranks = 4",
            "set it to 4 or more, or choose zb-v",
        ),
        (
            {"parallel.pipeline.stages": 1, "parallel.pipeline.schedule": "bitpipe"},
            "parallel.pipeline.stages",
            1,
            "bitpipe lets the two directions meet between two ranks",
            "set it to 2, or choose another schedule",
        ),
        (
            {"parallel.pipeline.stages": 2, "parallel.pipeline.group": 2},
            "parallel.pipeline.group",
            2,
            "1f1b has no groups of micro-batches",
            "leave the group out, or choose one of gis, gis-h, uniform",
        ),
        (
            {
                "parallel.pipeline.stages": 2,
                "parallel.pipeline.schedule": "zb-auto",
                "parallel.pipeline.memory_limit": "1KB",
            },
            "parallel.pipeline.memory_limit",
            "1KB",
            "one micro-batch alone takes 1 on rank 1, in activations of ",
            "set the limit to 1 or more activations of ",
        ),
        (
            {"parallel.pipeline.time_limit_seconds": 700.0},
            "parallel.pipeline.time_limit_seconds",
            700.0,
            "must be less than run.timeout_seconds (600)",
            "set it to less than 600",
        ),
        (
            {
                "parallel.pipeline.stages": 2,
                "parallel.pipeline.schedule": "csv:/nowhere.csv",
                "parallel.pipeline.chunks": 2,
            },
            "parallel.pipeline.schedule",
            "csv:/nowhere.csv",
            "the file cannot be read",
            "name a file that can be read",
        ),
        (
            {"parallel.pipeline.stages": 2, "parallel.pipeline.schedule": "csv:/nowhere.csv"},
            "parallel.pipeline.schedule",
            "csv:/nowhere.csv",
            "the file cannot be read (No such file or directory)",
            "name a file that can be read",
        ),
        (
            {"parallel.pipeline.stages": 2, "parallel.pipeline.partition": [3, 2]},
            "parallel.pipeline.partition",
            [3, 2],
            "must be 2 numbers that add up to model.layers (4), positive but for the first and last",
            "give one number of blocks per part of the model, or null",
        ),
        (
            {"parallel.pipeline.stages": 4, "parallel.pipeline.partition": [2, 0, 2, 0]},
            "parallel.pipeline.partition",
            [2, 0, 2, 0],
            "must be 4 numbers that add up to model.layers (4), positive but for the first and last",
            "give one number of blocks per part",
        ),
        (
            {"parallel.pipeline.stages": 2, "parallel.pipeline.partition": []},
            "parallel.pipeline.partition",
            [],
            "must be 2 numbers that add up",
            "give one number of blocks per part",
        ),
        (
            {"parallel.pipeline.schedule": "1fb1"},
            "parallel.pipeline.schedule",
            "1fb1",
            "must be one of 1f1b, bitpipe, breadth-first, ",
            "did you mean '1f1b'?",
        ),
        (
            {"zero.optim": 2},
            "zero.optim",
            2,
            "must be 1 or the data-shard degree, 4",
            "set zero.optim to 1 or all, or change parallel.data_shard",
        ),
        (
            {"zero.stage": 1, "zero.grads": "all"},
            "zero.stage",
            1,
            "a stage and numbers cannot both be given",
            "keep zero.stage, or keep zero.grads and zero.optim",
        ),
        (
            {"zero.grads": "all"},
            "zero.grads",
            4,
            "gradients cannot be spread over more ranks than the optimizer state (1)",
            "set zero.optim: all",
        ),
        (
            {"optimizer.betas": (0.9, 1.0)},
            "optimizer.betas",
            1.0,
            "must be at least 0 and less than 1",
            "e.g. optimizer.betas: [0.9, 0.95]",
        ),
        (
            {"topology.levels": [{"name": "node", "size": 3}]},
            "topology.levels",
            "node 3",
            "the sizes of the levels multiply to 3, the world size is 4",
            "correct the sizes, or leave topology.levels out",
        ),
        (
            {"model.vocab": 256},
            "model.vocab",
            256,
            "must be at least the vocabulary of data.tokenizer, 257 tokens",
            "set model.vocab to 257 or more; 320 divides evenly",
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else None,
)
def test_every_rule(base: dict[str, Any], case: dict[str, Any], path: str, value: object, rule: str, fix: str) -> None:
    found = problems({**base, **case})
    assert [problem.path for problem in found] == [path]
    assert found[0].value == value
    assert rule in found[0].rule
    assert fix in found[0].fix


def test_devices_and_kernels_that_are_not_there(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = problems({**base, "run.device": "cuda", "optimizer.kernel": "apex"})
    assert [problem.path for problem in found] == ["run.device", "optimizer.kernel"]
    assert "needs a GPU" in found[0].rule
    assert "the PyPI project called 'apex' is something else" in found[1].rule


def test_the_dataset_must_be_there_or_have_a_source(base: dict[str, Any]) -> None:
    del base["data.source"]
    found = problems(base)
    assert [problem.path for problem in found] == ["data.path"]
    assert "there is no such directory" in found[0].rule
    assert "atoll data build" in found[0].fix


def test_a_run_directory_that_cannot_be_written(base: dict[str, Any], tmp_path: Path) -> None:
    """A file where the directory should be, above it, or a link that leads nowhere."""
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for directory in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "link" / "run"):
        found = problems({**base, "run.directory": str(directory)})
        assert [problem.path for problem in found] == ["run.directory"]
        assert found[0].value == str(directory)
        assert "must be a writable directory" in found[0].rule
        assert "run.directory=runs/mine" in found[0].fix
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"], "nothing is left behind"


def test_the_parts_at_the_ends_may_have_no_blocks(base: dict[str, Any]) -> None:
    """They have the embedding and the head."""
    case = {**base, "parallel.pipeline.stages": 4, "parallel.pipeline.partition": [0, 3, 1, 0]}
    assert resolve(make_config(case), 4).config.parallel.pipeline.partition == (0, 3, 1, 0)


TWICE = "# placement: {}\n# replicas: {}\n"


@pytest.mark.parametrize(
    ("text", "rule", "tied"),
    [
        ("0F0,0B0\n1F0,1B0\n", "the program in the file is for microbatches=1, not 2", False),
        ("0F0,0F1,0B0,0B1\n", "the program in the file is for ranks=1, not 2", False),
        ("0F0,0F1,0B0,0B1\n1F0,1F1,1C0,1B1\n", "rank 1, cell 2: '1C0' is not an action: there is no op 'C'", False),
        ("0F0,0F1,0I0,0W0,0I1\n1F0,1F1,1B0,1B1\n", "missing: 0W1 is missing on rank 0, the other half", False),
        ("0F0,0F1,0B0,0B1\n1B0,1F0,1F1,1B1\n", "deadlock: rank 1, lane compute: 1B0 waits for 1F0 on rank 1", False),
        (
            "0F0,0SEND_F0,0F1,0SEND_F1,0B0,0B1\n1RECV_F0,1RECV_F0,1F0,1B0,1RECV_F1,1F1,1B1\n",
            "must list F, B, I and W only, and lists RECV_F, SEND_F",
            False,
        ),
        (
            TWICE.format("0 1 0 1", 2) + "0F0,0B0,2F1,2B1\n1F0,1B0,3F1,3B1\n",
            "must put the two copies of stage 0 on two ranks, and puts both on the same",
            False,
        ),
        (
            TWICE.format("0 1 1 0", 2) + "0F0,3F1,3B1,0B0\n2F1,1F0,1B0,2B1\n",
            "with model.tied_embeddings and the model twice, its first and last stage must be on one rank",
            True,
        ),
    ],
)
def test_a_program_in_a_file_must_be_right(
    base: dict[str, Any], tmp_path: Path, text: str, rule: str, tied: bool
) -> None:
    """For these ranks and micro-batches, with every pass there, in an order that comes to its end."""
    file = tmp_path / "program.csv"
    file.write_text(text)
    case = {"parallel.pipeline.stages": 2, "parallel.pipeline.schedule": f"csv:{file}", "model.tied_embeddings": tied}
    (problem,) = problems({**base, **case})
    assert (problem.path, problem.value) == ("parallel.pipeline.schedule", f"csv:{file}")
    assert rule in problem.rule
    if "waits for" in rule or "is missing" in rule:
        assert "rank 1 | " in problem.rule, "the grid is shown"


@pytest.mark.parametrize(
    "text",
    [
        "0F0,0F1,0I0,0W0,0I1,0W1\n1F0,1F1,1B0,1B1\n",
        TWICE.format("0 1 1 0", 2) + "0F0,3F1,3B1,0B0\n2F1,1F0,1B0,2B1\n",
    ],
)
def test_a_right_program_in_a_file_is_taken(base: dict[str, Any], tmp_path: Path, text: str) -> None:
    file = tmp_path / "program.csv"
    file.write_text(text)
    case = {"parallel.pipeline.stages": 2, "parallel.pipeline.schedule": f"csv:{file}"}
    assert resolve(make_config({**base, **case}), 4).parts == 2


def test_a_model_can_be_there_twice_and_no_more(base: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "program.csv"
    file.write_text(TWICE.format("0 1 2", 3) + "0F0,0B0\n1F1,1B1\n2F2,2B2\n")
    case = {"parallel.pipeline.stages": 3, "train.gradient_accumulation": 3, "train.global_batch": 6}
    (problem,) = problems({**base, **case, "parallel.pipeline.schedule": f"csv:{file}"}, 3)
    assert "holds the model 3 times; a run can hold it twice" in problem.rule


def test_all_problems_are_told_at_once(base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    case = {
        **base,
        "model.hidden": 66,
        "train.global_batch": 7,
        "parallel.tensor": 4,
        "parallel.pipeline.schedule": "zigzag",
        "model.vocab": 130,
        "zero.optim": 5,
        "optimizer.betas": (0.9, 2.0),
        "run.directory": str(tmp_path / "file"),
    }
    found = problems(case)
    assert [problem.path for problem in found] == [
        "model.hidden",
        "train.global_batch",
        "model.vocab",
        "parallel.pipeline.schedule",
        "zero.optim",
        "optimizer.betas",
        "run.directory",
        "model.vocab",
    ]
    text = str(ConfigError(found))
    assert text.startswith("8 problems in the configuration:\n")
    for problem in found:
        assert f"{problem.path}\n  value: {problem.value!r}\n  rule:  {problem.rule}\n  fix:   {problem.fix}" in text


def test_rules_that_need_a_layout_wait_for_one(base: dict[str, Any]) -> None:
    """Without a layout there are no data-parallel ranks to divide a batch by; the rest is still checked."""
    found = problems({**base, "parallel.data_shard": 3, "train.global_batch": 7, "model.hidden": 66})
    assert [problem.path for problem in found] == ["model.hidden", "parallel"]


def test_how_many_ranks_are_started() -> None:
    degrees = make_config({"parallel.tensor": 2, "parallel.pipeline.stages": 3})
    configured = make_config({"run.ranks": 5})
    assert local_ranks(degrees, None) == 6
    assert local_ranks(degrees, None, devices=8) == 8
    assert local_ranks(configured, None, devices=8) == 5
    assert local_ranks(configured, 2, devices=8) == 2
    assert local_ranks(make_config(), None) == 1
