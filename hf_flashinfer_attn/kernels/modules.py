"""Which compiled modules of FlashInfer there are and where: nothing is compiled or loaded here, and no GPU is needed.

FlashInfer compiles one module per kernel, dtype and head_dim, with and without a window and softcap, and keeps it on
disk. It is imported by the functions of this module, never on import.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
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

    Args:
        kernel: "fa2" or "fa3".
        dtype: torch.float16 or torch.bfloat16, of query, key, value and output.
        head_dim: After padding: 64, 128 or 256.
        window: Whether keys are bounded on the left.
        softcap: Whether logits are capped.
        biased: Whether a bias is added to the logits; with "fa2" alone, and neither a window nor softcap.

    Raises:
        ValueError: If a bias comes with what its kernel lacks.

    Examples:
        >>> import torch
        >>> from hf_flashinfer_attn.kernels.modules import KernelModule
        >>> print(KernelModule("fa3", torch.float16, 64, window=True, softcap=False))
        fa3, float16, head_dim 64, window
    """

    kernel: Literal["fa2", "fa3"]
    dtype: torch.dtype
    head_dim: int
    window: bool
    softcap: bool
    biased: bool = False

    def __post_init__(self) -> None:
        if self.biased and (self.kernel != "fa2" or self.window or self.softcap):
            raise ValueError(f"{self}: expected a bias with 'fa2' alone, and neither a window nor softcap.")

    def __str__(self) -> str:
        features = [name for name in ("window", "softcap") if getattr(self, name)] + ["bias"] * self.biased
        return ", ".join([self.kernel, str(self.dtype).removeprefix("torch."), f"head_dim {self.head_dim}", *features])

    @property
    def name(self) -> str:
        """What FlashInfer calls the module: of its folder and its shared library.

        Raises:
            BackendUnavailableError: If FlashInfer is not installed.
        """
        if self.biased:
            name: str = biased_module_arguments(self.dtype, self.head_dim)[0]
            return name
        modules = _flashinfer("flashinfer.jit.attention.modules")
        uri: str = modules.get_batch_prefill_uri(self.kernel, *self.arguments)
        # Its wrappers take a copy of fa2 of their own from 0.7.2 on; others share one.
        renamed = getattr(modules, "_get_batch_prefill_module_uri", None)
        if renamed is not None and self.kernel == "fa2":
            uri = renamed(uri, self.kernel, "equal", "full")
        return uri

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What FlashInfer's generators of modules take after the kernel, for a module without a bias."""
        positions, fp16_products = 0, False
        return (
            *(self.dtype,) * 3, torch.int32, self.head_dim, self.head_dim, positions, self.window, self.softcap,
            fp16_products,
        )  # fmt: skip


def _flashinfer(module: str) -> ModuleType:
    if importlib.util.find_spec("flashinfer") is None:
        raise BackendUnavailableError(
            "flashinfer",
            "the package flashinfer is not installed",
            "Install it: pip install flashinfer-python (Linux), or use hf_flashinfer_attn.configure(backend='torch').",
        )
    try:
        return importlib.import_module(module)
    except OSError as error:
        # FlashInfer makes its folder when it is imported.
        raise BackendUnavailableError(
            "flashinfer",
            f"flashinfer cannot be imported: {error}",
            "FLASHINFER_WORKSPACE_BASE names the folder that it writes to; it must be one that can be written to.",
        ) from error


def cache_directory() -> Path:
    """Returns the folder of modules that FlashInfer compiles on this machine, for its version and the GPUs it sees.

    `FLASHINFER_WORKSPACE_BASE` moves it, `FLASHINFER_CUDA_ARCH_LIST` stands for the GPUs; FlashInfer reads both on its
    import. The folder need not exist.

    Raises:
        BackendUnavailableError: If FlashInfer is not installed.

    Examples:
        >>> import importlib.util
        >>> from hf_flashinfer_attn.kernels.modules import cache_directory
        >>> cache_directory().name if importlib.util.find_spec("flashinfer") else "cached_ops"
        'cached_ops'
    """
    return Path(_flashinfer("flashinfer.jit.env").FLASHINFER_JIT_DIR)


def aot_directories() -> tuple[Path, ...]:
    """Returns the folders of modules that came compiled, with FlashInfer or with the package flashinfer-jit-cache.

    Raises:
        BackendUnavailableError: If FlashInfer is not installed.
    """
    env = _flashinfer("flashinfer.jit.env")
    return tuple(map(Path, getattr(env, "FLASHINFER_AOT_DIRS", (env.FLASHINFER_AOT_DIR,))))


def compiled_library(module: KernelModule) -> Path | None:
    """Returns the shared library of a module; None if it is neither compiled here nor came compiled.

    Raises:
        BackendUnavailableError: If FlashInfer is not installed.
    """
    name, env = module.name, _flashinfer("flashinfer.jit.env")
    if hasattr(env, "get_aot_path"):
        # Knows which of several packages are for these GPUs.
        came = Path(env.get_aot_path(name))
        found = [came] if came.is_file() else []
    else:
        found = [path for folder in aot_directories() if (path := folder / name / f"{name}.so").is_file()]
    built = cache_directory() / name / f"{name}.so"
    return next(iter(found), built if built.is_file() else None)


def is_compiled(module: KernelModule) -> bool:
    """Whether a module can be loaded without compiling it, unless FlashInfer, CUDA or flags changed since.

    Raises:
        BackendUnavailableError: If FlashInfer is not installed.

    Examples:
        >>> import importlib.util, torch
        >>> from hf_flashinfer_attn.kernels.modules import KernelModule, is_compiled
        >>> module = KernelModule("fa2", torch.float16, 64, window=False, softcap=False)
        >>> importlib.util.find_spec("flashinfer") is None or is_compiled(module) in (True, False)
        True
    """
    return compiled_library(module) is not None


def compiled_modules() -> tuple[str, ...]:
    """Returns the names of all modules of FlashInfer that are compiled, others than ours too, sorted.

    Raises:
        BackendUnavailableError: If FlashInfer is not installed.
    """
    libraries = (path for folder in (cache_directory(), *aot_directories()) for path in folder.glob("*/*.so"))
    return tuple(sorted({path.stem for path in libraries if path.parent.name == path.stem}))
