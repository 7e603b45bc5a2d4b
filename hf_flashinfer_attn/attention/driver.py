"""A layer's attention outside of torch.compile's graphs: decided, laid out, prepared once per forward, and run."""

from __future__ import annotations

import torch

from ..errors import UnsupportedAttentionError
from ..kernels import dense
from ..ragged.layout import RaggedLayout, is_of_graph, uniform_layout
from ..settings import current_settings
from ..tracing import AttentionCall, is_tracing, record_call
from .dense_mask import dense_mask_of, require_2d_mask_fits
from .plan import NativeAttention, PreparedAttention, native, native_masked, prepare
from .plan_cache import kept_of, signature_of
from .ragged_call import RaggedCall, attend_ragged, note_of
from .recorded_specs import LayerCall, calls_kept
from .recorders import refuse_recording
from .select import Decision, Path, decide
from .spec import LayerArguments, LayerRequest

__all__ = ["attend"]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    given: LayerArguments,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends as `attention_forward` says, which tells of arguments, results and errors."""
    refuse_recording()
    calls = calls_kept() if query.is_meta else None
    asked = LayerRequest.of(module, query, key, value, mask, given, has_values=calls is None)
    if calls is not None:
        calls.append(LayerCall.of(module, asked))
        return query.new_empty(key.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    decision = decide(asked.request, current_settings())
    _refuse_lengths_in_graph(asked, decision)
    if decision.path is Path.DENSE:
        return _attend_dense(asked, decision)
    # Before the plan lookup, which uses the layout as its owner.
    packed = asked.packed_layout()
    if decision.path is Path.TORCH:
        return _attend_ragged(asked, _layout_of(asked, packed), decision), None
    _refuse_mixed_dtypes(asked)
    query, key, value = asked.query, asked.key, asked.value
    kept = None
    if asked.is_plain:
        kept = kept_of(
            module, query, key, value, mask, given.sliding_window, asked.offsets, given.position_ids, given.scaling,
            given.softcap,
        )  # fmt: skip
    prepared: PreparedAttention | NativeAttention | None = None
    if kept is not None:
        signature = signature_of(module, query, key, value, given.scaling, given.is_causal, given.softcap)
        # Inputs that were cast are found only here.
        prepared = kept.store.find(signature)
    if prepared is None:
        prepared = _prepare_unread(asked)
        if prepared is None:
            layout = _layout_of(asked, packed)
            made = _prepare(asked, layout)
            if isinstance(made, Decision):
                # While its kernel is not compiled, torch serves the call, and nothing of it is kept.
                return _attend_ragged(asked, layout, made), None
            prepared = made
        if kept is not None:
            kept.store.keep(signature, prepared)
    return prepared(query, key, value, asked.layer, asked.bias, _sinks_of(asked)), None


def _refuse_lengths_in_graph(asked: LayerRequest, decision: Decision) -> None:
    """Refuses what looks at lengths on the host, which every replay would repeat from the capture."""
    if asked.offsets is None or not is_of_graph(asked.offsets[0]):
        return
    if decision.path is Path.FLASHINFER and asked.bias is None:
        return
    what = f"{decision.path.value} attention ({decision.reason})" if asked.bias is None else "a position_bias"
    raise UnsupportedAttentionError(f"{what} in a captured graph", "Use unpad without cuda_graphs for this model.")


def _refuse_mixed_dtypes(asked: LayerRequest) -> None:
    query, key, value = asked.query.dtype, asked.key.dtype, asked.value.dtype
    if not query == key == value:
        raise UnsupportedAttentionError(
            f"query, key and value of dtypes {query}, {key} and {value}",
            "Make the dtypes of the model and of its cache the same.",
        )


def _attend_dense(asked: LayerRequest, decision: Decision) -> tuple[torch.Tensor, torch.Tensor | None]:
    position_bias, query, key = asked.position_bias, asked.query, asked.key
    if asked.bias is not None and asked.packed is not None:
        position_bias = asked.bias.over(asked.packed)
    output, weights = dense.attend(
        query,
        key,
        asked.value,
        dense_mask_of(asked.mask, asked.offsets, position_bias, query, key, asked.pattern),
        sm_scale=asked.sm_scale,
        softcap=asked.softcap,
        sinks=asked.sinks,
        dropout=asked.request.dropout,
        return_weights=asked.request.output_attentions,
    )
    if is_tracing():
        head_dim = asked.request.head_dim
        note = asked.kept_queries if asked.request.window_keeps_padded_queries else None
        record_call(AttentionCall(asked.layer, asked.pattern.name, "dense", head_dim, head_dim, decision.reason, note))
    return output, weights


def _attend_ragged(asked: LayerRequest, layout: RaggedLayout, decision: Decision) -> torch.Tensor:
    call = RaggedCall(
        query=layout.query.gather(asked.query.transpose(1, 2)),
        key=layout.key.gather(asked.key.transpose(1, 2)),
        value=layout.key.gather(asked.value.transpose(1, 2)),
        layout=layout,
        pattern=asked.pattern,
        sm_scale=asked.sm_scale,
        softcap=asked.softcap,
        dropout=asked.request.dropout,
        layer=asked.layer,
        bias=asked.bias,
        sinks=_sinks_of(asked),
        note=note_of(layout, asked.kept_queries),
    )
    return layout.query.scatter(attend_ragged(call, decision))


def _sinks_of(asked: LayerRequest) -> torch.Tensor | None:
    return None if asked.sinks is None else asked.sinks.reshape(-1)


def _may_be_native(asked: LayerRequest) -> bool:
    return asked.is_plain and current_settings().backend == "auto"


def _prepare_unread(asked: LayerRequest) -> NativeAttention | None:
    """Prepares torch's own kernel for a mask whose lengths nobody read; None where another serves."""
    if asked.lazy is None or asked.offsets is not None or not _may_be_native(asked):
        return None
    asked.lazy.require_unwritten()
    return native_masked(
        asked.query, asked.key, asked.value, asked.lazy.spec, sm_scale=asked.sm_scale, softcap=asked.softcap
    )


def _prepare(asked: LayerRequest, layout: RaggedLayout) -> PreparedAttention | NativeAttention | Decision:
    """Prepares attention over a layout; or says who serves the call while its kernel is not compiled."""
    sides = asked.query, asked.key, asked.value
    if _may_be_native(asked):
        prepared = native(*sides, layout, asked.pattern, sm_scale=asked.sm_scale, softcap=asked.softcap)
        if prepared is not None:
            return prepared
    return prepare(
        *sides, layout, asked.pattern, sm_scale=asked.sm_scale, softcap=asked.softcap, biased=asked.bias is not None,
        sinks=asked.sinks is not None, note=note_of(layout, asked.kept_queries),
    )  # fmt: skip


def _layout_of(asked: LayerRequest, packed: RaggedLayout | None) -> RaggedLayout:
    """Returns which slots hold the tokens of a call.

    Args:
        asked: The call.
        packed: The layout of its packed sequences, where it has some.
    """
    if packed is not None:
        return packed
    if asked.lazy is not None:
        return asked.lazy.layout_of_forward(keep_padded_queries=asked.keep_padded_queries)
    if asked.mask is None:
        return uniform_layout(asked.query.shape[0], asked.query.shape[2], asked.key.shape[2])
    return _layout_of_2d_mask(asked.mask, asked.query, asked.key)


def _layout_of_2d_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> RaggedLayout:
    # A few models hand a flash kernel the 2D mask itself, in every layer.
    require_2d_mask_fits(mask, query, key)
    if query.shape[2] != key.shape[2]:
        raise UnsupportedAttentionError(
            f"a 2D attention mask of shape {tuple(mask.shape)} for {query.shape[2]} queries",
            "Use attn_implementation='eager' for this model.",
        )
    return RaggedLayout.from_padding_mask(mask)
