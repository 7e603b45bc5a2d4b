"""Specs of a model's layers, recorded while the model runs on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .spec import AttentionSpec

__all__ = ["SpecOfLayer", "keep_specs", "specs_kept"]

SpecOfLayer = tuple[torch.nn.Module, AttentionSpec]
_kept: ContextVar[list[SpecOfLayer] | None] = ContextVar("hf_flashinfer_attn_specs", default=None)


@contextmanager
def keep_specs() -> Iterator[list[SpecOfLayer]]:
    """Records the specs of this thread's layers on the meta device; the layers return meta tensors."""
    specs: list[SpecOfLayer] = []
    token = _kept.set(specs)
    try:
        yield specs
    finally:
        _kept.reset(token)


def specs_kept() -> list[SpecOfLayer] | None:
    """Returns the list that `keep_specs` fills; None outside of its block."""
    return _kept.get()
