"""First-use compilation of FlashInfer's kernels: logged, once per process, in the foreground or the background.

FlashInfer's `JitSpec` writes the build files and locks them, so FlashInfer later finds its modules up to date. This
file runs ninja itself, since `JitSpec.build` has no number of jobs and shows the compiler's output only on failure.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import BackendUnavailableError
from ..log import logger
from ..settings import Settings, current_settings
from .modules import KernelModule, cache_directory, compiled_library

__all__ = [
    "COMPILE_AHEAD",
    "GET_NVCC",
    "NO_NVCC",
    "compile_in_background",
    "compile_module",
    "heartbeat",
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

# Seconds between two log lines during a compilation.
HEARTBEAT = 10.0
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
# Compiler messages about missing parts of the system, and how to resolve them.
_CURES = {
    "cannot find -lcuda:": "The linker found no libcuda: install the driver or the CUDA toolkit's stubs, and name "
    "their folder with FLASHINFER_EXTRA_LDFLAGS=-L/usr/local/cuda/lib64/stubs. ",
    "cannot find -lcudart": "The linker found no libcudart: name the CUDA toolkit's folder with CUDA_HOME. ",
    "curand_kernel.h": "Install cuRAND's headers, and name their folder with CPATH. ",
    "Unsupported gpu architecture": "This nvcc is older than the GPU: install a newer CUDA toolkit. ",
}
# Excludes ninja's own lines, and flags whose names contain "error".
_DIAGNOSTIC = re.compile(r"^(?!\[\d+/).*?((?:fatal|error)(?: error)?\s*:.*|cannot find -l.*)$", re.M | re.I)
OnStep = Callable[[int, int], None]


def nvcc_path() -> Path | None:
    """Returns the nvcc that FlashInfer would run; None if there is none."""
    if (named := os.environ.get("FLASHINFER_NVCC")) is not None:
        path = shutil.which(named)
        return None if path is None else Path(path)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # FlashInfer searches the PATH only if no variable names a toolkit, and tries only one toolkit.
    if home is None:
        on_path = shutil.which("nvcc")
        home = _DEFAULT_HOME if on_path is None else os.path.dirname(os.path.dirname(on_path))
    # String formatting, as in FlashInfer, also for an empty variable.
    nvcc = Path(f"{home}/bin/nvcc")
    return nvcc if nvcc.is_file() else None


@contextmanager
def _building(module: KernelModule) -> Iterator[Any]:
    """Yields FlashInfer's `JitSpec` with its files written; its errors become `BackendUnavailableError`."""
    try:
        spec = module.spec()
        if hasattr(spec, "ninja_path"):
            spec.write_ninja()
        yield spec
    except BackendUnavailableError:
        raise
    except (RuntimeError, OSError) as error:
        message = f"its kernel ({module}) cannot be built: {error}"
        raise BackendUnavailableError("flashinfer", message, _WAY_OUT) from error


def _ninja(spec: Any, *options: str) -> list[str]:
    ninja = shutil.which("ninja")
    if ninja is None:
        raise BackendUnavailableError(
            "flashinfer",
            "there is no ninja on the PATH to compile its kernels with",
            "Install it: pip install ninja, with the environment's bin folder on the PATH.",
        )
    # FlashInfer's folder, which has ninja's build log.
    return [ninja, *options, "-C", str(spec.build_dir.resolve()), "-f", str(spec.ninja_path.resolve())]


def is_up_to_date(module: KernelModule) -> bool:
    """Whether FlashInfer would load a module without compiling; takes about 20 ms."""
    library = compiled_library(module)
    if library is None or not library.is_relative_to(cache_directory()):
        return library is not None
    with _building(module) as spec:
        if not hasattr(spec, "ninja_path"):
            return bool(spec.is_compiled)
        dry_run = subprocess.run(_ninja(spec, "-n"), capture_output=True, text=True, check=False)
    return dry_run.returncode == 0 and "no work to do" in dry_run.stdout


def log_of(module: KernelModule) -> Path:
    """Returns the path of the compiler log."""
    return cache_directory() / module.name / "build.log"


def compile_module(module: KernelModule, *, jobs: int | None = None, on_step: OnStep | None = None) -> float:
    """Compiles a module, unless another process has compiled it meanwhile, and returns the seconds that it took.

    `jobs` is the number of files at a time, by default `MAX_JOBS` or all cores. `on_step` gets the number of compiled
    files and of all files after each file.
    """
    start = time.perf_counter()
    if os.environ.get("FLASHINFER_DISABLE_JIT"):
        raise BackendUnavailableError(
            "flashinfer",
            f"its kernel ({module}) is not compiled, and FLASHINFER_DISABLE_JIT forbids to compile it",
            "Unset FLASHINFER_DISABLE_JIT, or use hf_flashinfer_attn.configure(backend='torch').",
        )
    if nvcc_path() is None:
        raise BackendUnavailableError("flashinfer", NO_NVCC, GET_NVCC)
    num_jobs = str(jobs or os.environ.get("MAX_JOBS", ""))
    # FlashInfer's lock: only one process compiles a module.
    with _building(module) as spec, FileLock(spec.lock_path, thread_local=False):
        if hasattr(spec, "ninja_path"):
            options = ["-v", *(["-j", num_jobs] if num_jobs.isdigit() else [])]
            status = _run(_ninja(spec, *options), log_of(module), on_step)
        else:
            # Another build tool, which FlashInfer runs.
            status = spec.build() or 0
    seconds = time.perf_counter() - start
    if status != 0:
        raise _failure(module, log_of(module), seconds)
    return seconds


def _run(command: list[str], log: Path, on_step: OnStep | None) -> int:
    """Runs ninja, writes its output to a log line by line, and returns its exit status."""
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    with log.open("wb", buffering=0) as file, subprocess.Popen(command, env=environment, **options) as process:
        try:
            for line in process.stdout or ():
                file.write(line)
                if on_step is not None and (step := re.match(rb"\[(\d+)/(\d+)\] ", line)) is not None:
                    on_step(int(step[1]), int(step[2]))
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def _failure(module: KernelModule, log: Path, seconds: float) -> BackendUnavailableError:
    text = log.read_text(encoding="utf-8", errors="replace")
    diagnostic = _DIAGNOSTIC.search(text)
    what = "" if diagnostic is None else f": {diagnostic[1].strip()[:200]}"
    cure = "".join(cure for message, cure in _CURES.items() if message in text)
    message = f"compiling its kernel ({module}) failed after {seconds:.0f} s{what}; the log is {log}"
    return BackendUnavailableError("flashinfer", message, f"{cure}{_WAY_OUT}")


_ready: set[KernelModule] = set()
# Held while a module is checked and compiled.
_locks: dict[KernelModule, threading.Lock] = {}
# Modules that failed to compile, and modules that jit="never" found missing; both are retried under new settings.
_failed: dict[KernelModule, tuple[Settings, BackendUnavailableError]] = {}
_missing: dict[KernelModule, Settings] = {}
_waiting: ContextVar[bool] = ContextVar("hf_flashinfer_attn_waiting", default=False)
_watched: set[str] = set()


def _lock_of(module: KernelModule) -> threading.Lock:
    # `setdefault` is atomic, so two threads get the same lock.
    return _locks.setdefault(module, threading.Lock())


def is_ready(module: KernelModule) -> bool:
    """Whether a module was found compiled earlier in this process; no disk access."""
    return module in _ready


def is_pending(module: KernelModule) -> bool:
    """Whether a module is being compiled in this process."""
    return _lock_of(module).locked()


@contextmanager
def waiting() -> Iterator[None]:
    """Makes this thread wait for kernels inside the block, even with jit="background"."""
    token = _waiting.set(True)
    try:
        yield
    finally:
        _waiting.reset(token)


def is_waiting() -> bool:
    """Whether this thread is in a block of [`waiting`]."""
    return _waiting.get()


@contextmanager
def heartbeat(say: Callable[[], None]) -> Iterator[None]:
    """Calls a function every ten seconds inside the block, in another thread."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT):
            say()

    thread = threading.Thread(target=beat, name="hf_flashinfer_attn-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Elapsed:
    """Formats the time since a compilation began, and the number of compiled files if known."""

    def __init__(self) -> None:
        self._start, self._files = time.perf_counter(), ""

    def step(self, done: int, total: int) -> None:
        self._files = f", {done} of {total} files"

    def __str__(self) -> str:
        return f"{time.perf_counter() - self._start:.0f} s{self._files}"


def _look(module: KernelModule) -> bool:
    """Whether a module is ready; checks the disk unless the result is cached."""
    if module not in _ready and is_up_to_date(module):
        _ready.add(module)
    return module in _ready


def _failure_of(module: KernelModule) -> BackendUnavailableError | None:
    """Returns the error of a failed compilation under the current settings; None without one."""
    settings, error = _failed.get(module, (None, None))
    return error if settings is current_settings() else None


def _compile(module: KernelModule, elapsed: _Elapsed) -> None:
    """Compiles a module and caches the outcome; the caller holds the module's lock."""
    settings = current_settings()
    try:
        compile_module(module, on_step=elapsed.step)
    except BackendUnavailableError as error:
        _failed[module] = settings, error
        raise
    _ready.add(module)


def require(module: KernelModule) -> None:
    """Waits until a module is compiled, with log lines; raises if it cannot be compiled or the settings forbid it."""
    if module in _ready:
        return
    if current_settings().jit == "never":
        if (reason := why_not(module)) is not None:
            raise BackendUnavailableError("flashinfer", reason, COMPILE_AHEAD)
        return
    # One thread compiles and logs; others wait here.
    with _lock_of(module):
        if (error := _failure_of(module)) is not None:
            # A new error, since many threads may raise it, each with its own traceback.
            raise BackendUnavailableError(error.backend, error.reason, error.way_out) from error
        if _look(module):
            return
        logger.warning(
            "compiling FlashInfer's kernel (%s) on its first use, about 20 to 90 s, longer on few cores. "
            "`hf-flashinfer-attn warmup` compiles ahead, configure(jit='background') does not wait. Log: %s",
            module,
            log_of(module),
        )
        elapsed = _Elapsed()
        with heartbeat(lambda: logger.warning("still compiling FlashInfer's kernel (%s): %s", module, elapsed)):
            _compile(module, elapsed)
        logger.warning("compiled FlashInfer's kernel (%s) in %s", module, elapsed)


def compile_in_background(module: KernelModule) -> str | None:
    """Starts a thread that compiles a module, once; returns why the module cannot be used yet, or None if it can."""
    lock = _lock_of(module)
    with ExitStack() as held:
        if module not in _ready and lock.acquire(blocking=False):
            held.callback(lock.release)
            try:
                is_done = _failure_of(module) is not None or _look(module)
            except BackendUnavailableError as error:
                _failed[module], is_done = (current_settings(), error), True
                logger.warning("attention stays on the torch backend: %s", error)
            if not is_done:
                logger.warning(
                    "compiling FlashInfer's kernel (%s) in the background; attention runs on the torch backend until "
                    "it is ready. Log: %s",
                    module,
                    log_of(module),
                )
                name = "hf_flashinfer_attn-compile"
                threading.Thread(target=_compile_aside, args=(module, lock), name=name, daemon=True).start()
                # The thread releases the lock.
                held.pop_all()
    if module in _ready:
        return None
    failure = _failure_of(module)
    return f"its kernel ({module}) is being compiled" if failure is None else failure.reason


def _compile_aside(module: KernelModule, lock: threading.Lock) -> None:
    elapsed = _Elapsed()
    try:
        _compile(module, elapsed)
        logger.warning("FlashInfer's kernel (%s) is ready after %s: attention switches to it", module, elapsed)
    except BackendUnavailableError as error:
        logger.warning("attention stays on the torch backend: %s", error)
    finally:
        lock.release()


def why_not(module: KernelModule) -> str | None:
    """Returns why jit="never" forbids a module, None if it is compiled; the disk is checked once per settings."""
    settings = current_settings()
    if module not in _ready and _missing.get(module) is not settings and not _look(module):
        _missing[module] = settings
    if module in _ready:
        return None
    return f"its kernel ({module}) is not compiled, and jit='never' forbids to compile it"


@contextmanager
def watched(name: str) -> Iterator[None]:
    """Logs that the first use of a kernel takes long, for kernels that FlashInfer selects and compiles itself."""
    if name in _watched:
        yield
        return
    elapsed = _Elapsed()
    message = "FlashInfer is still preparing a kernel (%s): %s, most likely compiling"
    try:
        with heartbeat(lambda: logger.warning(message, name, elapsed)):
            yield
    except RuntimeError as error:
        if not str(error).startswith("Ninja build failed"):
            raise
        message = f"its kernel ({name}) cannot be built: {error}"
        raise BackendUnavailableError("flashinfer", message, _WAY_OUT) from error
    _watched.add(name)
