"""Bulk embedding on one GPU and on two, with accelerate and with Ray Data.

    python benchmarks/measure_two_gpus.py --json benchmarks/results/two_gpus.json
    python benchmarks/measure_two_gpus.py --json two.json --cpu --layers 1 --rows 1500 --part-megabytes 0.02

Runs `examples/embed_accelerate.py` and `examples/embed_ray.py` over the same Parquet file, each with one worker and
with two, and Ray Data once more with an actor that is killed in the middle (SIGKILL). The first output is checked row
by row; the bytes of all others are compared with it. The model has random weights and the texts are random words, both
made here; nothing is downloaded. A short run before the others compiles kernels.

`embedding_seconds` is the time from the first row read to the last one written, over all workers, with models loaded;
Ray Data is told to wait for all actors before it starts. `warm_rows_per_second` leaves out the first part of each
worker, which captures most CUDA graphs. `launched_seconds` is the time of the whole program. The JSON is written after
each run. `passed` needs equal bytes, no lost row, and a speed-up of 1.8 in `rows_per_second` with both programs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from hf_flashinfer_attn.tools.bench.workload import shape_config
from hf_flashinfer_attn.tools.environment import describe_environment
from random_model import random_lengths, random_texts, save_random_model

TARGET = 1.8
TIMEOUT = 300
PROGRAMS = ("accelerate", "ray")


def command_of(program: str, workers: int, *, cpu: bool) -> list[str]:
    """Returns the command that starts one or two workers."""
    if program == "ray":
        return [sys.executable, str(ROOT / "examples/embed_ray.py"), "--actors", str(workers)]
    launch = ["--num_processes", str(workers), "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0", *(["--multi_gpu"] if workers > 1 else [])]
    return [sys.executable, "-m", "accelerate.commands.launch", *launch, *script_of(cpu=cpu)]


def script_of(*, cpu: bool) -> list[str]:
    return [str(ROOT / "examples/embed_accelerate.py"), *(["--cpu"] if cpu else [])]


def environment_of(*, cpu: bool) -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1",
        "RAY_DATA_DEFAULT_WAIT_FOR_MIN_ACTORS_S": str(TIMEOUT),
    }  # fmt: skip
    return {**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if cpu else environment


def kill_an_actor(process: subprocess.Popen[bytes], parts: Path, after: int) -> dict[str, int]:
    """Kills an actor that is at a part, once `after` parts are complete; returns what was killed when."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end and process.poll() is None:
        complete = len(list(parts.glob("part-*.parquet")))
        # Ray writes the running method to the name of the process.
        actors = psutil.Process(process.pid).children(recursive=True) if complete >= after else []
        for actor in actors:
            try:
                line = " ".join(actor.cmdline())
                if "MapWorker" in line and ".submit" in line:
                    actor.send_signal(signal.SIGKILL)
                    return {"process": actor.pid, "complete_parts": complete}
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.002)
    process.kill()
    raise RuntimeError(f"no actor was killed: {process.args!r} ended, or had no actor at a part")


def summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarises the parts of one process, in the order in which they ended."""
    first, last = parts[0], parts[-1]
    rows = sum(one["rows"] for one in parts)
    return {
        "process": first["worker"], "parts": len(parts), "rows": rows,
        "seconds": last["ended"] - min(one["started"] for one in parts),
        "encode_seconds": sum(one["encode_seconds"] for one in parts),
        "first_encode_seconds": first["encode_seconds"],
        "warm_rows_per_second": (rows - first["rows"]) / (last["ended"] - first["ended"]) if len(parts) > 1 else 0.0,
    }  # fmt: skip


def run(command: list[str], output: Path, arguments: list[str], *, cpu: bool, kill_after: int = 0) -> dict[str, Any]:
    """Runs a program, and summarises its report."""
    report = output.with_suffix(".json")
    whole = [*command, "--output", str(output), "--report", str(report), *arguments]
    killed: dict[str, int] | None = None
    start = time.perf_counter()
    with subprocess.Popen(whole, env=environment_of(cpu=cpu)) as process:
        if kill_after:
            killed = kill_an_actor(process, output.with_name(output.name + ".parts"), kill_after)
        try:
            status = process.wait(TIMEOUT)
        except BaseException:
            process.terminate()
            raise
    if status:
        raise RuntimeError(f"{whole} ended with {status}")
    found: dict[str, Any] = {"launched_seconds": time.perf_counter() - start}
    found |= {name: value for name, value in json.loads(report.read_text()).items() if name != "options"}
    parts = found.pop("part_reports")
    found["rows_per_second"] = found["embedded_rows"] / found["embedding_seconds"]
    by_process = [
        [one for one in parts if one["worker"] == worker] for worker in sorted({one["worker"] for one in parts})
    ]
    found["processes"] = [summary(sorted(mine, key=lambda one: one["ended"])) for mine in by_process]
    found["warm_rows_per_second"] = sum(one["warm_rows_per_second"] for one in found["processes"])
    found["sha256"] = hashlib.sha256(output.read_bytes()).hexdigest()
    return found if killed is None else {**found, "killed": killed}


def check(output: Path, source: Path) -> dict[str, bool]:
    """Checks that all rows of the input are there, in order, and that embeddings have length one."""
    table, ids = pq.read_table(output), pq.read_table(source, columns=["id"])["id"]
    in_order = np.array_equal(table["row"].to_numpy(), np.arange(len(ids))) and table["id"].equals(ids)
    norms = [np.linalg.norm(_matrix(table.slice(start, 65_536)), axis=1) for start in range(0, len(table), 65_536)]
    # Normalised in float16, of which 2e-3 is twice the rounding.
    return {"all_rows_in_order": in_order, "of_length_one": bool(np.abs(np.concatenate(norms) - 1).max() < 2e-3)}


def compare(output: Path, reference: Path) -> dict[str, Any]:
    """Describes outputs whose bytes differ."""
    one, two = pq.read_table(output), pq.read_table(reference)
    if len(one) != len(two):
        return {"rows": [len(one), len(two)]}
    worst, equal = 0.0, 0
    for start in range(0, len(one), 65_536):
        a, b = (_matrix(table.slice(start, 65_536)) for table in (one, two))
        worst, equal = max(worst, float(np.abs(a - b).max())), equal + int((a == b).all(1).sum())
    return {"max_difference": worst, "equal_rows": equal, "equal_ids": one["id"].equals(two["id"])}


def _matrix(table: pa.Table) -> np.ndarray:
    column = table["embedding"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    matrix: np.ndarray = column.flatten().to_numpy().reshape(len(table), -1)
    return matrix


def make_inputs(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Writes a model, a Parquet file of texts, and one of the first few of them."""
    save_random_model(folder / "model", shape_config(options.shape, options.layers))
    texts = list(random_texts(folder / "model", random_lengths(options.rows)))
    table = pa.table({"id": [f"text-{index}" for index in range(len(texts))], "text": texts})
    pq.write_table(table, folder / "texts.parquet", row_group_size=65_536)
    pq.write_table(table.slice(0, 2_000), folder / "few.parquet")
    return {"rows": len(texts), "megabytes_of_text": sum(map(len, texts)) / 1e6}


def measure(folder: Path, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Measures all runs; `report` is written after each."""

    def write() -> None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")

    report |= make_inputs(folder, options)
    source, first = folder / "texts.parquet", folder / "first.parquet"
    arguments = ["--model", str(folder / "model"), "--pooling", "cls", "--keep", "id"]
    arguments += ["--part-megabytes", str(options.part_megabytes), *options.options.split()]
    few = [*arguments, "--input", str(folder / "few.parquet")]
    # One process needs no launcher.
    run([sys.executable, *script_of(cpu=options.cpu)], folder / "few-out.parquet", few, cpu=options.cpu)
    cells = [(program, workers, False) for program in PROGRAMS for workers in (1, 2)]
    for program, workers, is_killed in [*cells, ("ray", 2, True)]:
        output = folder / "next.parquet" if first.exists() else first
        kill_after = max(report["runs"][0]["parts"] // 4, 1) if is_killed else 0
        command = command_of(program, workers, cpu=options.cpu)
        found = run(command, output, [*arguments, "--input", str(source)], cpu=options.cpu, kill_after=kill_after)
        found = {"program": program, **found}
        if output is first:
            report["output"] = check(output, source)
        else:
            found["equal_bytes"] = found["sha256"] == report["runs"][0]["sha256"]
            if not found["equal_bytes"]:
                found["difference"] = compare(output, first)
            output.unlink()
        report["runs"].append(found)
        print(json.dumps(found), flush=True)
        write()
    runs = {(one["program"], one["workers"]): one for one in report["runs"] if "killed" not in one}
    for name, rate in (("speedup", "rows_per_second"), ("warm_speedup", "warm_rows_per_second")):
        report[name] = {program: runs[program, 2][rate] / runs[program, 1][rate] for program in PROGRAMS}
    report["equal_bytes"] = all(one["equal_bytes"] for one in report["runs"][1:])
    right = report["equal_bytes"] and all(report["output"].values())
    report["passed"] = bool(right and min(report["speedup"].values()) >= TARGET)
    write()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", default="bge-base")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--part-megabytes", type=float, default=4.0)
    parser.add_argument("--cpu", action="store_true", help="workers on the CPU, to try this program")
    parser.add_argument("--folder", type=Path, help="for all files, such as one in memory")
    parser.add_argument("--options", default="", help="further options of both programs")
    options = parser.parse_args()
    if not options.cpu and torch.cuda.device_count() < 2:
        parser.error(f"{torch.cuda.device_count()} GPUs; expected two, or --cpu")
    report: dict[str, Any] = {
        "passed": False, "shape": options.shape, "target": TARGET, "cpu": options.cpu,
        "part_megabytes": options.part_megabytes,
        "versions": {name: version(name) for name in ("accelerate", "pyarrow", "ray", "tokenizers")},
        "environment": describe_environment(), "runs": [],
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder), options, report)
    print(json.dumps({name: report[name] for name in ("output", "equal_bytes", "speedup", "warm_speedup", "passed")}))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
