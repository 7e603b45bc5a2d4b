"""What a batch of a shape that did not come before costs, against one that did: servers see few shapes twice.

    python benchmarks/measure_new_shapes.py --json benchmarks/results/new_shapes.json

Attention alone with a padding mask and without: torch's own choice of a kernel, and others of its kernels called by
name; and whole forwards, with padding and without, of "flashinfer" also with torch's choice wherever torch serves. Each
batch has another number of rows or another length. The first time is of the first call on a shape, until the GPU is
done; the second one of the same call again. Medians over shapes. Kernels were loaded before, by other shapes. Outputs
are checked too: attention against float64, forwards against sdpa's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import AutoModel, PreTrainedModel

import hf_flashinfer_attn
from hf_flashinfer_attn.attention import plan
from hf_flashinfer_attn.tools.bench.contenders import twin
from hf_flashinfer_attn.tools.bench.workload import shape_config
from hf_flashinfer_attn.tools.environment import describe_environment

BACKENDS = {-1: "none", 0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN"}
SHAPES = ("gte-small", "bge-base")
CHOICE = "flashinfer, torch's choice"
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
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
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
        aten, scale = torch.ops.aten, dim**-0.5
        efficient = partial(aten._scaled_dot_product_efficient_attention, *sides, whole, False, scale=scale)
        runs: dict[str, Callable[[], Any]] = {
            "torch's choice": partial(F.scaled_dot_product_attention, *sides, mask, scale=scale),
            "memory-efficient": efficient,
        }
        if mask is None:
            runs["flash"] = partial(aten._scaled_dot_product_flash_attention, *sides, scale=scale)
        double = [side.double() for side in sides]
        wide = None if mask is None else mask.double()
        expected = F.scaled_dot_product_attention(*double, wide, scale=dim**-0.5)
        for name, run in runs.items():
            cell: dict[str, Any] = first_and_second(run)
            output = run()
            output = output if isinstance(output, torch.Tensor) else output[0]
            cell["error"] = float((output.double() - expected).norm() / expected.norm())
            assert cell["error"] < 2e-3, (heads, dim, rows, length, name, cell)
            cell["backend"] = name
            if name == "torch's choice":
                chosen = torch._fused_sdp_choice(*sides, attn_mask=mask, scale=dim**-0.5)
                cell["backend"] = BACKENDS.get(int(chosen), str(chosen))
            if at >= WARM:
                found[name].append({"rows": rows, "length": length, **cell})
    return [
        {"heads": heads, "head_dim": dim, "masked": masked, "attention": name, **over(cells), "shapes": cells}
        for name, cells in found.items()
    ]


def run_model(model: PreTrainedModel, inputs: dict[str, torch.Tensor], *, by_name: bool) -> torch.Tensor:
    with ExitStack() as stack:
        if not by_name:
            stack.enter_context(mock.patch.object(plan, "uses_flash_directly", return_value=False))
        hidden: torch.Tensor = model(**inputs).last_hidden_state
        return hidden


def forwards(shape: str, padded: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    config = shape_config(shape)
    with torch.device("cuda"):
        plain = AutoModel.from_config(config, attn_implementation="sdpa", dtype=torch.float16).eval()
    ours = twin(plain, "flashinfer")
    models = {
        "sdpa": plain,
        CHOICE: ours,
        "flashinfer": ours,
        "unpad": hf_flashinfer_attn.unpad(twin(plain, "flashinfer")),
        "graphs": hf_flashinfer_attn.unpad(twin(plain, "flashinfer"), cuda_graphs=True),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    # Lengths of its own for each, since what one has planned another may find.
    apart = len(models) * (2 * SHAPES.index(shape) + padded)
    for at, (rows, longest) in enumerate(BATCHES):
        for place, (name, model) in enumerate(models.items()):
            length = longest + 1 + apart + place
            lengths = torch.randint(1, length + 1, (rows,)) if padded else torch.full((rows,), length)
            lengths[0] = length
            mask = (torch.arange(length) < lengths[:, None]).long()
            ids = torch.randint(1000, 30_000, mask.shape) * mask
            inputs = {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}
            run = partial(run_model, model, inputs, by_name=name != CHOICE)
            cell: dict[str, Any] = first_and_second(run)
            valid = inputs["attention_mask"].bool()
            output, expected = run()[valid].double(), plain(**inputs).last_hidden_state[valid].double()
            cell["error"] = float((output - expected).norm() / expected.norm())
            assert cell["error"] < 5e-3, (shape, rows, length, name, cell)
            if at >= WARM:
                found[name].append({"rows": rows, "length": length, **cell})
    return [
        {"shape": shape, "padded": padded, "model": name, **over(cells), "shapes": cells}
        for name, cells in found.items()
    ]


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
    for shape in SHAPES:
        for padded in (True, False):
            report["forwards"] += forwards(shape, padded)
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    for cell in (*report["attention"], *report["forwards"]):
        print({name: value for name, value in cell.items() if name != "shapes"}, flush=True)


if __name__ == "__main__":
    main()
