"""What a layer asks for with a call: which keys, in which dtype, of which packed sequences."""

from __future__ import annotations

import torch

from .errors import UnsupportedAttentionError
from .layout import LengthsRead, RaggedLayout, packed_layout
from .mask import MaskSpec, RaggedMask
from .pattern import CAUSAL, FULL, Pattern, dense_pattern

__all__ = [
    "cast_as_flash",
    "fits",
    "image_offsets",
    "is_cast_as_flash",
    "packed_layout_of",
    "pattern_of",
    "weights_dtype",
]


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
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    else:
        dtype = weights_dtype(module, torch.float32)
    return (query.to(dtype), key.to(dtype), value.to(dtype)) if dtype.itemsize == 2 else (query, key, value)


def weights_dtype(module: torch.nn.Module, default: torch.dtype) -> torch.dtype:
    """Returns the dtype of a layer's matrices; `default` if it has none."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.ndim == 2), default)


def packed_layout_of(
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


def image_offsets(position_ids: torch.Tensor) -> torch.Tensor:
    """Returns the offsets of packed images, int32 on the host, from patch positions that restart at zero.

    Positions are `(tokens, 2)` pairs, or numbers `(1, tokens)` in older versions of transformers. The offsets ride on
    them, since every layer is handed the same tensor.
    """
    version = None if position_ids.is_inference() else position_ids._version
    known: tuple[int | None, torch.Tensor] | None = getattr(position_ids, "image_offsets", None)
    if known is not None and version is not None and known[0] == version:
        return known[1]
    starts = (position_ids == 0).all(-1) if position_ids.shape[-1] == 2 else position_ids.flatten() == 0
    flags: list[bool] = LengthsRead(starts).values
    offsets = torch.tensor([at for at, start in enumerate(flags) if start] + [len(flags)], dtype=torch.int32)
    position_ids._image_offsets = (version, offsets)  # type: ignore[attr-defined]
    return offsets


def fits(spec: MaskSpec, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether a mask was made for the lengths of a call."""
    return (spec.batch_size, spec.q_length, spec.kv_length) == (query.shape[0], query.shape[2], key.shape[2])
