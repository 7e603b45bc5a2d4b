"""Bulk embedding on one GPU and on two: `examples/embed_accelerate.py` over the same Parquet file.

    python benchmarks/measure_two_gpus.py --json benchmarks/results/two_gpus.json

The model has random weights and the texts are random words, both made here. A first run over a few rows compiles what
has to be compiled. Outputs of both runs are compared, row by row, before times count. Embedding is counted from the
first row read to the last one written, over all processes, models loaded and graphs captured; the whole is counted from
the launch to the end of the launcher, with imports and everything else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from hf_flashinfer_attn.bench.workload import shape_config
from hf_flashinfer_attn.environment import describe_environment
from random_model import random_lengths, random_texts, save_random_model

TARGET = 1.8


def run(gpus: int, folder: Path, source: Path, output: Path, more: list[str]) -> dict[str, Any]:
    """Embeds a file on so many processes, in processes of their own."""
    launch = ["--num_processes", str(gpus), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if gpus > 1:
        launch.append("--multi_gpu")
    report = output.with_suffix(".json")
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, str(ROOT / "examples/embed_accelerate.py")]
    options = ["--model", str(folder / "model"), "--input", str(source), "--output", str(output), "--pooling", "cls"]
    start = time.perf_counter()
    subprocess.run([*command, *options, "--report", str(report), *more], check=True)
    found: dict[str, Any] = {"gpus": gpus, "launched_seconds": time.perf_counter() - start}
    found |= {name: value for name, value in json.loads(report.read_text()).items() if name != "options"}
    parts = found.pop("part_reports")
    processes = sorted({one["worker"] for one in parts})
    found["processes"] = [
        {
            "parts": len(mine), "tokens": sum(one["tokens"] for one in mine),
            "seconds": max(one["ended"] for one in mine) - min(one["started"] for one in mine),
            # What comes before the GPU is busy, and after.
            "first_part_seconds": min(one["ended"] for one in mine) - min(one["started"] for one in mine),
            "last_part_seconds": mine[-1]["ended"] - mine[-1]["started"],
        }
        for mine in ([one for one in parts if one["worker"] == process] for process in processes)
    ]  # fmt: skip
    found["tokens_per_second"] = found["tokens"] / found["embedding_seconds"]
    return found


def compare(one: Path, two: Path, source: Path) -> dict[str, Any]:
    """Compares two outputs and checks that all rows of the input are there, in its order."""
    first, second, ids = pq.ParquetFile(one), pq.ParquetFile(two), pq.read_table(source, columns=["id"])["id"]
    tables = [file.read() for file in (first, second)]
    rows = np.arange(len(ids))
    in_order = all(np.array_equal(table["row"].to_numpy(), rows) and table["id"].equals(ids) for table in tables)
    worst, equal = 0.0, 0
    for start in range(0, len(ids), 65_536):
        a, b = (_matrix(table.slice(start, 65_536)) for table in tables)
        worst = max(worst, float(np.abs(a - b).max()))
        equal += int((a == b).all(1).sum())
    lengths = np.linalg.norm(_matrix(tables[0].slice(0, 65_536)), axis=1)
    return {
        "rows": len(ids), "in_order": in_order, "max_difference": worst, "equal_rows": equal,
        "of_length_one": bool(np.abs(lengths - 1).max() < 1e-3),
    }  # fmt: skip


def _matrix(table: pa.Table) -> np.ndarray:
    column = table["embedding"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    return column.flatten().to_numpy().reshape(len(table), -1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", default="bge-base")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="both in turn; the best of each counts")
    parser.add_argument("--folder", type=Path, help="for all files, such as one in memory")
    parser.add_argument("--options", default="", help="further options of embed_accelerate.py")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "passed": False, "shape": options.shape, "target": TARGET, "gpus_there": torch.cuda.device_count(),
        "versions": {name: version(name) for name in ("accelerate", "pyarrow", "tokenizers")},
        "environment": describe_environment(), "runs": [],
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    more = ["--keep", "id", *options.options.split()]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        config = shape_config(options.shape, options.layers)
        save_random_model(folder / "model", config)
        lengths = random_lengths(options.rows)
        texts = list(random_texts(folder / "model", lengths))
        table = pa.table({"id": [f"text-{index}" for index in range(len(texts))], "text": texts})
        source, few = folder / "texts.parquet", folder / "few.parquet"
        pq.write_table(table, source, row_group_size=65_536)
        pq.write_table(table.slice(0, 4_000), few)
        report |= {"rows": options.rows, "megabytes_of_text": sum(map(len, texts)) / 1e6}
        del table, texts
        for gpus in (1, options.gpus):
            # Rates of the disk's cache, of imports and of compilers settle.
            run(gpus, folder, few, folder / f"few_{gpus}.parquet", more)
        outputs = {gpus: folder / f"on_{gpus}.parquet" for gpus in (1, options.gpus)}
        for _ in range(options.rounds):
            for gpus, output in outputs.items():
                output.unlink(missing_ok=True)
                report["runs"].append(run(gpus, folder, source, output, more))
                print(json.dumps(report["runs"][-1]), flush=True)
                options.json.write_text(json.dumps(report, indent=1) + "\n")
        report["outputs"] = compare(outputs[1], outputs[options.gpus], source)
    best = {
        what: [min(one[what] for one in report["runs"] if one["gpus"] == gpus) for gpus in (1, options.gpus)]
        for what in ("embedding_seconds", "total_seconds", "launched_seconds")
    }
    report["speedup"] = {what: one / several for what, (one, several) in best.items()}
    found = report["outputs"]
    right = found["in_order"] and found["of_length_one"] and found["max_difference"] <= 2e-3
    report["passed"] = bool(right and report["speedup"]["embedding_seconds"] >= TARGET)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"outputs": found, "speedup": report["speedup"], "passed": report["passed"]}))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
