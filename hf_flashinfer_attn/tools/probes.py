"""What this machine has: one line per question. A probe that fails is a line that says so, and hides no other."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from ..errors import BackendUnavailableError, first_line
from ..kernels.jit import nvcc_path
from ..kernels.modules import KernelModule, cache_directory, compiled_modules, is_compiled
from .environment import TESTED

__all__ = ["IMPORT_ERRORS", "Probe", "probe_cache", "probe_compilers", "probe_gpus", "probe_versions"]


@dataclass(frozen=True, slots=True)
class Probe:
    """One line of a diagnosis.

    Args:
        name: What was asked.
        value: The answer, as plain values for JSON; None where there is none.
        shown: The answer as text, or what is wrong.
        is_problem: Whether to mark it as a problem or a warning.
    """

    name: str
    value: object
    shown: str
    is_problem: bool = False


def probe_versions() -> tuple[Probe, ...]:
    """Returns the versions of Python, of the packages that matter, and of the GPU's driver."""
    system = f"{platform.system()} {platform.machine()}"
    return (
        Probe("python", platform.python_version(), f"{platform.python_version()}, {system}"),
        _package("torch", "torch", _torch_build()),
        _package("transformers", "transformers"),
        _package("flashinfer", "flashinfer-python", _companions()),
        _package("triton", "triton", required=False),
        _driver(),
    )


def probe_gpus() -> tuple[Probe, ...]:
    """Returns the GPUs that torch can use; or why there are none."""
    try:
        torch.cuda.init()
        probes = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability, gib = f"{properties.major}.{properties.minor}", round(properties.total_memory / 2**30, 1)
            value = {"name": properties.name, "capability": capability, "memory_gib": gib}
            shown = f"{properties.name}, compute capability {capability}, {gib} GiB"
            probes.append(Probe(f"cuda:{index}", value, shown))
    except (RuntimeError, AssertionError) as error:
        # The last is how a torch without CUDA says so.
        probes = [Probe("cuda", None, f"none: {first_line(error)}", is_problem=True)]
    if not probes:
        probes = [Probe("cuda", None, "none: torch sees no GPU", is_problem=True)]
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        probes.append(Probe("visible", visible, f"CUDA_VISIBLE_DEVICES={visible!r}"))
    return tuple(probes)


def probe_compilers() -> tuple[Probe, ...]:
    """Returns what FlashInfer compiles its kernels with, and Triton the rest."""
    nvcc = nvcc_path()
    if nvcc is None:
        looked = "FLASHINFER_NVCC, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda"
        first = Probe("nvcc", None, f"none ({looked}): install the CUDA toolkit", is_problem=True)
    else:
        first = _program("nvcc", str(nvcc), r"release (\S+),")
    return (
        first,
        _program("ninja", shutil.which("ninja"), r"(\d\S*)", "none on the PATH: pip install ninja"),
        _program("C++", shutil.which(os.environ.get("CXX") or "c++"), _GNU, "no c++ on the PATH, and no CXX: g++"),
        _program("C", _c_compiler(), _GNU, "no cc, gcc or clang on the PATH, and no CC, which Triton needs"),
    )


def probe_cache() -> tuple[Probe, ...]:
    """Returns where compiled kernels are kept, which there are, how large they are, and the free space there."""
    try:
        folder = cache_directory()
    except BackendUnavailableError as error:
        return (Probe("folder", None, error.reason, is_problem=True),)
    except IMPORT_ERRORS as error:
        return (Probe("folder", None, f"flashinfer cannot be imported: {first_line(error)}", is_problem=True),)
    return (
        Probe("folder", str(folder), f"{_from_home(folder)}{'' if folder.exists() else ', not there yet'}"),
        _guarded("size", lambda: _size(folder)),
        _guarded("kernels", lambda: _kernels(folder)),
        _guarded("free", lambda: _free(folder)),
    )


# Errors an incompatible package may raise on import.
IMPORT_ERRORS = (ImportError, OSError, RuntimeError, AttributeError, ValueError, TypeError, KeyError)
_GNU = r"(?:version|\)) (\d\S*)"


def _guarded(name: str, probe: Callable[[], Probe]) -> Probe:
    try:
        return probe()
    except (*IMPORT_ERRORS, BackendUnavailableError) as error:
        return Probe(name, None, first_line(error), is_problem=True)


def _package(name: str, distribution: str, remark: str = "", *, required: bool = True) -> Probe:
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return Probe(
            name, None, f"not installed: pip install {distribution}" if required else "not installed", required
        )
    try:
        # Without the build tag: 2.13.0+cpu is not newer than 2.13.0.
        public = Version(Version(version).public)
    except InvalidVersion:
        return Probe(name, version, f"{version}, expected a version number", is_problem=True)
    if (wanted := _wanted(distribution)) is not None and not wanted.specifier.contains(public, prereleases=True):
        return Probe(name, version, f"{version}, expected {wanted.specifier}", is_problem=True)
    if public > Version(newest := TESTED[distribution][1]):
        return Probe(name, version, f"{version}{remark}, newer than {newest}, the newest tested", is_problem=True)
    return Probe(name, version, f"{version}{remark}")


def _wanted(distribution: str) -> Requirement | None:
    """Returns what this package asks of another; None where it is not installed itself, or asks for nothing."""
    try:
        lines = importlib.metadata.requires("hf-flashinfer-attn") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.name == distribution and "extra" not in str(requirement.marker):
            return requirement
    return None


def _torch_build() -> str:
    if torch.version.cuda is not None:
        return f", CUDA {torch.version.cuda}"
    return f", ROCm {torch.version.hip}" if torch.version.hip is not None else ", built without CUDA"


def _companions() -> str:
    """Names the packages that bring compiled kernels, with their versions."""
    found = []
    for distribution in ("flashinfer-jit-cache", "flashinfer-cubin"):
        try:
            found.append(f", {distribution} {importlib.metadata.version(distribution)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "".join(found)


def _driver() -> Probe:
    """Asks the kernel module first: containers may lack nvidia-smi."""
    with_version = Path("/proc/driver/nvidia/version")
    try:
        found = re.search(r"(?:Module|x86_64|aarch64)\s+(\d+(?:\.\d+)+)", with_version.read_text())
        if found is not None:
            return Probe("driver", found[1], found[1])
    except OSError:
        pass
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return Probe("driver", None, "none: no NVIDIA kernel module, no nvidia-smi", is_problem=True)
    try:
        command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        return Probe("driver", None, f"{smi} failed: {first_line(error)}", is_problem=True)
    if not lines:
        return Probe("driver", None, f"{smi} knows of no GPU", is_problem=True)
    return Probe("driver", lines[0], lines[0])


def _c_compiler() -> str | None:
    named = os.environ.get("CC")
    return next(
        (path for name in ((named,) if named else ("cc", "gcc", "clang")) if (path := shutil.which(name))), None
    )


def _program(name: str, path: str | None, version: str, missing: str = "") -> Probe:
    """Asks a program for its version."""
    if path is None:
        return Probe(name, None, missing, is_problem=True)
    try:
        ran = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return Probe(name, None, f"{path} does not run: {first_line(error)}", is_problem=True)
    if ran.returncode != 0:
        said = (ran.stderr or ran.stdout).strip().partition("\n")[0]
        return Probe(name, None, f"{path} --version fails with status {ran.returncode}: {said}", is_problem=True)
    found = re.search(version, ran.stdout)
    number = None if found is None else found[1]
    return Probe(name, {"path": path, "version": number}, f"{number or 'of unknown version'}, {path}")


def _from_home(folder: Path) -> str:
    home = Path("~").expanduser()
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)


def _size(folder: Path) -> Probe:
    total = 0
    if folder.exists():
        for path, _, files in os.walk(folder, onerror=_raise):
            total += sum(os.stat(os.path.join(path, file)).st_size for file in files)
    return Probe("size", total, f"{total / 2**20:,.1f} MiB")


def _raise(error: OSError) -> None:
    raise error


def _kernels(folder: Path) -> Probe:
    if folder.exists():
        # What cannot be listed must not look empty.
        os.listdir(folder)
    ours = {module.name: module for module in _known_modules() if is_compiled(module)}
    others = [name for name in compiled_modules() if name not in ours]
    shown = _in_short(ours.values()) or "none: compiled on first use, 20 to 90 s each"
    if others:
        shown += f"\n{len(others)} of FlashInfer's that are not used here"
    return Probe("kernels", {"compiled": [str(module) for module in ours.values()], "others": others}, shown)


def _known_modules() -> Iterator[KernelModule]:
    """Every module that this package may ask for."""
    sizes = (torch.float16, torch.bfloat16), (64, 128, 256)
    for kernel, dtype, head_dim, window, softcap in itertools.product(
        ("fa2", "fa3"), *sizes, (False, True), (False, True)
    ):
        yield KernelModule(kernel, dtype, head_dim, window, softcap)  # type: ignore[arg-type]
    for dtype, head_dim in itertools.product(*sizes):
        yield KernelModule("fa2", dtype, head_dim, window=False, softcap=False, biased=True)


def _in_short(modules: object) -> str:
    """Names modules in a line per kernel and dtype."""
    lines: dict[tuple[str, str], list[str]] = {}
    for text in map(str, modules):  # type: ignore[call-overload]
        kernel, dtype, rest = text.split(", ", 2)
        lines.setdefault((kernel, dtype), []).append(rest.removeprefix("head_dim ").replace(",", " with", 1))
    return "\n".join(f"{kernel}, {dtype}, head_dim {'; '.join(rest)}" for (kernel, dtype), rest in lines.items())


_LITTLE_SPACE = 1 << 30


def _free(folder: Path) -> Probe:
    # Of the file system that the folder will be made on.
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    little = free < _LITTLE_SPACE
    shown = f"{free / 2**30:,.1f} GiB" + (", little for kernels of some 10 MiB each and their build" if little else "")
    if not os.access(there, os.W_OK):
        return Probe("free", free, f"{shown}, and {there} cannot be written to", is_problem=True)
    return Probe("free", free, shown, is_problem=little)
