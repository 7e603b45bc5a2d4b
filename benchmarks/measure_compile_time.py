"""How long FlashInfer's kernels take to compile: each alone, as on its first use, and all together, as in `warmup`.

    python benchmarks/measure_compile_time.py --json benchmarks/results/compile_time.json --seconds 500

Everything is compiled anew in empty temporary folders; kernels that were compiled before or came with FlashInfer do not
count, and stay as they are. nvcc must be there. A GPU need not: set FLASHINFER_CUDA_ARCH_LIST=9.0a instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hf_flashinfer_attn import BackendUnavailableError
from hf_flashinfer_attn.kernels import jit
from hf_flashinfer_attn.kernels.modules import KernelModule, compiled_library, compiled_modules
from hf_flashinfer_attn.tools.environment import describe_environment
from hf_flashinfer_attn.tools.kernel_warmup import _archs, _capability, _compile_all, _default_workers

KERNELS = (
    KernelModule("fa2", torch.float16, 64, window=False, softcap=False),
    KernelModule("fa2", torch.float16, 128, window=False, softcap=False),
    KernelModule("fa2", torch.bfloat16, 64, window=True, softcap=False),
    KernelModule("fa2", torch.float16, 64, window=False, softcap=False, biased=True),
    KernelModule("fa3", torch.float16, 64, window=False, softcap=False),
    KernelModule("fa3", torch.float16, 128, window=False, softcap=False),
)
PHASES = ("alone", "together")


@contextmanager
def empty_cache() -> Iterator[None]:
    """Has FlashInfer build in an empty folder, and find no kernel that came compiled."""
    from flashinfer.jit import env

    with tempfile.TemporaryDirectory(prefix="hf_flashinfer_attn-") as folder:
        root = Path(folder)
        changes = {
            "FLASHINFER_WORKSPACE_DIR": root,
            "FLASHINFER_JIT_DIR": root / "cached_ops",
            "FLASHINFER_GEN_SRC_DIR": root / "generated",
            "FLASHINFER_AOT_DIR": root / "none",
            "FLASHINFER_AOT_DIRS": (root / "none",),
            "FLASHINFER_AOT_PROVIDERS": (),
        }
        # FlashInfer looks each of them up there when it needs it, so that its own builds ahead of time can do the same.
        with mock.patch.dict(vars(env), changes):
            assert compiled_modules() == (), f"kernels in an empty folder: {compiled_modules()}"
            yield


def checked(module: KernelModule, seconds: float | None, error: str | None) -> dict[str, Any]:
    """One kernel's entry, after a look whether FlashInfer would load what was built."""
    library = compiled_library(module)
    if error is None and not (seconds is not None and library is not None and jit.is_up_to_date(module)):
        error = f"it was not built anew, or not all of it: {library}"
    size = 0.0 if library is None else library.stat().st_size / 2**20
    return {"kernel": str(module), "seconds": seconds, "library_mib": size, "error": error}


def compile_alone(module: KernelModule, workers: int | None) -> dict[str, Any]:
    files, seconds, error = 0, None, None

    def count(done: int, total: int) -> None:
        nonlocal files
        files = total

    with empty_cache():
        try:
            seconds = jit.compile_module(module, jobs=workers, on_step=count)
        except BackendUnavailableError as failure:
            error = str(failure)
        return {**checked(module, seconds, error), "files": files}


def compile_together(modules: Sequence[KernelModule], workers: int) -> dict[str, Any]:
    with empty_cache():
        start = time.perf_counter()
        compiled = _compile_all(modules, workers, True)
        seconds = time.perf_counter() - start
        kernels = [checked(kernel.module, kernel.seconds, kernel.error) for kernel in compiled]
    return {"seconds": seconds, "workers": workers, "kernels": kernels}


def nvcc_release() -> str:
    nvcc = jit.nvcc_path()
    if nvcc is None:
        raise BackendUnavailableError("flashinfer", jit.NO_NVCC, jit.GET_NVCC)
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    return next((line for line in said.splitlines() if "release" in line), said.strip())


def chosen_kernels(pattern: str, archs: Sequence[str]) -> tuple[KernelModule, ...]:
    """Those of `KERNELS` with a text in their names; without fa3 where it does not run."""
    is_hopper = all(_capability(arch)[0] == 9 for arch in archs)
    return tuple(one for one in KERNELS if pattern in str(one) and (one.kernel != "fa3" or is_hopper))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--workers", type=int, help="compilers at a time; by default as on a first use, as in warmup")
    parser.add_argument("--seconds", type=float, default=500, help="after which no further kernel is started")
    parser.add_argument("--kernels", default="", help="only those with this text in their names, as 'fa2, float16'")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    archs = _archs(None)
    modules = chosen_kernels(options.kernels, archs)
    alone: list[dict[str, Any]] = []
    skipped: list[str] = []
    report: dict[str, Any] = {
        "passed": False, "environment": describe_environment(), "nvcc": nvcc_release(), "archs": archs,
        "max_jobs": os.environ.get("MAX_JOBS"), "workers": options.workers, "alone": alone, "together": None,
        "skipped": skipped,
    }  # fmt: skip

    def write() -> None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")

    def is_late(what: str) -> bool:
        if time.perf_counter() - start <= options.seconds:
            return False
        print(f"{what}: not started, {options.seconds:.0f} s are over", flush=True)
        skipped.append(what)
        return True

    write()
    for module in modules if "alone" in options.phases else ():
        if not is_late(f"alone: {module}"):
            alone.append(compile_alone(module, options.workers))
            print(alone[-1], flush=True)
        write()
    if "together" in options.phases and not is_late("together"):
        report["together"] = compile_together(modules, options.workers or _default_workers())
        print(report["together"], flush=True)
    entries = [*alone, *(report["together"] or {"kernels": []})["kernels"]]
    report["passed"] = bool(entries) and not skipped and all(entry["error"] is None for entry in entries)
    write()
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
