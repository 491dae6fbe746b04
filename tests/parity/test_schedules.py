"""Every schedule trains the real model to the same bits.

A schedule decides when a rank does what. Every stage adds its micro-batches up in their order, whole or in halves, so
losses, gradient norms, the evaluation and the final weights are those of 1f1b, bit for bit: on 2 and 4 pipeline ranks,
with tensor parallelism, with recomputation, with ZeRO, in bf16, with and without clipping. The norm is summed in fp64
over other units on every rank, and rounded to the fp32 number that is compared.

What is not equal bit for bit, because gradients are added in another order, and how far it is apart:

- two copies of the model (bitpipe): each adds its half of the micro-batches, then the two sums are added;
- tied embeddings whose embedding and head are on one rank (V-shaped placement): both add to the same gradient, micro-
  batch by micro-batch; on two ranks each adds up its own first;
- programs from files that run the backwards of a stage in another order.

A gradient then differs by the rounding of a sum of 8 fp32 numbers, about 1e-7 of itself, and so do the norms
(measured: up to 7.4e-8). After STEPS steps losses differ by up to 2.5e-8; weights by up to 6e-7 of the 9e-3 that they
can have moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from parallel.pipeline.actions import Op
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import generate, schedules
from tests.programs import generate_from, random_program
from tests.ranks import run_ranks
from tests.support import Case, Result, identical, join, largest_difference, make_run, relative, run_cases
from trainer.program import build_program

STEPS = 3
LOSS_TOLERANCE = 1e-6
NORM_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-5
CLIPPED = 0.82  # the second of the three norms is above
MODEL: dict[str, Any] = {
    "model.hidden": 32,
    "model.layers": 6,
    "model.ffn_hidden": 48,
    "train.sequence": 16,
    "train.global_batch": 8,
    "train.gradient_accumulation": 8,
    "optimizer.grad_clip": CLIPPED,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "p2": (2, {"parallel.pipeline.stages": 2}),
    "p4": (4, {"parallel.pipeline.stages": 4}),
    "p2 x tensor 2": (4, {"parallel.pipeline.stages": 2, "parallel.tensor": 2}),
}
NAMES = sorted(schedules())
OF_EACH_KIND = ("zb-h1", "interleaved", "gis-h", "zb-v", "dualpipe-v", "bitpipe")
COPIES = {name for name in NAMES if generate_from(name, 4, 8).replicas > 1}


def folded(program: Program) -> bool:
    """Whether both ends of the model are on one rank."""
    return program.rank_of(0) == program.rank_of(program.depth - 1)


FOLDED = {name for name in NAMES if folded(generate_from(name, 4, 8))}

TIED = {"model.tied_embeddings": True}
FULL = {"train.recompute": "full"}
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": TIED,
    "bf16": {"train.precision": "bf16"},
    "selective, qk-norm": {"train.recompute": "selective", "model.qk_norm": True, "model.kv_heads": 2},
}
SHARDED = {"parallel.pipeline.stages": 2, "parallel.data_shard": 2, "train.global_batch": 16}
ZERO: dict[str, dict[str, Any]] = {
    "stage 1": {"zero.stage": 1},
    "stage 1, tied": {"zero.stage": 1, **TIED},
    "stage 2": {"zero.stage": 2},
    "stage 2, tied, full": {"zero.stage": 2, **TIED, **FULL},
}


def scheduled(name: str, *more: Mapping[str, Any]) -> dict[str, Any]:
    """The case of a schedule; several mappings are laid over each other."""
    case = {**MODEL, "parallel.pipeline.schedule": name}
    for each in more:
        case |= each
    return case


def train(ranks: int, cases: Mapping[str, Case]) -> dict[str, Result]:
    return join(run_ranks(ranks, run_cases, dict(cases), STEPS, timeout_seconds=280))


def in_layout(layout: str, mode: str, names: Sequence[str]) -> dict[str, Result]:
    """Results by schedule, 1f1b's among them."""
    ranks, degrees = LAYOUTS[layout]
    return train(ranks, {name: scheduled(name, degrees, {"train.recompute": mode}) for name in {"1f1b", *names}})


def close(found: Result, expected: Result) -> bool:
    """Apart by no more than another order of sums explains."""
    return (
        not any(found.skipped)
        and relative(found.losses, expected.losses) <= LOSS_TOLERANCE
        and relative(found.eval_loss, expected.eval_loss) <= LOSS_TOLERANCE
        and relative(found.norms, expected.norms) <= NORM_TOLERANCE
        and largest_difference(found.weights, expected.weights) <= WEIGHT_TOLERANCE
    )


def unlike(results: Mapping[str, Result], *, expected: Result, apart: set[str]) -> list[str]:
    """Schedules that do not train as expected: bit for bit, but for those that add in another order."""
    return [
        name
        for name, found in results.items()
        if not (close(found, expected) if name in apart else identical(found, expected))
    ]


@pytest.mark.parametrize("mode", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_schedule_trains_like_1f1b(layout: str, mode: str) -> None:
    found = in_layout(layout, mode, NAMES)
    assert set(found) == set(NAMES)
    assert unlike(found, expected=found["1f1b"], apart=COPIES) == []
    first, second, _ = found["1f1b"].norms
    assert first < CLIPPED < second, "some steps are clipped, and some are not"
    if "tensor" not in layout:
        assert not identical(found["bitpipe"], found["1f1b"]), "the comparison shows the order of sums"


@pytest.mark.parametrize("layout", ["p4", "p2 x tensor 2"])
def test_schedules_of_each_kind_recompute(layout: str) -> None:
    found = in_layout(layout, "full", OF_EACH_KIND)
    assert unlike(found, expected=found["1f1b"], apart=COPIES) == []


def test_the_schedules_are_what_is_run() -> None:
    """Parity of runs that are all the same would prove nothing."""
    assert {"zb-v", "v-half", "v-min", "dualpipe-v", "bitpipe"} <= FOLDED
    assert {"bitpipe"} == COPIES
    for name in NAMES:
        program = build_program(make_run(4, scheduled(name, LAYOUTS["p4"][1])))
        compute = generate(name, 4, 8, time_limit_seconds=1.0)
        assert (program.name, program.placement) == (name, compute.placement)
        assert (Op.W in program.ops) == (Op.W in compute.ops)
        assert (Op.SYNC in program.ops) == (name in COPIES)
    written = {str(build_program(make_run(4, scheduled(name, LAYOUTS["p4"][1]))).actions) for name in NAMES}
    assert len(written) > len(NAMES) - 4, "few schedules are the same with these numbers"


def test_variants_of_the_model_train_like_under_1f1b() -> None:
    degrees = LAYOUTS["p4"][1]
    cases = {
        f"{name}, {variant}": scheduled(name, degrees, VARIANTS[variant])
        for name in ("1f1b", *OF_EACH_KIND)
        for variant in VARIANTS
    }
    found = train(4, cases)
    for variant in VARIANTS:
        results = {name: found[f"{name}, {variant}"] for name in ("1f1b", *OF_EACH_KIND)}
        apart = FOLDED if variant == "tied" else COPIES
        if variant == "bf16":
            # bf16 weights and activations are rounded to 8 bits, and the order of sums decides which way.
            copied = results.pop("bitpipe")
            assert relative(copied.losses, results["1f1b"].losses) <= 1e-3
        assert unlike(results, expected=results["1f1b"], apart=apart) == []


def test_sharded_gradients_and_state() -> None:
    names = ("1f1b", "zb-2p", *OF_EACH_KIND)
    cases = {f"{name}, {stage}": scheduled(name, SHARDED, ZERO[stage]) for name in names for stage in ZERO}
    found = train(4, cases)
    for stage in ZERO:
        results = {name: found[f"{name}, {stage}"] for name in names}
        apart = FOLDED if "tied" in stage else COPIES
        assert unlike(results, expected=results["1f1b"], apart=apart) == []


def test_programs_from_files(tmp_path: Path) -> None:
    """A published schedule, bit for bit; then any placement and order, two copies of the model, sharded and tied."""
    few = {"train.gradient_accumulation": 4}
    cases = {
        "1f1b": scheduled("1f1b", SHARDED),
        "few": scheduled("1f1b", SHARDED, few),
        "few, tied": scheduled("1f1b", SHARDED, few, TIED),
    }
    programs = {"zb-v": generate("zb-v", 2, 8)}
    for seed in range(40):
        program = random_program(seed, 2, replicas=1 + seed % 2)
        # Every rank has work; of two copies, one rank would hold both the tied embedding and its copy.
        if program.microbatches == 4 and set(program.placement) == {0, 1} and (seed % 2 == 0 or folded(program)):
            programs[f"random {seed}"] = program
    assert {program.replicas for program in programs.values()} == {1, 2}
    for name, program in programs.items():
        (tmp_path / f"{name}.csv").write_text(program.to_csv())
        case = scheduled(f"csv:{tmp_path / name}.csv", SHARDED, {"train.gradient_accumulation": program.microbatches})
        cases[name] = case
        if name != "zb-v":
            cases[f"{name}, tied"] = case | ZERO["stage 2, tied, full"]
    found = train(4, cases)
    assert identical(found["zb-v"], found["1f1b"])
    others = programs.keys() - {"zb-v"}
    assert len(others) > 3
    for name in others:
        assert close(found[name], found["few"]), name
        assert close(found[f"{name}, tied"], found["few, tied"]), name
