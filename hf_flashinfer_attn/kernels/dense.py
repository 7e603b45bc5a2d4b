"""Dense attention with a whole mask, for calls that ragged kernels do not support; differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["attend"]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    sm_scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes padded attention as transformers' eager functions do, through sdpa where possible.

    Args:
        query: Shape `(batch, heads, q_length, head_dim)`.
        key: Shape `(batch, kv_heads, kv_length, head_dim)`.
        value: Shape `(batch, kv_heads, kv_length, value_head_dim)`.
        mask: Float, added to the logits; or bool, True where a query sees a key. Broadcastable to
            `(batch, heads, q_length, kv_length)`.
        sm_scale: Factor of the logits.
        softcap: Caps logits to `softcap * tanh(logits / softcap)`, before the mask.
        sinks: Attention sinks, one logit per head, shape `(heads,)`.
        dropout: Probability of dropping an attention weight.
        return_weights: Whether to return the attention weights too.

    Returns:
        The output, shape `(batch, q_length, heads, value_head_dim)`, and the weights, shape
        `(batch, heads, q_length, kv_length)`, or None.
    """
    # Learned queries may have one row for the whole batch.
    rows = max(query.shape[0], key.shape[0])
    query, key, value = (side.expand(rows, -1, -1, -1) for side in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if softcap is None and sinks is None and not return_weights:
        query, mask = _average_where_blind(query, mask)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=sm_scale)
        return output.transpose(1, 2).contiguous(), None
    logits = torch.matmul(query, key.transpose(2, 3)) * sm_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        else:
            logits = logits + mask
    if sinks is not None:
        column = sinks.to(logits.dtype).reshape(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], 1)
        logits = torch.cat([logits, column], dim=-1)
    # Half precision is too coarse for a sum of exponentials.
    weights = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(value.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    weights = F.dropout(weights, dropout)
    output = torch.matmul(weights, value).transpose(1, 2).contiguous()
    return output, weights if return_weights else None


def _average_where_blind(query: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Makes queries that see no key average all values, as in eager attention; some models rely on it.

    Eager attention adds the dtype's minimum, which absorbs the logits. Kernels add half precision's minimum in float32,
    where the logits survive: such queries would attend to padding as if there were no mask.
    """
    if mask is None or (mask.is_floating_point() and query.dtype.itemsize > 2):
        return query, mask
    if mask.is_floating_point():
        blind = mask.amax(-1, keepdim=True) <= torch.finfo(mask.dtype).min / 2
        return query.masked_fill(blind, 0), mask.masked_fill(blind, 0)
    blind = ~mask.any(-1, keepdim=True)
    return query.masked_fill(blind, 0), mask | blind
