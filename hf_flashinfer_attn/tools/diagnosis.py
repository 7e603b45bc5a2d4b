"""`doctor`: this machine, the selected backend and its obstacles, a model's kernels, and their errors."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..attention.select import kernel_for
from ..errors import first_line
from ..kernels import flashinfer
from ..kernels.modules import KernelModule, is_compiled
from ..kernels.wrapper_pool import planning_ways
from ..ragged.band import Band
from ..settings import current_settings
from ..version import __version__
from . import accuracy
from .environment import FOREIGN_ERRORS
from .model_plan import ModelPlan, modules_of, plan_of_config
from .pretrained import reading
from .probes import Probe, probe_cache, probe_compilers, probe_gpus, probe_versions
from .screen import Block, Screen

__all__ = ["Diagnosis", "KernelCheck", "ModelKernel", "Section", "doctor"]

# Allowed error of a kernel, as a multiple of sdpa's.
BUDGET = 1.25


@dataclass(frozen=True, slots=True)
class Section:
    """A named group of probes."""

    name: str
    probes: tuple[Probe, ...]


@dataclass(frozen=True, slots=True)
class KernelCheck:
    """Check of one kernel, or "torch", on random input against float64."""

    kernel: str
    dtype: str
    head_dim: int
    # Such as "causal" or "window (64 before, 64 after)".
    attention: str
    # None if the kernel did not run.
    result: accuracy.KernelError | None
    # Reason if the kernel did not run, or if its error is too large.
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for `json.dumps`."""
        plain = asdict(self)
        del plain["result"]
        return {**plain, "errors": self.result and {**asdict(self.result), "ratio": self.result.ratio}}

    @property
    def cells(self) -> tuple[str, ...]:
        """Cells of a table row."""
        head_dim, figures = str(self.head_dim), ("-", "-", "-")
        if (result := self.result) is not None:
            figures = f"{result.error:.2e}", f"{result.fused_sdpa_error:.2e}", f"{result.ratio:.2f}"
            head_dim += f" -> {result.padded_head_dim}" * (result.padded_head_dim != self.head_dim)
        verdict = "ok" if self.problem is None else "FAILED"
        return self.kernel, self.dtype, head_dim, self.attention, *figures, verdict


_CHECK_HEADER = ("kernel", "dtype", "head_dim", "attention", "error", "sdpa's", "ratio", "")


@dataclass(frozen=True, slots=True)
class ModelKernel:
    """A kernel that a model may need, and whether it is compiled; None if unknown, for example for another GPU."""

    name: str
    compiled: bool | None


@dataclass(frozen=True, slots=True)
class Diagnosis(Screen):
    """Result of `doctor`; `print(diagnosis)` shows one screen.

    Args:
        sections: Versions, GPUs, compilers and the kernel cache.
        device: Device of attention: "cuda:0" or "cpu".
        backend: Selected backend, "flashinfer" or "torch"; None if calls would raise an error.
        obstacles: Reasons why FlashInfer would not run on a GPU here, with the way out; empty if it would.
        plan: Kernels of the model's layers; None without a model.
        kernels: FlashInfer kernels that the model may need.
        checks: Checks of the kernels; empty without `check`.

    Examples:
        >>> from hf_flashinfer_attn import Diagnosis
        >>> Diagnosis(sections=(), device="cpu", backend="torch", obstacles=("there is no NVIDIA driver",)).ready
        False
    """

    sections: tuple[Section, ...]
    device: str
    backend: str | None
    obstacles: tuple[str, ...]
    plan: ModelPlan | None = None
    kernels: tuple[ModelKernel, ...] = ()
    checks: tuple[KernelCheck, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether FlashInfer would run on a GPU here."""
        return not self.obstacles

    def to_dict(self) -> dict[str, object]:
        """Returns plain values, ready for `json.dumps`.

        The value of a failed probe is None; `problems` has the reason, by section and name. Sizes are in bytes.
        """
        probes = _by_name(self.sections)
        return {
            "hf_flashinfer_attn": __version__,
            "ready": self.ready,
            "backend": self.backend,
            "device": self.device,
            "obstacles": list(self.obstacles),
            **{section.name: {probe.name: probe.value for probe in section.probes} for section in self.sections},
            "problems": {name: probe.shown for name, probe in probes.items() if probe.is_problem},
            "model": self.plan and self.plan.to_dict(),
            "model_kernels": {kernel.name: kernel.compiled for kernel in self.kernels},
            "checks": [check.to_dict() for check in self.checks],
        }

    def _blocks(self) -> Iterator[Block]:
        """Yields the blocks."""
        title = f"hf_flashinfer_attn {__version__}\n"
        for section in self.sections:
            rows = [("! " * probe.is_problem + probe.name, probe.shown) for probe in section.probes]
            yield Block(f"{title}\n{section.name}", rows)
            title = ""
        if self.plan is not None:
            table, facts = self.plan._blocks()
            yield table._replace(title=f"\nmodel: {table.title}")
            yield facts._replace(rows=[*facts.rows, *self._facts_of_kernels()])
        if self.checks:
            yield Block(
                "\ncheck: relative errors against float64", [check.cells for check in self.checks], _CHECK_HEADER
            )
            failed = [check for check in self.checks if check.problem is not None]
            yield Block("", [(f"! {one.kernel}, {one.dtype}", f"{one.attention}: {one.problem}") for one in failed])
        verdict = ("! " * (not self.ready) + (self.backend or "none"), self._verdict)
        yield Block("\nbackend", [verdict, *(("", obstacle) for obstacle in self.obstacles)])

    def _facts_of_kernels(self) -> Iterator[tuple[str, str]]:
        missing = [kernel.name for kernel in self.kernels if kernel.compiled is False]
        if missing:
            count = f"{len(missing)} of {len(self.kernels)} not compiled yet (`warmup --model` does it)"
            yield "kernels", f"{count}: {'; '.join(missing)}"
        elif self.kernels and all(kernel.compiled for kernel in self.kernels):
            yield "kernels", "all compiled"
        if self.plan is not None and self.plan.capability is None:
            yield "on another GPU", "--arch 9.0"

    @property
    def _verdict(self) -> str:
        if self.ready:
            return f'"flashinfer" runs FlashInfer\'s kernels here, on {self.device}'
        if self.backend == "flashinfer":
            return f'"flashinfer" would run FlashInfer\'s kernels on {self.device}, but:'
        if self.backend is None:
            return '"flashinfer" would raise an error here:'
        return f'"flashinfer" runs on the torch backend here, on {self.device}:'


def doctor(
    model: str | os.PathLike[str] | PreTrainedConfig | None = None,
    *,
    check: bool = False,
    dtype: torch.dtype | None = None,
    capability: tuple[int, int] | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Diagnosis:
    """Reports the selected backend, and what blocks FlashInfer on a GPU.

    Args:
        model: A folder, Hub id or config. Also reports the kernels of the model's layers; weights are not read.
        check: Whether to compare kernels with float64 on random input: those of the model, or a selection without a
            model. Missing kernels are compiled first.
        dtype: Dtype of the model's weights; by default that of its config if it is half precision, otherwise
            torch.float16.
        capability: Compute capability of the GPU to plan the model for; by default that of this machine's GPU.
        on_step: Called with the name of each step.

    Returns:
        The findings; `print(diagnosis)` shows them. Missing components are reported, not raised.

    Raises:
        FlashInferAttentionError: If the model's config cannot be read.
        ValueError: If `capability` or `dtype` is given without a model.

    Examples:
        >>> import hf_flashinfer_attn
        >>> diagnosis = hf_flashinfer_attn.doctor()
        >>> diagnosis.backend in ("flashinfer", "torch")
        True
        >>> diagnosis.ready or len(diagnosis.obstacles) > 0
        True
    """
    if model is None and (dtype is not None or capability is not None):
        raise ValueError("dtype and capability describe what to plan a model for; pass the model as well.")
    probes = (
        ("versions", "versions of packages and of the driver", probe_versions),
        ("gpu", "GPUs", probe_gpus),
        ("compilers", "compilers", probe_compilers),
        ("cache", "FlashInfer and its kernel cache", probe_cache),
    )
    sections = []
    for name, what, probe in probes:
        on_step(f"looking for {what}")
        sections.append(Section(name, probe()))
    device = _device_here()
    backend, obstacles = _backend_here(device, _by_name(sections))
    plan, kernels = None, []
    if model is not None:
        on_step("planning the model's layers from its config")
        plan = _plan(model, dtype, capability)
        kernels = [ModelKernel(str(one), _is_compiled(one) if capability is None else None) for one in modules_of(plan)]
    checks: list[KernelCheck] = []
    if check:
        checked_on = device if backend == "flashinfer" else torch.device("cpu")
        cases = dict.fromkeys(_cases_here(checked_on) if plan is None or capability is not None else _cases_of(plan))
        for case in cases:
            checks.append(_check(case, checked_on, on_step))
        if backend == "flashinfer":
            on_step("planning each kernel again")
            # A second run of each kernel that passed, to see how FlashInfer plans for new lengths.
            for case in {case.kernel: case for case, check in zip(cases, checks) if check.problem is None}.values():
                case.measure(device)
            ways = planning_ways().items()
            plans = (Probe(kernel, way, way, is_problem=way != "recorded arguments") for kernel, way in ways)
            sections.append(Section("plans", tuple(plans)))
            obstacles += ["a kernel failed its check, see above"] * any(one.problem is not None for one in checks)
    return Diagnosis(tuple(sections), str(device), backend, tuple(obstacles), plan, tuple(kernels), tuple(checks))


def _by_name(sections: Sequence[Section]) -> dict[str, Probe]:
    return {f"{section.name}.{probe.name}": probe for section in sections for probe in section.probes}


def _device_here() -> torch.device:
    try:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    except RuntimeError:
        # A driver that lists GPUs, but cannot be initialised.
        return torch.device("cpu")


def _backend_here(device: torch.device, probes: dict[str, Probe]) -> tuple[str | None, list[str]]:
    """Returns the selected backend, and what blocks FlashInfer on a GPU."""
    try:
        settings = current_settings()
    except ValueError as error:
        return None, [str(error)]
    obstacles = []
    if settings.backend == "torch":
        obstacles.append("backend='torch' is set; use hf_flashinfer_attn.configure(backend='auto').")
    if device.type == "cpu":
        obstacles.append(_reason_without_gpu(probes))
    elif (unavailable := flashinfer.unavailable_reason(device)) is not None:
        obstacles.append("{}. {}".format(*unavailable))
    else:
        obstacles += _reasons_against_compiling(probes)
        return "torch" if settings.backend == "torch" else "flashinfer", obstacles
    return None if settings.backend == "flashinfer" else "torch", obstacles


def _reason_without_gpu(probes: dict[str, Probe]) -> str:
    if torch.version.cuda is None:
        build = "is a ROCm build" if torch.version.hip is not None else "is built without CUDA"
        return f"this torch {build}; install one built with CUDA, on a machine with an NVIDIA GPU."
    if probes["versions.driver"].value is None:
        return "there is no NVIDIA driver: run on a machine with an NVIDIA GPU, or start the container with --gpus all."
    why = "CUDA_VISIBLE_DEVICES hides it" if "gpu.visible" in probes else "the driver may be too old for this torch"
    return f"there is a driver, but torch can use no GPU: {why}."


def _reasons_against_compiling(probes: dict[str, Probe]) -> list[str]:
    """Returns the problems that prevent compiling kernels, or loading compiled ones; none with precompiled kernels."""
    if (folder := probes["cache.folder"]).is_problem:
        return [folder.shown]
    if "jit-cache" in probes["versions.flashinfer"].shown:
        return []
    needed = ["compilers.ninja"]
    kernels = probes.get("cache.kernels")
    if kernels is None or not (kernels.value or {}).get("compiled"):
        # FlashInfer needs ninja even to load compiled kernels, and compilers only for missing ones.
        needed += ["compilers.nvcc", "compilers.C++"]
    return [f"{probes[name].name}: {probes[name].shown}" for name in needed if probes[name].is_problem]


def _plan(
    model: str | os.PathLike[str] | PreTrainedConfig, dtype: torch.dtype | None, capability: tuple[int, int] | None
) -> ModelPlan:
    if isinstance(model, PreTrainedConfig):
        config = model
    else:
        with reading(model):
            config = AutoConfig.from_pretrained(model)
    if dtype is None:
        named = getattr(config, "dtype", None)
        dtype = named if named in flashinfer.DTYPES else torch.float16
    return plan_of_config(config, dtype=dtype, capability=capability)


def _is_compiled(module: KernelModule) -> bool | None:
    try:
        return is_compiled(module)
    except FOREIGN_ERRORS:
        # A probe of the cache reports the reason.
        return None


class _Case(NamedTuple):
    """Arguments of `measure_kernel_error`."""

    kernel: flashinfer.Kernel | None
    dtype: torch.dtype
    head_dim: int
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    biased: bool = False

    def measure(self, device: torch.device) -> accuracy.KernelError:
        return accuracy.measure_kernel_error(**self._asdict(), device=device)


def _check(case: _Case, device: torch.device, on_step: Callable[[str], None]) -> KernelCheck:
    name, dtype = case.kernel or "torch", str(case.dtype).removeprefix("torch.")
    softcap = "" if case.softcap is None else f", softcap {case.softcap:g}"
    attention = Band(case.left, case.right).name + softcap + ", bias" * case.biased
    on_step(f"checking {name}, {dtype}, head_dim {case.head_dim}, {attention}")
    result, problem = None, None
    try:
        result = case.measure(device)
        # "not <=", so that NaN fails too.
        if not result.ratio <= BUDGET:
            problem = f"{result.ratio:.2f} times the error of sdpa, expected at most {BUDGET}"
    except FOREIGN_ERRORS as error:
        problem = first_line(error)
    return KernelCheck(name, dtype, case.head_dim, attention, result, problem)


def _cases_here(device: torch.device) -> Iterator[_Case]:
    """Yields a selection for this machine: each kernel in each dtype, with and without head-dim padding."""
    if device.type == "cpu":
        for dtype in (torch.float32, *flashinfer.DTYPES):
            for left, right in ((None, None), (None, 0), (16, 16)):
                yield _Case(None, dtype, 64, left, right)
        return
    capability = torch.cuda.get_device_capability(device)
    dtypes = [dtype for dtype in flashinfer.DTYPES if flashinfer.dtype_reason(dtype, capability) is None]
    for dtype, head_dim, reach in itertools.product(dtypes, (32, 128), (float("inf"), 1.0)):
        kernel = kernel_for(capability, head_dim, reach)
        yield _Case(kernel, dtype, head_dim)
        yield _Case(kernel, dtype, head_dim, right=0)


def _cases_of(plan: ModelPlan) -> Iterator[_Case]:
    for layer in plan.layers:
        for name in layer.kernels:
            if name in ("fa2", "fa3", "auto", "torch"):
                kernel: Any = None if name == "torch" else name
                yield _Case(kernel, plan.dtype, layer.head_dim, layer.left, layer.right, layer.softcap, layer.biased)
