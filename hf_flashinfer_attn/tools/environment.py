"""Tested versions, and a description of the machine as plain values for JSON; a failed probe becomes a value."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from ..version import __version__

__all__ = ["TESTED", "describe_environment", "versions_tested"]

# Oldest and newest tested version of each distribution, installed by CI; torch's oldest was tested on a GPU, its newest
# by `benchmarks/test_newest.sh`. Newer versions are allowed.
TESTED = {
    "transformers": ("5.5.4", "5.24.0"),
    "flashinfer-python": ("0.7.2.post1", "0.7.4"),
    "triton": ("3.6.0", "3.9.0"),
    "torch": ("2.11.0", "2.14.1"),
}


def versions_tested() -> str:
    """Returns the tested versions as one line of text.

    Examples:
        >>> from hf_flashinfer_attn.tools.environment import versions_tested
        >>> "transformers 5.5.4 to " in versions_tested()
        True
    """
    return ", ".join(f"{name} {oldest} to {newest}" for name, (oldest, newest) in TESTED.items())


def describe_environment() -> dict[str, object]:
    """Describes this machine and the packages that matter for a measurement.

    FlashInfer and Triton are looked up in the metadata of installed packages, never imported.

    Returns:
        Plain values, ready for `json.dumps`: the date in UTC, versions of packages (None where one is not installed),
        CPU, logical CPUs of this process, threads of torch, and name, compute capability and memory in GiB of the
        current GPU (None where there is none). A probe that failed gives a string that starts with "unknown:".

    Examples:
        >>> from hf_flashinfer_attn.tools.environment import describe_environment
        >>> environment = describe_environment()
        >>> isinstance(environment["torch"], str) and isinstance(environment["python"], str)
        True
    """
    return {name: _guarded(probe) for name, probe in _PROBES.items()}


def _guarded(probe: Callable[[], object]) -> object:
    try:
        return probe()
    except Exception as error:  # a broken driver or package must not cost the measurement
        return f"unknown: {type(error).__name__}: {error}"


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    # `platform.processor()` is empty on most Linux systems.
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_count() -> int | None:
    # In a container or under a scheduler, fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _cuda_version() -> str | None:
    import torch

    return torch.version.cuda


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _gpu_capability() -> str | None:
    import torch

    return ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else None


def _gpu_memory_gib() -> float | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30, 1)


_PROBES: dict[str, Callable[[], object]] = {
    "date_utc": lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "hf_flashinfer_attn": lambda: __version__,
    "torch": lambda: _installed_version("torch"),
    "transformers": lambda: _installed_version("transformers"),
    "flashinfer": lambda: _installed_version("flashinfer-python"),
    "triton": lambda: _installed_version("triton"),
    "cuda": _cuda_version,
    "python": platform.python_version,
    "system": lambda: f"{platform.system()} {platform.machine()}",
    "cpu": _cpu_name,
    "cpu_count": _cpu_count,
    "torch_threads": _torch_threads,
    "gpu": _gpu_name,
    "gpu_capability": _gpu_capability,
    "gpu_memory_gib": _gpu_memory_gib,
}
