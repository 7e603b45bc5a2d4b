"""Whole masks of dense attention, made from lazy, 2D and 4D masks, cu_seqlens, biases and selected keys."""

from __future__ import annotations

import torch

from ..ragged.band import Pattern
from ..ragged.layout import RaggedLayout
from ..ragged.lazy_mask import RaggedMask
from .spec import require_2d_mask_fits

__all__ = ["bias_of_packed", "dense_mask_of", "mask_of_chosen"]


def dense_mask_of(
    mask: torch.Tensor | None,
    cu_seqlens: tuple[torch.Tensor, torch.Tensor] | None,
    position_bias: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    pattern: Pattern,
) -> torch.Tensor | None:
    """Returns the whole mask of a call, bool or additive, plus the bias."""
    q_length, kv_length = query.shape[2], key.shape[2]
    if isinstance(mask, RaggedMask):
        mask = mask.dense()
    elif mask is None and pattern.is_causal and q_length > 1:
        mask = torch.ones(q_length, kv_length, dtype=torch.bool, device=query.device).tril(kv_length - q_length)
    elif mask is not None and mask.ndim == 2:
        require_2d_mask_fits(mask, query, key)
        mask = mask.to(torch.bool)[:, None, None, :]
        if pattern.is_causal:
            mask = mask & mask.new_ones(q_length, kv_length).tril(kv_length - q_length)
    if mask is not None and not mask.is_floating_point() and mask.dtype != torch.bool:
        mask = mask.to(torch.bool)
    if cu_seqlens is not None:
        of_queries, of_keys = _sequences_of(query, cu_seqlens[0]), _sequences_of(key, cu_seqlens[1])
        mask = _intersect(mask, (of_queries[:, :, None] == of_keys[:, None, :])[:, None])
    if position_bias is None or mask is None:
        return mask if position_bias is None else position_bias
    return _intersect(position_bias, mask) if mask.dtype == torch.bool else position_bias + mask


def bias_of_packed(bias: torch.Tensor, layout: RaggedLayout) -> torch.Tensor:
    """Returns the bias of packed sequences by token, zero between two sequences; differentiable.

    From shape `(sequences, heads, longest_query, longest_key)` to `(1, heads, total_query_tokens, total_key_tokens)`.
    """
    whole = bias.new_zeros(1, bias.shape[1], layout.query.total_tokens, layout.key.total_tokens)
    for row, (query, key) in enumerate(zip(layout.query.offsets[:-1], layout.key.offsets[:-1])):
        queries, keys = layout.query.lengths[row], layout.key.lengths[row]
        whole[0, :, query : query + queries, key : key + keys] = bias[row, :, :queries, :keys]
    return whole


def mask_of_chosen(
    mask: torch.Tensor | None, indices: torch.Tensor, query: torch.Tensor, key: torch.Tensor, pattern: Pattern
) -> torch.Tensor:
    """Returns the whole mask of sparse attention; transformers leaves it to flash kernels to hide the other keys.

    `indices` are the keys that the layer selected, shape `(batch, q_length, selected)`. They may include keys that the
    pattern hides, if a query sees fewer keys than are selected.
    """
    mask = dense_mask_of(mask, None, None, query, key, pattern)
    shape = (query.shape[0], query.shape[2], key.shape[2])
    selected = torch.zeros(shape, dtype=torch.bool, device=query.device).scatter(-1, indices.long(), True)
    return _intersect(mask, selected.unsqueeze(1))


def _sequences_of(side: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Returns the sequence index of each token, shape `(batch, tokens)`."""
    tokens = torch.arange(side.shape[0] * side.shape[2], device=cu_seqlens.device)
    return torch.bucketize(tokens, cu_seqlens[1:], right=True).view(side.shape[0], side.shape[2]).to(side.device)


def _intersect(mask: torch.Tensor | None, allowed: torch.Tensor) -> torch.Tensor:
    """Returns a bool or additive mask that also hides keys where `allowed` is False; `allowed` if there is no mask."""
    if mask is None:
        return allowed
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)
