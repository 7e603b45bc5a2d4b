"""What a batch of a shape that did not come before costs, against one that did: servers see few shapes twice.

    python benchmarks/measure_new_shapes.py --json benchmarks/results/new_shapes.json

Attention alone with a padding mask and without: torch's own choice of a kernel, and its memory-efficient one called by
name; and whole forwards, padded and not. Each batch has another number of rows and another length. The first time is of
the first call on a shape, until the GPU is done; the second time of the same call again. Medians over shapes. Kernels
were loaded before, by other shapes. Outputs are checked first: attention against float64, forwards against sdpa's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModel

import hf_flashinfer_attn
from hf_flashinfer_attn.bench.contenders import twin
from hf_flashinfer_attn.bench.workload import shape_config
from hf_flashinfer_attn.environment import describe_environment

BACKENDS = {-1: "none", 0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN"}
# Heads, head_dim.
HEADS = ((12, 32), (12, 64))
# The first three warm up.
BATCHES = ((3, 40), (5, 120), (9, 300), (8, 57), (7, 83), (8, 131), (6, 189), (8, 244), (8, 333), (11, 409), (16, 95),
           (21, 151), (32, 203), (48, 119), (64, 77))  # fmt: skip
WARM = 3


def timed(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def first_and_second(run: Callable[[], Any]) -> dict[str, float]:
    first = timed(run)
    return {"first_ms": first, "second_ms": statistics.median(timed(run) for _ in range(7))}


def over(cells: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(cell[name] for cell in cells) for name in ("first_ms", "second_ms")}


def attention(heads: int, dim: int, masked: bool) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {"torch's choice": [], "memory-efficient": []}
    for at, (rows, length) in enumerate(BATCHES):
        sides = [torch.randn(rows, length, heads, dim, device="cuda", dtype=torch.float16).transpose(1, 2)
                 for _ in range(3)]  # fmt: skip
        mask = None
        if masked:
            lengths = torch.randint(1, length + 1, (rows,), device="cuda")
            valid = torch.arange(length, device="cuda") < lengths[:, None]
            least = torch.finfo(torch.float16).min
            mask = torch.full((rows, 1, 1, -(-length // 8) * 8), least, dtype=torch.float16, device="cuda")
            mask = mask[..., :length].masked_fill_(valid[:, None, None], 0)
        whole = None if mask is None else mask.expand(rows, heads, length, length)
        runs: dict[str, Callable[[], torch.Tensor]] = {
            "torch's choice": lambda s=sides, m=mask: F.scaled_dot_product_attention(*s, m, scale=dim**-0.5),
            "memory-efficient": lambda s=sides, m=whole: torch.ops.aten._scaled_dot_product_efficient_attention(
                *s, m, False, 0.0, False, scale=dim**-0.5
            )[0],
        }
        double = [side.double() for side in sides]
        wide = None if mask is None else mask.double()
        expected = F.scaled_dot_product_attention(*double, wide, scale=dim**-0.5)
        for name, run in runs.items():
            cell: dict[str, Any] = first_and_second(run)
            cell["error"] = float((run().double() - expected).norm() / expected.norm())
            assert cell["error"] < 2e-3, (heads, dim, rows, length, name, cell)
            cell["backend"] = "memory-efficient"
            if name != "memory-efficient":
                chosen = torch._fused_sdp_choice(*sides, attn_mask=mask, scale=dim**-0.5)
                cell["backend"] = BACKENDS.get(int(chosen), str(chosen))
            if at >= WARM:
                found[name].append({"rows": rows, "length": length, **cell})
    return [
        {"heads": heads, "head_dim": dim, "masked": masked, "attention": name, **over(cells), "shapes": cells}
        for name, cells in found.items()
    ]


def forwards(shape: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    config = shape_config(shape)
    with torch.device("cuda"):
        plain = AutoModel.from_config(config, attn_implementation="sdpa", dtype=torch.float16).eval()
    models = {
        "sdpa": plain,
        "flashinfer": twin(plain, "flashinfer"),
        "unpad": hf_flashinfer_attn.unpad(twin(plain, "flashinfer")),
        "graphs": hf_flashinfer_attn.unpad(twin(plain, "flashinfer"), cuda_graphs=True),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for at, (rows, length) in enumerate(BATCHES):
        lengths = torch.randint(1, length + 1, (rows,))
        lengths[0] = length
        mask = (torch.arange(length) < lengths[:, None]).long()
        ids = torch.randint(1000, 30_000, mask.shape) * mask
        inputs = {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}
        valid, expected = inputs["attention_mask"].bool(), None
        for name, model in models.items():
            cell: dict[str, Any] = first_and_second(partial(model, **inputs))
            output = model(**inputs).last_hidden_state[valid].double()
            expected = output if expected is None else expected
            cell["error"] = float((output - expected).norm() / expected.norm())
            assert cell["error"] < 5e-3, (shape, rows, length, name, cell)
            if at >= WARM:
                found[name].append({"rows": rows, "length": length, **cell})
    return [{"shape": shape, "model": name, **over(cells), "shapes": cells} for name, cells in found.items()]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    report: dict[str, Any] = {"environment": describe_environment(), "attention": [], "forwards": []}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for heads, dim in HEADS:
        for masked in (True, False):
            report["attention"] += attention(heads, dim, masked)
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    for shape in ("gte-small", "bge-base"):
        report["forwards"] += forwards(shape)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    for cell in (*report["attention"], *report["forwards"]):
        print({name: value for name, value in cell.items() if name != "shapes"}, flush=True)


if __name__ == "__main__":
    main()
