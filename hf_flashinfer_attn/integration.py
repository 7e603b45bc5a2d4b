"""The two functions that transformers calls: the mask function, once per forward, and the attention function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from .attention import RaggedCall, attend_ragged, needs_grad
from .backends import dense
from .bias import LogitsBias
from .compiled import ragged_attention
from .dispatch import AttentionRequest, Decision, Path, decide
from .errors import UnsupportedAttentionError
from .graph_mask import GraphMask, trace_mask
from .hooks import weights_are_collected
from .layer_calls import LayerCall, calls_kept
from .layout import (
    LengthsRead,
    PreparedStore,
    RaggedLayout,
    is_of_graph,
    known_layout,
    packed_layout,
    uniform_layout,
    versions_of,
)
from .mask import MaskSpec, RaggedMask, lazy_mask
from .pattern import CAUSAL, FULL, Pattern, dense_pattern
from .prepared import NativeAttention, PreparedAttention, native, native_masked, prepare
from .settings import current_settings
from .trace import AttentionCall, is_tracing, record_call

__all__ = ["NAME", "PAGED_NAME", "attention_forward", "attention_mask", "refuse_paged"]

NAME = "flashinfer"
PAGED_NAME = f"paged|{NAME}"


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
) -> RaggedMask | GraphMask | None:
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
        bands, so that the graph stays whole, and a graph break for any other mask.
    """
    if (
        mask_function is bidirectional_mask_function
        and attention_mask is None
        and getattr(kwargs.get("config"), "model_type", None) in _FAILS_ON_MASKS
    ):
        return None
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
        position_ids: Tells images apart in Pixtral's vision tower, which gives a flash kernel nothing else to.
        cache: The paged cache of continuous batching.
        indices: The keys that a layer of sparse attention chose for each query, integers, shape
            `(batch, q_length, chosen)`.
        block_indices: The same in blocks of keys, shape `(batch, groups, q_length, chosen)`.
        sinks: A logit for each query that takes weight and gives nothing; refused.

    Returns:
        The output, shape `(batch, q_length, heads, value_head_dim)`, in padding zero or anything finite; and the
        weights, or None.

    Raises:
        BackendUnavailableError: If the backend asked for by name cannot run.
        UnsupportedAttentionError: If the request is not supported, or needs a fallback that was forbidden.
    """
    if output_attentions is None:
        output_attentions = weights_are_collected()
    if (cu_seq_lens_q is None) != (cu_seq_lens_k is None):
        raise UnsupportedAttentionError(
            "one of cu_seq_lens_q and cu_seq_lens_k without the other", "Pass both, or neither with a padding mask."
        )
    if cu_seq_lens_q is not None and type(module).__name__ in _READS_NEIGHBOURS:
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
        attention_mask = _mask_of_blocks(module, attention_mask, block_indices, query, key, position_ids)
    elif indices is not None and indices.shape[-1] < key.shape[2]:
        attention_mask = _mask_of_chosen(attention_mask, indices, query, key)
    rest = (
        dropout, scaling, is_causal, sliding_window, softcap, s_aux, position_bias, output_attentions, cu_seq_lens_q,
        cu_seq_lens_k, position_ids, cache,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        mask = _eager_mask(attention_mask)
        plain = s_aux is None and position_bias is None and cache is None
        if query.is_cuda and plain and not (output_attentions or dropout):
            # Every layer but the first of its kind ends here, and the host does nothing but launch. The owner is held
            # until then, with whom the plan would go.
            packed = None if cu_seq_lens_q is None or cu_seq_lens_k is None else (cu_seq_lens_q, cu_seq_lens_k)
            kept = _kept_of(module, query, key, value, mask, sliding_window, packed, position_ids, scaling, softcap)
            if kept is not None and kept.store.last is not None:
                signature = _signature(module, query, key, value, scaling, is_causal, softcap)
                if (prepared := kept.store.find(signature)) is not None:
                    return prepared(query, key, value, _layer_name(module) if is_tracing() else ""), None
        return _attend(module, query, key, value, mask, *rest)
    lazy = None
    if isinstance(attention_mask, GraphMask):
        if attention_mask.values is None and attention_mask.fits(query, key):
            lazy = attention_mask
        whole_mask = lazy is None
    else:
        whole_mask = attention_mask is not None or sliding_window is not None or query.shape[0] != key.shape[0]
    whole_mask = whole_mask or dropout > 0 or bool(output_attentions) or position_bias is not None or s_aux is not None
    whole_mask = whole_mask or cache is not None
    whole_mask = whole_mask or type(module).__name__ in _PACKED_IMAGES
    whole_mask = whole_mask or type(module).__name__ in _CAUSAL_PADDING_IS_READ
    if whole_mask or needs_grad(query, key, value):
        untraced: tuple[torch.Tensor, torch.Tensor | None]
        untraced = _untraced_attend(module, query, key, value, attention_mask, *rest)
        return untraced
    offsets = cu_seq_lens_q, cu_seq_lens_k
    return _attend_traced(module, query, key, value, lazy, offsets, scaling, is_causal, softcap), None


def _mask_of_chosen(
    mask: torch.Tensor | GraphMask | None, indices: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    """Returns a mask that hides all keys but the chosen ones too, which transformers leaves to flash kernels."""
    shape = (query.shape[0], query.shape[2], key.shape[2])
    hidden = torch.ones(shape, dtype=torch.bool, device=query.device).scatter(-1, indices.long(), False).unsqueeze(1)
    if mask is None:
        mask = query.new_zeros(hidden.shape)
    whole: torch.Tensor = mask.dense() if isinstance(mask, (RaggedMask, GraphMask)) else mask
    return whole & ~hidden if whole.dtype == torch.bool else whole.masked_fill(hidden, torch.finfo(whole.dtype).min)


def _mask_of_blocks(
    module: torch.nn.Module,
    mask: torch.Tensor | GraphMask | None,
    block_indices: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    """The same of blocks, which only the layer can tell the keys of."""
    indexer: Any = module.indexer
    q_length, kv_length = query.shape[2], key.shape[2]
    if position_ids is None:
        position_ids = torch.arange(kv_length - q_length, kv_length, device=query.device)
    whole = mask.dense() if isinstance(mask, (RaggedMask, GraphMask)) else mask
    made: torch.Tensor = indexer.build_block_mask(
        block_indices, whole, kv_length, query.dtype, query.device, position_ids.expand(query.shape[0], -1)
    )
    return made


def _signature(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    is_causal: bool | None,
    softcap: float | None,
) -> tuple[Any, ...]:
    """All that the choice of a path and a plan depends on, besides the mask or layout that keeps what was chosen."""
    device = query.get_device()
    return (
        # The configuration lives longer than a mask; where there is none, nothing but causality depends on the module.
        type(module), id(getattr(module, "config", None)), getattr(module, "is_causal", None), query.shape, key.shape,
        value.shape, query.dtype, key.dtype, value.dtype, scaling, is_causal, softcap, device,
        torch._C._cuda_getCurrentRawStream(device), current_settings(),
    )  # fmt: skip


class _Kept(NamedTuple):
    """What earlier layers left, and whom it lives with; a tuple, as one is made in every call."""

    owner: object
    store: PreparedStore


class _PackedLane(NamedTuple):
    """What layers of a forward keep for packed sequences, on their mask; shapes are told apart by signatures."""

    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    versions: tuple[int, int] | None
    kept: _Kept

    def is_of(self, query_offsets: torch.Tensor, key_offsets: torch.Tensor) -> bool:
        return (
            self.query_offsets is query_offsets
            and self.key_offsets is key_offsets
            and self.versions == versions_of(query_offsets, key_offsets)
        )


def _kept_of(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sliding_window: int | None,
    offsets: tuple[torch.Tensor, torch.Tensor] | None,
    position_ids: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> _Kept | None:
    """Returns where the layers of a forward keep prepared attention; None where each must be looked at."""
    if torch.cuda.is_current_stream_capturing():
        return None
    # Tensors may be written to between two calls.
    if isinstance(scaling, torch.Tensor) or isinstance(softcap, torch.Tensor):
        return None
    if needs_grad(query, key, value):
        return None
    if offsets is not None:
        return _kept_of_packed(query, key, mask, sliding_window, offsets)
    if isinstance(mask, RaggedMask):
        return None if mask.was_modified else _Kept(mask, mask.prepared)
    if mask is not None or sliding_window is not None or query.shape[0] != key.shape[0]:
        return None
    if position_ids is not None and type(module).__name__ in _PACKED_IMAGES:
        return None
    layout = uniform_layout(query.shape[0], query.shape[2], key.shape[2])
    return _Kept(layout, layout.prepared)


def _kept_of_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    sliding_window: int | None,
    offsets: tuple[torch.Tensor, torch.Tensor],
) -> _Kept | None:
    """Returns what layers that attend to packed sequences alike keep; None before their layout is known."""
    pattern, carrier = None, None
    if isinstance(mask, RaggedMask):
        if mask.was_modified or mask.spec.padding_mask is not None:
            return None
        lane: _PackedLane | None = mask.packed_lane
        if lane is not None and lane.is_of(*offsets):
            return lane.kept
        pattern, carrier = mask.spec.pattern, mask.carrier
    elif mask is not None or sliding_window is not None:
        return None
    layout = known_layout(carrier, *offsets, ((query.shape[0], query.shape[2]), (key.shape[0], key.shape[2])))
    if layout is None:
        return None
    # Layers with another band share the layout, and nothing else.
    kept = _Kept(layout, layout.derived.setdefault(("prepared", pattern), PreparedStore()))
    if isinstance(mask, RaggedMask):
        mask.packed_lane = _PackedLane(*offsets, versions_of(*offsets), kept)
    return kept


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
    if _is_cast_as_flash(query):
        query, key, value = _cast_as_flash(module, query, key, value)
    band = _pattern_of(module, None, is_causal) if mask is None else mask
    output: torch.Tensor = ragged_attention(
        query.transpose(1, 2).contiguous(),
        key.transpose(1, 2).contiguous(),
        value.transpose(1, 2).contiguous(),
        None if mask is None else mask.handle,
        *offsets,
        band.left,
        band.right,
        mask is not None and mask.handle is not None and not _padded_queries_are_idle(module),
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap,
    )
    return output


def _attend(
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
    cache: object | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if cache is not None:
        refuse_paged()
    if query.is_meta and (calls := calls_kept()) is not None:
        calls.append(_layer_call(module, query, key, value, attention_mask, is_causal, softcap, s_aux, position_bias))
        return query.new_empty(key.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    sm_scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if _is_cast_as_flash(query):
        query, key, value = _cast_as_flash(module, query, key, value)
    mask = attention_mask
    lazy = mask if isinstance(mask, RaggedMask) else None
    if lazy is not None and not _fits(lazy.spec, query, key) and lazy.hides_nothing:
        # Eager attention gets none, and some models hand on the mask of other queries or keys than those of this call.
        mask, lazy, is_causal = None, None, False
    if mask is None and cu_seq_lens_q is None and position_ids is not None and type(module).__name__ in _PACKED_IMAGES:
        cu_seq_lens_q = cu_seq_lens_k = _image_offsets(position_ids)
    offsets = None if cu_seq_lens_q is None or cu_seq_lens_k is None else (cu_seq_lens_q, cu_seq_lens_k)
    pattern = _pattern_of(module, mask, is_causal)
    if mask is None and sliding_window is not None and key.shape[2] > sliding_window:
        raise UnsupportedAttentionError(
            f"sliding_window={sliding_window} without a mask over {key.shape[2]} keys",
            "Use attn_implementation='eager' for this model.",
        )
    bias = packed = None
    if position_bias is not None:
        rows, heads, q_length, kv_length = *query.shape[:3], key.shape[2]
        if offsets is not None and query.shape[0] == key.shape[0] == 1:
            packed = _packed_layout(lazy, *offsets, query, key)
            rows, q_length, kv_length = len(packed.query.lengths), packed.query.max_length, packed.key.max_length
        if packed is not None or offsets is None:
            bias = LogitsBias.fit(position_bias, (rows, heads, q_length, kv_length))
    keep_padded_queries = not _padded_queries_are_idle(module)
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
        causal_padding_is_read=(
            lazy is not None
            and pattern.is_causal
            and type(module).__name__ in _CAUSAL_PADDING_IS_READ
            and lazy.has_padding
        ),
        mask_shape_differs=query.shape[0] != key.shape[0] or (lazy is not None and not _fits(lazy.spec, query, key)),
        mask_modified=lazy is not None and lazy.was_modified,
    )
    decision = decide(request, current_settings())
    if offsets is not None and is_of_graph(offsets[0]) and (decision.path is not Path.FLASHINFER or bias is not None):
        # These look at lengths on the host, and every replay would repeat those of the capture.
        what = f"{decision.path.value} attention ({decision.reason})" if bias is None else "a position_bias"
        raise UnsupportedAttentionError(f"{what} in a captured graph", "Use unpad without cuda_graphs for this model.")
    layer = _layer_name(module)
    if decision.path is Path.DENSE:
        if bias is not None and packed is not None:
            position_bias = bias.over(packed)
        output, weights = dense.attend(
            query,
            key,
            value,
            _dense_mask(mask, offsets, position_bias, query, key, pattern),
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
        packed = _packed_layout(lazy, *offsets, query, key)
    kept = None
    prepared: PreparedAttention | NativeAttention | None = None
    if decision.path is Path.FLASHINFER and not query.dtype == key.dtype == value.dtype:
        raise UnsupportedAttentionError(
            f"query, key and value of dtypes {query.dtype}, {key.dtype} and {value.dtype}",
            "Make the dtypes of the model and of its cache the same.",
        )
    if decision.path is Path.FLASHINFER and bias is None and s_aux is None:
        kept = _kept_of(module, query, key, value, mask, sliding_window, offsets, position_ids, scaling, softcap)
        if kept is not None:
            signature = _signature(module, query, key, value, scaling, is_causal, softcap)
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
    pattern = _pattern_of(module, mask, is_causal)
    request = AttentionRequest(
        pattern=pattern,
        device=query.device,
        dtype=_weights_dtype(module, query.dtype) if query.dtype == torch.float32 else query.dtype,
        head_dim=max(query.shape[-1], value.shape[-1]),
        biased_packed=(
            position_bias is not None and LogitsBias.fit(position_bias, (*query.shape[:3], key.shape[2])) is None
        ),
        biased_window=position_bias is not None and (pattern.is_window or softcap is not None),
        window_keeps_padded_queries=(lazy is not None and pattern.is_window and not _padded_queries_are_idle(module)),
        causal_padding_is_read=(
            lazy is not None and pattern.is_causal and type(module).__name__ in _CAUSAL_PADDING_IS_READ
        ),
        mask_shape_differs=query.shape[0] != key.shape[0] or (lazy is not None and not _fits(lazy.spec, query, key)),
        mask_modified=lazy is not None and lazy.was_modified,
    )
    return LayerCall(
        module, request, query.shape[1], key.shape[1], query.shape[-1], value.shape[-1], softcap,
        position_bias is not None, s_aux is not None,
    )  # fmt: skip


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _untraced_attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | GraphMask | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    output_attentions: bool | None,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    output_attentions = bool(output_attentions) or weights_are_collected()
    return _attend(
        module, query, key, value, _eager_mask(attention_mask), dropout, scaling, is_causal, sliding_window, softcap,
        s_aux, position_bias, output_attentions, *rest,
    )  # fmt: skip


def _eager_mask(mask: torch.Tensor | GraphMask | None) -> torch.Tensor | None:
    """Returns what an uncompiled forward gets for a mask, which a graph break may carry out of a graph."""
    if not isinstance(mask, GraphMask):
        return mask
    return mask.lazy() if mask.values is None else mask.values


def _pattern_of(module: torch.nn.Module, mask: torch.Tensor | None, is_causal: bool | None) -> Pattern:
    if isinstance(mask, RaggedMask):
        return mask.spec.pattern
    if mask is None or mask.ndim == 2:
        # Only where no mask helper was called: a mask knows better than a module (UMT5's decoder says False).
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        if is_causal is None and mask is None and type(module).__name__ in _CAUSAL_BY_MASK:
            causal = False
        return CAUSAL if causal else FULL
    if mask.ndim == 4:
        return dense_pattern("given as a 4D tensor")
    raise UnsupportedAttentionError(
        f"an attention mask of shape {tuple(mask.shape)}, expected 2 or 4 dimensions",
        "Use attn_implementation='eager' for this model.",
    )


def _is_cast_as_flash(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype == torch.float32


def _cast_as_flash(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Casts float32 input as transformers does for flash kernels: to autocast's dtype, or to that of the layer.

    Layer norms kept in float32, as PEFT keeps them, hand float32 to attention in a half-precision model.
    """
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    else:
        dtype = _weights_dtype(module, torch.float32)
    return (query.to(dtype), key.to(dtype), value.to(dtype)) if dtype.itemsize == 2 else (query, key, value)


def _weights_dtype(module: torch.nn.Module, default: torch.dtype) -> torch.dtype:
    return next((parameter.dtype for parameter in module.parameters() if parameter.ndim == 2), default)


def _packed_layout(
    lazy: RaggedMask | None,
    query_offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
) -> RaggedLayout:
    """Returns the layout of packed sequences, which rides on what masks share, or else on the offsets."""
    if lazy is not None and lazy.has_padding:
        raise UnsupportedAttentionError(
            "cu_seq_lens_q and cu_seq_lens_k together with a padding mask",
            "Packed input has no padding: leave the attention_mask out.",
        )
    shapes = ((query.shape[0], query.shape[2]), (key.shape[0], key.shape[2]))
    return packed_layout(query_offsets if lazy is None else lazy.carrier, query_offsets, key_offsets, shapes)


def _image_offsets(position_ids: torch.Tensor) -> torch.Tensor:
    """Returns the offsets of packed images, int32 on the host, from patch positions that restart at zero.

    Positions are `(tokens, 2)` pairs, or numbers `(1, tokens)` in older versions of transformers. The offsets ride on
    them, since every layer is handed the same tensor.
    """
    version = None if position_ids.is_inference() else position_ids._version
    known: tuple[int | None, torch.Tensor] | None = getattr(position_ids, "_image_offsets", None)
    if known is not None and version is not None and known[0] == version:
        return known[1]
    starts = (position_ids == 0).all(-1) if position_ids.shape[-1] == 2 else position_ids.flatten() == 0
    flags: list[bool] = LengthsRead(starts).values
    offsets = torch.tensor([at for at, start in enumerate(flags) if start] + [len(flags)], dtype=torch.int32)
    position_ids._image_offsets = (version, offsets)  # type: ignore[attr-defined]
    return offsets


def _layout_of_2d_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> RaggedLayout:
    # A few models hand a flash kernel the 2D mask itself, in every layer.
    expected = (key.shape[0], key.shape[2])
    if tuple(mask.shape) != expected or query.shape[2] != key.shape[2]:
        raise UnsupportedAttentionError(
            f"a 2D attention mask of shape {tuple(mask.shape)} for {query.shape[2]} queries, expected {expected}",
            "Use attn_implementation='eager' for this model.",
        )
    return RaggedLayout.from_padding_mask(mask)


def _dense_mask(
    mask: torch.Tensor | None,
    offsets: tuple[torch.Tensor, torch.Tensor] | None,
    position_bias: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    pattern: Pattern,
) -> torch.Tensor | None:
    """Returns the whole mask of a call, bool or additive, with the bias in it."""
    q_length, kv_length = query.shape[2], key.shape[2]
    if isinstance(mask, RaggedMask):
        mask = mask.dense()
    elif mask is None and pattern.is_causal and q_length > 1:
        mask = torch.ones(q_length, kv_length, dtype=torch.bool, device=query.device).tril(kv_length - q_length)
    elif mask is not None and mask.ndim == 2:
        mask = mask.to(torch.bool)[:, None, None, :]
        if pattern.is_causal:
            mask = mask & mask.new_ones(q_length, kv_length).tril(kv_length - q_length)
    if mask is not None and not mask.is_floating_point() and mask.dtype != torch.bool:
        mask = mask.to(torch.bool)
    if offsets is not None:
        query_owners, key_owners = _owners(query, offsets[0]), _owners(key, offsets[1])
        mask = _intersect(mask, (query_owners[:, :, None] == key_owners[:, None, :])[:, None])
    if position_bias is None or mask is None:
        return mask if position_bias is None else position_bias
    return _intersect(position_bias, mask) if mask.dtype == torch.bool else position_bias + mask


def _owners(side: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Returns the packed sequence of each token, counted over all rows, shape `(batch, tokens)`."""
    tokens = torch.arange(side.shape[0] * side.shape[2], device=offsets.device)
    return torch.bucketize(tokens, offsets[1:], right=True).view(side.shape[0], side.shape[2]).to(side.device)


def _intersect(mask: torch.Tensor | None, allowed: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return allowed
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)


def _fits(spec: MaskSpec, query: torch.Tensor, key: torch.Tensor) -> bool:
    return (spec.batch_size, spec.q_length, spec.kv_length) == (query.shape[0], query.shape[2], key.shape[2])


def _layer_name(module: torch.nn.Module) -> str:
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ if index is None else f"{type(module).__name__}[{index}]"


# What the forward of an attention layer may take without attending to another sequence than its own.
_OWN_SEQUENCE = frozenset(
    {
        "self", "hidden_states", "attention_mask", "position_embeddings", "position_ids", "past_key_values",
        "layer_past", "use_cache", "output_attentions", "cu_seqlens", "max_seqlen", "mask", "position_bias", "kwargs",
        "relative_position_embeddings", "layer_idx", "cache_position", "value_embeds", "freqs_ci", "position_mask",
        "codebook_idx", "cycle_offset", "sliding_window", "rotary_pos_emb", "deterministic",
    }
)  # fmt: skip
# Padding included, Blt's bytes become patches, DiffusionGemma's prompt the keys of its canvas, and MiniMax M3's tokens
# the blocks that it chooses from.
_CAUSAL_PADDING_IS_READ = frozenset({"BltSelfAttention", "DiffusionGemmaEncoderTextAttention", "MiniMaxM3VLAttention"})
# SigLIP's text tower pools the last position, padding or not; Conformers, and adapters on speech models, convolve over
# the hidden states of padding; recurrent layers carry them on. Without a mask from the user, T5Gemma's encoder masks
# its pad tokens by itself, and its decoder attends to all of them.
_PADDING_IS_READ = frozenset(
    {
        "SiglipAttention", "Siglip2Attention", "RecurrentGemmaAttention", "RecurrentGemmaSdpaAttention",
        "T5GemmaSelfAttention", *_CAUSAL_PADDING_IS_READ,
    }
)  # fmt: skip
# Adds a mask to scores of another shape, as its encoder does only if it is given one.
_FAILS_ON_MASKS = frozenset({"autoformer"})
# Say that they are causal where they are not, as in cross-attention; what is causal in these models has a mask.
_CAUSAL_BY_MASK = frozenset(
    {"BridgeTowerSelfAttention", "IdeficsAttention", "KosmosTextAttention", "LightGlueAttention"}
)
_READS_NEIGHBOURS = frozenset({"MobileBertSelfAttention"})
_PACKED_IMAGES = frozenset({"PixtralAttention"})
# Takes for a second sequence that these encoder-only models never give.
_SECOND_SEQUENCE = frozenset({"key_value_states", "encoder_hidden_states", "encoder_attention_mask"})
_ENCODER_ONLY_LAYERS = frozenset(
    {
        "EsmSelfAttention", "HubertAttention", "SEWAttention", "UniSpeechAttention", "UniSpeechSatAttention",
        "Wav2Vec2Attention", "Data2VecAudioAttention", "MCTCTAttention",
    }
)  # fmt: skip


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _takes_one_sequence(forward: Callable[..., Any], is_encoder_only: bool) -> bool:
    """Whether a layer's forward has no parameter by which another sequence could come in."""
    inputs = _parameters_of(forward)
    return (inputs - _SECOND_SEQUENCE if is_encoder_only else inputs) <= _OWN_SEQUENCE


@functools.cache
def _parameters_of(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _padded_queries_are_idle(module: torch.nn.Module) -> bool:
    """Whether nothing valid depends on the queries that a layer's padding mask calls padding, for certain.

    A mask function cannot tell cross-attention to a sequence of equal length from self-attention; a layer that takes
    nothing but its own hidden states can only be the latter. And some models read the hidden states of padding later.
    Where in doubt, padded queries are kept: slower, right.
    """
    layer = type(module)
    name = layer.__name__
    if (
        name in _PADDING_IS_READ
        or "Conformer" in name
        or getattr(getattr(module, "config", None), "add_adapter", False)
    ):
        return False
    config: PreTrainedConfig | None = getattr(module, "config", None)
    if config is not None and not hasattr(config, "vocab_size"):
        # Vision towers and codecs pool, shuffle and convolve padding too.
        return False
    attends_across = getattr(config, "add_cross_attention", False) or getattr(config, "is_decoder", False)
    alone: bool = _takes_one_sequence(layer.forward, name in _ENCODER_ONLY_LAYERS and not attends_across)
    return alone


def refuse_paged(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Stands where continuous batching looks for an attention function, and says that there is none."""
    raise UnsupportedAttentionError(
        f"continuous batching (attn_implementation={PAGED_NAME!r})",
        "Use attn_implementation='paged|sdpa' for continuous batching.",
    )
