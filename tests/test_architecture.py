"""Floors of the package: imports go down only, no files import each other in a circle, and sizes stay small."""

from __future__ import annotations

import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

import hf_flashinfer_attn

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(hf_flashinfer_attn.__file__).parent
NAME = hf_flashinfer_attn.__name__
# Lines.
MOST_OF_A_FILE = 500
MOST_OF_THE_PACKAGE = 14_600
MOST_WITHOUT_TOOLS = 10_700


def lines_of(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(NAME, cache_dir=None)


def test_imports_go_down_only() -> None:
    # In a process of its own: it configures logging, which switches off all loggers there are.
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_no_files_import_each_other_in_a_circle(graph: grimp.ImportGraph) -> None:
    # Raises a CycleError that names the files of a circle.
    TopologicalSorter({file: graph.find_modules_directly_imported_by(file) for file in graph.modules}).prepare()


def test_files_and_package_stay_small() -> None:
    lengths = {file.relative_to(PACKAGE).as_posix(): lines_of(file) for file in PACKAGE.rglob("*.py")}
    assert not {name for name, lines in lengths.items() if lines > MOST_OF_A_FILE}
    assert sum(lengths.values()) <= MOST_OF_THE_PACKAGE
    assert sum(lines for name, lines in lengths.items() if not name.startswith("tools/")) <= MOST_WITHOUT_TOOLS


def test_no_module_is_shadowed_by_a_public_name(graph: grimp.ImportGraph) -> None:
    """`import hf_flashinfer_attn.trace` would give the module, and `hf_flashinfer_attn.trace` then, too."""
    packages = [name for name in graph.modules if graph.find_children(name)]
    assert NAME in packages
    for package in packages:
        public = getattr(importlib.import_module(package), "__all__", ())
        shadowed = [name for name in public if f"{package}.{name}" in graph.modules]
        assert not shadowed, package
