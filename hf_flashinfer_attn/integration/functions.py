"""The two functions that transformers calls: the mask function, once per forward, and the attention function."""

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
        q_length: Query slots per row.
        kv_length: Key slots per row.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        mask_function: Which keys a query may see, padding aside.
        attention_mask: Valid positions, bool, shape `(batch, tokens seen so far)`.
        dtype: Of the additive mask.
        device: Of the additive mask.
        use_vmap: Whether the mask function needs vmap to be evaluated.

    Returns:
        A mask of shape `(batch, 1, q_length, kv_length)` without memory. While torch.compile traces, a `GraphMask` for
        bands, so that the graph stays whole, and a graph break for any other mask. While torch.export or
        torch.jit.trace records, the mask of eager attention.
    """
    if (
        mask_function is bidirectional_mask_function
        and attention_mask is None
        and getattr(kwargs.get("config"), "model_type", None) in FAILS_ON_MASKS
    ):
        return None
    if recorder() is not None:
        # Models that compute attention by themselves can be recorded.
        recorded: torch.Tensor = eager_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, dtype=dtype,
            use_vmap=use_vmap, device=device,
        )  # fmt: skip
        return recorded
    if torch.compiler.is_compiling():
        # Not None: not every module takes its absence for what was asked.
        if mask_function is bidirectional_mask_function and attention_mask is None:
            return GraphMask(None, (batch_size, q_length, kv_length), None, None, dtype, torch.device(device))
        # Some models hand a mask that they were given to a mask helper again.
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
        attention_mask: The lazy mask of `attention_mask`; or a 4D mask of the user's, bool or additive; or a 2D padding
            mask; or None.
        dropout: Probability of dropping an attention weight.
        scaling: What logits are multiplied with; `head_dim ** -0.5` by default.
        is_causal: Causality where there is no mask; the module's own by default.
        sliding_window: Carried by the mask; refused where there is none to carry it.
        softcap: Caps logits to `softcap * tanh(logits / softcap)`.
        s_aux: Attention sinks, shape `(heads,)`.
        position_bias: Added to the logits, broadcastable to `(batch, heads, q_length, kv_length)`; of packed sequences
            to `(sequences, heads, longest, longest)`, by the place of a token in its own sequence.
        output_attentions: Whether to return the weights.
        cu_seq_lens_q: Offsets of packed sequences.
        cu_seq_lens_k: The same of the keys.
        max_length_q: Length of the longest packed sequence; unused, but named so that torch.compile adds no guard.
        max_length_k: The same for the keys.
        position_ids: Positions that restart at each image, for Pixtral's vision tower, which passes no cu_seqlens.
        cache: The paged cache of continuous batching, which is refused; or the cache that the layer has updated.
        indices: The keys that a layer of sparse attention chose for each query, integers, shape
            `(batch, q_length, chosen)`.
        block_indices: The same in blocks of keys, shape `(batch, groups, q_length, chosen)`.
        sinks: A logit for each query that takes weight and gives nothing; refused.
        kwargs: Other arguments that models pass to their layers. Those that would change the result raise an error;
            unknown tensors are ignored, as in transformers' sdpa, and logged once.

    Returns:
        The output, shape `(batch, q_length, heads, value_head_dim)`, in padding zero or anything finite; and the
        weights, or None.

    Raises:
        BackendUnavailableError: If the backend asked for by name cannot run.
        UnsupportedAttentionError: If the request is not supported, or needs a fallback that was forbidden, or the
            forward is recorded by torch.export or torch.jit.trace.
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
    given = LayerArguments(
        dropout, scaling, is_causal, sliding_window, softcap, s_aux, position_bias, output_attentions, cu_seq_lens_q,
        cu_seq_lens_k, position_ids,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        return _attend_layer(module, query, key, value, _eager_mask(attention_mask), given)
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
        untraced = _untraced_attend(module, query, key, value, attention_mask, given)
        return untraced
    offsets = cu_seq_lens_q, cu_seq_lens_k
    return _attend_traced(module, query, key, value, lazy, offsets, scaling, is_causal, softcap), None


def _attend_layer(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    given: LayerArguments,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention outside of torch.compile's graphs: with the plan of an earlier layer, or by the driver."""
    found = find_plan(module, query, key, value, mask, given)
    if found is not None and found.plan is not None:
        output = found.plan(query, key, value)
        if is_tracing():
            record_call(replace(found.plan.record, layer=layer_name(module)))
        return output, None
    kept = specs_kept() if query.is_meta else None
    inputs = AttentionInputs.of_layer(module, query, key, value, mask, given, has_values=kept is None)
    if kept is not None:
        kept.append((module, inputs.spec(has_values=False)))
        return query.new_empty(key.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    if found is not None and given.cu_seq_lens_q is not None:
        inputs.state = found.state
    output, weights, plan = attend(inputs)
    if found is not None and plan is not None and inputs.query is query and inputs.state is found.state:
        found.keep(plan)
    return output, weights


def _attend_traced(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: GraphMask | None,
    offsets: tuple[torch.Tensor | None, torch.Tensor | None],
    scaling: float | None,
    is_causal: bool | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention for torch.compile: nothing but an op and the moves of data around it."""
    if is_cast_as_flash(query):
        query, key, value = cast_as_flash(module, query, key, value)
    left, right = (mask.left, mask.right) if mask is not None else (None, _causal_bound(module, is_causal))
    output: torch.Tensor = ragged_attention(
        query.transpose(1, 2).contiguous(),
        key.transpose(1, 2).contiguous(),
        value.transpose(1, 2).contiguous(),
        None if mask is None else mask.handle,
        *offsets,
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
    given: LayerArguments,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    given = given._replace(output_attentions=bool(given.output_attentions) or weights_are_collected())
    return _attend_layer(module, query, key, value, _eager_mask(attention_mask), given)


def _eager_mask(mask: torch.Tensor | GraphMask | None) -> torch.Tensor | None:
    """Returns what an uncompiled forward gets for a mask, which a graph break may carry out of a graph."""
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
    """Returns an additive mask that also hides all keys but those of chosen blocks, which only the layer knows.

    Args:
        module: The layer.
        mask: As a model gave it.
        block_indices: Blocks chosen for each query, shape `(batch, groups, q_length, chosen)`.
        query: Shape `(batch, heads, q_length, head_dim)`.
        key: Shape `(batch, kv_heads, kv_length, head_dim)`.
        position_ids: Of the queries; None where they are the last of the keys.
    """
    if isinstance(mask, RaggedMask):
        mask = mask.dense()
    q_length, kv_length = query.shape[2], key.shape[2]
    if position_ids is None:
        position_ids = torch.arange(kv_length - q_length, kv_length, device=query.device)
    positions = position_ids.expand(query.shape[0], -1)
    return block_mask(module, block_indices, mask, kv_length, query.dtype, query.device, positions)


def refuse_paged(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Stands where continuous batching looks for an attention function, and says that there is none."""
    raise UnsupportedAttentionError(
        f"continuous batching (attn_implementation={PAGED_NAME!r})",
        f"Use attn_implementation='sdpa', or a newer version of transformers, which takes {NAME!r} itself.",
    )
