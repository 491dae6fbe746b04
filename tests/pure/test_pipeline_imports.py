"""Programs are plain data: planning, checking and drawing them loads no tensor library."""

from __future__ import annotations

import subprocess
import sys


def test_pure_modules_do_not_import_torch() -> None:
    modules = ["render", "simulate", "verify", "schedules.registry"]
    modules += [f"passes.{name}" for name in ("backward", "reduce", "transfers", "update")]
    lines = [f"import parallel.pipeline.{module}" for module in modules]
    lines += ["import parallel.pipeline.schedules.registry as registry, sys", "registry.schedules()"]
    lines += ["assert 'torch' not in sys.modules"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=60)
