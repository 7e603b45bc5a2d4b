"""What the user chose: process-wide settings, from `configure` or from environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal, get_args

__all__ = ["BackendName", "Settings", "configure", "current_settings"]

BackendName = Literal["auto", "flashinfer", "torch"]

BACKEND_VARIABLE = "HF_FLASHINFER_ATTN_BACKEND"
STRICT_VARIABLE = "HF_FLASHINFER_ATTN_STRICT"
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"", "0", "false", "no", "off"})


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings in force.

    Args:
        backend: "auto" takes FlashInfer where there is a CUDA GPU for it and torch elsewhere; a backend asked for by
            name never falls back.
        strict: Whether a fallback raises [`UnsupportedAttentionError`] instead of being logged once, and a forward that
            `unpad` leaves padded too.

    Raises:
        ValueError: If a value is not known.

    Examples:
        >>> import hf_flashinfer_attn
        >>> hf_flashinfer_attn.Settings(strict=True).backend
        'auto'
    """

    backend: BackendName = "auto"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.backend not in get_args(BackendName):
            raise ValueError(
                f"backend={self.backend!r} is not known; expected one of {list(get_args(BackendName))}. "
                f"Set it with hf_flashinfer_attn.configure(backend=...) or the variable {BACKEND_VARIABLE}."
            )
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict={self.strict!r} is not a bool; pass True or False.")


def _from_environment() -> Settings:
    strict = os.environ.get(STRICT_VARIABLE, "").strip().lower()
    if strict not in _TRUE | _FALSE:
        raise ValueError(
            f"{STRICT_VARIABLE}={strict!r} is not a truth value; expected one of {sorted(_TRUE)} or "
            f"{sorted(_FALSE - {''})}."
        )
    backend = os.environ.get(BACKEND_VARIABLE, "").strip().lower() or "auto"
    return Settings(backend=backend, strict=strict in _TRUE)  # type: ignore[arg-type]


_settings: Settings | None = None


def current_settings() -> Settings:
    """Returns the settings in force, reading the environment on first use.

    Raises:
        ValueError: If an environment variable holds a value that is not known.

    Examples:
        >>> import hf_flashinfer_attn
        >>> hf_flashinfer_attn.current_settings().strict
        False
    """
    global _settings
    if _settings is None:
        _settings = _from_environment()
    return _settings


def configure(*, backend: BackendName | None = None, strict: bool | None = None) -> Settings:
    """Changes the settings of this process; what is not given keeps its value.

    Args:
        backend: "auto", "flashinfer" or "torch". Environment variable: `HF_FLASHINFER_ATTN_BACKEND`.
        strict: Whether fallbacks raise. Environment variable: `HF_FLASHINFER_ATTN_STRICT`.

    Returns:
        The settings now in force.

    Raises:
        ValueError: If a value is not known.

    Examples:
        >>> import hf_flashinfer_attn
        >>> hf_flashinfer_attn.configure(backend="torch")
        Settings(backend='torch', strict=False)
        >>> hf_flashinfer_attn.configure(backend="auto")
        Settings(backend='auto', strict=False)
    """
    global _settings
    chosen = current_settings()
    if backend is not None:
        chosen = replace(chosen, backend=backend)
    if strict is not None:
        chosen = replace(chosen, strict=strict)
    _settings = chosen
    return chosen
