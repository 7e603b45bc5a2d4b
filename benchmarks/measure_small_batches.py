"""From what size on a padded batch is worth a plan, a gather and a scatter, and not just a mask.

    python benchmarks/measure_small_batches.py --json benchmarks/results/small_batches.json

Whole forwards of the shapes of encoders, over batches of a few requests and over many short ones: sdpa; ours with
torch's own kernel and a padding mask ("native"); and ours with a plan, a gather and a scatter ("planned"). Outputs are
checked against sdpa's before anything is timed. Times are of 20 forwards in a row, as in a bulk job, medians of five.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedModel

import hf_flashinfer_attn  # noqa: F401 - registers it
from hf_flashinfer_attn.attention import select
from hf_flashinfer_attn.tools.bench.contenders import twin
from hf_flashinfer_attn.tools.bench.workload import shape_config
from hf_flashinfer_attn.tools.environment import describe_environment

SHAPES = ("gte-small", "bge-base", "bge-large")
# Rows, and the longest of them; the others are shorter.
BATCHES = (
    (8, 64), (8, 128), (8, 192), (8, 256), (8, 384), (8, 512), (32, 128), (32, 256), (64, 256), (256, 16), (256, 32),
    (256, 48), (256, 64), (256, 96), (256, 128),
)  # fmt: skip
ALWAYS, NEVER = 1 << 62, 0


def batch_of(rows: int, longest: int, *, is_sorted: bool) -> dict[str, torch.Tensor]:
    shortest = longest - longest // 12 if is_sorted else 1
    lengths = torch.randint(shortest, longest + 1, (rows,))
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = torch.randint(1000, 30_000, mask.shape) * mask
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


def seconds(model: PreTrainedModel, inputs: dict[str, torch.Tensor], forwards: int = 20) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(forwards):
        model(**inputs)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / forwards


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    cells: list[dict[str, object]] = []
    report = {"dtype": "float16", "environment": describe_environment(), "cells": cells}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for shape in SHAPES:
        torch.manual_seed(0)
        config = shape_config(shape)
        with torch.device("cuda"):
            sdpa = AutoModel.from_config(config, attn_implementation="sdpa", dtype=torch.float16).eval()
        ours = twin(sdpa, "flashinfer")
        for rows, longest in BATCHES:
            inputs = batch_of(rows, longest, is_sorted=rows == 256)
            valid = inputs["attention_mask"].bool()
            expected = sdpa(**inputs).last_hidden_state[valid]
            variants = {"sdpa": (sdpa, ALWAYS), "native": (ours, ALWAYS), "planned": (ours, NEVER)}
            times: dict[str, list[float]] = {name: [] for name in variants}
            for name, (model, bound) in variants.items():
                select.SMALL_LOGITS = bound
                for _ in range(3):
                    output = model(**inputs).last_hidden_state[valid]
                error = (output.double() - expected.double()).norm() / expected.double().norm()
                assert error < 5e-3, (shape, rows, longest, name, float(error))
            for _ in range(5):
                for name, (model, bound) in variants.items():
                    select.SMALL_LOGITS = bound
                    times[name].append(seconds(model, inputs))
            found = {name: statistics.median(measured) * 1e3 for name, measured in times.items()}
            logits = rows * config.num_attention_heads * longest**2
            cells.append(
                {"shape": shape, "rows": rows, "longest": longest, "logits_per_layer": logits,
                 "padded_fraction": 1 - float(valid.float().mean()), "forward_ms": found}
            )  # fmt: skip
            # After each, so that what was interrupted keeps what it has.
            options.json.write_text(json.dumps(report, indent=1) + "\n")
            times_text = "  ".join(f"{name} {value:7.2f}" for name, value in found.items())
            print(
                f"{shape:10s} {rows:4d} x {longest:4d}  {logits / 2**26:8.2f} x 2^26 logits  ms: {times_text}",
                flush=True,
            )
        del sdpa, ours


if __name__ == "__main__":
    main()
