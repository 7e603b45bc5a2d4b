"""Executes the notebooks in place and keeps their outputs, and in their metadata what they were produced on.

    python benchmarks/run_notebooks.py [NAME ...] [--out FOLDER]

With `--out`, notebooks and `notebooks.json` (seconds, device and error of each) are written there, and those of this
repository stay as they are. The exit status is 1 if a notebook failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hf_flashinfer_attn.tools.environment import describe_environment

NOTEBOOKS = ROOT / "notebooks"
# The key of the metadata that tells where outputs come from.
PRODUCED_ON = "produced_on"
RECORDED = ("date_utc", "gpu", "cpu", "torch", "transformers", "flashinfer", "python")


def run(notebook: Path, timeout: int) -> tuple[nbformat.NotebookNode, dict[str, Any]]:
    """Executes a notebook in a fresh kernel of this Python.

    Args:
        notebook: Read, not written.
        timeout: Seconds per cell; compiling a kernel for the first time takes a minute or more.

    Returns:
        The notebook with its outputs, as far as it got, and what happened: name, seconds, device, error or None.
    """
    content: nbformat.NotebookNode = nbformat.read(notebook, as_version=4)  # type: ignore[no-untyped-call]
    # The kernel is another process: it has to find this very package too, installed or not.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    client = NotebookClient(
        content,
        kernel_name="python3",
        timeout=timeout,
        record_timing=False,
        resources={"metadata": {"path": str(notebook.parent)}},
    )
    start = time.perf_counter()
    error = None
    try:
        client.execute(env={**os.environ, "PYTHONPATH": path})
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    seconds = round(time.perf_counter() - start, 1)
    environment = describe_environment()
    content.metadata[PRODUCED_ON] = {name: environment[name] for name in RECORDED}
    content.metadata["language_info"] = {"name": "python"}
    for cell in content.cells:
        _join_streams(cell)
    device = environment["gpu"] or environment["cpu"]
    return content, {"notebook": notebook.name, "seconds": seconds, "device": device, "error": error}


def _join_streams(cell: nbformat.NotebookNode) -> None:
    """Puts together what a cell wrote to one stream in pieces, whose number depends on when they were sent."""
    outputs: list[nbformat.NotebookNode] = []
    for output in cell.get("outputs", []):
        last = outputs[-1] if outputs else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            outputs[-1].text += output.text
        else:
            outputs.append(output)
    if cell.cell_type == "code":
        cell.outputs = outputs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="as 1_quickstart (default: all)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write there, not in place")
    parser.add_argument("--timeout", type=int, default=400, metavar="SECONDS", help="per cell (default: 400)")
    options = parser.parse_args()
    notebooks = sorted(NOTEBOOKS.glob("*.ipynb"))
    known = [notebook.stem for notebook in notebooks]
    if unknown := set(options.names) - set(known):
        parser.error(f"{sorted(unknown)} are no notebooks; expected some of {known}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for notebook in notebooks:
        if options.names and notebook.stem not in options.names:
            continue
        content, result = run(notebook, options.timeout)
        results.append(result)
        print(f"{result['notebook']}: {result['seconds']} s, {result['error'] or 'ok'}", flush=True)
        if options.out is not None:
            # After each, so that what was cut short keeps what it has.
            (options.out / "notebooks.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        if options.out is not None or result["error"] is None:
            nbformat.write(content, (options.out or NOTEBOOKS) / notebook.name)  # type: ignore[no-untyped-call]
    return int(any(result["error"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
