"""Functions that transformers calls: the mask function (once per forward) and the attention function (per layer)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import Cache
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask

from ..attention.dense_mask import mask_of_chosen
from ..attention.driver import attend
from ..attention.plan_cache import find_plan
from ..attention.quirks import (
    CAUSAL_PADDING_IS_READ,
    FAILS_ON_MASKS,
    PACKED_IMAGES,
    READS_NEIGHBOURS,
    is_one_of,
    layer_name,
    padded_queries_reason,
)
from ..attention.recorded_specs import specs_kept
from ..attention.recorders import is_exporting, recorder, refuse_export
from ..attention.spec import AttentionInputs, LayerArguments, cast_as_flash, is_cast_as_flash, needs_grad, pattern_of
from ..errors import UnsupportedAttentionError
from ..ragged.lazy_mask import RaggedMask, lazy_mask
from ..settings import NAME, PAGED_NAME
from ..tracing import is_tracing, record_call
from .extra_arguments import check_extra_arguments
from .ops import ragged_attention
from .traced_mask import GraphMask, trace_mask
from .transformers_patches import block_mask, weights_are_collected

__all__ = ["attention_forward", "attention_mask", "refuse_paged"]


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., torch.Tensor] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | GraphMask | None:
    """Makes the lazy mask of one forward; called by transformers' mask helpers.

    Args:
        batch_size: Rows.
        q_length: Padded length of the queries.
        kv_length: Padded length of the keys.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        mask_function: transformers' mask function: which keys a query sees, padding aside.
        attention_mask: Padding mask, bool, True for valid positions, shape `(batch, tokens seen so far)`.
        dtype: dtype of the additive mask.
        device: Device of the additive mask.
        use_vmap: Whether the mask function must be evaluated with vmap.

    Returns:
        A lazy mask, shape `(batch, 1, q_length, kv_length)`. While torch.compile traces: a `GraphMask` for bands; for
        any other mask the graph breaks. While torch.export or torch.jit.trace records: eager attention's mask.
    """
    if (
        mask_function is bidirectional_mask_function
        and attention_mask is None
        and getattr(kwargs.get("config"), "model_type", None) in FAILS_ON_MASKS
    ):
        return None
    if recorder() is not None:
        # Models with their own attention code can be recorded.
        recorded: torch.Tensor = eager_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, dtype=dtype,
            use_vmap=use_vmap, device=device,
        )  # fmt: skip
        return recorded
    if torch.compiler.is_compiling():
        # Not None: modules may interpret a missing mask as causal.
        if mask_function is bidirectional_mask_function and attention_mask is None:
            return GraphMask(None, (batch_size, q_length, kv_length), None, None, dtype, torch.device(device))
        # Some models pass a mask through a mask helper twice.
        if isinstance(attention_mask, GraphMask):
            return attention_mask
        traced = trace_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, dtype, device, use_vmap
        )
        if traced is not None:
            return traced
        return _untraced_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, dtype, device, use_vmap
        )
    return lazy_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, dtype, device, use_vmap
    )


_untraced_mask: Callable[..., RaggedMask] = torch.compiler.disable(lazy_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | GraphMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    position_ids: torch.Tensor | None = None,
    cache: object | None = None,
    indices: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as transformers' layers call it.

    Args:
        module: The attention layer.
        query: Shape `(batch, heads, q_length, head_dim)`.
        key: Shape `(batch, kv_heads, kv_length, head_dim)`.
        value: Shape `(batch, kv_heads, kv_length, value_head_dim)`.
        attention_mask: The lazy mask of the function `attention_mask`; a user's 4D mask, bool or additive; a 2D padding
            mask; or None.
        dropout: Probability of dropping an attention weight.
        scaling: Factor of the logits; `head_dim ** -0.5` by default.
        is_causal: Whether a call without a mask is causal; the module's attribute by default.
        sliding_window: Window size; the mask contains the window. Without a mask, a window shorter than the keys is
            refused.
        softcap: Caps logits to `softcap * tanh(logits / softcap)`.
        s_aux: Attention sinks, shape `(heads,)`.
        position_bias: Added to the logits, broadcastable to `(batch, heads, q_length, kv_length)`; for packed sequences
            to `(sequences, heads, longest_query, longest_key)`, by position in the sequence.
        output_attentions: Whether to return the weights.
        cu_seq_lens_q: cu_seqlens of packed queries, integers, shape `(sequences + 1,)`.
        cu_seq_lens_k: The same for the keys.
        max_length_q: Length of the longest packed sequence; unused, but named so that torch.compile adds no guard.
        max_length_k: The same for the keys.
        position_ids: Positions that restart at each image, for Pixtral's vision tower, which passes no cu_seqlens.
        cache: The cache that the layer has updated, which is ignored; a paged cache of continuous batching is refused.
        indices: Keys that a layer of sparse attention selected for each query, integers, shape
            `(batch, q_length, selected)`.
        block_indices: The same in blocks of keys, shape `(batch, groups, q_length, selected)`.
        sinks: Attention sinks per query; refused.
        kwargs: Other arguments that models pass to their layers. Those that would change the result raise an error;
            unknown tensors are ignored, as in transformers' sdpa, and logged once.

    Returns:
        The output, shape `(batch, q_length, heads, value_head_dim)`, with any finite values in padding; and the
        weights, or None.

    Raises:
        BackendUnavailableError: If the backend of the settings cannot run.
        UnsupportedAttentionError: If the call is not supported, the settings forbid its fallback, or torch.export or
            torch.jit.trace records the forward.
    """
    if kwargs:
        check_extra_arguments(kwargs)
    if cache is not None and not isinstance(cache, Cache):
        refuse_paged()
    if output_attentions is None:
        output_attentions = weights_are_collected()
    if (cu_seq_lens_q is None) != (cu_seq_lens_k is None):
        raise UnsupportedAttentionError(
            "one of cu_seq_lens_q and cu_seq_lens_k without the other", "Pass both, or neither with a padding mask."
        )
    if (
        cu_seq_lens_q is not None
        and is_one_of(type(module), READS_NEIGHBOURS)
        and getattr(getattr(module, "config", None), "trigram_input", True)
    ):
        raise UnsupportedAttentionError(
            f"packed sequences in {type(module).__name__}: the model's embeddings join each token with its neighbours, "
            "which packing takes from other sequences",
            "Pad the batch; in sentence-transformers, model[0].unpad_inputs = False.",
        )
    if sinks is not None:
        raise UnsupportedAttentionError(
            f"sinks of shape {tuple(sinks.shape)}, one for each query",
            "Use attn_implementation='eager' for this model.",
        )
    if block_indices is not None:
        attention_mask = _mask_of_blocks(module, _values(attention_mask), block_indices, query, key, position_ids)
    elif indices is not None and indices.shape[-1] < key.shape[2]:
        mask = _values(attention_mask)
        attention_mask = mask_of_chosen(mask, indices, query, key, pattern_of(module, mask, is_causal))
    arguments = LayerArguments(
        dropout, scaling, is_causal, sliding_window, softcap, s_aux, position_bias, output_attentions, cu_seq_lens_q,
        cu_seq_lens_k, position_ids,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        return _attend_layer(module, query, key, value, _eager_mask(attention_mask), arguments)
    if is_exporting():
        refuse_export()
    lazy = None
    if isinstance(attention_mask, GraphMask):
        if attention_mask.values is None and attention_mask.fits(query, key):
            lazy = attention_mask
        whole_mask = lazy is None
    else:
        whole_mask = attention_mask is not None or sliding_window is not None or query.shape[0] != key.shape[0]
    whole_mask = whole_mask or dropout > 0 or bool(output_attentions) or position_bias is not None or s_aux is not None
    whole_mask = whole_mask or is_one_of(type(module), PACKED_IMAGES | CAUSAL_PADDING_IS_READ)
    if whole_mask or needs_grad(query, key, value):
        untraced: tuple[torch.Tensor, torch.Tensor | None]
        untraced = _untraced_attend(module, query, key, value, attention_mask, arguments)
        return untraced
    cu_seqlens = cu_seq_lens_q, cu_seq_lens_k
    return _attend_traced(module, query, key, value, lazy, cu_seqlens, scaling, is_causal, softcap), None


def _attend_layer(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    arguments: LayerArguments,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention outside of compiled graphs: runs the cached plan of an earlier layer, or the driver."""
    cached = find_plan(module, query, key, value, mask, arguments)
    if cached is not None and cached.plan is not None:
        output = cached.plan(query, key, value)
        if is_tracing():
            record_call(replace(cached.plan.record, layer=layer_name(module)))
        return output, None
    specs = specs_kept() if query.is_meta else None
    inputs = AttentionInputs.of_layer(module, query, key, value, mask, arguments, has_values=specs is None)
    if specs is not None:
        specs.append((module, inputs.spec(has_values=False)))
        return query.new_empty(key.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    if cached is not None and arguments.cu_seq_lens_q is not None:
        inputs.state = cached.state
    output, weights, plan = attend(inputs)
    if cached is not None and plan is not None and inputs.query is query and inputs.state is cached.state:
        cached.keep(plan)
    return output, weights


def _attend_traced(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: GraphMask | None,
    cu_seqlens: tuple[torch.Tensor | None, torch.Tensor | None],
    scaling: float | None,
    is_causal: bool | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention inside a compiled graph: one op, and transposes around it."""
    if is_cast_as_flash(query):
        query, key, value = cast_as_flash(module, query, key, value)
    left, right = (mask.left, mask.right) if mask is not None else (None, _causal_bound(module, is_causal))
    output: torch.Tensor = ragged_attention(
        query.transpose(1, 2).contiguous(),
        key.transpose(1, 2).contiguous(),
        value.transpose(1, 2).contiguous(),
        None if mask is None else mask.handle,
        *cu_seqlens,
        left,
        right,
        None if mask is None or mask.handle is None else padded_queries_reason(module, is_causal=mask.right == 0),
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap,
    )
    return output


def _causal_bound(module: torch.nn.Module, is_causal: bool | None) -> int | None:
    return 0 if pattern_of(module, None, is_causal).is_causal else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _untraced_attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | GraphMask | None,
    arguments: LayerArguments,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    arguments = arguments._replace(output_attentions=bool(arguments.output_attentions) or weights_are_collected())
    return _attend_layer(module, query, key, value, _eager_mask(attention_mask), arguments)


def _eager_mask(mask: torch.Tensor | GraphMask | None) -> torch.Tensor | None:
    """Converts a `GraphMask`, which a graph break may carry out of a graph, to the mask of an uncompiled forward."""
    if not isinstance(mask, GraphMask):
        return mask
    return mask.lazy() if mask.values is None else mask.values


def _values(mask: torch.Tensor | GraphMask | None) -> torch.Tensor | None:
    return mask.dense() if isinstance(mask, GraphMask) else mask


def _mask_of_blocks(
    module: torch.nn.Module,
    mask: torch.Tensor | None,
    block_indices: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Returns the additive mask of block-sparse attention, made by the layer from its selected blocks.

    Without position_ids, the queries are the last positions of the keys.
    """
    if isinstance(mask, RaggedMask):
        mask = mask.dense()
    q_length, kv_length = query.shape[2], key.shape[2]
    if position_ids is None:
        position_ids = torch.arange(kv_length - q_length, kv_length, device=query.device)
    positions = position_ids.expand(query.shape[0], -1)
    return block_mask(module, block_indices, mask, kv_length, query.dtype, query.device, positions)


def refuse_paged(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Attention function registered for continuous batching; always raises `UnsupportedAttentionError`."""
    raise UnsupportedAttentionError(
        f"continuous batching (attn_implementation={PAGED_NAME!r})",
        f"Use attn_implementation='sdpa', or a newer version of transformers, which takes {NAME!r} itself.",
    )
