"""Every notebook runs from top to bottom, in a fresh kernel of this Python, and keeps what a reader wants to see."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from benchmarks import run_notebooks

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Paths of the machine that ran it tell a reader nothing.
MACHINE_PATH = re.compile(r"site-packages|/(root|home|tmp|work)/")


def _read(notebook: Path) -> nbformat.NotebookNode:
    content: nbformat.NotebookNode = nbformat.read(notebook, as_version=4)  # type: ignore[no-untyped-call]
    return content


def _write(notebook: Path, *cells: str) -> Path:
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])  # type: ignore[no-untyped-call]
    nbformat.write(made, notebook)  # type: ignore[no-untyped-call]
    return notebook


def _outputs(content: nbformat.NotebookNode) -> list[Any]:
    return [output for cell in content.cells if cell.cell_type == "code" for output in cell.outputs]


def _texts(content: nbformat.NotebookNode) -> list[str]:
    texts = []
    for output in _outputs(content):
        texts.append(output.get("text", ""))
        texts += [data for kind, data in output.get("data", {}).items() if kind.startswith("text/")]
    return texts


def test_there_are_notebooks() -> None:
    assert [notebook.stem[0] for notebook in NOTEBOOKS] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads that wait for each other on busy cores take many times as long.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    content, result = run_notebooks.run(notebook, timeout=180)
    assert result["error"] is None
    assert [text for text in _texts(content) if "Warning" in text] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_its_outputs(notebook: Path) -> None:
    content = _read(notebook)
    cells = [cell for cell in content.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = _outputs(content)
    assert not [output for output in outputs if output.output_type == "error"]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert [text for text in _texts(content) if MACHINE_PATH.search(text)] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_says_what_its_outputs_were_produced_on(notebook: Path) -> None:
    content = _read(notebook)
    produced_on = content.metadata[run_notebooks.PRODUCED_ON]
    device = produced_on["gpu"] or produced_on["cpu"]
    assert [text for text in _texts(content) if device in text and produced_on["torch"] in text]


def test_failure_is_told(tmp_path: Path) -> None:
    content, result = run_notebooks.run(_write(tmp_path / "wrong.ipynb", "print('before')", "1 / 0", "2"), timeout=60)
    assert "ZeroDivisionError" in result["error"]
    assert [cell.execution_count for cell in content.cells] == [1, 2, None]
    assert _texts(content)[0] == "before\n"


def test_notebooks_are_written_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_notebooks, "NOTEBOOKS", tmp_path)
    sources = [_write(tmp_path / f"{name}.ipynb", source) for name, source in (("a", "6 * 7"), ("b", "1 / 0"))]
    before = [source.read_text(encoding="utf-8") for source in sources]
    monkeypatch.setattr("sys.argv", ["run_notebooks.py", "--out", str(tmp_path / "out")])
    assert run_notebooks.main() == 1
    assert [source.read_text(encoding="utf-8") for source in sources] == before
    assert _texts(_read(tmp_path / "out" / "a.ipynb")) == ["", "42"]
    results = json.loads((tmp_path / "out" / "notebooks.json").read_text(encoding="utf-8"))
    assert [(one["notebook"], one["error"] is None) for one in results] == [("a.ipynb", True), ("b.ipynb", False)]
    assert "a.ipynb" in capsys.readouterr().out


def test_no_such_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["run_notebooks.py", "5_nothing"])
    with pytest.raises(SystemExit):
        run_notebooks.main()
    assert "expected some of ['1_quickstart'" in capsys.readouterr().err


def test_progress_leaves_nothing_in_a_notebook(tmp_path: Path) -> None:
    notebook = _write(
        tmp_path / "progress.ipynb",
        "import warnings; warnings.simplefilter('error')\n"
        "from hf_flashinfer_attn.tools.bench import Progress\n"
        "with Progress() as progress:\n"
        "    progress.step('loading')\n"
        "    progress.print('0.5 s')\n",
    )
    content, result = run_notebooks.run(notebook, timeout=60)
    assert result["error"] is None
    # A terminal's bar, without ipywidgets: redrawn in place, then blanked.
    written = {"stdout": "", "stderr": ""}
    for output in _outputs(content):
        written[output.name] += output.text
    assert written["stdout"] == "0.5 s\n"
    assert "loading" in written["stderr"]
    assert re.search(r"\r *\r$", written["stderr"])
