"""Saves that are killed or cannot write, and checkpoints that were damaged: nothing is lost, and everybody is told."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.checkpointing import Arrangement, full_state, make_engine, train
from tests.ranks import RanksFailed, run_ranks
from trainer.checkpoint.directory import LATEST, complete_checkpoints
from trainer.checkpoint.manifest import INDEX
from trainer.checkpoint.store import CheckpointError, check_compatible, find_latest, load, save

TWO = Arrangement(shard=2, zero=1)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(directory: str, moment: str) -> None:
    """One complete save, and another during which a process is killed outright."""
    run = TWO.run()
    engine = make_engine(run)
    save(engine, run, Path(directory), 1, 8, keep=3)
    train(engine, run, range(1))
    if dist.get_rank() == (1 if moment == "a rank has written its file" else 0):
        if moment == "a rank has written its file":
            os.fsync = die
        elif moment == "all is written but not committed":
            Path.rename = die  # type: ignore[assignment, method-assign]
        else:
            Path.replace = die  # type: ignore[assignment, method-assign]
    save(engine, run, Path(directory), 2, 16, keep=3)


def load_and_save(directory: str) -> tuple[int, int]:
    """Continue as a restarted run would."""
    run = TWO.run()
    engine = make_engine(run)
    path = find_latest(Path(directory))
    assert path is not None
    manifest = load(engine, run, path)
    train(engine, run, range(1))
    save(engine, run, Path(directory), 2, 16, keep=3)
    return manifest.step, manifest.cursor


@pytest.mark.parametrize(
    "moment",
    ["a rank has written its file", "all is written but not committed", "the directory is there but not latest"],
)
def test_a_save_that_is_killed_leaves_the_previous_checkpoint(tmp_path: Path, moment: str) -> None:
    with pytest.raises(RanksFailed, match="SIGKILL"):
        run_ranks(2, save_and_die, str(tmp_path), moment)
    assert find_latest(tmp_path) == tmp_path / "step-00000001"
    assert list(complete_checkpoints(tmp_path)) == ([1, 2] if "but not latest" in moment else [1])
    assert run_ranks(2, load_and_save, str(tmp_path)) == [(1, 8), (1, 8)]
    assert find_latest(tmp_path) == tmp_path / "step-00000002"
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "step-00000001", "step-00000002"]


def save_on_full_disk(directory: str, failing: int) -> str:
    """A save during which one rank's files may not grow, and one more when they may again."""
    run = TWO.run()
    engine = make_engine(run)
    save(engine, run, Path(directory), 1, 8, keep=1)
    train(engine, run, range(1))
    before = full_state(engine)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        save(engine, run, Path(directory), 2, 16, keep=1)
    except CheckpointError as error:
        message = str(error)
    else:
        message = "no error"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    left = sorted(path.name for path in Path(directory).iterdir())
    assert left == [LATEST, "step-00000001"], left
    dist.barrier()
    save(engine, run, Path(directory), 2, 16, keep=1)
    load(engine, run, Path(directory) / "step-00000002")
    after = full_state(engine)
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    return message


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_fails_the_save_on_all_ranks(tmp_path: Path, failing: int) -> None:
    messages = run_ranks(2, save_on_full_disk, str(tmp_path), failing)
    assert messages[0] == messages[1]
    assert f"cannot save checkpoint {tmp_path / 'step-00000002'}; earlier ones are untouched" in messages[0]
    assert f"rank {failing}: [Errno 27] File too large" in messages[0]
    assert f"__{failing}_0.distcp" in messages[0]
    assert f"rank {1 - failing}:" not in messages[0]


def save_error(directory: str) -> str:
    run = TWO.run()
    with pytest.raises(CheckpointError) as caught:
        save(make_engine(run), run, Path(directory), 1, 8, keep=1)
    return str(caught.value)


def test_a_directory_that_cannot_be_made_fails_the_save_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    messages = run_ranks(2, save_error, str(tmp_path / "checkpoints"))
    assert messages[0] == messages[1]
    assert "rank 0: [Errno 17] File exists" in messages[0]


def save_once(directory: str) -> str:
    run = TWO.run()
    return str(save(make_engine(run), run, Path(directory), 1, 8, keep=1))


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint, for tests to damage copies of."""
    return Path(run_ranks(2, save_once, str(tmp_path_factory.mktemp("complete")))[0])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def load_errors(paths: list[str], arrangement: Arrangement) -> list[str]:
    """What every load says."""
    run = arrangement.run()
    engine = make_engine(run)
    messages = []
    for path in paths:
        with pytest.raises(CheckpointError) as caught:
            load(engine, run, Path(path))
        messages.append(str(caught.value))
    return messages


def test_a_damaged_checkpoint_is_refused_on_all_ranks_and_the_file_is_named(complete: Path, tmp_path: Path) -> None:
    names = ("flipped", "truncated", "missing", "index")
    copies = {name: Path(shutil.copytree(complete, tmp_path / name)) for name in names}
    flip(copies["flipped"] / "__1_0.distcp")
    (copies["truncated"] / "__0_0.distcp").write_bytes((complete / "__0_0.distcp").read_bytes()[:-100])
    (copies["missing"] / "__1_0.distcp").unlink()
    flip(copies["index"] / INDEX)
    found = run_ranks(2, load_errors, [str(path) for path in copies.values()], TWO)
    assert found[0] == found[1]
    flipped, truncated, missing, index = found[0]
    assert f"{copies['flipped'] / '__1_0.distcp'} is damaged" in flipped
    assert "another checksum" in flipped
    assert "must have" in truncated
    assert str(copies["truncated"] / "__0_0.distcp") in truncated
    assert "must be there (No such file or directory)" in missing
    assert str(copies["index"] / INDEX) in index
    # Everything but a flipped bit is known before a process group exists.
    config = TWO.run().config
    assert [len(check_compatible(copies[name], config)) for name in names] == [0, 1, 1, 1]


def test_a_checkpoint_of_another_model_is_refused_on_all_ranks(complete: Path) -> None:
    run = Arrangement(tensor=2).run(model__hidden=64)
    (problem,) = check_compatible(complete, run.config)
    assert (problem.path, problem.value) == ("model.hidden", 64)
    found = run_ranks(2, load_other_model, str(complete))
    assert found[0] == found[1]
    assert "must be 32" in found[0]


def load_other_model(path: str) -> str:
    run = Arrangement(tensor=2).run(model__hidden=64)
    with pytest.raises(CheckpointError) as caught:
        load(make_engine(run), run, Path(path))
    return str(caught.value)


def peaks(directory: str) -> tuple[float, float, float]:
    """Bytes of the state, and by how much saving and loading raise the memory of the process."""
    run = Arrangement().run(model__vocab=2**19, model__tied_embeddings=True)
    engine = make_engine(run)
    state = sum(3 * owned.master.nbytes for owned in engine.optimizer.ranges.values())
    for owned in engine.optimizer.ranges.values():  # pages that were never written take no memory
        owned.first_moment.fill_(1.0)
        owned.second_moment.fill_(1.0)
    found = []
    for action in (
        lambda: save(engine, run, Path(directory), 1, 8, keep=1),
        lambda: load(engine, run, Path(directory) / "step-00000001"),
    ):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = memory("VmRSS")
        action()
        found.append(memory("VmHWM") - before)
    return state, found[0], found[1]


def memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's resettable memory peak")
def test_saving_and_loading_need_memory_for_a_few_chunks_not_for_the_state(tmp_path: Path) -> None:
    ((state, saving, loading),) = run_ranks(1, peaks, str(tmp_path))
    assert state > 190 * 2**20
    chunk = 32 * 2**20
    assert saving < 3 * chunk
    assert loading < 4 * chunk
