"""Attention alone: from strided padded query, key and value to the padded output, beside sdpa with its mask.

    python benchmarks/measure_attention.py --json benchmarks/results/attention_alone.json

Every contender is checked against float64 on the same input before it is timed. Times are medians of single calls
between two CUDA events, after a write that clears the L2 cache, contenders taking turns; `graph` is the time of one of
ten calls in a CUDA graph, without any host. `host_us` is what one call costs the host: many calls of a tiny shape, not
waiting for the GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hf_flashinfer_attn import Settings
from hf_flashinfer_attn.attention.plan import FlashInferPlan, plan_flashinfer
from hf_flashinfer_attn.attention.select import select_kernel
from hf_flashinfer_attn.attention.spec import AttentionInputs
from hf_flashinfer_attn.kernels import flashinfer
from hf_flashinfer_attn.kernels import torch_ragged as reference
from hf_flashinfer_attn.ragged.band import CAUSAL, FULL, Band
from hf_flashinfer_attn.ragged.forward_state import ForwardState, uniform_state
from hf_flashinfer_attn.ragged.layout import RaggedLayout
from hf_flashinfer_attn.tools.bench.workload import chat_lengths
from hf_flashinfer_attn.tools.environment import describe_environment

Call = Callable[[], Any]
SETTINGS = Settings(backend="flashinfer")


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    lengths: str
    rows: int
    causal: bool = False
    window: int | None = None


SHAPES = (
    Shape("12 x 32, 64 uniform in [1, 512]", 12, 12, 32, "uniform:512", 64),
    Shape("12 x 32, 64 of chat", 12, 12, 32, "chat", 64),
    Shape("12 x 32, 8 of chat", 12, 12, 32, "chat", 8),
    Shape("12 x 32, 256 of chat", 12, 12, 32, "chat", 256),
    Shape("12 x 32, 256 of chat, sorted", 12, 12, 32, "sorted", 256),
    Shape("12 x 32, 64 full of 512", 12, 12, 32, "full:512", 64),
    Shape("12 x 64, 64 uniform in [1, 512]", 12, 12, 64, "uniform:512", 64),
    Shape("12 x 64, 64 of chat", 12, 12, 64, "chat", 64),
    Shape("12 x 64, 256 of chat", 12, 12, 64, "chat", 256),
    Shape("12 x 64, 64 full of 512", 12, 12, 64, "full:512", 64),
    Shape("16 x 72, 64 full of 256", 16, 16, 72, "full:256", 64),
    Shape("12 x 64, window 64, 16 uniform in [1, 8192]", 12, 12, 64, "uniform:8192", 16, window=64),
    Shape("16 (8) x 128, causal, 16 uniform in [1, 8192]", 16, 8, 128, "uniform:8192", 16, causal=True),
)


def lengths_of(shape: Shape) -> list[int]:
    kind, _, most = shape.lengths.partition(":")
    generator = torch.Generator().manual_seed(0)
    if kind == "full":
        return [int(most)] * shape.rows
    if kind == "uniform":
        return torch.randint(1, int(most) + 1, (shape.rows,), generator=generator).tolist()
    drawn = chat_lengths(10_000, generator)
    if kind == "sorted":
        drawn = drawn.sort(descending=True).values[len(drawn) // 2 :]
    return drawn[: shape.rows].tolist()


def contenders_of(shape: Shape, dtype: torch.dtype) -> tuple[dict[str, Call], torch.Tensor, torch.Tensor, float]:
    """Returns what to time, the exact output of valid positions, which are valid, and the FLOPs."""
    lengths = lengths_of(shape)
    width = max(lengths)
    valid = (torch.arange(width) < torch.tensor(lengths)[:, None]).cuda()
    sides = [
        torch.randn(shape.rows, width, heads, shape.head_dim, device="cuda", dtype=dtype).transpose(1, 2)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]
    query, key, value = sides
    scale = shape.head_dim**-0.5
    pattern = Band(shape.window, shape.window) if shape.window is not None else CAUSAL if shape.causal else FULL
    is_full = bool(valid.all())
    # As in a model: plans of a padded batch share scratch memory, those of a batch without padding allocate.
    padded = None if is_full else ForwardState(RaggedLayout.from_padding_mask(valid))
    state = uniform_state(shape.rows, width, width) if padded is None else padded
    layout = state.layout()
    mask = None
    if not is_full or pattern != FULL:
        distance = torch.arange(width, device="cuda")[None, :] - torch.arange(width, device="cuda")[:, None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if pattern.left is not None:
            seen &= distance >= -pattern.left
        if pattern.right is not None:
            seen &= distance <= pattern.right
        mask = valid[:, None, None, :] & seen
        mask = mask | ~mask.any(-1, keepdim=True)  # rows that see nothing would be NaN

    def sdpa() -> torch.Tensor:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=shape.heads != shape.kv_heads
        )
        return out.transpose(1, 2).contiguous()

    contenders: dict[str, Call] = {"sdpa": sdpa}

    spec = AttentionInputs(query, key, value, pattern, scale, "", object()).spec()

    def planned(kernel: flashinfer.Kernel) -> FlashInferPlan:
        plan = plan_flashinfer(spec, layout, kernel, SETTINGS, state=state)
        assert isinstance(plan, FlashInferPlan), plan
        return plan

    def ours(kernel: flashinfer.Kernel) -> Call:
        plan = planned(kernel)
        return lambda: plan(query, key, value)

    for kernel in ("fa3", "fa2"):
        contenders[f"ours, {kernel}"] = ours(kernel)
    chosen = planned(select_kernel(spec, layout, SETTINGS)[1])
    packed = chosen.gather(query, key, value)
    output = torch.empty_like(packed[0], memory_format=torch.contiguous_format)
    chosen.kernels.run(*packed, output)
    contenders["ours, gather alone"] = lambda: chosen.gather(query, key, value)
    contenders["ours, kernel alone"] = lambda: chosen.kernels.run(*packed, output)
    contenders["ours, scatter alone"] = lambda: chosen.scatter(output)

    def naive() -> torch.Tensor:
        ragged = [
            layout_side.gather(side.transpose(1, 2))
            for layout_side, side in zip((layout.query, layout.key, layout.key), sides)
        ]
        out = flashinfer.attend(*ragged, layout, left=pattern.left, right=pattern.right, sm_scale=scale, kernel="fa3")
        return layout.query.scatter(out)

    contenders["F.pad + fa3 + crop"] = naive
    doubles = [layout.query.gather(side.transpose(1, 2)).double() for side in sides]
    exact = reference.attend(*doubles, layout, left=pattern.left, right=pattern.right, sm_scale=scale)
    visible = [
        sum(
            min(n, i + 1 if pattern.right == 0 else n if pattern.right is None else i + pattern.right + 1)
            - (0 if pattern.left is None else max(0, i - pattern.left))
            for i in range(n)
        )
        for n in lengths
    ]
    return contenders, exact, valid, 4.0 * shape.head_dim * shape.heads * sum(visible)


def milliseconds(contenders: dict[str, Call], repeats: int) -> dict[str, list[float]]:
    cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        for _ in range(3):
            call()
    for _ in range(repeats):
        for name, call in contenders.items():
            cache.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


def graphed(call: Call) -> float:
    """Milliseconds of GPU time per call: the median over replays of a graph of ten calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(10):
            call()
    found = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 10)
    return statistics.median(found)


def host_microseconds(call: Call, calls: int = 300) -> float:
    """Host time of one call, the median over batches of calls that the GPU keeps up with."""
    found = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(found)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    cells, failed = [], 0
    for shape in SHAPES:
        contenders, exact, valid, flops = contenders_of(shape, dtype)
        errors: dict[str, float] = {}
        for name, call in contenders.items():
            if "alone" not in name:
                output = call()
                errors[name] = float((output[valid].double() - exact).norm() / exact.norm())
                if name != "sdpa" and not errors[name] <= 1.25 * errors["sdpa"]:
                    print(f"WRONG {shape.name}: {name} {errors[name]:.2e}, sdpa {errors['sdpa']:.2e}")
                    failed += 1
        times = milliseconds(contenders, options.repeats)
        graphs = {name: graphed(call) for name, call in contenders.items() if name != "F.pad + fa3 + crop"}
        cell = {
            "shape": asdict(shape),
            "tokens": int(valid.sum()),
            "padded_fraction": 1 - float(valid.float().mean()),
            "flops": flops,
            "errors": errors,
            "ms": {name: statistics.median(found) for name, found in times.items()},
            "ms_spread": {name: [min(found), max(found)] for name, found in times.items()},
            "graph_ms": graphs,
        }
        cells.append(cell)
        print(shape.name)
        for name in contenders:
            print(f"    {name:22s} {cell['ms'][name]:8.3f} ms, in a graph {graphs.get(name, float('nan')):8.3f}")
        del contenders, exact
    tiny = Shape("host", 2, 2, 32, "uniform:16", 4)
    contenders, *_ = contenders_of(tiny, dtype)
    host = {name: host_microseconds(call) for name, call in contenders.items()}
    print("host us per call:", {name: round(value, 1) for name, value in host.items()})
    report = {
        "passed": not failed, "dtype": options.dtype, "environment": describe_environment(), "host_us": host,
        "cells": cells,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
