"""Saved at one arrangement, loaded at another: the same state bit for bit, and the same losses from there on.

What is compared: the full tensors right after the load must be those right after the save, bitwise. The losses of
the next steps must be those of the run that saved and went on - bitwise in the same arrangement; within 1e-5
between arrangements, which sum in another order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.checkpointing import Arrangement, full_state, make_engine, train
from tests.ranks import run_ranks
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.store import find_latest, load, save
from trainer.config.run import ResolvedRun

RELATIVE = 1e-5
SAVED, LAST = 2, 4  # steps before the save, and in all

ARRANGEMENTS = [
    Arrangement(),
    Arrangement(tensor=2),
    Arrangement(tensor=2, pipeline=2),
    Arrangement(shard=2, zero=2),
    Arrangement(pipeline=2, shard=2, zero=1),
    Arrangement(shard=4, zero=1),
    Arrangement(pipeline=2),
    Arrangement(tensor=2, replicate=2),
    Arrangement(shard=2, replicate=2, zero=2),
    Arrangement(pipeline=4),
    Arrangement(tensor=2, shard=2, zero=2),
    Arrangement(shard=4, zero=0),
    Arrangement(tensor=4),
]
SCHEDULED = [
    Arrangement(pipeline=2, schedule="zb-v"),
    Arrangement(pipeline=4),
    Arrangement(pipeline=2, schedule="bitpipe"),
    Arrangement(),
    Arrangement(pipeline=2, shard=2, zero=1, schedule="bitpipe"),
    Arrangement(pipeline=2, shard=2, zero=2, schedule="breadth-first"),
]
"""Several parts of the model on a rank, in a V and in a loop, and the model twice."""

TIED = [
    Arrangement(),
    Arrangement(pipeline=2),
    Arrangement(tensor=2, pipeline=2),
    Arrangement(pipeline=2, shard=2, zero=2),
    Arrangement(pipeline=2, replicate=2),
    Arrangement(pipeline=2, schedule="zb-v"),
    Arrangement(pipeline=2, shard=2, zero=1, schedule="bitpipe"),
]


@dataclass(frozen=True)
class Case:
    """One side of a pair: an arrangement of one of the models."""

    arrangement: Arrangement
    tied: bool = False
    precision: str = "fp32"

    def __str__(self) -> str:
        words = [str(self.arrangement), *(["tied"] if self.tied else []), self.precision]
        return "-".join(word for word in words if word != "fp32")

    def run(self) -> ResolvedRun:
        return self.arrangement.run(model__tied_embeddings=self.tied, train__precision=self.precision)


Pair = tuple[Case, Case]


def pairs() -> list[Pair]:
    """Saver and loader: every arrangement loads its own checkpoint and those of some others."""
    found = []
    rings = ((ARRANGEMENTS, False, (0, 2, 5)), (TIED, True, (0, 1, 4)), (SCHEDULED, False, (0, 1, 3, 5)))
    for arrangements, tied, distances in rings:
        for index, target in enumerate(arrangements):
            for distance in distances:
                source = arrangements[(index + distance) % len(arrangements)]
                found.append((Case(source, tied), Case(target, tied)))
    narrow = Case(Arrangement(pipeline=2, shard=2, zero=2), precision="bf16")
    found += [(narrow, Case(Arrangement(tensor=2, shard=2, zero=1), precision="bf16")), (narrow, narrow)]
    found += [(narrow, Case(Arrangement(shard=2, zero=1))), (Case(Arrangement(shard=2, zero=2)), narrow)]
    return list(dict.fromkeys(found))


PAIRS = pairs()


@dataclass(frozen=True)
class Loaded:
    """What a load gave: names of tensors that differ, where the run stands, and the losses that follow."""

    differing: list[str]
    missing: list[str]
    step: int
    cursor: int
    losses: list[float]


def save_on_ranks(root: str, cases: Sequence[Case]) -> dict[Case, list[float]]:
    """On every rank: train, save, go on; the losses after the save."""
    losses = {}
    for case in cases:
        run = case.run()
        engine = make_engine(run)
        train(engine, run, range(SAVED))
        save(engine, run, Path(root) / str(case), SAVED, 100 + SAVED, keep=1)
        state = full_state(engine)
        if dist.get_rank() == 0:
            torch.save(state, Path(root) / f"{case}.pt")
        losses[case] = train(engine, run, range(SAVED, LAST))
    return losses


def load_on_ranks(root: str, wanted: Sequence[Pair]) -> dict[Pair, Loaded]:
    """On every rank: an engine with other weights, filled from each checkpoint in turn, goes on."""
    by_target: dict[Case, list[Case]] = defaultdict(list)
    for source, target in wanted:
        by_target[target].append(source)
    found = {}
    for target, sources in by_target.items():
        run = target.run()
        engine = make_engine(run)
        train(engine, run, range(1))  # every buffer holds something else before the first load, too
        for source in sources:
            path = find_latest(Path(root) / str(source))
            assert path is not None
            manifest = load(engine, run, path)
            state, saved = full_state(engine), torch.load(Path(root) / f"{source}.pt")
            differing = [name for name in state if name in saved and not torch.equal(state[name], saved[name])]
            missing = sorted(state.keys() ^ saved.keys())
            losses = train(engine, run, range(SAVED, LAST))
            found[source, target] = Loaded(differing, missing, manifest.step, manifest.cursor, losses)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def continued(root: Path) -> dict[Case, list[float]]:
    """The losses of the runs that saved, after the save."""
    found: dict[Case, list[float]] = {}
    savers = list(dict.fromkeys(source for source, _ in PAIRS))
    for ranks in (1, 2, 4):
        cases = [case for case in savers if case.arrangement.ranks == ranks]
        results = run_ranks(ranks, save_on_ranks, str(root), cases)
        assert all(result == results[0] for result in results), "ranks disagree about the losses"
        found |= results[0]
    return found


@pytest.fixture(scope="module")
def loaded(root: Path, continued: dict[Case, list[float]]) -> dict[Pair, Loaded]:
    """What every pair gave."""
    found: dict[Pair, Loaded] = {}
    for ranks in (1, 2, 4):
        wanted = [pair for pair in PAIRS if pair[1].arrangement.ranks == ranks]
        found |= run_ranks(ranks, load_on_ranks, str(root), wanted)[0]
    return found


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-to-{pair[1]}")
def test_any_arrangement_continues_from_any_other(
    pair: Pair, loaded: dict[Pair, Loaded], continued: dict[Case, list[float]]
) -> None:
    source, target = pair
    result, expected = loaded[pair], continued[source]
    assert (result.step, result.cursor) == (SAVED, 100 + SAVED)
    assert result.missing == []
    assert result.differing == []
    if source == target:
        assert result.losses == expected
    else:
        # bf16 rounds weights and activations to 8 bits of mantissa, and the order of sums decides which way.
        tolerance = RELATIVE if source.precision == target.precision == "fp32" else 5e-3
        assert result.losses == pytest.approx(expected, rel=tolerance)


def spoil_on_ranks(root: str, source: Case) -> list[list[float]]:
    """Losses after a load, and after loads of which one part went wrong."""
    run = source.run()
    engine = make_engine(run)
    path = find_latest(Path(root) / str(source))
    assert path is not None
    found = []
    for spoil in ("nothing", "model", "first_moment", "second_moment", "steps"):
        load(engine, run, path)
        if spoil == "steps":
            engine.optimizer.set_step_count(0)
        for owned in engine.optimizer.ranges.values():
            if spoil == "model":
                owned.master.mul_(1.01)
            elif spoil in ("first_moment", "second_moment"):
                getattr(owned, spoil).mul_(1.1)
        found.append(train(engine, run, range(SAVED, LAST)))
    return found


def test_the_losses_would_show_any_part_that_is_not_restored(root: Path, continued: dict[Case, list[float]]) -> None:
    source = Case(Arrangement())
    (found,) = run_ranks(1, spoil_on_ranks, str(root), source)
    assert found[0] == continued[source]
    for losses in found[1:]:
        assert abs(losses[-1] - found[0][-1]) > 3 * RELATIVE * found[0][-1]


def test_torchs_own_tools_read_the_files(root: Path, continued: dict[Case, list[float]], tmp_path: Path) -> None:
    case = Case(Arrangement(tensor=2, pipeline=2))
    path = find_latest(root / str(case))
    assert path is not None
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    whole, saved = torch.load(tmp_path / "whole.pt"), torch.load(root / f"{case}.pt")
    assert whole.keys() == saved.keys()
    assert all(torch.equal(whole[name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    ("arrangement", "spread"),
    [
        (Arrangement(shard=2, replicate=2, zero=2), 1.5),
        (Arrangement(pipeline=2, shard=2, zero=1, schedule="bitpipe"), 2.0),  # the parts of a model differ in size
    ],
    ids=str,
)
def test_all_ranks_write_and_nothing_is_written_twice(
    arrangement: Arrangement, spread: float, root: Path, continued: dict[Case, list[float]]
) -> None:
    """Neither by replicas, nor by the copies of a bidirectional schedule."""
    case = Case(arrangement)
    path = find_latest(root / str(case))
    assert path is not None
    manifest = read_manifest(path)
    data = [size for name, size in manifest.files.items() if name.endswith(".distcp")]
    elements = sum(tensor.numel() for tensor in torch.load(root / f"{case}.pt").values())
    assert len(data) == 4
    assert max(data) < spread * min(data)
    # Each tensor is saved in fp32 with about a kilobyte around it.
    chunks = len(torch.load(root / f"{case}.pt")) * 6
    assert 4 * elements < sum(data) < 4 * elements + 1500 * chunks
    assert manifest.zero == {"params": 1, "grads": arrangement.zero, "optim": 2}
    assert manifest.layout["data_replicate"] == arrangement.replicate
    assert manifest.updates == SAVED
