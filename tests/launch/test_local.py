"""The local launcher with real processes: logs, exit codes, signals, and that nothing stays behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from launch.logs import Console, parse_ranks, rank_log
from trainer.process import LAUNCHER_PID, die_with_parent

ROOT = Path(__file__).parents[2]
START = """
import sys
from pathlib import Path
from launch.local import run_local
ranks, shown, restarts, grace, directory, *arguments = sys.argv[1:]
sys.exit(run_local(arguments, int(ranks), Path(directory), [int(rank) for rank in shown.split(",")],
                   module="tests.launch.fake_worker", max_restarts=int(restarts), grace_seconds=float(grace)))
"""

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "run" / "logs"


@pytest.fixture
def launch(logs: Path) -> Iterator[Launch]:
    """Start the launcher in a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, ranks: int = 2, shown: str = "0", restarts: int = 0, grace: float = 60.0,
              environment: dict[str, str] | None = None) -> subprocess.Popen[str]:  # fmt: skip
        options = [str(option) for option in (ranks, shown, restarts, grace, logs)]
        inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        process = subprocess.Popen(
            [sys.executable, "-c", START, *options, *arguments],
            cwd=ROOT,
            env=inherited | {"PYTHONPATH": str(ROOT)} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def running(logs: Path, ranks: int = 2) -> list[int]:
    """The process ids that the ranks, and their children, report in their logs, once all have."""
    texts = [
        rank_log(logs, rank).read_text() if rank_log(logs, rank).exists() else "" for rank in range(ranks)
    ]
    lines = [re.search(r"^running ([\d ]+)$", text, re.MULTILINE) for text in texts]
    return [int(pid) for line in lines for pid in line[1].split()] if all(lines) else []  # type: ignore[index]


def alive(pids: Sequence[int]) -> list[int]:
    """Which of the processes still run; a zombie does not."""
    found = []
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat")
        try:
            state = stat.read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found.append(pid)
    return found


def test_success(launch: Launch, logs: Path) -> None:
    for attempt in (1, 2):
        process = launch("fine", "a=$$x ${local_rank}", "b c", ranks=2)
        output, error = process.communicate(timeout=60)
        assert (process.returncode, error) == (0, "")
        assert len(output.splitlines()) == 3, "only what this launch wrote, without a prefix"
        assert "'WORLD_SIZE': '2', 'LOCAL_RANK': '0'" in output
        assert "'ATOLL_LAUNCHER': 'local'" in output
        assert "arguments a=$$x ${local_rank} b c\n" in output
        for rank in range(2):
            text = rank_log(logs, rank).read_text()
            assert text.count("to standard error\n") == attempt, "logs are appended to"
    threads = re.findall(r"'OMP_NUM_THREADS': '(\d+)'", output)
    assert threads == [str(max(1, len(os.sched_getaffinity(0)) // 2))]


def test_several_ranks_are_shown_with_a_prefix_and_own_threads_are_kept(launch: Launch) -> None:
    output, _ = launch("fine", ranks=3, shown="0,2", environment={"OMP_NUM_THREADS": "3"}).communicate(
        timeout=60
    )
    assert sorted({line[:4] for line in output.splitlines()}) == ["[0] ", "[2] "]
    assert output.count("'OMP_NUM_THREADS': '3'") == 2


def test_the_rank_that_failed_first_is_named(launch: Launch, logs: Path) -> None:
    """Rank 1 fails first and rank 0 because of it, but rank 0 is the first process to end."""
    process = launch("fail", "1", ranks=2)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    message = f"atoll: rank 1 failed: ValueError: the data is wet; log: {rank_log(logs, 1)}\n"
    assert error == message
    assert "Traceback" in rank_log(logs, 1).read_text()


def test_a_rank_that_dies_without_a_word_is_named(launch: Launch) -> None:
    process = launch("crash", "1", ranks=3)
    start = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert error.startswith("atoll: rank 1 was ended by SIGKILL; log: ")
    assert time.monotonic() - start < 30


def test_a_worker_that_cannot_start(launch: Launch, logs: Path) -> None:
    process = launch("no_such_behaviour")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ended with exit code 1; log:" in error
    assert "KeyError: 'no_such_behaviour'" in rank_log(logs, 0).read_text()


def test_restart(launch: Launch, logs: Path, tmp_path: Path) -> None:
    process = launch("flaky", str(tmp_path / "marker"), restarts=1)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0
    assert error == "atoll: rank 0 failed: RuntimeError: not yet; starting all ranks again\n"
    assert re.findall(r"attempt (\d)", output) == ["0", "1"]


def test_signals_reach_the_ranks_and_are_waited_for(launch: Launch, logs: Path) -> None:
    process = launch("saving", restarts=3)
    wait_for(lambda: bool(running(logs)))
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: all("saved on SIGUSR1" in rank_log(logs, rank).read_text() for rank in range(2)))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=10)
    assert process.returncode == 0
    assert output.endswith("saved on SIGUSR1\nsaved on SIGTERM\nstopped\n")
    assert error == "atoll: stopped by SIGINT; all ranks ended cleanly\n"


def test_sigterm_leaves_no_process(launch: Launch, logs: Path) -> None:
    process = launch("saving")
    wait_for(lambda: bool(running(logs)))
    pids = running(logs)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert alive(pids) == []


def test_a_stop_during_the_start_is_not_lost(launch: Launch) -> None:
    process = launch("saving")
    wait_for(lambda: handles(process.pid, signal.SIGTERM))
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert process.returncode in (0, 128 + signal.SIGTERM)
    assert error.startswith("atoll: stopped by SIGTERM")


def handles(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def test_ranks_that_do_not_stop_are_killed_after_the_grace(launch: Launch, logs: Path) -> None:
    process = launch("stuck", grace=1.0)
    wait_for(lambda: bool(running(logs)))
    pids = running(logs)
    assert len(pids) == 4
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=10)
    assert alive(pids) == []
    assert process.returncode == 128 + signal.SIGKILL
    assert error.startswith("atoll: stopped by SIGTERM: rank ")


def test_what_is_ignored_stays_ignored(launch: Launch, logs: Path) -> None:
    """As under `nohup`, and for SIGINT in background jobs of a script."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = launch("saving")
    signal.signal(signal.SIGHUP, before)
    wait_for(lambda: bool(running(logs)))
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=10)
    assert error == "atoll: stopped by SIGTERM; all ranks ended cleanly\n"


def test_a_second_interrupt_kills(launch: Launch, logs: Path) -> None:
    process = launch("stuck", grace=60.0)
    wait_for(lambda: bool(running(logs)))
    pids = running(logs)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert len(alive(pids)) == 4
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert alive(pids) == []


def test_no_rank_outlives_a_killed_launcher(launch: Launch, logs: Path) -> None:
    process = launch("saving")
    wait_for(lambda: bool(running(logs)))
    pids = running(logs)
    process.kill()
    wait_for(lambda: alive(pids) == [], 10)


def test_a_worker_whose_launcher_is_gone_ends() -> None:
    script = (
        f"from trainer.process import die_with_parent; die_with_parent({{{LAUNCHER_PID!r}: '999999999'}})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (1, "the launcher (process 999999999) is gone\n")


def test_a_worker_started_by_hand_is_not_bound() -> None:
    assert not die_with_parent({})


def test_the_console_copies_whole_lines_and_survives_its_reader(tmp_path: Path) -> None:
    rank_log(tmp_path, 0).write_bytes(b"old\n")
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        with Console(tmp_path, [0], stream), rank_log(tmp_path, 0).open("ab") as log:
            for piece in ("é\nhal".encode()[:1], "é\nhal".encode()[1:], b"f\nrest"):
                log.write(piece)
                log.flush()
                time.sleep(0.15)
        assert os.read(reading, 1000).decode() == "é\nhalf\nrest\n"
        os.close(reading)
        with Console(tmp_path, [0], stream), rank_log(tmp_path, 0).open("ab") as log:
            log.write(b"nobody reads this\n")
            log.flush()


def test_which_ranks_are_shown() -> None:
    assert parse_ranks("all", 3) == [0, 1, 2]
    assert parse_ranks("0, 2", 3) == [0, 2]
    for wrong in ("3", "x", "", "-1"):
        with pytest.raises(ValueError, match="must be one of the ranks 0 to 2"):
            parse_ranks(wrong, 3)
