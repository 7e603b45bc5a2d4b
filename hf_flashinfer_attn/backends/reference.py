"""The torch backend: ragged attention on any device and dtype, differentiable, the oracle of the GPU tests."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from ..layout import RaggedLayout

__all__ = ["attend"]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RaggedLayout,
    *,
    causal: bool,
    sm_scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Computes attention row by row, without any padding.

    Args:
        query: Shape `(total_query_tokens, heads, head_dim)`, any dtype and device.
        key: Shape `(total_key_tokens, kv_heads, head_dim)`; `heads` must be a multiple of `kv_heads`.
        value: Shape `(total_key_tokens, kv_heads, value_head_dim)`.
        layout: Which tokens belong to which row.
        causal: Whether query i of a row sees only its first `i + 1 + key_length - query_length` keys.
        sm_scale: What logits are multiplied with.
        dropout: Probability of dropping an attention weight.

    Returns:
        Shape `(total_query_tokens, heads, value_head_dim)`, the dtype of `query`. Rows without keys are zero.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    rows = zip(layout.query.lengths, layout.key.lengths)
    outputs: list[torch.Tensor] = []
    query_start = key_start = 0
    # Neighbours of equal lengths go in one call: all of a batch without padding, most of one sorted by length.
    for (query_length, key_length), run in itertools.groupby(rows):
        count = sum(1 for _ in run)
        query_end, key_end = query_start + count * query_length, key_start + count * key_length
        if query_length:
            outputs.append(
                _attend_equal(
                    query[query_start:query_end].unflatten(0, (count, query_length)),
                    key[key_start:key_end].unflatten(0, (count, key_length)),
                    value[key_start:key_end].unflatten(0, (count, key_length)),
                    causal,
                    sm_scale,
                    dropout,
                )
            )
        query_start, key_start = query_end, key_end
    if not outputs:
        return query.new_zeros(0, query.shape[1], value.shape[2])
    return torch.cat(outputs)


def _attend_equal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, sm_scale: float, dropout: float
) -> torch.Tensor:
    """Attention of rows of equal lengths, `(rows, tokens, heads, dim)` in, `(rows * tokens, heads, dim)` out."""
    query_length, key_length = query.shape[1], key.shape[1]
    if key_length == 0:
        return query.new_zeros(query.shape[0] * query_length, query.shape[2], value.shape[3])
    mask = None
    blind = 0
    if causal and query_length != key_length:
        mask = torch.ones(query_length, key_length, dtype=torch.bool, device=query.device)
        mask = mask.tril(key_length - query_length)
        blind = max(0, query_length - key_length)
        mask[:blind] = True
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        scale=sm_scale,
    ).transpose(1, 2)
    if blind:
        output = torch.cat([torch.zeros_like(output[:, :blind]), output[:, blind:]], dim=1)
    return output.flatten(0, 1)
