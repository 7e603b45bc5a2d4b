"""The error of the benchmark."""

from __future__ import annotations

from ...errors import FlashInferAttentionError

__all__ = ["BenchError"]


class BenchError(FlashInferAttentionError):
    """What was asked for cannot be measured here."""
