"""Probes of this machine: versions, GPUs, compilers, kernel cache. A failed probe is reported as a problem."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from ..errors import BackendUnavailableError, first_line
from ..kernels.flashinfer import DTYPES, KERNEL_HEAD_DIMS
from ..kernels.jit import nvcc_path
from ..kernels.modules import KernelModule, cache_directory, compiled_modules, is_compiled
from .environment import FOREIGN_ERRORS, TESTED, describe_gpu, installed_version

__all__ = ["Probe", "probe_cache", "probe_compilers", "probe_gpus", "probe_versions"]

_KERNELS: tuple[Literal["fa2", "fa3"], ...] = ("fa2", "fa3")
_GNU = r"(?:version|\)) (\d\S*)"
LITTLE_SPACE = 1 << 30


@dataclass(frozen=True, slots=True)
class Probe:
    """One line of a diagnosis: a plain value for JSON (None if the probe failed), and its text."""

    name: str
    value: Any
    shown: str
    # An error or a warning.
    is_problem: bool = False


def probe_versions() -> tuple[Probe, ...]:
    """Returns the versions of Python, the relevant packages, and the GPU driver."""
    version, cuda, hip = platform.python_version(), torch.version.cuda, torch.version.hip
    build = f", CUDA {cuda}" if cuda is not None else f", ROCm {hip}" if hip is not None else ", built without CUDA"
    kernels = ((name, installed_version(name)) for name in ("flashinfer-jit-cache", "flashinfer-cubin"))
    return (
        Probe("python", version, f"{version}, {platform.system()} {platform.machine()}"),
        _package("torch", "torch", build),
        _package("transformers", "transformers"),
        _package(
            "flashinfer", "flashinfer-python", "".join(f", {name} {number}" for name, number in kernels if number)
        ),
        _package("triton", "triton", required=False),
        _driver(),
    )


def probe_gpus() -> tuple[Probe, ...]:
    """Returns the GPUs that torch can use, or the reason for none."""
    probes = []
    why = "torch sees no GPU"
    try:
        torch.cuda.init()
        for index in range(torch.cuda.device_count()):
            value = describe_gpu(index)
            shown = "{name}, compute capability {capability}, {memory_gib} GiB".format(**value)
            probes.append(Probe(f"cuda:{index}", value, shown))
    except FOREIGN_ERRORS as error:
        probes, why = [], first_line(error)
    if not probes:
        probes = [Probe("cuda", None, f"none: {why}", is_problem=True)]
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        probes.append(Probe("visible", visible, f"CUDA_VISIBLE_DEVICES={visible!r}"))
    return tuple(probes)


def probe_compilers() -> tuple[Probe, ...]:
    """Returns the compilers of FlashInfer (nvcc, ninja, C++) and of Triton (C)."""
    nvcc = nvcc_path()
    no_nvcc = "none (FLASHINFER_NVCC, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda): install the CUDA toolkit"
    c_compilers = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    c_compiler = next(filter(None, map(shutil.which, c_compilers)), None)
    cxx = shutil.which(os.environ.get("CXX") or "c++")
    return (
        _program("nvcc", str(nvcc) if nvcc else None, r"release (\S+),", no_nvcc),
        _program("ninja", shutil.which("ninja"), r"(\d\S*)", "none on the PATH: pip install ninja"),
        _program("C++", cxx, _GNU, "no c++ on the PATH, and no CXX: g++"),
        _program("C", c_compiler, _GNU, "no cc, gcc or clang on the PATH, and no CC, which Triton needs"),
    )


def probe_cache() -> tuple[Probe, ...]:
    """Returns the kernel cache: folder, size, compiled kernels and free space."""
    try:
        folder = cache_directory()
    except BackendUnavailableError as error:
        return (Probe("folder", None, error.reason, is_problem=True),)
    except FOREIGN_ERRORS as error:
        return (Probe("folder", None, f"flashinfer cannot be imported: {first_line(error)}", is_problem=True),)
    home = Path("~").expanduser()
    shown = f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)
    return (
        Probe("folder", str(folder), shown + ("" if folder.exists() else ", not there yet")),
        *(_guarded(name, probe, folder) for name, probe in (("size", _size), ("kernels", _kernels), ("free", _free))),
    )


def _guarded(name: str, probe: Callable[[Path], Probe], folder: Path) -> Probe:
    try:
        return probe(folder)
    except FOREIGN_ERRORS as error:
        return Probe(name, None, first_line(error), is_problem=True)


def _package(name: str, distribution: str, remark: str = "", *, required: bool = True) -> Probe:
    version = installed_version(distribution)
    if version is None:
        return Probe(name, None, "not installed" + f": pip install {distribution}" * required, required)
    try:
        # Without the local version: 2.13.0+cpu is not newer than 2.13.0.
        public = Version(Version(version).public)
    except InvalidVersion:
        return Probe(name, version, f"{version}, expected a version number", is_problem=True)
    for wanted in _requirements():
        if wanted.name == distribution and not wanted.specifier.contains(public, prereleases=True):
            return Probe(name, version, f"{version}, expected {wanted.specifier}", is_problem=True)
    if public > Version(newest := TESTED[distribution][1]):
        return Probe(name, version, f"{version}{remark}, newer than {newest}, the newest tested", is_problem=True)
    return Probe(name, version, f"{version}{remark}")


def _requirements() -> list[Requirement]:
    """Returns this package's requirements; none if it is not installed."""
    try:
        requirements = map(Requirement, importlib.metadata.requires("hf-flashinfer-attn") or [])
    except importlib.metadata.PackageNotFoundError:
        return []
    return [requirement for requirement in requirements if "extra" not in str(requirement.marker)]


def _driver() -> Probe:
    # The kernel module first: containers may lack nvidia-smi.
    try:
        module = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        module = ""
    match = re.search(r"(?:Module|x86_64|aarch64)\s+(\d+(?:\.\d+)+)", module)
    if match is not None:
        return Probe("driver", match[1], match[1])
    smi, query = shutil.which("nvidia-smi"), ("--query-gpu=driver_version", "--format=csv,noheader")
    probe = _program("driver", smi, r"^(\d\S*)", "none: no NVIDIA kernel module, no nvidia-smi", *query)
    if probe.value is None:
        return probe
    version = probe.value["version"]
    return Probe("driver", version, version or f"{smi} knows of no GPU", is_problem=version is None)


def _program(name: str, path: str | None, version: str, missing: str, *query: str) -> Probe:
    """Returns path and version of a program."""
    if path is None:
        return Probe(name, None, missing, is_problem=True)
    command = [path, *(query or ["--version"])]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return Probe(name, None, f"{path} does not run: {first_line(error)}", is_problem=True)
    if ran.returncode != 0:
        output = (ran.stderr or ran.stdout).strip().partition("\n")[0]
        return Probe(name, None, f"{' '.join(command)} fails with status {ran.returncode}: {output}", is_problem=True)
    match = re.search(version, ran.stdout)
    number = None if match is None else match[1]
    return Probe(name, {"path": path, "version": number}, f"{number or 'of unknown version'}, {path}")


def _size(folder: Path) -> Probe:
    def fail(error: OSError) -> None:
        raise error

    walked = os.walk(folder, onerror=fail) if folder.exists() else ()
    total = sum(os.stat(os.path.join(path, file)).st_size for path, _, files in walked for file in files)
    return Probe("size", total, f"{total / 2**20:,.1f} MiB")


def _kernels(folder: Path) -> Probe:
    if folder.exists():
        # Raises if the folder cannot be listed.
        os.listdir(folder)
    sizes = list(itertools.product(DTYPES, KERNEL_HEAD_DIMS))
    features = list(itertools.product((False, True), (False, True)))
    # All modules that this package may compile.
    usable = [KernelModule(kernel, *size, *flags) for kernel in _KERNELS for size in sizes for flags in features]
    usable += [KernelModule("fa2", *size, window=False, softcap=False, biased=True) for size in sizes]
    ours = {module.name: str(module) for module in usable if is_compiled(module)}
    others = [name for name in compiled_modules() if name not in ours]
    # One line per kernel and dtype.
    lines: defaultdict[str, list[str]] = defaultdict(list)
    for module in ours.values():
        kernel, _, rest = module.partition(", head_dim ")
        lines[kernel].append(rest.replace(",", " with", 1))
    shown = [f"{kernel}, head_dim {'; '.join(rests)}" for kernel, rests in lines.items()]
    shown = shown or ["none: compiled on first use, 20 to 90 s each"]
    shown += [f"{len(others)} of FlashInfer's that are not used here"] * bool(others)
    return Probe("kernels", {"compiled": list(ours.values()), "others": others}, "\n".join(shown))


def _free(folder: Path) -> Probe:
    # The nearest existing parent, if the folder does not exist yet.
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    little = free < LITTLE_SPACE
    shown = f"{free / 2**30:,.1f} GiB" + ", little for kernels of some 10 MiB each and their build" * little
    if not os.access(there, os.W_OK):
        return Probe("free", free, f"{shown}, and {there} cannot be written to", is_problem=True)
    return Probe("free", free, shown, is_problem=little)
