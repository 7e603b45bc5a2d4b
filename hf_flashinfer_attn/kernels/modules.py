"""FlashInfer's compiled modules: names, folders and build specs. Nothing is compiled here.

FlashInfer compiles one module per kernel, dtype and head_dim, with and without a window and softcap, and keeps it on
disk. It is imported by the functions of this module, never on import.
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
    """One compiled module of FlashInfer, as this package asks for them.

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
    # Adds a bias to the logits; with "fa2" alone, and neither a window nor softcap.
    biased: bool = False

    def __post_init__(self) -> None:
        if self.biased and (self.kernel != "fa2" or self.window or self.softcap):
            raise ValueError(f"{self}: expected a bias with 'fa2' alone, and neither a window nor softcap.")

    def __str__(self) -> str:
        features = [name for name in ("window", "softcap") if getattr(self, name)] + ["bias"] * self.biased
        return ", ".join([self.kernel, str(self.dtype).removeprefix("torch."), f"head_dim {self.head_dim}", *features])

    @property
    def name(self) -> str:
        """FlashInfer's name of the module, its folder and its shared library."""
        if self.biased:
            return str(biased_module_arguments(self.dtype, self.head_dim)[0])
        modules = _flashinfer("attention.modules")
        uri: str = modules.get_batch_prefill_uri(self.kernel, *self.arguments)
        # FlashInfer's own wrappers load a variant of fa2 of another name.
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
        """Returns FlashInfer's `JitSpec` of the module, its sources written."""
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
        # FlashInfer makes its folder when it is imported.
        raise BackendUnavailableError(
            "flashinfer",
            f"flashinfer cannot be imported: {error}",
            "FLASHINFER_WORKSPACE_BASE names the folder that it writes to; it must be one that can be written to.",
        ) from error


def cache_directory() -> Path:
    """Returns the folder, which may not exist yet, of modules compiled here, for FlashInfer's version and the GPUs."""
    return Path(_flashinfer("env").FLASHINFER_JIT_DIR)


def aot_directories() -> tuple[Path, ...]:
    """Returns the folders of modules that came compiled, with FlashInfer or with the package flashinfer-jit-cache."""
    return tuple(map(Path, _flashinfer("env").FLASHINFER_AOT_DIRS))


def compiled_library(module: KernelModule) -> Path | None:
    """Returns the shared library of a module; None if it is neither compiled here nor came compiled."""
    # FlashInfer chooses among the packages that are for these GPUs.
    came = Path(_flashinfer("env").get_aot_path(module.name))
    built = cache_directory() / module.name / f"{module.name}.so"
    return next((path for path in (came, built) if path.is_file()), None)


def is_compiled(module: KernelModule) -> bool:
    """Whether a module can be loaded without compiling it, unless FlashInfer, CUDA or flags changed since."""
    return compiled_library(module) is not None


def compiled_modules() -> tuple[str, ...]:
    """Returns the sorted names of all compiled modules of FlashInfer, not only of this package's."""
    libraries = (path for folder in (cache_directory(), *aot_directories()) for path in folder.glob("*/*.so"))
    return tuple(sorted({path.stem for path in libraries if path.parent.name == path.stem}))
