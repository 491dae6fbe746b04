"""Who may import whom: launch -> trainer -> {parallel, offload}, and pure parts without torch.

Imports are read from the source, those inside functions included: a lazy import is a dependency all the same.
"""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("launch", "trainer", "parallel", "offload")
MAY_IMPORT = {
    "launch": {"launch", "trainer", "parallel", "offload"},
    "trainer": {"trainer", "parallel", "offload"},
    "parallel": {"parallel"},
    "offload": {"offload"},
}
SIDE_BY_SIDE = ("tensor", "sequence", "pipeline", "zero", "outer")
TENSORS = {"parallel.pipeline.executor", "parallel.pipeline.stage"}  # what runs a program on a device
SOURCES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Dotted names of the modules that a source file imports."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ".".join(file.parts[: -node.level])
                yield f"{base}.{node.module}" if node.module else base
            else:
                assert node.module is not None
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", SOURCES, ids=str)
def test_imports_go_one_way(file: Path) -> None:
    package = file.parts[0]
    tops = {name.partition(".")[0] for name in imported(file)} & {*PACKAGES, "tests", "benchmarks"}
    assert tops <= MAY_IMPORT[package], f"{package} must not import {sorted(tops - MAY_IMPORT[package])}"


@pytest.mark.parametrize("subpackage", SIDE_BY_SIDE)
def test_subpackages_of_parallel_stand_side_by_side(subpackage: str) -> None:
    others = {f"parallel.{other}" for other in SIDE_BY_SIDE if other != subpackage}
    for file in SOURCES:
        if file.parts[:2] == ("parallel", subpackage):
            crossing = {".".join(name.split(".")[:2]) for name in imported(file)} & others
            assert not crossing, f"{file} must not import {sorted(crossing)}"


@pytest.mark.parametrize("file", [file for file in SOURCES if file.name == "__init__.py"], ids=str)
def test_packages_are_only_described_by_their_init(file: Path) -> None:
    body = ast.parse((ROOT / file).read_text()).body
    assert len(body) == 1, "one docstring and nothing else"
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


def pure_modules() -> list[str]:
    """The modules that must load without torch."""
    found = ["parallel.topology", "parallel.layout", "launch.cli"]
    for package in ("parallel.pipeline", "trainer.config"):
        spec = importlib.util.find_spec(package)
        assert spec is not None, f"{package} is missing"
        found += [info.name for info in pkgutil.walk_packages(spec.submodule_search_locations, f"{package}.")]
    return [name for name in found if name not in TENSORS]


def test_pure_parts_import_no_torch() -> None:
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    command = [sys.executable, "-c", script, *pure_modules()]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
