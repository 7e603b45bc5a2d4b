"""Parsed attention arguments, shared by the runtime and `doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import UnsupportedAttentionError
from ..ragged.band import CAUSAL, FULL, Pattern, dense_pattern
from ..ragged.bias import LogitsBias
from ..ragged.layout import LengthsRead, RaggedLayout, packed_layout, with_versions
from ..ragged.lazy_mask import MaskSpec, RaggedMask
from ..settings import current_settings
from .quirks import (
    CAUSAL_BY_MASK,
    CAUSAL_PADDING_IS_READ,
    PACKED_IMAGES,
    is_one_of,
    layer_name,
    why_padded_queries_stay,
)
from .ragged_call import needs_grad
from .select import AttentionRequest

__all__ = ["LayerArguments", "LayerRequest", "cast_as_flash", "is_cast_as_flash", "pattern_of"]


class LayerArguments(NamedTuple):
    """What a layer passes besides query, key, value and mask; `attention_forward` tells of each.

    A tuple, which torch.compile carries over a graph break.
    """

    dropout: float
    scaling: float | None
    is_causal: bool | None
    sliding_window: int | None
    softcap: float | None
    s_aux: torch.Tensor | None
    position_bias: torch.Tensor | None
    output_attentions: bool | None
    cu_seq_lens_q: torch.Tensor | None
    cu_seq_lens_k: torch.Tensor | None
    position_ids: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LayerRequest:
    """A call of the attention function, as it is understood.

    Args:
        request: What the choice of a path depends on.
        layer: What to call the layer in a trace.
        query: Shape `(batch, heads, q_length, head_dim)`; cast as for a flash kernel, with key and value.
        key: Shape `(batch, kv_heads, kv_length, head_dim)`.
        value: Shape `(batch, kv_heads, kv_length, value_head_dim)`.
        mask: As it was given.
        offsets: Of packed sequences, of queries and of keys, integers, shape `(sequences + 1,)`; None where there are
            none.
        position_bias: As it was given.
        bias: The same by the rows of the layout; None where there is none or it does not fit them.
        packed: The layout of packed sequences, where the bias needed it.
        sinks: As they were given.
        sm_scale: What logits are multiplied with.
        softcap: What logits are capped to.
        kept_queries: Why padded queries must be computed; None if no valid output can depend on them.
        keep_padded_queries: Whether padded queries are computed, for that reason or by the settings.
    """

    request: AttentionRequest
    layer: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    offsets: tuple[torch.Tensor, torch.Tensor] | None
    position_bias: torch.Tensor | None
    bias: LogitsBias | None
    packed: RaggedLayout | None
    sinks: torch.Tensor | None
    sm_scale: float
    softcap: float | None
    kept_queries: str | None
    keep_padded_queries: bool

    @classmethod
    def of(
        cls,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        given: LayerArguments,
        *,
        has_values: bool = True,
    ) -> LayerRequest:
        """Reads the arguments of `attention_forward`.

        Args:
            module: The attention layer.
            query: Shape `(batch, heads, q_length, head_dim)`.
            key: Shape `(batch, kv_heads, kv_length, head_dim)`.
            value: Shape `(batch, kv_heads, kv_length, value_head_dim)`.
            mask: As it was given.
            given: The other arguments.
            has_values: Whether tensors can be read. Where they cannot, the call is taken for one on a GPU whose mask
                holds padding on the right.

        Raises:
            UnsupportedAttentionError: If arguments contradict each other, or ask for what no path has.
        """
        position_bias, is_causal = given.position_bias, given.is_causal
        sm_scale = query.shape[-1] ** -0.5 if given.scaling is None else float(given.scaling)
        if is_cast_as_flash(query) or (query.dtype == torch.float32 and not has_values):
            query, key, value = cast_as_flash(module, query, key, value)
        lazy = mask if isinstance(mask, RaggedMask) else None
        if lazy is not None and has_values and not _fits(lazy.spec, query, key) and lazy.hides_nothing:
            # Eager attention gets none, and some models hand on the mask of other queries or keys than those of a call.
            mask, lazy, is_causal = None, None, False
        holds_images = mask is None and is_one_of(type(module), PACKED_IMAGES)
        cu_seq_lens_q, cu_seq_lens_k = given.cu_seq_lens_q, given.cu_seq_lens_k
        if holds_images and cu_seq_lens_q is None and given.position_ids is not None and has_values:
            cu_seq_lens_q = cu_seq_lens_k = _image_offsets(*with_versions(module, given.position_ids))
        offsets = None if cu_seq_lens_q is None or cu_seq_lens_k is None else (cu_seq_lens_q, cu_seq_lens_k)
        pattern = pattern_of(module, mask, is_causal)
        if mask is None and given.sliding_window is not None and key.shape[2] > given.sliding_window:
            raise UnsupportedAttentionError(
                f"sliding_window={given.sliding_window} without a mask over {key.shape[2]} keys",
                "Use attn_implementation='eager' for this model.",
            )
        bias = packed = None
        if position_bias is not None:
            rows, heads, q_length, kv_length = *query.shape[:3], key.shape[2]
            if offsets is not None and query.shape[0] == key.shape[0] == 1 and has_values:
                packed = _packed_layout(lazy, *offsets, query, key)
                rows, q_length, kv_length = len(packed.query.lengths), packed.query.max_length, packed.key.max_length
            if packed is not None or offsets is None:
                bias = LogitsBias.fit(position_bias, (rows, heads, q_length, kv_length))
        kept_queries = why_padded_queries_stay(module, is_causal=pattern.is_causal)
        keeps_on_request = current_settings().padded_queries == "keep"
        request = AttentionRequest(
            pattern=pattern,
            device=query.device,
            dtype=query.dtype,
            head_dim=max(query.shape[-1], value.shape[-1]),
            needs_grad=needs_grad(query, key, value, position_bias, given.s_aux),
            dropout=given.dropout,
            output_attentions=bool(given.output_attentions),
            biased_packed=(
                position_bias is not None and (bias is None or (lazy is not None and lazy.spec.packed is not None))
            ),
            biased_window=position_bias is not None and (pattern.is_window or given.softcap is not None),
            # Transformers finds packed sequences in positions too, which need not be read where offsets tell.
            mask_holes=(
                lazy is not None and (offsets is None or lazy.spec.packed is None) and has_values and lazy.has_holes
            ),
            window_keeps_padded_queries=(
                lazy is not None
                and pattern.is_window
                and kept_queries is not None
                and (not has_values or lazy.has_padding)
            ),
            causal_padding_is_read=(
                lazy is not None
                and pattern.is_causal
                and is_one_of(type(module), CAUSAL_PADDING_IS_READ)
                and (not has_values or lazy.has_padding)
            ),
            padded_queries_need_mask=keeps_on_request and _padded_queries_need_mask(mask, pattern, has_values),
            mask_shape_differs=query.shape[0] != key.shape[0]
            or (lazy is not None and not _fits(lazy.spec, query, key)),
            mask_modified=lazy is not None and lazy.was_modified,
        )
        return cls(
            request=request,
            layer=layer_name(module),
            query=query,
            key=key,
            value=value,
            mask=mask,
            offsets=offsets,
            position_bias=position_bias,
            bias=bias,
            packed=packed,
            sinks=given.s_aux,
            sm_scale=sm_scale,
            softcap=given.softcap,
            kept_queries=kept_queries,
            keep_padded_queries=kept_queries is not None or keeps_on_request,
        )

    @property
    def pattern(self) -> Pattern:
        """Which keys a query may see, padding aside."""
        return self.request.pattern

    @property
    def lazy(self) -> RaggedMask | None:
        """The mask, where it is one of ours."""
        return self.mask if isinstance(self.mask, RaggedMask) else None

    @property
    def is_plain(self) -> bool:
        """Whether nothing is added to the logits, and no sinks take weight."""
        return self.bias is None and self.sinks is None

    def packed_layout(self) -> RaggedLayout | None:
        """Returns the layout of packed sequences; None where there are none.

        Raises:
            UnsupportedAttentionError: If the mask holds padding as well.
        """
        if self.packed is not None or self.offsets is None:
            return self.packed
        return _packed_layout(self.lazy, *self.offsets, self.query, self.key)


def _padded_queries_need_mask(mask: torch.Tensor | None, pattern: Pattern, has_values: bool) -> bool:
    """Whether padded queries need a materialised mask to equal those of eager attention."""
    if mask is None:
        return False
    if not isinstance(mask, RaggedMask):
        # A 2D mask does not tell which queries are padding.
        return mask.ndim == 2
    return mask.padded_queries_need_mask if has_values else pattern.is_causal or pattern.is_window


def pattern_of(module: torch.nn.Module, mask: torch.Tensor | None, is_causal: bool | None) -> Pattern:
    """Returns which keys a query may see, padding aside.

    Raises:
        UnsupportedAttentionError: If the mask has another number of dimensions than 2 or 4.
    """
    if isinstance(mask, RaggedMask):
        return mask.spec.pattern
    if mask is None or mask.ndim == 2:
        # Only where no mask helper was called: a mask knows better than a module (UMT5's decoder says False).
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        if is_causal is None and mask is None and is_one_of(type(module), CAUSAL_BY_MASK):
            causal = False
        return CAUSAL if causal else FULL
    if mask.ndim == 4:
        return dense_pattern("given as a 4D tensor")
    raise UnsupportedAttentionError(
        f"an attention mask of shape {tuple(mask.shape)}, expected 2 or 4 dimensions",
        "Use attn_implementation='eager' for this model.",
    )


def is_cast_as_flash(query: torch.Tensor) -> bool:
    """Whether transformers would look for a half-precision dtype for the input of a flash kernel."""
    return query.is_cuda and query.dtype == torch.float32


def cast_as_flash(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Casts float32 input as transformers does for flash kernels: to autocast's dtype, or to that of the layer.

    Layer norms kept in float32, as PEFT keeps them, hand float32 to attention in a half-precision model.
    """
    device_type = query.device.type
    if not query.is_meta and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    else:
        dtype = next((parameter.dtype for parameter in module.parameters() if parameter.ndim == 2), torch.float32)
    return (query.to(dtype), key.to(dtype), value.to(dtype)) if dtype.itemsize == 2 else (query, key, value)


def _packed_layout(
    lazy: RaggedMask | None,
    query_offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
) -> RaggedLayout:
    """Returns the layout of packed sequences, cached on the masks' carrier or on the offsets."""
    if lazy is not None and lazy.has_padding:
        raise UnsupportedAttentionError(
            "cu_seq_lens_q and cu_seq_lens_k together with a padding mask",
            "Packed input has no padding: leave the attention_mask out.",
        )
    shapes = ((query.shape[0], query.shape[2]), (key.shape[0], key.shape[2]))
    return packed_layout(query_offsets if lazy is None else lazy.carrier, query_offsets, key_offsets, shapes)


def _image_offsets(position_ids: torch.Tensor) -> torch.Tensor:
    """Returns the offsets of packed images, int32 on the host, from patch positions that restart at zero.

    Positions are `(tokens, 2)` pairs, or numbers `(1, tokens)` in older versions of transformers. They count versions,
    and the offsets are an attribute of them, since every layer is given the same tensor.
    """
    known: tuple[int, torch.Tensor] | None = getattr(position_ids, "_image_offsets", None)
    if known is not None and known[0] == position_ids._version:
        return known[1]
    starts = (position_ids == 0).all(-1) if position_ids.shape[-1] == 2 else position_ids.flatten() == 0
    flags: list[bool] = LengthsRead(starts).values
    at = [at for at, start in enumerate(flags) if start] + [len(flags)]
    with torch.inference_mode(False):
        offsets = torch.tensor(at, dtype=torch.int32, device="cpu")
    position_ids._image_offsets = (position_ids._version, offsets)  # type: ignore[attr-defined]
    return offsets


def _fits(spec: MaskSpec, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether a mask was made for the lengths of a call."""
    return (spec.batch_size, spec.q_length, spec.kv_length) == (query.shape[0], query.shape[2], key.shape[2])
