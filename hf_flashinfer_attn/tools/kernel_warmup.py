"""`warmup`: compiles all kernels that a model may need ahead of time, in parallel, with or without a GPU."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ..errors import BackendUnavailableError, FlashInferAttentionError
from ..kernels import flashinfer, jit
from ..kernels.modules import KernelModule, cache_directory
from ..settings import NAME
from ..unpadding import capture_graphs, graph_statistics, unpad
from .model_plan import modules_of, plan_of_config
from .pretrained import reading

__all__ = ["GraphCheck", "WarmedKernel", "WarmupReport", "warmup"]

ARCH_VARIABLE = "FLASHINFER_CUDA_ARCH_LIST"


@dataclass(frozen=True, slots=True)
class WarmedKernel:
    """Result for one kernel."""

    module: KernelModule
    # None if the kernel was already compiled.
    seconds: float | None
    # Reason if compilation failed, with the path of the log.
    error: str | None

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.module}: failed, {self.error}"
        return f"{self.module}: " + ("was there" if self.seconds is None else f"compiled in {self.seconds:.0f} s")


@dataclass(frozen=True, slots=True)
class GraphCheck:
    """Result of capturing a model's CUDA graphs; the graphs were freed after the check."""

    captured: int
    memory_mib: float
    # Duration of `unpad` and `capture_graphs`, with Triton's compilation.
    seconds: float
    # Reason if a capture failed.
    problem: str | None

    def __str__(self) -> str:
        figures = f"graphs: {self.captured} captured in {self.seconds:.1f} s, {self.memory_mib:.0f} MiB of the GPU"
        return figures if self.problem is None else f"{figures}; {self.problem}"


@dataclass(frozen=True, slots=True)
class WarmupReport:
    """Result of `warmup`; `print(report)` shows it.

    Args:
        model_type: Model type of the config.
        archs: Compute capabilities of the kernels, in FlashInfer's notation.
        directory: Folder of the compiled kernels.
        kernels: All kernels that the model may need.
        notes: Reasons why the model needs no kernels, or remarks on kernels that cannot be predicted.
        graphs: Result of capturing graphs; None without `graphs`.
        seconds: Total time.

    Examples:
        >>> from pathlib import Path
        >>> from hf_flashinfer_attn import WarmupReport
        >>> notes = ("it computes attention by itself",)
        >>> report = WarmupReport("deberta", ("9.0a",), Path("cached_ops"), (), notes, None, 0.2)
        >>> report.passed
        True
        >>> print(report)
        kernels of deberta for 9.0a in cached_ops
        note: it computes attention by itself
        0 of 0 kernels are ready after 0 s
    """

    model_type: str
    archs: tuple[str, ...]
    directory: Path
    kernels: tuple[WarmedKernel, ...]
    notes: tuple[str, ...]
    graphs: GraphCheck | None
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all kernels are compiled and all requested graphs were captured."""
        has_graphs = self.graphs is None or self.graphs.problem is None
        return has_graphs and all(kernel.error is None for kernel in self.kernels)

    def __str__(self) -> str:
        ready = sum(kernel.error is None for kernel in self.kernels)
        return "\n".join(
            [
                f"kernels of {self.model_type} for {' '.join(self.archs)} in {self.directory}",
                *(f"  {kernel}" for kernel in self.kernels),
                *(f"note: {note}" for note in self.notes),
                *([] if self.graphs is None else [str(self.graphs)]),
                f"{ready} of {len(self.kernels)} kernels are ready after {self.seconds:.0f} s",
            ]
        )


def warmup(
    model: PreTrainedModel | PreTrainedConfig | str | os.PathLike[str],
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    arch: str | None = None,
    graphs: Iterable[tuple[int, int]] = (),
    workers: int | None = None,
    progress: bool = True,
) -> WarmupReport:
    """Compiles all FlashInfer kernels that a model may need, which otherwise happens on first use.

    Args:
        model: A model, its config, its path or its id; weights are only read for `graphs`.
        dtypes: torch.float16, torch.bfloat16 or both; by default the model's if it is one of these, else float16.
        arch: Compute capability to compile for, such as "8.0" or "9.0a", in a separate process and without a GPU;
            by default those in `FLASHINFER_CUDA_ARCH_LIST`, or those of this machine's GPUs.
        graphs: Numbers of rows and tokens of batches. Captures CUDA graphs of these sizes to check that this works,
            and reports their memory; needs a GPU, and a path or id. The graphs are not kept: a server captures its own
            with `capture_graphs`. Compiled kernels, including Triton's, stay in the caches.
        workers: Number of parallel compilers; by default from cores and memory.
        progress: Whether to show a bar on stderr, or lines if stderr is not a terminal.

    Returns:
        The report. For a failed kernel it has the path of the compiler's log.

    Raises:
        BackendUnavailableError: Without a GPU and `arch`, without nvcc, or without ninja.
        FlashInferAttentionError: If the model or its config cannot be read.
        ValueError: If `arch`, a dtype or a graph size is invalid.

    Examples:
        >>> import hf_flashinfer_attn
        >>> from transformers import BertConfig
        >>> try:
        ...     report = hf_flashinfer_attn.warmup(BertConfig(), arch="5.2")
        ... except hf_flashinfer_attn.BackendUnavailableError as error:
        ...     print(error.reason)
        the GPU has compute capability 5.2, FlashInfer needs 7.5 or newer
    """
    start = time.perf_counter()
    shapes = tuple(graphs)
    if shapes and (arch is not None or not isinstance(model, (str, os.PathLike))):
        raise ValueError("graphs are captured on this machine's GPU, of a path or id; leave arch out, or graphs.")
    if any(rows < 1 or tokens < rows for rows, tokens in shapes):
        raise ValueError(f"graphs={shapes}: expected rows above 0, and at least one token a row.")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: expected a number above 0.")
    config = model.config if isinstance(model, PreTrainedModel) else model
    if not isinstance(config, PreTrainedConfig):
        with reading(config):
            config = AutoConfig.from_pretrained(config)
    archs, chosen = _archs(arch), _dtypes(config, dtypes)
    modules: dict[KernelModule, None] = {}
    notes: dict[str, None] = {}
    for dtype, (major, minor) in product(chosen, map(_capability, archs)):
        plan = plan_of_config(config, dtype=dtype, capability=(major, minor))
        needed = modules_of(plan, dtype)
        modules |= dict.fromkeys(needed)
        if plan.problem is not None:
            notes[f"what its attention needs is not known: {plan.problem}"] = None
        elif not needed:
            reasons = dict.fromkeys(layer.reason or "the settings in force" for layer in plan.layers)
            notes[f"no kernel of FlashInfer serves it in {_named(dtype)}: {'; '.join(reasons)}"] = None
        if any("auto" in layer.kernels for layer in plan.layers):
            notes[f"on {major}.{minor} FlashInfer itself chooses, and may compile more on first use"] = None
    request = tuple(modules), workers or _default_workers(), progress
    if arch is None:
        directory, kernels = cache_directory(), _compile_all(*request)
    else:
        directory, kernels = _compile_elsewhere(arch, request)
    check = _check_graphs(str(model), chosen[0], shapes) if shapes else None
    seconds = time.perf_counter() - start
    return WarmupReport(config.model_type, archs, directory, kernels, tuple(notes), check, seconds)


def _archs(arch: str | None) -> tuple[str, ...]:
    named = os.environ.get(ARCH_VARIABLE) if arch is None else arch
    if named:
        archs = tuple(named.split())
    elif torch.cuda.is_available():
        of_gpus = (torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
        archs = tuple(dict.fromkeys(f"{major}.{minor}" for major, minor in of_gpus))
    else:
        raise BackendUnavailableError(
            "flashinfer",
            "there is no GPU to compile kernels for",
            "Name the compute capability of the GPU that they are for: --arch 9.0a, or warmup(..., arch='9.0a').",
        )
    for one in archs:
        if (reason := flashinfer.capability_reason(_capability(one))) is not None:
            raise BackendUnavailableError("flashinfer", reason, "Use hf_flashinfer_attn.configure(backend='torch').")
    return archs


def _capability(arch: str) -> tuple[int, int]:
    if (match := re.fullmatch(r"(\d+)\.(\d)[af]?", arch)) is None:
        raise ValueError(f"arch={arch!r} is not a compute capability; expected one such as '8.0', '9.0a' or '12.0f'.")
    return int(match[1]), int(match[2])


def _dtypes(config: PreTrainedConfig, dtypes: Sequence[torch.dtype] | None) -> tuple[torch.dtype, ...]:
    if dtypes is None:
        return (config.dtype if config.dtype in flashinfer.DTYPES else torch.float16,)
    if not dtypes or any(dtype not in flashinfer.DTYPES for dtype in dtypes):
        named = ", ".join(map(_named, dtypes))
        raise ValueError(f"dtypes=({named}): expected torch.float16, torch.bfloat16 or both.")
    return tuple(dict.fromkeys(dtypes))


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Memory of one compiler process, a generous estimate.
_COMPILER_GIB = 3


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return cores
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    return max(1, min(cores, free // _COMPILER_GIB))


def _compile_all(modules: Sequence[KernelModule], workers: int, shown: bool) -> tuple[WarmedKernel, ...]:
    """Compiles missing modules in parallel, with progress on stderr: bars on a terminal, lines elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    missing = [module for module in modules if not jit.is_up_to_date(module)]
    if missing and jit.nvcc_path() is None:
        raise BackendUnavailableError("flashinfer", jit.NO_NVCC, jit.GET_NVCC)
    # fa3 first: it takes longest to compile.
    missing.sort(key=lambda module: module.kernel, reverse=True)
    at_once, start = max(1, min(workers, len(missing))), time.perf_counter()
    on_terminal = shown and sys.stderr.isatty()
    bars = Progress(console=Console(stderr=True), transient=True, disable=not on_terminal)
    tasks = {module: bars.add_task(str(module), total=None) for module in missing}

    def say(text: str) -> None:
        if shown and missing:
            print(f"[{time.perf_counter() - start:6.1f} s] {text}", file=sys.stderr, flush=True)

    def beat() -> None:
        done, total = sum(task.completed for task in bars.tasks), sum(task.total or 0 for task in bars.tasks)
        if not on_terminal:
            say(f"compiled {done:.0f} of {total:.0f} files" if total else "compiling the first files")

    def compile_one(module: KernelModule) -> WarmedKernel:
        def step(done: int, total: int) -> None:
            bars.update(tasks[module], completed=done, total=total)

        seconds = error = None
        try:
            seconds = jit.compile_module(module, jobs=max(1, workers // at_once), on_step=step)
        except BackendUnavailableError as failure:
            error = f"{failure.reason}. {failure.way_out}"
        kernel = WarmedKernel(module, seconds, error)
        # Without the reason, which the report shows.
        say(str(kernel) if error is None else f"{module}: failed")
        return kernel

    with bars, jit.heartbeat(beat), ThreadPoolExecutor(at_once) as pool:
        say(f"compiling {len(missing)} of {len(modules)} kernels, with {workers} compilers at a time")
        compiled = {kernel.module: kernel for kernel in pool.map(compile_one, missing)}
    return tuple(compiled.get(module, WarmedKernel(module, None, None)) for module in modules)


def _compile_elsewhere(arch: str, request: tuple[Any, ...]) -> tuple[Path, tuple[WarmedKernel, ...]]:
    """Compiles for another GPU in a subprocess, since FlashInfer reads the compute capability on import."""
    root = str(Path(__file__).parents[2])
    with tempfile.TemporaryDirectory(prefix="hf_flashinfer_attn-") as folder:
        answer = Path(folder) / "answer"
        code = f"import sys; sys.path.append({root!r}); from {__name__} import _answer; _answer({str(answer)!r})"
        environment = {**os.environ, ARCH_VARIABLE: arch}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, input=pickle.dumps(request), env=environment, check=False)
        if not answer.is_file():
            raise BackendUnavailableError(
                "flashinfer",
                f"the process that compiles its kernels for {arch} ended with status {done.returncode}",
                "What it wrote to stderr says why.",
            )
        directory, kernels, error = pickle.loads(answer.read_bytes())
    if error is not None:
        raise BackendUnavailableError("flashinfer", *error)
    return directory, kernels


def _answer(file: str) -> None:
    """Runs in the subprocess: reads a request from stdin, writes the result or error to a file."""
    result: tuple[object, ...]
    try:
        result = cache_directory(), _compile_all(*pickle.load(sys.stdin.buffer)), None
    except BackendUnavailableError as error:
        result = None, None, (error.reason, error.way_out)
    Path(file).write_bytes(pickle.dumps(result))


def _check_graphs(name: str, dtype: torch.dtype, shapes: Sequence[tuple[int, int]]) -> GraphCheck:
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            "flashinfer", "there is no GPU to capture CUDA graphs on", "Leave the graphs out on this machine."
        )
    with reading(name):
        model = AutoModel.from_pretrained(name, attn_implementation=NAME, dtype=dtype)
    model.to("cuda").eval()
    start, problem = time.perf_counter(), None
    try:
        unpad(model, cuda_graphs=True)
        capture_graphs(model, shapes)
    except (ValueError, FlashInferAttentionError) as error:
        problem = str(error)
    torch.cuda.synchronize()
    seconds, statistics = time.perf_counter() - start, graph_statistics(model)
    return GraphCheck(statistics.captured, statistics.memory_bytes / 2**20, seconds, problem)
