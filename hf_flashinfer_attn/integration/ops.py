"""Custom ops for torch.compile: ragged attention, and handles of lazy masks."""

from __future__ import annotations

from typing import Optional

import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from ..attention.driver import attend
from ..attention.spec import AttentionInputs
from ..errors import UnsupportedAttentionError
from ..ragged.band import Band, MaskFunction
from ..ragged.forward_state import ForwardState, packed_state
from ..ragged.layout import RaggedLayout
from ..ragged.lazy_mask import RaggedMask, lazy_mask
from ..ragged.mask_state import copy_of
from .transformers_patches import weights_are_collected

__all__ = ["mask_handle", "mask_of_handle", "mask_values", "ragged_attention", "unpadded_mask"]


# The ops plan on the host and keep workspaces, which must not be in the memory pool of a CUDA graph.
_TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


# torch reads the annotations at run time to make the schema of an op, on Python 3.10 too.
@torch.library.custom_op("hf_flashinfer_attn::mask_handle", mutates_args=(), tags=_TAGS)
def mask_handle(
    padding_mask: Optional[torch.Tensor],  # noqa: UP045
    packed: Optional[torch.Tensor],  # noqa: UP045
    positions: Optional[torch.Tensor],  # noqa: UP045
    first_query: Optional[torch.Tensor],  # noqa: UP045
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    left: Optional[int],  # noqa: UP045
    right: Optional[int],  # noqa: UP045
    dtype: torch.dtype,
) -> torch.Tensor:
    """Makes the lazy mask of one forward, and returns an empty tensor, its handle for the other ops.

    Args:
        padding_mask: Padding mask, bool, shape `(batch, tokens seen so far)`.
        packed: Sequence index of each token, never decreasing, shape `(batch, q_length)`.
        positions: Positions that the band counts in, increasing by one in every sequence, shape `(batch, q_length)`.
        first_query: 0-dimensional integer that replaces `q_offset`, for caches that count on the device.
        batch_size: Rows.
        q_length: Padded length of the queries.
        kv_length: Padded length of the keys.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        left: Number of keys before its own position that a query sees; None for all.
        right: Number of keys after its own position that a query sees; None for all.
        dtype: dtype of the mask.

    Raises:
        RuntimeError: If sequences are not contiguous or positions do not increase by one; asynchronously on a GPU.
    """
    anchor = next(tensor for tensor in (padding_mask, packed, first_query) if tensor is not None)
    # The lazy mask outlives the op, and the compiler may reuse the memory of the op's inputs.
    if padding_mask is not None:
        padding_mask = copy_of(padding_mask)
    if packed is not None:
        packed = packed.clone()
        # True for transformers' mask functions; a user's mask function may differ.
        steps = packed.diff()
        is_packing = steps >= 0
        if positions is not None:
            is_packing = is_packing & ((steps > 0) | (positions.diff() == 1))
        torch._assert_async(is_packing.all(), "a mask function of packed sequences that are not one after another")
    mask = lazy_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset if first_query is None else first_query,
        kv_offset,
        _mask_function(left, right, packed),
        padding_mask,
        dtype,
        anchor.device,
        use_vmap=False,
    )
    handle = torch.empty(0, dtype=torch.uint8, device=anchor.device)
    handle._ragged_mask = mask  # type: ignore[attr-defined]
    return handle


@mask_handle.register_fake
def _(
    padding_mask: torch.Tensor | None,
    packed: torch.Tensor | None,
    positions: torch.Tensor | None,
    first_query: torch.Tensor | None,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    left: int | None,
    right: int | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    anchor = next(tensor for tensor in (padding_mask, packed, first_query) if tensor is not None)
    return torch.empty(0, dtype=torch.uint8, device=anchor.device)


def mask_of_handle(handle: torch.Tensor) -> RaggedMask:
    """Returns the lazy mask of a handle from `mask_handle`.

    Raises:
        RuntimeError: If the compiled graph copied the tensor.
    """
    mask: RaggedMask | None = getattr(handle, "_ragged_mask", None)
    if mask is None:
        raise RuntimeError(
            "A compiled graph handed hf_flashinfer_attn a copy of its mask, expected the tensor itself. "
            "Compile without the pass that copies op outputs, or run this model uncompiled."
        )
    return mask


def unpadded_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    left: int | None,
    right: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> RaggedMask:
    """Makes the lazy mask of rows without padding; the last query is aligned with the last key."""
    mask_function = _mask_function(left, right, None)
    return lazy_mask(
        batch_size, q_length, kv_length, kv_length - q_length, 0, mask_function, None, dtype, device, use_vmap=False
    )


def _mask_function(left: int | None, right: int | None, packed: torch.Tensor | None) -> MaskFunction:
    """Returns transformers' mask function for a band, causal or symmetric."""
    function: MaskFunction
    if right == 0:
        function = causal_mask_function if left is None else sliding_window_causal_mask_function(left + 1)
    else:
        assert left == right
        function = bidirectional_mask_function if left is None else sliding_window_bidirectional_mask_function(left)
    return function if packed is None else and_masks(function, packed_sequence_mask_function(packed))


@torch.library.custom_op("hf_flashinfer_attn::mask_values", mutates_args=(), tags=_TAGS)
def mask_values(
    handle: torch.Tensor, batch_size: int, q_length: int, kv_length: int, dtype: torch.dtype
) -> torch.Tensor:
    """Returns the additive mask of a handle, shape `(batch, 1, q_length, kv_length)`."""
    return mask_of_handle(handle)._moved(dtype, handle.device).dense().clone()


@mask_values.register_fake
def _(handle: torch.Tensor, batch_size: int, q_length: int, kv_length: int, dtype: torch.dtype) -> torch.Tensor:
    return handle.new_empty(batch_size, 1, q_length, kv_length, dtype=dtype)


@torch.library.custom_op("hf_flashinfer_attn::ragged_attention", mutates_args=(), tags=_TAGS)
def ragged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    handle: Optional[torch.Tensor],  # noqa: UP045
    query_cu_seqlens: Optional[torch.Tensor],  # noqa: UP045
    key_cu_seqlens: Optional[torch.Tensor],  # noqa: UP045
    left: Optional[int],  # noqa: UP045
    right: Optional[int],  # noqa: UP045
    padded_queries: Optional[str],  # noqa: UP045
    sm_scale: float,
    softcap: Optional[float],  # noqa: UP045
) -> torch.Tensor:
    """Attention over padded or packed tokens; forward only.

    Args:
        query: Shape `(rows, q_length, heads, head_dim)`.
        key: Shape `(rows, kv_length, kv_heads, head_dim)`.
        value: Shape `(rows, kv_length, kv_heads, value_head_dim)`.
        handle: Mask, from `mask_handle`; None for rows without padding, aligned to the last key.
        query_cu_seqlens: cu_seqlens of packed queries, shape `(sequences + 1,)`; None unless packed, or if the mask is.
        key_cu_seqlens: The same for the keys.
        left: Number of keys before its own position that a query sees, without a handle; None for all.
        right: Number of keys after its own position that a query sees, without a handle; None for all.
        padded_queries: Why padded queries are computed; None if they are not.
        sm_scale: Factor of the logits.
        softcap: Caps logits to `softcap * tanh(logits / softcap)`.

    Returns:
        Shape `(rows, q_length, heads, value_head_dim)`, contiguous.

    Raises:
        UnsupportedAttentionError: If cu_seqlens come with a padding mask, attention weights must be returned, or the
            settings forbid a fallback.
    """
    if weights_are_collected():
        raise UnsupportedAttentionError(
            "output_attentions=True in a model that is compiled in parts",
            "Compile the whole model or none of it, or use attn_implementation='eager'.",
        )
    mask = None if handle is None else mask_of_handle(handle)
    inputs = AttentionInputs(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        Band(left, right) if mask is None else mask.spec.pattern,
        sm_scale,
        "compiled",
        object(),
        mask,
        softcap,
        padded_queries=padded_queries,
    )
    if query_cu_seqlens is not None and key_cu_seqlens is not None:
        inputs.cu_seqlens = query_cu_seqlens, key_cu_seqlens
        _use_same_lengths(inputs)
    return attend(inputs)[0]


def _use_same_lengths(inputs: AttentionInputs) -> None:
    """Sets the state of packed sequences, and checks that cu_seqlens did not change since they were read.

    Generated code may reuse the memory of cu_seqlens without changing their version counters.
    """
    assert inputs.cu_seqlens is not None
    queries, keys = inputs.cu_seqlens
    shapes = inputs.packed_shapes()
    inputs.state = packed_state(inputs.layer, queries, keys, shapes, inputs.mask)
    layout = inputs.state.layout()
    same = (layout.query.cu_seqlens(queries.device) == queries).all()
    if keys is not queries:
        same = same & (layout.key.cu_seqlens(keys.device) == keys).all()
    if same.is_cuda:
        # Only checked: reading the new lengths would make the host wait in every layer.
        torch._assert_async(same, "cu_seqlens that changed between two layers")
    elif not same:
        inputs.state = ForwardState(RaggedLayout.from_cu_seqlens(queries, keys, *shapes))


@ragged_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    handle: torch.Tensor | None,
    query_cu_seqlens: torch.Tensor | None,
    key_cu_seqlens: torch.Tensor | None,
    left: int | None,
    right: int | None,
    padded_queries: str | None,
    sm_scale: float,
    softcap: float | None,
) -> torch.Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])
