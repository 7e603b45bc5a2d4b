"""Attention under torch.compile: one custom op where there is no lazy mask, a named graph break where there is."""

from __future__ import annotations

from typing import Optional

import torch

from .attention import RaggedCall, attend_ragged, decide_ragged
from .layout import RaggedLayout, packed_layout, uniform_layout
from .pattern import band

__all__ = ["ragged_attention"]


# It plans on the host and keeps workspaces, neither of which may happen inside a graph's memory pool.
_TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


# The annotations are read at run time to make the op's schema, on Python 3.10 too.
@torch.library.custom_op("hf_flashinfer_attn::ragged_attention", mutates_args=(), tags=_TAGS)
def ragged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_offsets: Optional[torch.Tensor],  # noqa: UP045
    key_offsets: Optional[torch.Tensor],  # noqa: UP045
    rows: int,
    causal: bool,
    sm_scale: float,
    softcap: Optional[float],  # noqa: UP045
) -> torch.Tensor:
    """Full or causal attention over ragged tokens, as an op that torch.compile need not look into; forward only.

    Args:
        query: Shape `(total_query_tokens, heads, head_dim)`.
        key: Shape `(total_key_tokens, kv_heads, head_dim)`.
        value: Shape `(total_key_tokens, kv_heads, value_head_dim)`.
        query_offsets: Offsets of packed sequences, shape `(sequences + 1,)`; None for `rows` rows of equal length.
        key_offsets: The same of the keys.
        rows: Rows of the padded tensors.
        causal: Whether a query sees no later key; aligned to the last key of a sequence.
        sm_scale: What logits are multiplied with.
        softcap: Caps logits to `softcap * tanh(logits / softcap)`.

    Returns:
        Shape `(total_query_tokens, heads, value_head_dim)`, contiguous.
    """
    layout: RaggedLayout
    if query_offsets is None or key_offsets is None:
        layout = uniform_layout(rows, query.shape[0] // rows, key.shape[0] // rows)
    else:
        shapes = ((rows, query.shape[0] // rows), (rows, key.shape[0] // rows))
        layout = packed_layout(query_offsets, query_offsets, key_offsets, shapes)
    pattern = band(None, 0 if causal else None)
    call = RaggedCall(query, key, value, layout, pattern, sm_scale, softcap, dropout=0.0, layer="compiled")
    return attend_ragged(call, decide_ragged(call)).contiguous()


@ragged_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_offsets: torch.Tensor | None,
    key_offsets: torch.Tensor | None,
    rows: int,
    causal: bool,
    sm_scale: float,
    softcap: float | None,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])
