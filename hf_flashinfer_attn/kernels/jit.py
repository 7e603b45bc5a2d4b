"""First-use compilation of FlashInfer's kernels: logged, once per process, in the foreground or the background.

A module is compiled with the build files that FlashInfer writes and in the folder where it looks, so that it finds
nothing left to do; the compiler's output goes to a log beside it.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailableError
from ..settings import Settings, current_settings
from .biased import biased_module_arguments
from .modules import KernelModule, aot_directories, cache_directory, compiled_library

__all__ = [
    "COMPILE_AHEAD",
    "GET_NVCC",
    "NO_NVCC",
    "compile_in_background",
    "compile_module",
    "is_pending",
    "is_ready",
    "is_up_to_date",
    "is_waiting",
    "log_of",
    "nvcc_path",
    "require",
    "waiting",
    "watched",
    "why_not",
]

logger = logging.getLogger("hf_flashinfer_attn")

# Seconds between two words about a kernel that is being compiled.
HEARTBEAT = 10.0
DISABLED_VARIABLE = "FLASHINFER_DISABLE_JIT"
_WAY_OUT = (
    "Run `hf-flashinfer-attn doctor` to see what is missing, or use hf_flashinfer_attn.configure(backend='torch')."
)
NO_NVCC = (
    "there is no nvcc to compile its kernels with (looked at FLASHINFER_NVCC, CUDA_HOME or CUDA_PATH where one is set, "
    "else at PATH and /usr/local/cuda)"
)
GET_NVCC = "Install the CUDA toolkit, or the package flashinfer-jit-cache with compiled kernels."
COMPILE_AHEAD = (
    "Compile it ahead: `hf-flashinfer-attn warmup --model PATH`; or wait for it: "
    "hf_flashinfer_attn.configure(jit='wait')."
)
_DEFAULT_HOME = "/usr/local/cuda"
# What the compiler says where the machine lacks something, and what to do about it.
_CURES = {
    "cannot find -lcuda:": "The linker found no libcuda: install the driver or the CUDA toolkit's stubs, and name "
    "their folder with FLASHINFER_EXTRA_LDFLAGS=-L/usr/local/cuda/lib64/stubs. ",
    "cannot find -lcudart": "The linker found no libcudart: name the CUDA toolkit's folder with CUDA_HOME. ",
    "curand_kernel.h": "Install cuRAND's headers, and name their folder with CPATH. ",
    "Unsupported gpu architecture": "This nvcc is older than the GPU: install a newer CUDA toolkit. ",
}


def nvcc_path() -> Path | None:
    """Returns the nvcc that FlashInfer would run; None if there is none.

    It takes the toolkit whose nvcc is first on the `PATH` only where neither `CUDA_HOME` nor `CUDA_PATH` names one, and
    looks no further than the one it took. `FLASHINFER_NVCC` names another compiler to use with that toolkit.
    """
    if (named := os.environ.get("FLASHINFER_NVCC")) is not None:
        found = shutil.which(named)
        return None if found is None else Path(found)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is None:
        on_path = shutil.which("nvcc")
        home = _DEFAULT_HOME if on_path is None else os.path.dirname(os.path.dirname(on_path))
    # Not joined as paths are: FlashInfer writes an empty variable into its build files as it is.
    nvcc = Path(f"{home}/bin/nvcc")
    return nvcc if nvcc.is_file() else None


def _build_files_of(module: KernelModule) -> Any:
    """Returns FlashInfer's `JitSpec` of a module, its sources and its build file written."""
    generators = importlib.import_module("flashinfer.jit.attention.modules")
    if module.biased:
        arguments = biased_module_arguments(module.dtype, module.head_dim)
        spec = generators.gen_customize_batch_prefill_module("fa2", *arguments)
    else:
        name = "_gen_batch_prefill_primary_module" if module.kernel == "fa2" else ""
        generate = getattr(generators, name, generators.gen_batch_prefill_module)
        spec = generate(module.kernel, *module.arguments)
    spec.write_ninja()
    return spec


@contextmanager
def _preparation_of(module: KernelModule) -> Iterator[None]:
    """Turns what FlashInfer raises before it compiles anything into an error of ours."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if isinstance(error, BackendUnavailableError):
            raise
        raise BackendUnavailableError(
            "flashinfer", f"its kernel ({module}) cannot be built: {error}", _WAY_OUT
        ) from error


def _ninja(spec: Any, *options: str) -> list[str]:
    ninja = shutil.which("ninja")
    if ninja is None:
        raise BackendUnavailableError(
            "flashinfer",
            "there is no ninja on the PATH to compile its kernels with",
            "Install it: pip install ninja, with the environment's bin folder on the PATH.",
        )
    # In FlashInfer's own folder: ninja's notes of what is done lie there.
    return [ninja, *options, "-C", str(spec.build_dir.resolve()), "-f", str(spec.ninja_path.resolve())]


def is_up_to_date(module: KernelModule) -> bool:
    """Whether FlashInfer would load a module and compile nothing; takes some 20 ms.

    Raises:
        BackendUnavailableError: If FlashInfer could not load it either.
    """
    library = compiled_library(module)
    if library is None:
        return False
    if any(library.is_relative_to(folder) for folder in aot_directories()):
        return True
    with _preparation_of(module):
        command = _ninja(_build_files_of(module), "-n")
        asked = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return asked.returncode == 0 and "no work to do" in asked.stdout


def log_of(module: KernelModule) -> Path:
    """Returns where the output of the compiler of a module goes."""
    return cache_directory() / module.name / "build.log"


def compile_module(
    module: KernelModule, *, jobs: int | None = None, on_step: Callable[[int, int], None] | None = None
) -> float:
    """Compiles a module, or finds that another process did.

    Args:
        module: What to compile.
        jobs: Files to compile at a time; by default what `MAX_JOBS` says, or all cores.
        on_step: Called with files done and files in all, whenever one is done.

    Returns:
        Seconds that it took.

    Raises:
        BackendUnavailableError: If it cannot be compiled; the message gives the path of the log.
    """
    start = time.perf_counter()
    if os.environ.get(DISABLED_VARIABLE):
        raise BackendUnavailableError(
            "flashinfer",
            f"its kernel ({module}) is not compiled, and {DISABLED_VARIABLE} forbids to compile it",
            f"Unset {DISABLED_VARIABLE}, or use hf_flashinfer_attn.configure(backend='torch').",
        )
    from filelock import FileLock

    with _preparation_of(module):
        if nvcc_path() is None:
            raise BackendUnavailableError("flashinfer", NO_NVCC, GET_NVCC)
        spec = _build_files_of(module)
        at_once = jobs if jobs is not None else os.environ.get("MAX_JOBS", "")
        options = ["-v", *(["-j", str(at_once)] if str(at_once).isdigit() else [])]
        command, log = _ninja(spec, *options), log_of(module)
        # FlashInfer's own lock: two processes do not compile the same.
        with FileLock(spec.lock_path, thread_local=False):
            status = _run(command, log, on_step)
    if status != 0:
        raise _failure(module, log, time.perf_counter() - start)
    return time.perf_counter() - start


def _run(command: list[str], log: Path, on_step: Callable[[int, int], None] | None) -> int:
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    with (
        log.open("w", encoding="utf-8", errors="replace") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
            errors="replace", env=environment,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if on_step is not None and (step := re.match(r"\[(\d+)/(\d+)\] ", line)) is not None:
                    on_step(int(step[1]), int(step[2]))
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def _failure(module: KernelModule, log: Path, seconds: float) -> BackendUnavailableError:
    text = log.read_text(encoding="utf-8", errors="replace")
    # Not a line of ninja's, nor a flag with such a name.
    diagnostic = r"^(?!\[\d+/).*?((?:fatal|error)(?: error)?\s*:.*|cannot find -l.*)$"
    said = re.search(diagnostic, text, re.MULTILINE | re.IGNORECASE)
    what = "" if said is None else f": {said[1].strip()[:200]}"
    cure = "".join(cure for sign, cure in _CURES.items() if sign in text)
    return BackendUnavailableError(
        "flashinfer",
        f"compiling its kernel ({module}) failed after {seconds:.0f} s{what}; the log is {log}",
        f"{cure}{_WAY_OUT}",
    )


@dataclass(slots=True)
class _Job:
    """One module being compiled, or that could not be, by the first thread that asked for it.

    Args:
        module: What.
        settings: In force when it began; a failure is believed until they are set again.
    """

    module: KernelModule
    settings: Settings
    start: float = field(default_factory=time.perf_counter)
    done: threading.Event = field(default_factory=threading.Event)
    error: BackendUnavailableError | None = None
    files: tuple[int, int] | None = None

    def run(self) -> None:
        """Compiles; whoever asks then finds the module ready, or the error, or neither if this was interrupted."""
        try:
            compile_module(self.module, on_step=self._count)
            _ready.add(self.module)
        except BackendUnavailableError as error:
            self.error = error
        finally:
            if self.error is None:
                with _lock:
                    _jobs.pop(self.module, None)
            self.done.set()

    def _count(self, done: int, total: int) -> None:
        self.files = done, total

    def elapsed(self) -> str:
        files = "" if self.files is None else f", {self.files[0]} of {self.files[1]} files"
        return f"{time.perf_counter() - self.start:.0f} s{files}"


_ready: set[KernelModule] = set()
_jobs: dict[KernelModule, _Job] = {}
# Modules that "never" found missing, and with what settings.
_missing: dict[KernelModule, Settings] = {}
_lock = threading.Lock()


def is_ready(module: KernelModule) -> bool:
    """Whether a module is known to be compiled: one look into a set."""
    return module in _ready


def is_pending(module: KernelModule) -> bool:
    """Whether a module is being compiled in this process."""
    job = _jobs.get(module)
    return job is not None and not job.done.is_set()


_waiting: ContextVar[bool] = ContextVar("hf_flashinfer_attn_waiting", default=False)


@contextmanager
def waiting() -> Iterator[None]:
    """Has this thread wait for kernels inside the block, with jit="background" too."""
    token = _waiting.set(True)
    try:
        yield
    finally:
        _waiting.reset(token)


def is_waiting() -> bool:
    """Whether this thread is in a block of [`waiting`]."""
    return _waiting.get()


def _look(module: KernelModule) -> bool:
    if module not in _ready and is_up_to_date(module):
        _ready.add(module)
    return module in _ready


def _job_of(module: KernelModule) -> tuple[_Job, bool]:
    """Returns the job of a module, and whether the caller is the one to run it."""
    settings = current_settings()
    with _lock:
        job = _jobs.get(module)
        # `configure` makes new settings, and after it a failed compile is tried again.
        if job is not None and (job.error is None or job.settings is settings):
            return job, False
        job = _jobs[module] = _Job(module, settings)
        return job, True


def require(module: KernelModule) -> None:
    """Returns once a module is compiled, and says what takes so long.

    Raises:
        BackendUnavailableError: If it cannot be compiled, or must not be with jit="never".
    """
    while module not in _ready:
        if current_settings().jit == "never":
            if (reason := why_not(module)) is not None:
                raise BackendUnavailableError("flashinfer", reason, COMPILE_AHEAD)
            return
        job, is_mine = _job_of(module)
        if is_mine and _look_for(job):
            return
        with _heartbeat(job, is_mine):
            if is_mine:
                job.run()
            else:
                job.done.wait()
        if job.error is not None:
            # Raised by many threads, each with a traceback of its own.
            raise BackendUnavailableError(job.error.backend, job.error.reason, job.error.way_out) from job.error


def _look_for(job: _Job) -> bool:
    """Whether a job has nothing to do; it is then over."""
    try:
        found = _look(job.module)
    except BaseException:
        _give_up(job)
        raise
    if found:
        _give_up(job)
    return found


def _give_up(job: _Job) -> None:
    with _lock:
        _jobs.pop(job.module, None)
    job.done.set()


@contextmanager
def _heartbeat(job: _Job, is_mine: bool) -> Iterator[None]:
    """Says that a job is waited for, and how long so far, from a thread of its own."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT):
            logger.warning("still compiling FlashInfer's kernel (%s): %s", job.module, job.elapsed())

    if is_mine:
        logger.warning(
            "compiling FlashInfer's kernel (%s) on its first use, about 20 to 90 s, longer on few cores. "
            "`hf-flashinfer-attn warmup` compiles ahead, configure(jit='background') does not wait. Log: %s",
            job.module,
            log_of(job.module),
        )
    thread = threading.Thread(target=beat, name="hf_flashinfer_attn-heartbeat", daemon=True)
    # One voice per job is enough.
    if is_mine:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if is_mine:
            thread.join()
    if is_mine and job.error is None:
        logger.warning("compiled FlashInfer's kernel (%s) in %s", job.module, job.elapsed())


def compile_in_background(module: KernelModule) -> str | None:
    """Has a thread compile a module, unless one does or did.

    Returns:
        Why the module cannot be used yet, or at all; None if it is ready.
    """
    if module in _ready:
        return None
    job, is_mine = _job_of(module)
    if is_mine:
        try:
            if _look_for(job):
                return None
        except BackendUnavailableError as error:
            job.error = error
            with _lock:
                _jobs[module] = job
            logger.warning("attention stays on the torch backend: %s", error)
            return error.reason
        logger.warning(
            "compiling FlashInfer's kernel (%s) in the background; attention runs on the torch backend until it is "
            "ready. Log: %s",
            module,
            log_of(module),
        )
        threading.Thread(target=_run_aside, args=(job,), name="hf_flashinfer_attn-compile", daemon=True).start()
    if job.error is not None:
        return job.error.reason
    # It may have been done since.
    return None if module in _ready else f"its kernel ({module}) is being compiled"


def _run_aside(job: _Job) -> None:
    job.run()
    if job.error is None:
        logger.warning(
            "FlashInfer's kernel (%s) is ready after %s: attention switches to it", job.module, job.elapsed()
        )
    else:
        logger.warning("attention stays on the torch backend: %s", job.error)


def why_not(module: KernelModule) -> str | None:
    """Returns why a module cannot be used without compiling it; looked up once per settings. None if it can."""
    if module in _ready:
        return None
    settings = current_settings()
    if _missing.get(module) is not settings:
        if _look(module):
            return None
        _missing[module] = settings
    return f"its kernel ({module}) is not compiled, and jit='never' forbids to compile it"


_watched: set[str] = set()


@contextmanager
def watched(name: str) -> Iterator[None]:
    """Says that the first use of a kernel takes long, where only FlashInfer knows what it compiles.

    Args:
        name: Of what is used; watched until a block with this name ends well.

    Raises:
        BackendUnavailableError: If compiling fails.
    """
    if name in _watched:
        yield
        return
    over, start = threading.Event(), time.perf_counter()

    def beat() -> None:
        while not over.wait(HEARTBEAT):
            seconds = time.perf_counter() - start
            logger.warning("FlashInfer is still preparing a kernel (%s): %.0f s, most likely compiling", name, seconds)

    threading.Thread(target=beat, name="hf_flashinfer_attn-heartbeat", daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("Ninja build failed"):
            raise
        raise BackendUnavailableError(
            "flashinfer", f"its kernel ({name}) cannot be built: {error}", _WAY_OUT
        ) from error
    finally:
        over.set()
    _watched.add(name)
