"""The package as users have it: installed, with its types."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import user_program
from packaging.version import Version

import hf_flashinfer_attn
from hf_flashinfer_attn.tools.environment import TESTED

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(hf_flashinfer_attn.__file__).parent


def run_python(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_tests_run_on_the_package_that_is_meant() -> None:
    source = ROOT / "hf_flashinfer_attn"
    # Where the tests were taken away from the source it is the installed one that they are about.
    expected = source if source.is_dir() else Path(sysconfig.get_path("purelib")) / "hf_flashinfer_attn"
    assert expected == PACKAGE


def test_tested_versions_are_those_of_the_ci() -> None:
    oldest, shared, newest = (
        dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / ".ci" / file).read_text(), re.MULTILINE))
        for file in ("oldest.txt", "constraints.txt", "newest.txt")
    )
    for name, versions in TESTED.items():
        assert oldest.get(name, versions[0]) == versions[0]
        assert newest.get(name, versions[1]) == versions[1]
        assert Version(versions[0]) <= Version(shared[name]) <= Version(versions[1])
    assert oldest.keys() == newest.keys() < TESTED.keys() <= shared.keys()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["--version"], 0), (["bench", "--help"], 0), (["dcotor"], 2), (["doctor", "--arch", "9.0"], 2)],
    ids=["help", "version", "help-of-a-command", "typo", "no-model"],
)
@pytest.mark.parametrize("program", ["-m", "script"])
def test_help_and_wrong_usage_import_nothing_heavy(
    program: str, arguments: list[str], status: int, tmp_path: Path
) -> None:
    script = tmp_path / "hf-flashinfer-attn"
    script.write_text("import sys\nfrom hf_flashinfer_attn.tools.cli import main\nsys.exit(main())\n")
    run = ["-m", "hf_flashinfer_attn"] if program == "-m" else [str(script)]
    ran = run_python("-X", "importtime", *run, *arguments, folder=tmp_path)
    assert ran.returncode == status
    imported = set(re.findall(r"^import time: .*\| +(\S+)$", ran.stderr, re.MULTILINE))
    assert "hf_flashinfer_attn.tools.cli" in imported
    assert not imported & {"torch", "transformers", "numpy"}


def test_other_programs_of_python_register_on_import(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import hf_flashinfer_attn, transformers\n"
        "assert 'flashinfer' in transformers.AttentionInterface().valid_keys()\n"
    )
    ran = run_python("-m", "mine", "--help", folder=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_user_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    user_program.main()
    assert "backend='cuda' is not known" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_user_program_type_checks_against_the_installed_package(tmp_path: Path) -> None:
    # An environment of its own, as mypy takes types only from what is installed there; the rest is that of the tests.
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    installed = next((tmp_path / "venv" / "lib").glob("python3*")) / "site-packages"
    shutil.copytree(PACKAGE, installed / "hf_flashinfer_attn", ignore=shutil.ignore_patterns("__pycache__"))
    (installed / "others.pth").write_text(sysconfig.get_path("purelib"))
    program = shutil.copy(ROOT / "tests" / "user_program.py", tmp_path)
    # Not all of transformers has types.
    options = ["--strict", "--config-file=", "--untyped-calls-exclude=transformers", f"--python-executable={python}"]
    # With the repository's own, which holds other modules; libraries are the slow part, and stay the same.
    apart = {"PYTHONPATH": "", "MYPYPATH": "", "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache" / "user_program")}
    done = run_python("-m", "mypy", *options, str(program), folder=tmp_path, **apart)
    assert done.returncode == 0, done.stdout + done.stderr
