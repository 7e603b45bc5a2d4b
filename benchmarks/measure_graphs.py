"""CUDA graphs of unpadded models: host time of a forward, filler, memory; and the life of a server.

    python benchmarks/measure_graphs.py --json benchmarks/results/graphs.json --seconds 300

Host time is that of one forward with inputs on the CPU, packing included, from the call to its return, while the GPU is
idle; medians of 50. Filler is that of all batches of a request set, and memory what its graphs took of the GPU. The
server gets batches of 1 to 256 rows of random lengths for so many seconds; every answer is compared with that of the
same weights without graphs, and the GPU's memory is looked at all along.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel

import hf_flashinfer_attn
from hf_flashinfer_attn.tools.bench.contenders import twin
from hf_flashinfer_attn.tools.bench.workload import REQUEST_SETS, chat_lengths, shape_config
from hf_flashinfer_attn.tools.environment import describe_environment


def batch_of(lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {"input_ids": torch.randint(1000, 30_000, mask.shape) * mask, "attention_mask": mask}


def graphed(plain: PreTrainedModel) -> PreTrainedModel:
    return hf_flashinfer_attn.unpad(twin(plain, "flashinfer"), cuda_graphs=True)


def host_milliseconds(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    found = []
    for _ in range(53):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(**inputs)
        found.append(time.perf_counter() - start)
    return statistics.median(found[3:]) * 1e3


def request_sets(shape: str, plain: PreTrainedModel) -> list[dict[str, Any]]:
    cells = []
    unpadded = hf_flashinfer_attn.unpad(twin(plain, "flashinfer"))
    for name in ("single", "chat", "bulk", "sorted", "uniform"):
        chosen, model = REQUEST_SETS[name], graphed(plain)
        lengths = torch.tensor(chosen.lengths())
        batches = [batch_of(lengths[at : at + chosen.batch_size]) for at in range(0, len(lengths), chosen.batch_size)]
        for inputs in batches:
            output = model(**inputs).last_hidden_state
        valid = batches[-1]["attention_mask"].bool()
        expected = unpadded(**batches[-1]).last_hidden_state[valid]
        error = float((output[valid].double() - expected.double()).norm() / expected.double().norm())
        assert error < 3e-3, (shape, name, error)
        counted = hf_flashinfer_attn.graph_statistics(model)
        cells.append(
            {"shape": shape, "lengths": name, "batch_size": chosen.batch_size, "batches": len(batches),
             "waste": counted.waste, **asdict(counted), "error_against_ungraphed": error,
             "host_ms": host_milliseconds(model, batches[0]),
             "host_ms_without_graphs": host_milliseconds(unpadded, batches[0])}
        )  # fmt: skip
        print({key: cells[-1][key] for key in ("shape", "lengths", "waste", "captured", "memory_bytes", "host_ms",
                                               "host_ms_without_graphs")}, flush=True)  # fmt: skip
        hf_flashinfer_attn.repad(model)
    return cells


def serve(plain: PreTrainedModel, seconds: float) -> dict[str, Any]:
    model, expected_model = graphed(plain), hf_flashinfer_attn.unpad(twin(plain, "flashinfer"))
    generator = torch.Generator().manual_seed(1)
    memory: list[tuple[float, int, int]] = []
    worst, batches, start = 0.0, 0, time.perf_counter()
    while (now := time.perf_counter() - start) < seconds:
        rows = int(torch.randint(1, 257, (), generator=generator))
        inputs = batch_of(chat_lengths(rows, generator))
        output = model(**inputs).last_hidden_state
        expected = expected_model(**inputs).last_hidden_state
        worst = max(worst, float((output.double() - expected.double()).norm() / expected.double().norm()))
        batches += 1
        del output, expected
        if not memory or now - memory[-1][0] > seconds / 60:
            # What torch keeps for whatever comes is not what graphs take.
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            memory.append((now, total - free, torch.cuda.memory_allocated()))
    later = [used for at, used, _ in memory if at > seconds / 2]
    return {
        "seconds": seconds, "batches": batches, "worst_error_against_ungraphed": worst,
        "memory_used_bytes": memory, "memory_growth_in_second_half_bytes": max(later) - later[0],
        **asdict(hf_flashinfer_attn.graph_statistics(model)),
    }  # fmt: skip


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--shapes", default="gte-small,bge-base")
    options = parser.parse_args()
    report: dict[str, Any] = {"passed": False, "dtype": "float16", "environment": describe_environment(), "cells": []}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for shape in options.shapes.split(","):
        torch.manual_seed(0)
        with torch.device("cuda"):
            plain = AutoModel.from_config(shape_config(shape), attn_implementation="sdpa", dtype=torch.float16).eval()
        report["cells"] += request_sets(shape, plain)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    server = report["server"] = {"shape": shape, **serve(plain, options.seconds)}
    print({key: value for key, value in server.items() if key != "memory_used_bytes"}, flush=True)
    report["passed"] = server["worst_error_against_ungraphed"] < 3e-3
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
