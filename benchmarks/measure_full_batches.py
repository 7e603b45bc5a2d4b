"""Attention on batches without padding: our kernels beside torch's own, by length, heads and head_dim.

    python benchmarks/measure_full_batches.py --json benchmarks/results/full_batches.json

`hf_flashinfer_attn.attention.select` decides between them. Microseconds from strided query, key and value to the
padded output, medians; errors of the first row against float64.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from triton.testing import do_bench

from hf_flashinfer_attn import Settings
from hf_flashinfer_attn.attention.plan import FlashInferPlan, plan_flashinfer
from hf_flashinfer_attn.attention.spec import AttentionInputs
from hf_flashinfer_attn.ragged.band import CAUSAL, FULL
from hf_flashinfer_attn.ragged.forward_state import uniform_state
from hf_flashinfer_attn.tools.environment import describe_environment

SHAPES = [(12, 12, 64, False), (16, 16, 64, False), (12, 12, 128, False), (16, 8, 128, True)]
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
TOKENS, MOST_ROWS = 32_768, 256
# Of torch's error in the same dtype.
BUDGET = 1.25


def ways(sides: list[torch.Tensor], is_causal: bool) -> dict[str, Callable[[], torch.Tensor]]:
    query, key, value = sides
    rows, heads, length, head_dim = query.shape
    state = uniform_state(rows, length, length)
    spec = AttentionInputs(query, key, value, CAUSAL if is_causal else FULL, head_dim**-0.5, "", object()).spec()

    def torch_own() -> torch.Tensor:
        output = F.scaled_dot_product_attention(*sides, is_causal=is_causal, enable_gqa=heads != key.shape[1])
        return output.transpose(1, 2).contiguous()

    found: dict[str, Callable[[], torch.Tensor]] = {"sdpa": torch_own}
    for kernel in ("fa2", "fa3"):
        plan = plan_flashinfer(spec, state.layout(), kernel, Settings(backend="flashinfer"), state=state)
        assert isinstance(plan, FlashInferPlan), plan
        found[kernel] = partial(plan, *sides)
    return found


def measure(heads: int, kv_heads: int, head_dim: int, is_causal: bool, length: int) -> dict[str, Any]:
    rows = max(1, min(MOST_ROWS, TOKENS // length))
    sides = [
        torch.randn(rows, length, count, head_dim, device="cuda", dtype=torch.float16).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    ]
    exact = F.scaled_dot_product_attention(
        *(side[:1].double() for side in sides), is_causal=is_causal, enable_gqa=heads != kv_heads
    ).transpose(1, 2)
    cell: dict[str, Any] = {
        "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "causal": is_causal, "rows": rows,
        "length": length, "microseconds": {}, "errors": {},
    }  # fmt: skip
    for name, run in ways(sides, is_causal).items():
        cell["errors"][name] = float((run()[:1].double() - exact).norm() / exact.norm())
        cell["microseconds"][name] = 1e3 * do_bench(run, warmup=5, rep=25, return_mode="median")
    return cell


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    cells = []
    for shape in SHAPES:
        for length in LENGTHS:
            cell = measure(*shape, length)
            cells.append(cell)
            times = "  ".join(f"{name} {value:7.1f}" for name, value in cell["microseconds"].items())
            print(f"{shape} {cell['rows']:4d} x {length:5d}  {times}", flush=True)
    passed = all(error <= BUDGET * cell["errors"]["sdpa"] for cell in cells for error in cell["errors"].values())
    report = {"passed": passed, "dtype": "float16", "environment": describe_environment(), "cells": cells}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
