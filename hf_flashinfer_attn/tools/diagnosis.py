"""`doctor`: what this machine has, whether FlashInfer would run on it, what a model would use, and how exact it is."""

from __future__ import annotations

import itertools
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any, cast

import torch

from ..errors import BackendUnavailableError, first_line
from ..html_table import html_table
from ..kernels.modules import is_compiled
from ..settings import current_settings
from ..version import __version__
from .model_plan import modules_of
from .pretrained import reading
from .probes import IMPORT_ERRORS, Probe, probe_cache, probe_compilers, probe_gpus, probe_versions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..kernels.flashinfer import Kernel
    from .accuracy import KernelError
    from .model_plan import ModelPlan

__all__ = ["Diagnosis", "KernelCheck", "ModelKernel", "Section", "doctor"]

# The error of a kernel over that of sdpa's, up to which it is as exact.
BUDGET = 1.25
_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Section:
    """Some lines of a diagnosis that belong together."""

    name: str
    probes: tuple[Probe, ...]


@dataclass(frozen=True, slots=True)
class KernelCheck:
    """One kernel on random input against float64.

    Args:
        kernel: "fa2", "fa3", "auto" or "torch".
        dtype: Of the input, such as "float16".
        head_dim: Of query, key and value.
        attention: What was computed, such as "causal" or "window (64 before, 64 after)".
        result: The errors; None if it did not run.
        problem: Why it did not run, or what is wrong with its numbers; None if it is as exact as sdpa.
    """

    kernel: str
    dtype: str
    head_dim: int
    attention: str
    result: KernelError | None
    problem: str | None

    def to_dict(self) -> dict[str, object]:
        """Returns plain values, ready for `json.dumps`."""
        plain: dict[str, object] = {name: getattr(self, name) for name in self.__slots__ if name != "result"}
        plain["errors"] = None if self.result is None else {**asdict(self.result), "ratio": self.result.ratio}
        return plain


@dataclass(frozen=True, slots=True)
class ModelKernel:
    """One kernel that a model may need.

    Args:
        name: Such as "fa3, float16, head_dim 64, window".
        compiled: Whether it is in the kernel cache; None where that is not known, as for another GPU.
    """

    name: str
    compiled: bool | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Result of `doctor`; `print(diagnosis)` shows one screen.

    Args:
        sections: Versions, GPUs, compilers and the kernel cache.
        device: Device that attention would run on: "cuda:0" or "cpu".
        backend: Selected backend, "flashinfer" or "torch"; None if calls would raise an error.
        obstacles: Why FlashInfer would not run on a GPU here, and the way out; empty if it would.
        plan: Kernels of the model's layers; None without a model.
        kernels: FlashInfer kernels that the model may need.
        checks: Errors of the kernels; empty without `check`.

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

        What a probe could not find is None, and `problems` says why, by section and name. Sizes are in bytes.
        """
        problems = {
            f"{section.name}.{probe.name}": probe.shown
            for section in self.sections
            for probe in section.probes
            if probe.is_problem
        }
        return {
            "hf_flashinfer_attn": __version__,
            "ready": self.ready,
            "backend": self.backend,
            "device": self.device,
            "obstacles": list(self.obstacles),
            **{section.name: {probe.name: probe.value for probe in section.probes} for section in self.sections},
            "problems": problems,
            "model": None if self.plan is None else self.plan.to_dict(),
            "model_kernels": {kernel.name: kernel.compiled for kernel in self.kernels},
            "checks": [check.to_dict() for check in self.checks],
        }

    def __str__(self) -> str:
        lines = [f"hf_flashinfer_attn {__version__}"]
        for section in self.sections:
            lines += ["", section.name]
            for probe in section.probes:
                lines += _entry("!" if probe.is_problem else " ", probe.name, probe.shown)
        if self.plan is not None:
            lines += ["", "model", *(f"  {line}" for line in _wrapped(str(self.plan)))]
            if self.plan.capability is None:
                lines.append("  on another GPU: --arch 9.0")
            lines += map("  {}".format, _wrapped(self._kernels))
        if self.checks:
            lines += [
                "",
                "check: relative errors against float64",
                *map("  {}".format, _table(_check_rows(self.checks))),
            ]
            for check in self.checks:
                if check.problem is not None:
                    lines += _entry("!", f"{check.kernel}, {check.dtype}", f"{check.attention}: {check.problem}")
        lines += ["", "backend"]
        lines += _entry(" " if self.ready else "!", self.backend or "none", self._verdict)
        for obstacle in self.obstacles:
            lines += _entry(" ", "", obstacle)
        return "\n".join(lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        parts = [
            html_table(
                ("", "", f"hf_flashinfer_attn {__version__}"),
                [
                    (section.name if at == 0 else "", probe.name, f"{'⚠ ' * probe.is_problem}{probe.shown}")
                    for section in self.sections
                    for at, probe in enumerate(section.probes)
                ],
            )
        ]
        if self.plan is not None:
            parts += [self.plan._repr_html_(), *(f"<div>{escape(line)}</div>" for line in self._kernels.splitlines())]
        if self.checks:
            header, *rows = _check_rows(self.checks)
            problems = [f"{check.kernel}, {check.dtype}: {check.problem}" for check in self.checks if check.problem]
            title = "check: relative errors against float64"
            parts.append(html_table(header, rows, title=title, note="\n".join(problems)))
        parts.append(html_table((), [(obstacle,) for obstacle in self.obstacles], title=f"backend: {self._verdict}"))
        return f"<div>{'<br>'.join(parts)}</div>"

    @property
    def _kernels(self) -> str:
        """Says which kernels of the model are still to be compiled, for the GPUs that FlashInfer compiles for here."""
        missing = [kernel.name for kernel in self.kernels if kernel.compiled is False]
        if not missing:
            known = self.kernels and all(kernel.compiled for kernel in self.kernels)
            return "kernels: all compiled" if known else ""
        count = f"{len(missing)} of {len(self.kernels)} not compiled yet (`warmup --model` does it)"
        return f"kernels: {count}: {'; '.join(missing)}"

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
    """Reports whether FlashInfer would run on a GPU here, and if not, what is missing.

    Args:
        model: A folder, Hub id or config, to report also the kernels of its layers. Weights are not read.
        check: Whether to compare the kernels that would be used here (those of the model, otherwise a selection) with
            float64 on random input. Kernels that are not compiled yet are compiled first.
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
    found = []
    for name, what, probe in probes:
        on_step(f"looking for {what}")
        found.append(Section(name, probe()))
    sections = tuple(found)
    device = _device_here()
    backend, obstacles = _backend_here(device, sections)
    if model is not None:
        on_step("planning the model's layers from its config")
    plan = None if model is None else _plan(model, dtype, capability)
    checks: tuple[KernelCheck, ...] = ()
    if check:
        of_model = plan if plan is not None and capability is None else None
        device_of_checks = device if backend == "flashinfer" else torch.device("cpu")
        cases = tuple(dict.fromkeys(_cases_here(device_of_checks) if of_model is None else _cases_of(of_model)))
        checks = tuple(_checks(device_of_checks, cases, on_step))
        if backend == "flashinfer":
            on_step("planning each kernel again")
            sections += (Section("plans", tuple(_probe_plans(device, cases, checks))),)
        if backend == "flashinfer" and any(one.problem is not None for one in checks):
            obstacles.append("a kernel failed its check, see above")
    kernels = () if plan is None else _model_kernels(plan, of_here=capability is None)
    return Diagnosis(sections, str(device), backend, tuple(obstacles), plan, kernels, checks)


def _device_here() -> torch.device:
    try:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    except RuntimeError:
        # A driver that counts GPUs and does not start.
        return torch.device("cpu")


def _backend_here(device: torch.device, sections: tuple[Section, ...]) -> tuple[str | None, list[str]]:
    """Returns the selected backend, and what blocks FlashInfer on a GPU."""
    from ..kernels.flashinfer import unavailable_reason

    probes = {f"{section.name}.{probe.name}": probe for section in sections for probe in section.probes}
    try:
        settings = current_settings()
    except ValueError as error:
        return None, [str(error)]
    obstacles = []
    if settings.backend == "torch":
        obstacles.append("backend='torch' is set; use hf_flashinfer_attn.configure(backend='auto').")
    if device.type == "cpu":
        obstacles.append(_reason_without_gpu(probes))
        unavailable = None
    else:
        unavailable = unavailable_reason(device)
    if unavailable is not None:
        obstacles.append("{}. {}".format(*unavailable))
    takes_flashinfer = device.type == "cuda" and unavailable is None
    if takes_flashinfer:
        obstacles += _reasons_against_compiling(probes)
    if settings.backend == "torch":
        return "torch", obstacles
    if not takes_flashinfer:
        return None if settings.backend == "flashinfer" else "torch", obstacles
    return "flashinfer", obstacles


def _reason_without_gpu(probes: dict[str, Probe]) -> str:
    if torch.version.cuda is None:
        build = "is a ROCm build" if torch.version.hip is not None else "is built without CUDA"
        return f"this torch {build}; install one built with CUDA, on a machine with an NVIDIA GPU."
    if probes["versions.driver"].value is None:
        return "there is no NVIDIA driver: run on a machine with an NVIDIA GPU, or start the container with --gpus all."
    why = "CUDA_VISIBLE_DEVICES hides it" if "gpu.visible" in probes else "the driver may be too old for this torch"
    return f"there is a driver, but torch can use no GPU: {why}."


def _reasons_against_compiling(probes: dict[str, Probe]) -> list[str]:
    """Says why kernels could not be compiled, or loaded, where they did not come compiled."""
    if (folder := probes["cache.folder"]).is_problem:
        return [folder.shown]
    if "jit-cache" in probes["versions.flashinfer"].shown:
        return []
    needed = ["compilers.ninja"]
    kernels = probes.get("cache.kernels")
    if kernels is None or not cast("dict[str, Any]", kernels.value or {}).get("compiled"):
        # To run what is there, FlashInfer asks ninja, and ninja nobody.
        needed += ["compilers.nvcc", "compilers.C++"]
    return [f"{name.partition('.')[2]}: {probes[name].shown}" for name in needed if probes[name].is_problem]


def _plan(
    model: str | os.PathLike[str] | PreTrainedConfig, dtype: torch.dtype | None, capability: tuple[int, int] | None
) -> ModelPlan:
    from transformers import AutoConfig, PreTrainedConfig

    from ..kernels.flashinfer import DTYPES
    from .model_plan import plan_of_config

    config = model
    if not isinstance(config, PreTrainedConfig):
        with reading(model):
            config = AutoConfig.from_pretrained(model)
    if dtype is None:
        named = getattr(config, "dtype", None)
        dtype = named if named in DTYPES else torch.float16
    return plan_of_config(config, dtype=dtype, capability=capability)


def _model_kernels(plan: ModelPlan, *, of_here: bool) -> tuple[ModelKernel, ...]:
    kernels = []
    for module in modules_of(plan):
        try:
            compiled = is_compiled(module) if of_here else None
        except (*IMPORT_ERRORS, BackendUnavailableError):
            # Why is a line of the cache.
            compiled = None
        kernels.append(ModelKernel(str(module), compiled))
    return tuple(kernels)


@dataclass(frozen=True, slots=True)
class _Case:
    kernel: Kernel | None
    dtype: torch.dtype
    head_dim: int
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    biased: bool = False

    @property
    def attention(self) -> str:
        from ..ragged.band import Band

        softcap = "" if self.softcap is None else f", softcap {self.softcap:g}"
        return f"{Band(self.left, self.right).name}{softcap}{', bias' if self.biased else ''}"

    def measure(self, device: torch.device) -> KernelError:
        from .accuracy import measure_kernel_error

        return measure_kernel_error(
            self.kernel, self.head_dim, dtype=self.dtype, device=device, left=self.left, right=self.right,
            softcap=self.softcap, biased=self.biased,
        )  # fmt: skip


def _probe_plans(device: torch.device, cases: Sequence[_Case], checks: Sequence[KernelCheck]) -> Iterator[Probe]:
    """Says how FlashInfer plans for new lengths; kernels that passed their check run once more to find out."""
    from ..kernels.wrapper_pool import planning_ways

    passed = {case.kernel: case for case, check in zip(cases, checks) if check.problem is None}
    for case in passed.values():
        case.measure(device)
    for kernel, way in planning_ways().items():
        yield Probe(kernel, way, way, is_problem=way != "recorded arguments")


def _checks(device: torch.device, cases: Sequence[_Case], on_step: Callable[[str], None]) -> Iterator[KernelCheck]:
    for case in cases:
        name, dtype = case.kernel or "torch", str(case.dtype).removeprefix("torch.")
        on_step(f"checking {name}, {dtype}, head_dim {case.head_dim}, {case.attention}")
        result, problem = None, None
        try:
            result = case.measure(device)
            # Not the other way round: an error may be NaN.
            if not result.ratio <= BUDGET:
                problem = f"{result.ratio:.2f} times the error of sdpa, expected at most {BUDGET}"
        except (RuntimeError, OSError, ImportError, ValueError, AssertionError) as error:
            problem = first_line(error)
        yield KernelCheck(name, dtype, case.head_dim, case.attention, result, problem)


def _cases_here(device: torch.device) -> Iterator[_Case]:
    """A choice of what would run here: each kernel in each dtype, heads as they are and padded."""
    from ..attention.select import kernel_for
    from ..kernels.flashinfer import DTYPES, dtype_reason

    if device.type == "cpu":
        for dtype in (torch.float32, *DTYPES):
            yield _Case(None, dtype, 64)
            yield _Case(None, dtype, 64, right=0)
            yield _Case(None, dtype, 64, left=16, right=16)
        return
    capability = torch.cuda.get_device_capability(device)
    dtypes = [dtype for dtype in DTYPES if dtype_reason(dtype, capability) is None]
    for dtype, head_dim, keys in itertools.product(dtypes, (32, 128), (float("inf"), 1.0)):
        kernel = kernel_for(capability, head_dim, keys)
        yield _Case(kernel, dtype, head_dim)
        yield _Case(kernel, dtype, head_dim, right=0)


def _cases_of(plan: ModelPlan) -> Iterator[_Case]:
    for layer in plan.layers:
        for name in layer.kernels:
            if name not in ("fa2", "fa3", "auto", "torch"):
                continue
            kernel = None if name == "torch" else cast("Kernel", name)
            yield _Case(kernel, plan.dtype, layer.head_dim, layer.left, layer.right, layer.softcap, layer.biased)


def _check_rows(checks: tuple[KernelCheck, ...]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("kernel", "dtype", "head_dim", "attention", "error", "sdpa's", "ratio", "")]
    for check in checks:
        result = check.result
        figures = ("-", "-", "-")
        head_dim = str(check.head_dim)
        if result is not None:
            figures = f"{result.error:.2e}", f"{result.fused_sdpa_error:.2e}", f"{result.ratio:.2f}"
            if result.padded_head_dim != check.head_dim:
                head_dim += f" -> {result.padded_head_dim}"
        verdict = "ok" if check.problem is None else "FAILED"
        rows.append((check.kernel, check.dtype, head_dim, check.attention, *figures, verdict))
    return rows


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


_NAME_WIDTH = 13


def _entry(mark: str, name: str, text: str) -> list[str]:
    """Returns a line, or several: each line of the text is wrapped and indented."""
    head, indent = f"{mark} {name.ljust(_NAME_WIDTH)} ", " " * (_NAME_WIDTH + 3)
    lines = [
        line
        for part in text.splitlines() or [""]
        # Paths stay whole, to be copied.
        for line in textwrap.wrap(part, _WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)
    ]
    if len(name) > _NAME_WIDTH:
        return [head.rstrip(), *(indent + line for line in lines)]
    return [(head if at == 0 else indent) + line for at, line in enumerate(lines)] or [head.rstrip()]


def _wrapped(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if len(line) <= _WIDTH - 2:
            yield line
        else:
            yield from textwrap.wrap(
                line, _WIDTH - 2, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
