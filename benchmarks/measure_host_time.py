"""Where the time of a small forward goes: sdpa, CUDA graphs, and CUDA graphs of what torch.compile made.

    python benchmarks/measure_host_time.py --json benchmarks/results/host_time.json --seconds 420

The first batch of each request set, with inputs on the CPU and on the GPU. Outputs are checked against sdpa's before
anything is timed. Host time is from the call to its return, while the GPU is idle; time in a row is per forward of
many, as in a bulk job; a replay is a graph alone; all medians. Compiling starts with an empty cache of torch's.

Parts are of the host time, each without the parts inside of it, so that they add up to the whole: reading the mask with
inputs on the GPU looks at the model too, while the lengths are on their way. Timers cost little, told by the whole with
them. Packing is also measured by itself, which needs no GPU. On a CPU nothing is captured: the part of the graphs is
the forward itself, and times are no more than a proof that this program works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModel, PreTrainedModel

import hf_flashinfer_attn
from hf_flashinfer_attn import GraphOptions
from hf_flashinfer_attn.tools.bench.contenders import twin
from hf_flashinfer_attn.tools.bench.workload import REQUEST_SETS, shape_config, synthetic_batches
from hf_flashinfer_attn.tools.environment import describe_environment
from hf_flashinfer_attn.unpadding import graphs, hooks, model_state
from hf_flashinfer_attn.unpadding.graphs import graphs_of
from hf_flashinfer_attn.unpadding.packing import Packing

Inputs = dict[str, torch.Tensor]
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float16 if DEVICE.type == "cuda" else torch.float32
PLACES = {"cpu": CPU, DEVICE.type: DEVICE}
ERROR_BOUND = 5e-3
# By part, where its callers look it up; several functions may make up one.
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "packing": ((hooks, "_find_packing"), (hooks, "_pack_inputs"), (hooks, "cu_seqlens_of")),
    "waiting for the GPU": ((torch.cuda.Event, "synchronize"),),
    "moving": ((Packing, "move"),),
    "is the model the captured one": ((model_state.ModelState, "holds"),),
    "planning": ((graphs, "plan_graph"),),
    "replay": ((torch.cuda.CUDAGraph, "replay"),),
    "spreading": ((Packing, "spread"),),
    "pooler": ((hooks, "_pool"),),
    "graphs: choosing one, copies in and out": ((graphs.GraphedForward, "__call__"),),
}
REST = "the rest: hooks and calls of modules"


def _to(inputs: Inputs, device: torch.device) -> Inputs:
    return {name: value.to(device) for name, value in inputs.items()}


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], object], repeats: int, row: int = 0) -> float:
    """Median per call: of the host's time, or of `row` calls in a row until the GPU is done."""
    found = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        for _ in range(max(row, 1)):
            run()
        if row:
            wait()
        found.append((time.perf_counter() - start) * 1e3 / max(row, 1))
    return statistics.median(found)


class Timers:
    """Seconds of the parts of a call, each without the parts that ran inside of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - start
                self.seconds[part] += whole - self._inside.pop()
                self._inside[-1] += whole

        return run

    @contextmanager
    def around_parts(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part, functions in PARTS.items():
                for owner, name in functions:
                    stack.enter_context(mock.patch.object(owner, name, self.timed(part, getattr(owner, name))))
            yield


def microseconds_by_part(backbone: PreTrainedModel, inputs: Inputs, repeats: int) -> dict[str, float]:
    timers, forwards = Timers(), []
    whole = timers.timed(REST, backbone)
    with timers.around_parts():
        for at in range(repeats + 3):
            timers.seconds.clear()
            wait()
            whole(**inputs)
            if at >= 3:
                forwards.append(dict(timers.seconds))
    names = dict.fromkeys(name for name in (*PARTS, "pooler", REST) if any(name in found for found in forwards))
    parts = {name: statistics.median(found.get(name, 0.0) for found in forwards) * 1e6 for name in names}
    return {**parts, "the whole, with timers": statistics.median(sum(found.values()) for found in forwards) * 1e6}


def packing_alone(repeats: int) -> list[dict[str, float]]:
    """Reading the mask and packing ids and positions, in numpy on the host."""
    cells = []
    for rows in (8, 64, 256):
        lengths = REQUEST_SETS["chat"].lengths(rows)
        ids, mask = synthetic_batches(lengths, rows, shape_config("gte-small"), CPU)[0].inputs.values()

        def pack(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> tuple[torch.Tensor, torch.Tensor]:
            packing = Packing.of(mask, returns_dict=True, find_holes=False)
            return packing.pack(ids), packing.position_ids(CPU)

        packed, positions = pack()
        assert packed[0].equal(ids[mask.bool()]), rows
        assert positions[0].equal((mask.cumsum(1) - 1)[mask.bool()]), rows
        cells.append({"rows": rows, "slots": ids.numel(), "tokens": packed.numel(),
                      "microseconds": milliseconds(pack, 4 * repeats) * 1e3})  # fmt: skip
    return cells


def measure_cell(one: PreTrainedModel, inputs: Inputs, expected: torch.Tensor, repeats: int) -> dict[str, Any]:
    """One model on one batch; without times if its outputs are not sdpa's."""
    graphed, valid, row = graphs_of(one), inputs["attention_mask"].bool().to(DEVICE), max(1, repeats // 2)
    given = {place: _to(inputs, device) for place, device in PLACES.items()}

    def run_from(place: str) -> Callable[[], Any]:
        # Without hooks of ours, inputs are moved by whoever calls.
        return lambda: one(**(given[place] if graphed is not None else _to(given[place], DEVICE)))

    runs, found = {place: run_from(place) for place in PLACES}, dict[str, Any]()
    if graphed is not None:
        before = graphed.statistics.compile_seconds
        found["first_forward_s"] = milliseconds(runs["cpu"], 1, row=1) / 1e3
        found["compile_s"] = graphed.statistics.compile_seconds - before
        # Kernels are loaded and compiled by now: what is left is the capture.
        graphed.reset()
        found["captured_again_s"] = milliseconds(runs["cpu"], 1, row=1) / 1e3
        found["without_graphs_because"] = graphed.refusal()
    outputs = {place: run().last_hidden_state[valid].double() for place, run in runs.items()}
    errors = {place: float((ours - expected).norm() / expected.norm()) for place, ours in outputs.items()}
    found["error_against_sdpa"] = errors
    has_graph = graphed is not None and bool(graphed._graphs)
    is_as_asked_for = has_graph or graphed is None or DEVICE.type == "cpu"
    found["passed"] = is_as_asked_for and all(error < ERROR_BOUND for error in errors.values())
    if not found["passed"]:
        return found
    for run in (*runs.values(), *runs.values()):
        run()
    found["host_ms"] = {place: milliseconds(run, repeats) for place, run in runs.items()}
    found["in_a_row_ms"] = {place: milliseconds(run, 5, row) for place, run in runs.items()}
    if graphed is None:
        return found
    captured = graphed.statistics.captured
    if has_graph:
        # That of the last forward.
        found["replay_ms"] = milliseconds(next(reversed(graphed._graphs.values())).graph.replay, 5, row)
    found["parts_us"] = {place: microseconds_by_part(one, given[place], repeats) for place in PLACES}
    # Else the model with timers was another one to its graphs, and the parts are those of a capture.
    found["passed"] = graphed.statistics.captured == captured
    return {**found, "statistics": asdict(graphed.statistics)}


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shapes", default="gte-small,bge-base")
    parser.add_argument("--sets", default="single,chat,bulk")
    parser.add_argument("--seconds", type=float, default=420, help="after which nothing further is begun")
    parser.add_argument("--layers", type=int, help="of the models, for small machines")
    parser.add_argument("--repeats", type=int, default=50, help="forwards of each median and row")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    cells: list[dict[str, Any]] = []
    skipped: list[str] = []
    report: dict[str, Any] = {
        "passed": False, "dtype": str(DTYPE), "layers": options.layers, "environment": describe_environment(),
        "load_average": os.getloadavg(), "packing_alone": packing_alone(options.repeats), "cells": cells,
        "skipped": skipped,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for shape in options.shapes.split(","):
        torch.manual_seed(0)
        # Another model's compiled code counts against how often a forward may be compiled.
        torch.compiler.reset()
        config = shape_config(shape, options.layers)
        with torch.device(DEVICE):
            plain = AutoModel.from_config(config, attn_implementation="sdpa", dtype=DTYPE).eval()
        models = {"sdpa": plain}
        for name, given in (("graphs", GraphOptions()), ("compiled_graphs", GraphOptions(compile=True))):
            models[name] = hf_flashinfer_attn.unpad(twin(plain, "flashinfer"), cuda_graphs=given)
        for requests in options.sets.split(","):
            rows = REQUEST_SETS[requests].batch_size
            batch = synthetic_batches(REQUEST_SETS[requests].lengths(rows), rows, config, CPU)[0]
            on_device = _to(batch.inputs, DEVICE)
            expected = plain(**on_device).last_hidden_state[on_device["attention_mask"].bool()].double()
            for name, one in models.items():
                if time.perf_counter() - start > options.seconds:
                    skipped.append(f"{shape} {requests} {name}")
                    continue
                cell = {"shape": shape, "lengths": requests, "rows": rows, "slots": batch.slots,
                        "tokens": sum(batch.lengths), "model": name}  # fmt: skip
                cells.append({**cell, **measure_cell(one, batch.inputs, expected, options.repeats)})
                print(json.dumps(cells[-1]), flush=True)
                # After each, so that what was interrupted keeps what it has.
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    report["passed"] = not skipped and all(cell["passed"] for cell in cells)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        sys.exit(main())
