"""A layer's attention outside of torch.compile's graphs: decided, laid out, prepared once per forward, and run."""

from __future__ import annotations

import torch

from .attention import RaggedCall, attend_ragged, needs_grad
from .backends import dense
from .bias import LogitsBias
from .dense_mask import dense_mask_of
from .dispatch import AttentionRequest, Decision, Path, decide
from .errors import UnsupportedAttentionError
from .layer_calls import LayerCall, calls_kept
from .layer_kinds import PACKED_IMAGES, layer_name, padded_queries_are_idle
from .layer_request import (
    cast_as_flash,
    fits,
    image_offsets,
    is_cast_as_flash,
    packed_layout_of,
    pattern_of,
    weights_dtype,
)
from .layout import RaggedLayout, is_of_graph, uniform_layout
from .mask import RaggedMask
from .prepared import NativeAttention, PreparedAttention, native, native_masked, prepare
from .reuse import kept_of, signature_of
from .settings import current_settings
from .trace import AttentionCall, is_tracing, record_call

__all__ = ["attend"]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    output_attentions: bool | None,
    cu_seq_lens_q: torch.Tensor | None,
    cu_seq_lens_k: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends as `attention_forward` says, which tells of arguments, results and errors."""
    if query.is_meta and (calls := calls_kept()) is not None:
        calls.append(_layer_call(module, query, key, value, attention_mask, is_causal, softcap, s_aux, position_bias))
        return query.new_empty(key.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    sm_scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if is_cast_as_flash(query):
        query, key, value = cast_as_flash(module, query, key, value)
    mask = attention_mask
    lazy = mask if isinstance(mask, RaggedMask) else None
    if mask is None and cu_seq_lens_q is None and position_ids is not None and type(module).__name__ in PACKED_IMAGES:
        cu_seq_lens_q = cu_seq_lens_k = image_offsets(position_ids)
    offsets = None if cu_seq_lens_q is None or cu_seq_lens_k is None else (cu_seq_lens_q, cu_seq_lens_k)
    pattern = pattern_of(module, mask, is_causal)
    if mask is None and sliding_window is not None and key.shape[2] > sliding_window:
        raise UnsupportedAttentionError(
            f"sliding_window={sliding_window} without a mask over {key.shape[2]} keys",
            "Use attn_implementation='eager' for this model.",
        )
    bias = packed = None
    if position_bias is not None:
        rows, heads, q_length, kv_length = *query.shape[:3], key.shape[2]
        if offsets is not None and query.shape[0] == key.shape[0] == 1:
            packed = packed_layout_of(lazy, *offsets, query, key)
            rows, q_length, kv_length = len(packed.query.lengths), packed.query.max_length, packed.key.max_length
        if packed is not None or offsets is None:
            bias = LogitsBias.fit(position_bias, (rows, heads, q_length, kv_length))
    keep_padded_queries = not padded_queries_are_idle(module)
    request = AttentionRequest(
        pattern=pattern,
        device=query.device,
        dtype=query.dtype,
        head_dim=max(query.shape[-1], value.shape[-1]),
        needs_grad=needs_grad(query, key, value, position_bias, s_aux),
        dropout=dropout,
        output_attentions=bool(output_attentions),
        biased_packed=(
            position_bias is not None and (bias is None or (lazy is not None and lazy.spec.packed is not None))
        ),
        biased_window=position_bias is not None and (pattern.is_window or softcap is not None),
        # Transformers finds packed sequences in positions too, which need not be read where offsets tell.
        mask_holes=lazy is not None and (offsets is None or lazy.spec.packed is None) and lazy.has_holes,
        window_keeps_padded_queries=(
            lazy is not None and pattern.is_window and keep_padded_queries and lazy.has_padding
        ),
        mask_shape_differs=query.shape[0] != key.shape[0] or (lazy is not None and not fits(lazy.spec, query, key)),
        mask_modified=lazy is not None and lazy.was_modified,
    )
    decision = decide(request, current_settings())
    if offsets is not None and is_of_graph(offsets[0]) and (decision.path is not Path.FLASHINFER or bias is not None):
        # These look at lengths on the host, and every replay would repeat those of the capture.
        what = f"{decision.path.value} attention ({decision.reason})" if bias is None else "a position_bias"
        raise UnsupportedAttentionError(f"{what} in a captured graph", "Use unpad without cuda_graphs for this model.")
    layer = layer_name(module)
    if decision.path is Path.DENSE:
        if bias is not None and packed is not None:
            position_bias = bias.over(packed)
        output, weights = dense.attend(
            query,
            key,
            value,
            dense_mask_of(mask, offsets, position_bias, query, key, pattern),
            sm_scale=sm_scale,
            softcap=softcap,
            sinks=s_aux,
            dropout=dropout,
            return_weights=bool(output_attentions),
        )
        if is_tracing():
            head_dim = request.head_dim
            record_call(AttentionCall(layer, pattern.name, "dense", head_dim, head_dim, decision.reason))
        return output, weights
    may_be_native = (
        decision.path is Path.FLASHINFER and current_settings().backend == "auto" and bias is None and s_aux is None
    )
    # Before anything is looked up that rides on it, so that the first layer already leaves what the second one finds.
    if packed is None and offsets is not None:
        packed = packed_layout_of(lazy, *offsets, query, key)
    kept = None
    prepared: PreparedAttention | NativeAttention | None = None
    if decision.path is Path.FLASHINFER and not query.dtype == key.dtype == value.dtype:
        raise UnsupportedAttentionError(
            f"query, key and value of dtypes {query.dtype}, {key.dtype} and {value.dtype}",
            "Make the dtypes of the model and of its cache the same.",
        )
    if decision.path is Path.FLASHINFER and bias is None and s_aux is None:
        kept = kept_of(module, query, key, value, mask, sliding_window, offsets, position_ids, scaling, softcap)
        if kept is not None:
            signature = signature_of(module, query, key, value, scaling, is_causal, softcap)
            # Inputs that were cast are found only here.
            if (prepared := kept.store.find(signature)) is not None:
                return prepared(query, key, value, layer), None
    if may_be_native and lazy is not None and offsets is None:
        prepared = native_masked(query, key, value, lazy.spec, sm_scale=sm_scale, softcap=softcap)
        if prepared is not None:
            if kept is not None:
                kept.store.keep(signature, prepared)
            return prepared(query, key, value, layer), None
    if packed is not None:
        layout = packed
    elif lazy is not None:
        layout = lazy.layout_of_forward(keep_padded_queries=keep_padded_queries)
    elif mask is None:
        layout = uniform_layout(query.shape[0], query.shape[2], key.shape[2])
    else:
        layout = _layout_of_2d_mask(mask, query, key)
    sinks = None if s_aux is None else s_aux.reshape(-1)
    if decision.path is Path.FLASHINFER:
        if may_be_native:
            prepared = native(query, key, value, layout, pattern, sm_scale=sm_scale, softcap=softcap)
        if prepared is None:
            made = prepare(
                query, key, value, layout, pattern, sm_scale=sm_scale, softcap=softcap, biased=bias is not None,
                sinks=sinks is not None,
            )  # fmt: skip
            # While its kernel is not compiled, torch serves the call, and nothing of it is kept.
            decision, prepared = (made, None) if isinstance(made, Decision) else (decision, made)
        if prepared is not None:
            if kept is not None:
                kept.store.keep(signature, prepared)
            return prepared(query, key, value, layer, bias, sinks), None
    call = RaggedCall(
        query=layout.query.gather(query.transpose(1, 2)),
        key=layout.key.gather(key.transpose(1, 2)),
        value=layout.key.gather(value.transpose(1, 2)),
        layout=layout,
        pattern=pattern,
        sm_scale=sm_scale,
        softcap=softcap,
        dropout=dropout,
        layer=layer,
        bias=bias,
        sinks=sinks,
    )
    return layout.query.scatter(attend_ragged(call, decision)), None


def _layer_call(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    position_bias: torch.Tensor | None,
) -> LayerCall:
    """Returns what a call asks for where tensors have no values, as if its mask held padding on the right."""
    lazy = mask if isinstance(mask, RaggedMask) else None
    pattern = pattern_of(module, mask, is_causal)
    request = AttentionRequest(
        pattern=pattern,
        device=query.device,
        dtype=weights_dtype(module, query.dtype) if query.dtype == torch.float32 else query.dtype,
        head_dim=max(query.shape[-1], value.shape[-1]),
        biased_packed=(
            position_bias is not None and LogitsBias.fit(position_bias, (*query.shape[:3], key.shape[2])) is None
        ),
        biased_window=position_bias is not None and (pattern.is_window or softcap is not None),
        window_keeps_padded_queries=(lazy is not None and pattern.is_window and not padded_queries_are_idle(module)),
        mask_shape_differs=query.shape[0] != key.shape[0] or (lazy is not None and not fits(lazy.spec, query, key)),
        mask_modified=lazy is not None and lazy.was_modified,
    )
    return LayerCall(
        module, request, query.shape[1], key.shape[1], query.shape[-1], value.shape[-1], softcap,
        position_bias is not None, s_aux is not None,
    )  # fmt: skip


def _layout_of_2d_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> RaggedLayout:
    # A few models hand a flash kernel the 2D mask itself, in every layer.
    expected = (key.shape[0], key.shape[2])
    if tuple(mask.shape) != expected or query.shape[2] != key.shape[2]:
        raise UnsupportedAttentionError(
            f"a 2D attention mask of shape {tuple(mask.shape)} for {query.shape[2]} queries, expected {expected}",
            "Use attn_implementation='eager' for this model.",
        )
    return RaggedLayout.from_padding_mask(mask)
