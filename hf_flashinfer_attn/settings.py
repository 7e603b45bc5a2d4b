"""Process-wide settings, from `configure` or from environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal, get_args

__all__ = ["NAME", "PAGED_NAME", "BackendName", "JitMode", "PaddedQueries", "Settings", "configure", "current_settings"]

# Names of the attention implementation in transformers.
NAME = "flashinfer"
PAGED_NAME = f"paged|{NAME}"

BackendName = Literal["auto", "flashinfer", "torch"]
JitMode = Literal["wait", "background", "never"]
PaddedQueries = Literal["drop", "keep"]

BACKEND_VARIABLE = "HF_FLASHINFER_ATTN_BACKEND"
STRICT_VARIABLE = "HF_FLASHINFER_ATTN_STRICT"
JIT_VARIABLE = "HF_FLASHINFER_ATTN_JIT"
PADDED_QUERIES_VARIABLE = "HF_FLASHINFER_ATTN_PADDED_QUERIES"
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"", "0", "false", "no", "off"})


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings in force.

    Args:
        backend: "auto" uses FlashInfer on a supported CUDA GPU and torch elsewhere; "flashinfer" and "torch" never fall
            back.
        strict: Whether a fallback raises an error instead of being logged once: [`BackendUnavailableError`] if
            FlashInfer cannot run here, [`UnsupportedAttentionError`] if its kernels do not support a call or `unpad`
            leaves a forward padded. With `backend="torch"`, the torch backend is not a fallback.
        jit: What to do if a kernel is not compiled. "wait" compiles it during the forward; "background" compiles it in
            a thread while the torch backend runs; "never" runs the torch backend. Where `backend` or `strict` forbid
            the torch backend, "background" waits and "never" raises an error.
        padded_queries: "drop" skips padded queries; "keep" computes them as eager attention does, for models and losses
            that read padded positions.

    Raises:
        ValueError: If a value is unknown.

    Examples:
        >>> import hf_flashinfer_attn
        >>> hf_flashinfer_attn.Settings(strict=True).backend
        'auto'
    """

    backend: BackendName = "auto"
    strict: bool = False
    jit: JitMode = "wait"
    padded_queries: PaddedQueries = "drop"

    def __post_init__(self) -> None:
        if self.backend not in get_args(BackendName):
            raise ValueError(
                f"backend={self.backend!r} is not known; expected one of {list(get_args(BackendName))}. "
                f"Set it with hf_flashinfer_attn.configure(backend=...) or the variable {BACKEND_VARIABLE}."
            )
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict={self.strict!r} is not a bool; pass True or False.")
        if self.jit not in get_args(JitMode):
            raise ValueError(
                f"jit={self.jit!r} is not known; expected one of {list(get_args(JitMode))}. "
                f"Set it with hf_flashinfer_attn.configure(jit=...) or the variable {JIT_VARIABLE}."
            )
        if self.padded_queries not in get_args(PaddedQueries):
            raise ValueError(
                f"padded_queries={self.padded_queries!r} is not known; expected one of "
                f"{list(get_args(PaddedQueries))}. Set it with hf_flashinfer_attn.configure(padded_queries=...) or the "
                f"variable {PADDED_QUERIES_VARIABLE}."
            )


def _from_environment() -> Settings:
    strict = os.environ.get(STRICT_VARIABLE, "").strip().lower()
    if strict not in _TRUE | _FALSE:
        raise ValueError(
            f"{STRICT_VARIABLE}={strict!r} is not a truth value; expected one of {sorted(_TRUE)} or "
            f"{sorted(_FALSE - {''})}."
        )
    backend = os.environ.get(BACKEND_VARIABLE, "").strip().lower() or "auto"
    jit = os.environ.get(JIT_VARIABLE, "").strip().lower() or "wait"
    padded_queries = os.environ.get(PADDED_QUERIES_VARIABLE, "").strip().lower() or "drop"
    return Settings(backend, strict in _TRUE, jit, padded_queries)  # type: ignore[arg-type]


_settings: Settings | None = None


def current_settings() -> Settings:
    """Returns the settings in force, reading the environment on first use.

    Raises:
        ValueError: If an environment variable has an unknown value.

    Examples:
        >>> import hf_flashinfer_attn
        >>> hf_flashinfer_attn.current_settings().strict
        False
    """
    global _settings
    if _settings is None:
        _settings = _from_environment()
    return _settings


def configure(
    *,
    backend: BackendName | None = None,
    strict: bool | None = None,
    jit: JitMode | None = None,
    padded_queries: PaddedQueries | None = None,
) -> Settings:
    """Changes the settings of this process; omitted ones keep their values.

    Args:
        backend: "auto", "flashinfer" or "torch". Environment variable: `HF_FLASHINFER_ATTN_BACKEND`.
        strict: Whether fallbacks raise. Environment variable: `HF_FLASHINFER_ATTN_STRICT`.
        jit: "wait", "background" or "never": what to do if a kernel is not compiled. Environment variable:
            `HF_FLASHINFER_ATTN_JIT`. Failed compilations are retried after this call.
        padded_queries: "drop" or "keep" padded queries. Environment variable: `HF_FLASHINFER_ATTN_PADDED_QUERIES`.

    Returns:
        The settings now in force.

    Raises:
        ValueError: If a value is unknown.

    Examples:
        >>> import hf_flashinfer_attn
        >>> hf_flashinfer_attn.configure(backend="torch")
        Settings(backend='torch', strict=False, jit='wait', padded_queries='drop')
        >>> hf_flashinfer_attn.configure(backend="auto")
        Settings(backend='auto', strict=False, jit='wait', padded_queries='drop')
    """
    global _settings
    # Always a new object, so that identity checks see the change.
    settings = replace(current_settings())
    if backend is not None:
        settings = replace(settings, backend=backend)
    if strict is not None:
        settings = replace(settings, strict=strict)
    if jit is not None:
        settings = replace(settings, jit=jit)
    if padded_queries is not None:
        settings = replace(settings, padded_queries=padded_queries)
    _settings = settings
    return settings
