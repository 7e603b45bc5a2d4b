"""Tested versions, and a description of this machine as plain values for JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..version import __version__

__all__ = ["FOREIGN_ERRORS", "TESTED", "describe_environment", "describe_gpu", "installed_version", "versions_tested"]

# Oldest and newest tested version of each distribution. CI tests both, except torch: the oldest was tested on a GPU,
# the newest by `benchmarks/test_newest.sh`. Newer versions are allowed.
TESTED = {
    "transformers": ("5.5.4", "5.24.0"),
    "flashinfer-python": ("0.7.2.post1", "0.7.4"),
    "triton": ("3.6.0", "3.9.0"),
    "torch": ("2.11.0", "2.14.1"),
}
# Errors that other packages, broken installations and the code of models may raise.
FOREIGN_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


def versions_tested() -> str:
    """Returns the tested versions as one line of text."""
    return ", ".join(f"{name} {oldest} to {newest}" for name, (oldest, newest) in TESTED.items())


def describe_environment() -> dict[str, object]:
    """Describes this machine and the installed packages, as plain values for `json.dumps`.

    Packages are looked up, not imported. Missing values are None; a failed GPU query is a string that starts with
    "unknown:".
    """
    gpu = dict.fromkeys(("name", "capability", "memory_gib"))
    try:
        if torch.cuda.is_available():
            gpu = describe_gpu(torch.cuda.current_device())
    except FOREIGN_ERRORS as error:
        gpu = dict.fromkeys(gpu, f"unknown: {type(error).__name__}: {error}")
    return {
        "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hf_flashinfer_attn": __version__,
        "torch": installed_version("torch"),
        "transformers": installed_version("transformers"),
        "flashinfer": installed_version("flashinfer-python"),
        "triton": installed_version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        # Available cores: fewer than the machine's in a container or under a scheduler.
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu["name"],
        "gpu_capability": gpu["capability"],
        "gpu_memory_gib": gpu["memory_gib"],
    }


def describe_gpu(index: int) -> dict[str, object]:
    """Returns name, compute capability and memory in GiB of a GPU, as plain values."""
    gpu = torch.cuda.get_device_properties(index)
    memory = round(gpu.total_memory / 2**30, 1)
    return {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_gib": memory}


def installed_version(distribution: str) -> str | None:
    """Returns the version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    # `platform.processor()` is empty on most Linux systems.
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
