"""Short queries and single requests: `unpad`, with and without CUDA graphs, against padded sdpa.

    python benchmarks/measure_short_requests.py --json benchmarks/results/short_requests_0.7.4.json

Shapes of gte-small and bge-base (12 x 32 and 12 x 64 heads), float16, random weights, ids and masks on the CPU, under
`torch.inference_mode()`. Outputs are compared with sdpa's on every batch before anything is timed. Models take turns;
times are of a pass over all batches, whose outputs are read at its end, the best of some after one that captures. The
report also says how FlashInfer's plans were made.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel

import hf_flashinfer_attn
from hf_flashinfer_attn.kernels.wrapper_pool import planning_ways
from hf_flashinfer_attn.tools.bench.contenders import twin
from hf_flashinfer_attn.tools.bench.workload import shape_config
from hf_flashinfer_attn.tools.environment import describe_environment

SHAPES = {"12 x 32": "gte-small", "12 x 64": "bge-base"}
# Rows per batch, batches, and the mean, deviation and range of lengths.
REQUESTS = {
    "short queries": (32, 60, 12.0, 6.0, (3, 40)),
    "single requests": (1, 300, 40.0, 30.0, (4, 200)),
}


def batches(name: str, most: int) -> list[dict[str, torch.Tensor]]:
    rows, count, mean, deviation, (least, most) = REQUESTS[name]
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(min(count, most)):
        lengths = torch.normal(mean, deviation, (rows,), generator=generator).round().clamp(least, most).long()
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        made.append({"input_ids": torch.randint(1000, 30_000, mask.shape, generator=generator) * mask,
                     "attention_mask": mask})  # fmt: skip
    return made


def run(model: PreTrainedModel, batch: dict[str, torch.Tensor], *, on_gpu: bool) -> torch.Tensor:
    moved = {name: value.cuda(non_blocking=True) for name, value in batch.items()} if on_gpu else batch
    hidden: torch.Tensor = model(**moved).last_hidden_state
    return hidden


def measure(shape: str, name: str, passes: int, most: int) -> dict[str, Any]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        plain = AutoModel.from_config(shape_config(SHAPES[shape]), attn_implementation="sdpa", dtype=torch.float16)
    plain.eval()
    models = {
        "sdpa": plain,
        "flashinfer": twin(plain, "flashinfer"),
        "unpad": hf_flashinfer_attn.unpad(twin(plain, "flashinfer")),
        "graphs": hf_flashinfer_attn.unpad(twin(plain, "flashinfer"), cuda_graphs=True),
    }
    on_gpu, requests = {"sdpa", "flashinfer"}, batches(name, most)
    errors = dict.fromkeys(models, 0.0)
    for batch in requests:
        valid = batch["attention_mask"].bool().cuda()
        expected = run(plain, batch, on_gpu=True)[valid].double()
        for model in models:
            output = run(models[model], batch, on_gpu=model in on_gpu)[valid].double()
            errors[model] = max(errors[model], float((output - expected).norm() / expected.norm()))
    assert all(error < 5e-3 for error in errors.values()), errors
    times: dict[str, list[float]] = {model: [] for model in models}
    for _ in range(passes):
        for model in models:
            torch.cuda.synchronize()
            start = time.perf_counter()
            first = [run(models[model], batch, on_gpu=model in on_gpu)[:, 0] for batch in requests]
            torch.cat(first).cpu()
            times[model].append(time.perf_counter() - start)
    statistics = hf_flashinfer_attn.graph_statistics(models["graphs"])
    return {
        "shape": shape, "requests": name, "batches": len(requests), "rows": REQUESTS[name][0],
        "seconds": times, "error_against_sdpa": errors,
        "speedup": {model: min(times["sdpa"]) / min(taken) for model, taken in times.items()},
        "graphs": {"captured": statistics.captured, "replayed": statistics.replayed},
    }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--most-batches", type=int, default=300)
    options = parser.parse_args()
    report: dict[str, Any] = {"environment": describe_environment(), "cells": []}
    for shape in SHAPES:
        for name in REQUESTS:
            report["cells"].append(cell := measure(shape, name, options.passes, options.most_batches))
            print(shape, name, {model: f"{x:.2f}x" for model, x in cell["speedup"].items()}, cell["graphs"], flush=True)
            report["plans"] = planning_ways()
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(report["plans"])


if __name__ == "__main__":
    main()
