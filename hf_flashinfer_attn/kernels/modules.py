"""FlashInfer's compiled modules: names, folders and build specs. `jit` compiles them.

FlashInfer compiles one module per kernel, dtype and head_dim, with and without a window and softcap, and caches it on
disk. Functions of this module import FlashInfer on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import BackendUnavailableError
from .biased import biased_module_arguments

__all__ = [
    "KernelModule",
    "aot_directories",
    "cache_directory",
    "compiled_library",
    "compiled_modules",
    "is_compiled",
]


@dataclass(frozen=True, slots=True)
class KernelModule:
    """A compiled module of FlashInfer.

    Examples:
        >>> import torch
        >>> from hf_flashinfer_attn.kernels.modules import KernelModule
        >>> print(KernelModule("fa3", torch.float16, 64, window=True, softcap=False))
        fa3, float16, head_dim 64, window
    """

    kernel: Literal["fa2", "fa3"]
    # Of query, key, value and output: torch.float16 or torch.bfloat16.
    dtype: torch.dtype
    # After padding: 64, 128 or 256.
    head_dim: int
    window: bool
    softcap: bool
    # Adds a bias to the logits; only "fa2", without window and softcap.
    biased: bool = False

    def __post_init__(self) -> None:
        if self.biased and (self.kernel != "fa2" or self.window or self.softcap):
            raise ValueError(f"{self}: expected a bias with 'fa2' alone, and neither a window nor softcap.")

    def __str__(self) -> str:
        features = [name for name in ("window", "softcap") if getattr(self, name)] + ["bias"] * self.biased
        return ", ".join([self.kernel, str(self.dtype).removeprefix("torch."), f"head_dim {self.head_dim}", *features])

    @property
    def name(self) -> str:
        """FlashInfer's name of the module, also that of its folder and shared library."""
        if self.biased:
            return str(biased_module_arguments(self.dtype, self.head_dim)[0])
        modules = _flashinfer("attention.modules")
        uri: str = modules.get_batch_prefill_uri(self.kernel, *self.arguments)
        # FlashInfer's wrappers load a variant of fa2 with another name.
        rename = getattr(modules, "_get_batch_prefill_module_uri", None)
        return uri if rename is None or self.kernel != "fa2" else str(rename(uri, self.kernel, "equal", "full"))

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Arguments of FlashInfer's generators after the kernel, for a module without a bias."""
        positions, fp16_products = 0, False
        return (
            *(self.dtype,) * 3, torch.int32, self.head_dim, self.head_dim, positions, self.window, self.softcap,
            fp16_products,
        )  # fmt: skip

    def spec(self) -> Any:
        """Returns FlashInfer's `JitSpec` of the module, and writes its sources."""
        modules = _flashinfer("attention.modules")
        if self.biased:
            arguments = biased_module_arguments(self.dtype, self.head_dim)
            return modules.gen_customize_batch_prefill_module("fa2", *arguments)
        primary = getattr(modules, "_gen_batch_prefill_primary_module", None) if self.kernel == "fa2" else None
        return (primary or modules.gen_batch_prefill_module)(self.kernel, *self.arguments)


def _flashinfer(module: str) -> Any:
    """Returns a module of `flashinfer.jit`; raises BackendUnavailableError if it cannot be imported."""
    if importlib.util.find_spec("flashinfer") is None:
        raise BackendUnavailableError(
            "flashinfer",
            "the package flashinfer is not installed",
            "Install it: pip install flashinfer-python (Linux), or use hf_flashinfer_attn.configure(backend='torch').",
        )
    try:
        return importlib.import_module(f"flashinfer.jit.{module}")
    except OSError as error:
        # FlashInfer creates its folder on import.
        raise BackendUnavailableError(
            "flashinfer",
            f"flashinfer cannot be imported: {error}",
            "FLASHINFER_WORKSPACE_BASE names the folder that it writes to; it must be one that can be written to.",
        ) from error


def cache_directory() -> Path:
    """Returns the folder of modules compiled on this machine, for this FlashInfer and GPU; it may not exist."""
    return Path(_flashinfer("env").FLASHINFER_JIT_DIR)


def aot_directories() -> tuple[Path, ...]:
    """Returns the folders of prebuilt modules, of FlashInfer and of the package flashinfer-jit-cache."""
    return tuple(map(Path, _flashinfer("env").FLASHINFER_AOT_DIRS))


def compiled_library(module: KernelModule) -> Path | None:
    """Returns the shared library of a module, prebuilt or compiled on this machine; None if there is none."""
    # FlashInfer selects the package for these GPUs.
    prebuilt = Path(_flashinfer("env").get_aot_path(module.name))
    built = cache_directory() / module.name / f"{module.name}.so"
    return next((path for path in (prebuilt, built) if path.is_file()), None)


def is_compiled(module: KernelModule) -> bool:
    """Whether a module has a shared library, which may be stale if FlashInfer, CUDA or flags changed."""
    return compiled_library(module) is not None


def compiled_modules() -> tuple[str, ...]:
    """Returns the sorted names of all compiled modules of FlashInfer, not only of those that this package uses."""
    libraries = (path for folder in (cache_directory(), *aot_directories()) for path in folder.glob("*/*.so"))
    return tuple(sorted({path.stem for path in libraries if path.parent.name == path.stem}))
