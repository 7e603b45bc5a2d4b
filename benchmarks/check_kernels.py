"""Checks every kernel and head_dim against float64 on a CUDA GPU, and writes what it measured.

python benchmarks/check_kernels.py --json benchmarks/results/kernel_errors.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from hf_flashinfer_attn.kernels.flashinfer import KERNEL_HEAD_DIMS, Kernel
from hf_flashinfer_attn.tools.accuracy import KernelError, measure_kernel_error
from hf_flashinfer_attn.tools.environment import describe_environment

HEAD_DIMS = (8, 16, 24, 26, 32, 48, 64, 72, 80, 96, 112, 120, 128, 192, 256)
DTYPES = (torch.float16, torch.bfloat16)
BUDGET = 1.25


@dataclass(frozen=True)
class Variant:
    """A compiled kernel: windows and softcap are variants of their own, checked at one head_dim and dtype."""

    kernel: Kernel
    head_dim: int
    dtype: torch.dtype
    left: int | None = None
    softcap: float | None = None


WINDOWS = ((7, 0), (64, 64), (5, 3), (None, 9), (12, None))
VARIANTS = ((7, None), (None, 2.0), (7, 2.0))


def compile_kernel(variant: Variant) -> float:
    """Compiles one kernel by using it once; returns the seconds it took."""
    start = time.perf_counter()
    measure_kernel_error(
        variant.kernel,
        variant.head_dim,
        dtype=variant.dtype,
        device=torch.device("cuda"),
        left=variant.left,
        softcap=variant.softcap,
        max_length=16,
    )
    return time.perf_counter() - start


def compile_all(kernels: list[Kernel], workers: int) -> None:
    # fa3 first: its kernels take longest.
    jobs = [Variant(kernel, 64, torch.float16, *extra) for kernel in kernels for extra in VARIANTS]
    jobs += [Variant(kernel, dim, dtype) for kernel in kernels for dim in KERNEL_HEAD_DIMS for dtype in DTYPES]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for job, seconds in zip(jobs, pool.map(compile_kernel, jobs)):
            print(f"{seconds:4.0f} s {job}", flush=True)


def check(kernels: list[Kernel], repeats: int) -> list[KernelError]:
    device = torch.device("cuda")
    errors = []
    for kernel, head_dim, dtype, right in itertools.product(kernels, HEAD_DIMS, DTYPES, (None, 0)):
        heads, kv_heads = ((4, 4), (8, 2))[head_dim % 16 == 0]
        for _ in range(repeats):
            errors.append(
                measure_kernel_error(
                    kernel, head_dim, dtype=dtype, right=right, device=device, num_heads=heads, num_kv_heads=kv_heads
                )
            )
    for kernel, (left, right), softcap in itertools.product(kernels, WINDOWS, (None, 2.0)):
        errors.append(
            measure_kernel_error(
                kernel, 32, dtype=torch.float16, device=device, left=left, right=right, softcap=softcap, num_kv_heads=2
            )
        )
    for kernel, right in itertools.product(kernels, (None, 0)):
        errors.append(measure_kernel_error(kernel, 32, dtype=torch.float16, device=device, right=right, softcap=2.0))
    for kernel, dtype in itertools.product(kernels, DTYPES):
        errors.append(measure_kernel_error(kernel, 192, value_head_dim=128, dtype=dtype, right=0, device=device))
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--kernels", default="fa3,fa2")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--compile-workers", type=int, default=6)
    options = parser.parse_args()
    kernels: list[Kernel] = options.kernels.split(",")
    compile_all(kernels, options.compile_workers)
    errors = check(kernels, options.repeats)
    worst = max(errors, key=lambda error: error.ratio if error.ratio == error.ratio else float("inf"))
    passed = all(error.ratio <= BUDGET for error in errors)
    report = {
        "passed": passed,
        "budget": BUDGET,
        "worst_ratio": worst.ratio,
        "environment": describe_environment(),
        "errors": [{**asdict(error), "ratio": error.ratio} for error in errors],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    for kernel in kernels:
        ratios = [error.ratio for error in errors if error.kernel == kernel]
        plain = [(error.error / error.sdpa_error, error.head_dim) for error in errors if error.kernel == kernel]
        print(f"{kernel}: {len(ratios)} checks, error / error of fused sdpa: worst {max(ratios):.3f}")
        print(f"  error / error of sdpa as called: worst {max(plain)[0]:.3f} at head_dim {max(plain)[1]}")
        missed = sorted({head_dim for ratio, head_dim in plain if ratio > BUDGET})
        print(f"  head_dims above {BUDGET} of sdpa as called: {missed}")
    print("worst:", worst)
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
