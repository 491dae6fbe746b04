"""The facts about the machine and the software of a run, for its run directory.

A figure without the hardware and versions behind it cannot be compared; this is what goes with it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "atoll",
    "torch",
    "numpy",
    "pydantic",
    "tokenizers",
    "safetensors",
    "deepspeed",
    "mpi4py",
    "apex",
)
_VARIABLES = re.compile(
    r"(ATOLL|OMP|MKL|KMP|GOMP|CUDA|ROCR|HIP|NCCL|TORCH_NCCL|GLOO|UCX|FI|PYTORCH)_\w+"
    r"|TORCHELASTIC_RESTART_COUNT|(WORLD|LOCAL_WORLD)_SIZE|SLURM_(JOB_ID|JOB_NUM_NODES|NTASKS|JOB_PARTITION)"
)
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|KEY", re.IGNORECASE)


def describe(config_files: Iterable[Path] = ()) -> dict[str, Any]:
    """Software, hardware and launch facts as plain values, ready for JSON or YAML.

    `git` is the commit of the repository that holds the first of `config_files` (or the working directory),
    with `dirty` for uncommitted changes; None outside a repository. `memory_bytes` and
    `devices[].memory_bytes` are in bytes. Variables whose name speaks of a secret are left out.
    """
    first = next(iter(config_files), None)
    return {
        "command": sys.argv,
        "hostname": socket.gethostname(),
        "launcher": _launcher(os.environ),
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "usable_cores": len(usable_cores())},
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "devices": _devices(),
        "cuda": torch.version.cuda,
        "git": _git(first.absolute().parent if first else Path.cwd()),
        "environment": _variables(os.environ),
    }


def usable_cores() -> set[int]:
    """The CPU cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _launcher(environment: Mapping[str, str]) -> str:
    if "ATOLL_LAUNCHER" in environment:
        return environment["ATOLL_LAUNCHER"]
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    return "environment variables" if "WORLD_SIZE" in environment else "none"


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    names = [name for name in sorted(environment) if _VARIABLES.fullmatch(name) and not _SECRET.search(name)]
    return {name: environment[name] for name in names}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional package that is not installed has no version
    found["torch"] = torch.__version__  # with its build, such as +cu129, which the metadata may lack
    return found


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def _devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": device.name, "memory_bytes": device.total_memory} for device in properties]


def _git(directory: Path) -> dict[str, Any] | None:
    """Commit and state of the repository around `directory`."""

    def ask(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", "-C", str(directory), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None  # no git on this machine, or a file system too slow to ask
        return answer.stdout.strip() if answer.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if commit is None:
        return None
    changes = ask("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}
