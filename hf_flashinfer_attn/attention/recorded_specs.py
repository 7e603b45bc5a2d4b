"""What the attention layers of a model ask for, kept while it runs on the meta device, where nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from .select import AttentionRequest, Path, fallback_of
from .spec import LayerRequest

__all__ = ["LayerCall", "calls_kept", "keep_layer_calls"]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of the attention function on tensors without values.

    Args:
        module: The attention layer.
        request: What the choice of a path depends on.
        num_heads: Of the query.
        num_kv_heads: Of key and value.
        head_dim: Of query and key.
        value_head_dim: Of value.
        softcap: What logits are capped to.
        biased: Whether a bias is added to the logits.
        sinks: Whether there are attention sinks.
        kept_queries: Why padded queries would be computed; None if they would not be.
    """

    module: torch.nn.Module
    request: AttentionRequest
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    softcap: float | None
    biased: bool
    sinks: bool
    kept_queries: str | None

    @classmethod
    def of(cls, module: torch.nn.Module, asked: LayerRequest) -> LayerCall:
        """Keeps what does not need tensors, so that calls can be compared."""
        request, is_square = asked.request, asked.query.shape[2] == asked.key.shape[2]
        is_kept = asked.lazy is not None and is_square and not asked.pattern.is_causal
        fallback = fallback_of(request)
        is_kept = is_kept and (fallback is None or fallback[0] is not Path.DENSE)
        return cls(
            module=module,
            request=asked.request,
            num_heads=asked.query.shape[1],
            num_kv_heads=asked.key.shape[1],
            head_dim=asked.query.shape[-1],
            value_head_dim=asked.value.shape[-1],
            softcap=asked.softcap,
            biased=asked.position_bias is not None,
            sinks=asked.sinks is not None,
            kept_queries=asked.kept_queries if is_kept or request.window_keeps_padded_queries else None,
        )


_kept: ContextVar[list[LayerCall] | None] = ContextVar("hf_flashinfer_attn_layer_calls", default=None)


@contextmanager
def keep_layer_calls() -> Iterator[list[LayerCall]]:
    """Keeps the calls of this thread on the meta device, and has them return outputs without values."""
    calls: list[LayerCall] = []
    token = _kept.set(calls)
    try:
        yield calls
    finally:
        _kept.reset(token)


def calls_kept() -> list[LayerCall] | None:
    """Returns where to keep calls; None where nobody asked for them."""
    return _kept.get()
