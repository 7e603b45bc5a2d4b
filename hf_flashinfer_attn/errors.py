"""Errors of this package. Each message names the given value, the expected one and a way out."""

from __future__ import annotations

__all__ = ["BackendUnavailableError", "FlashInferAttentionError", "UnsupportedAttentionError", "first_line"]


class FlashInferAttentionError(RuntimeError):
    """Base class of this package's errors. Invalid arguments raise `ValueError`.

    Examples:
        >>> import hf_flashinfer_attn
        >>> try:
        ...     raise hf_flashinfer_attn.UnsupportedAttentionError("softcap", "use backend='auto'")
        ... except hf_flashinfer_attn.FlashInferAttentionError as error:
        ...     print(error)
        softcap. use backend='auto'
    """


class BackendUnavailableError(FlashInferAttentionError):
    """FlashInfer or its kernels cannot run here, and a fallback is not allowed.

    Args:
        backend: Name of the backend.
        reason: Why it cannot run.
        way_out: How to resolve it.

    Examples:
        >>> import hf_flashinfer_attn
        >>> try:
        ...     raise hf_flashinfer_attn.BackendUnavailableError("flashinfer", "no CUDA device", "use backend='torch'")
        ... except hf_flashinfer_attn.BackendUnavailableError as error:
        ...     print(error.backend, "-", error.reason)
        flashinfer - no CUDA device
    """

    def __init__(self, backend: str, reason: str, way_out: str) -> None:
        super().__init__(f"backend {backend!r} cannot run here: {reason}. {way_out}")
        self.backend = backend
        self.reason = reason
        self.way_out = way_out


class UnsupportedAttentionError(FlashInferAttentionError):
    """A call is not supported by the selected backend, and a fallback is not possible or not allowed.

    Args:
        feature: The unsupported feature.
        way_out: How to resolve it.

    Examples:
        >>> import hf_flashinfer_attn
        >>> try:
        ...     raise hf_flashinfer_attn.UnsupportedAttentionError("softcap", "use backend='auto'")
        ... except hf_flashinfer_attn.UnsupportedAttentionError as error:
        ...     print(error.feature)
        softcap
    """

    def __init__(self, feature: str, way_out: str) -> None:
        super().__init__(f"{feature}. {way_out}")
        self.feature = feature
        self.way_out = way_out


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message; the name of its class if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
