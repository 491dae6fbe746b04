"""Stands in for the trainer under the local launcher: says where it is, then does what its argument names.

python -m tests.launch.fake_worker BEHAVIOUR [ARGUMENTS...]
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from pathlib import Path

from trainer.process import die_with_parent

RANK = int(os.environ["RANK"])


def fine(*arguments: str) -> None:
    """Ends well, after saying what it was given."""
    names = ("ATOLL_LAUNCHER", "OMP_NUM_THREADS", "WORLD_SIZE", "LOCAL_RANK")
    settings = {name: os.environ[name] for name in names}
    print("settings", settings)
    print("arguments", *arguments)
    print("to standard error", file=sys.stderr)


def fail(failing: str) -> None:
    """The named rank fails but is slow to end; the others fail because of it, and end at once."""
    if int(failing) == RANK:
        atexit.register(time.sleep, 20)
        raise ValueError("the data\nis wet")
    record = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).with_name(f"rank-{failing}.json")
    while not record.exists():
        time.sleep(0.05)
    raise ConnectionError("a peer is gone")


def crash(failing: str) -> None:
    """The named rank dies without a word; the others wait for it."""
    if int(failing) == RANK:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    while Path(f"/proc/{os.environ['ATOLL_LAUNCHER_PID']}").exists():
        time.sleep(0.1)


def stuck() -> None:
    """Takes no notice of anything short of SIGKILL, and has a child that does not either."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    child = os.fork()
    if child:
        print("running", os.getpid(), child, flush=True)
    time.sleep(60)


def saving() -> None:
    """Saves on SIGUSR1; saves and stops on SIGTERM."""
    stop = []

    def handler(number: int, frame: object) -> None:
        print("saved on", signal.Signals(number).name, flush=True)
        if number == signal.SIGTERM:
            stop.append(number)

    signal.signal(signal.SIGUSR1, handler)
    signal.signal(signal.SIGTERM, handler)
    print("running", os.getpid(), flush=True)
    while not stop:
        time.sleep(0.05)
    print("stopped", flush=True)
    sys.exit(0)


def flaky(marker: str) -> None:
    """Fails the first time."""
    print("attempt", os.environ["TORCHELASTIC_RESTART_COUNT"])
    if RANK == 0 and not Path(marker).exists():
        Path(marker).touch()
        raise RuntimeError("not yet")


def main() -> None:
    """Run one behaviour; torch's `record` writes error files, but is slow to import and not always needed."""
    die_with_parent()
    behaviour, *arguments = sys.argv[1:]
    run = globals()[behaviour]
    if behaviour in ("fail", "flaky"):
        from torch.distributed.elastic.multiprocessing.errors import record

        run = record(run)
    run(*arguments)


if __name__ == "__main__":
    main()
