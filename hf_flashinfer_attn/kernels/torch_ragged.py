"""Ragged attention in torch, for any device and dtype; differentiable. The GPU tests use it as reference."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from ..ragged.layout import RaggedLayout

__all__ = ["attend"]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RaggedLayout,
    *,
    left: int | None = None,
    right: int | None = None,
    sm_scale: float,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Computes attention row by row, without any padding.

    Query i of a row is at key position `i + key_length - query_length`, so the last query is aligned with the last key.

    Args:
        query: Shape `(total_query_tokens, heads, head_dim)`, any dtype and device.
        key: Shape `(total_key_tokens, kv_heads, head_dim)`; `heads` must be a multiple of `kv_heads`.
        value: Shape `(total_key_tokens, kv_heads, value_head_dim)`.
        layout: Row lengths.
        left: Number of keys before its own position that a query sees; None for all.
        right: Number of keys after its own position that a query sees; None for all, 0 for causal attention.
        sm_scale: Factor of the logits.
        softcap: Caps logits to `softcap * tanh(logits / softcap)`.
        bias: Added to the logits by padded position, shape `(rows, heads, q_length, kv_length)`.
        sinks: Attention sinks, one logit per head, shape `(heads,)`.
        dropout: Probability of dropping an attention weight.

    Returns:
        Shape `(total_query_tokens, heads, value_head_dim)`, the dtype of `query`. Queries that see no key are zero.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    rows = zip(layout.query.lengths, layout.key.lengths)
    outputs: list[torch.Tensor] = []
    row = query_start = key_start = 0
    # Consecutive rows of equal lengths are one call: a whole batch without padding, most of a batch sorted by length.
    for (query_length, key_length), run in itertools.groupby(rows):
        count = sum(1 for _ in run)
        query_end, key_end = query_start + count * query_length, key_start + count * key_length
        if query_length:
            outputs.append(
                _attend_equal(
                    query[query_start:query_end].unflatten(0, (count, query_length)).transpose(1, 2),
                    key[key_start:key_end].unflatten(0, (count, key_length)).transpose(1, 2),
                    value[key_start:key_end].unflatten(0, (count, key_length)).transpose(1, 2),
                    left,
                    right,
                    sm_scale,
                    softcap,
                    None if bias is None else _bias_of(bias, layout, range(row, row + count)),
                    sinks,
                    dropout,
                )
            )
        row, query_start, key_start = row + count, query_end, key_end
    if not outputs:
        return query.new_zeros(0, query.shape[1], value.shape[2])
    return torch.cat(outputs)


def _bias_of(bias: torch.Tensor, layout: RaggedLayout, rows: range) -> torch.Tensor:
    """Returns the bias of rows of equal lengths, shape `(rows, heads, queries, keys)`; differentiable."""
    query, key = layout.query, layout.key
    if query.is_full and key.is_full:
        return bias[rows.start : rows.stop, :, : query.lengths[rows.start], : key.lengths[rows.start]]
    parts = []
    for row in rows:
        part = bias[row]
        for dim, side in ((1, query), (2, key)):
            positions = side.positions_in_row(bias.device)
            if positions is not None:
                part = part.index_select(dim, positions[side.offsets[row] : side.offsets[row + 1]])
        parts.append(part)
    return torch.stack(parts)


def _attend_equal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    left: int | None,
    right: int | None,
    sm_scale: float,
    softcap: float | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Attention of rows of equal lengths: from `(rows, heads, tokens, dim)` to `(rows * tokens, heads, dim)`."""
    query_length, key_length = query.shape[2], key.shape[2]
    if key_length == 0:
        return query.new_zeros(query.shape[0] * query_length, query.shape[1], value.shape[3])
    left = None if left is not None and left >= key_length - 1 else left
    right = None if right is not None and right >= query_length - 1 else right
    is_plain = softcap is None and bias is None and sinks is None
    plain_causal = left is None and right == 0 and query_length == key_length and is_plain
    mask = blind = None
    if (left is not None or right is not None) and not plain_causal:
        mask = _band(query_length, key_length, left, right, query.device)
        blind = ~mask.any(1, keepdim=True)
        # A row without keys would be NaN; it is made zero below.
        mask = mask | blind
    if softcap is None and sinks is None:
        if bias is not None:
            bias = bias.to(query.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=plain_causal, scale=sm_scale
        )
    else:
        # float32, as in fused kernels: half-precision logits and weights would triple the error of the output.
        exact = torch.promote_types(query.dtype, torch.float32)
        logits = torch.matmul(query.to(exact), key.to(exact).transpose(2, 3)) * sm_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias.to(logits.dtype)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            column = sinks.to(logits.dtype)[:, None, None].expand(len(logits), -1, query_length, 1)
            logits = torch.cat([logits, column], dim=-1)
        weights = torch.softmax(logits, dim=-1)[..., :key_length]
        output = torch.matmul(F.dropout(weights, dropout), value.to(exact)).to(query.dtype)
    if blind is not None:
        output = output.masked_fill(blind, 0)
    return output.transpose(1, 2).flatten(0, 1)


def _band(
    query_length: int, key_length: int, left: int | None, right: int | None, device: torch.device
) -> torch.Tensor:
    distance = torch.arange(key_length, device=device) - torch.arange(query_length, device=device)[:, None]
    distance = distance - (key_length - query_length)
    mask = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    if left is not None:
        mask &= distance >= -left
    if right is not None:
        mask &= distance <= right
    return mask
