"""flash-attn's functions on this package's backends, for models that get a flash kernel from transformers."""

from __future__ import annotations

import torch

from ..attention.driver import attend
from ..attention.spec import AttentionInputs
from ..errors import UnsupportedAttentionError
from ..ragged.band import CAUSAL, FULL
from ..ragged.forward_state import ForwardState, packed_state, uniform_state

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]

_NO_WINDOW = ((-1, -1), (None, None), None)


def _refuse(window_size: object, softcap: float, alibi_slopes: object) -> None:
    if tuple(window_size) not in _NO_WINDOW if isinstance(window_size, (tuple, list)) else window_size is not None:
        raise UnsupportedAttentionError(
            f"window_size={window_size} in a direct flash-attention call, expected (-1, -1) or None",
            "Call the model through transformers' masks.",
        )
    if softcap:
        raise UnsupportedAttentionError(
            f"softcap={softcap} in a direct flash-attention call, expected 0", "Use attn_implementation='eager'."
        )
    if alibi_slopes is not None:
        value = (
            f"of shape {tuple(alibi_slopes.shape)}" if isinstance(alibi_slopes, torch.Tensor) else repr(alibi_slopes)
        )
        raise UnsupportedAttentionError(
            f"alibi_slopes {value} in a direct flash-attention call, expected None",
            "Use attn_implementation='eager'.",
        )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over packed sequences, with the signature of flash-attn's function of this name.

    Args:
        q: Shape `(total_query_tokens, heads, head_dim)`.
        k: Shape `(total_key_tokens, kv_heads, head_dim)`.
        v: Shape `(total_key_tokens, kv_heads, value_head_dim)`.
        cu_seqlens_q: cu_seqlens of the queries, int32, shape `(batch + 1,)`.
        cu_seqlens_k: The same for the keys.
        max_seqlen_q: Unused.
        max_seqlen_k: Unused.
        dropout_p: Probability of dropping an attention weight.
        softmax_scale: Factor of the logits; `head_dim ** -0.5` by default.
        causal: Whether no query sees a later key; the last query is aligned with the last key.
        window_size: Must be (-1, -1), (None, None) or None.
        softcap: Must be 0.
        alibi_slopes: Must be None.

    Returns:
        Shape `(total_query_tokens, heads, value_head_dim)`.

    Raises:
        UnsupportedAttentionError: For a window, softcap or ALiBi.
    """
    _refuse(window_size, softcap, alibi_slopes)
    shapes = (1, q.shape[0]), (1, k.shape[0])
    state = packed_state(object(), cu_seqlens_q, cu_seqlens_k, shapes)
    return _attend(q[None], k[None], v[None], state, causal, softmax_scale, dropout_p)[0]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over a batch without padding, with the signature of flash-attn's function of this name.

    Shapes are `(batch, tokens, heads, head_dim)`; the arguments are those of [`flash_attn_varlen_func`].
    """
    _refuse(window_size, softcap, alibi_slopes)
    state = uniform_state(q.shape[0], q.shape[1], k.shape[1])
    return _attend(q, k, v, state, causal, softmax_scale, dropout_p)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: ForwardState,
    causal: bool,
    softmax_scale: float | None,
    dropout: float,
) -> torch.Tensor:
    query, key, value = (side.transpose(1, 2) for side in (q, k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    inputs = AttentionInputs(query, key, value, CAUSAL if causal else FULL, scale, "varlen", object(), dropout=dropout)
    inputs.state = state
    return attend(inputs)[0]
