"""Head-dim padding: query, key and value to ragged tokens of a size that a kernel has, and the output back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..ragged.token_map import use_triton

if TYPE_CHECKING:
    from . import triton_pad

__all__ = ["Packer", "Unpacker", "aligned"]


class Packer:
    """Gathers query, key and value of a layer and pads their head_dim with zeros.

    Args:
        query_slots: Slots to take, int32, shape `(query_tokens,)`; None for all.
        key_slots: The same of keys and values.
        size: The head_dim to return, a power of two.
    """

    def __init__(self, query_slots: torch.Tensor | None, key_slots: torch.Tensor | None, size: int) -> None:
        self._slots = query_slots, key_slots
        self._size = size
        self._fused: triton_pad.Packer | None = None
        self._views: _Views | None = None

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Packs; all calls of one packer take tensors of the same shapes, on the current device if that is a GPU.

        Args:
            query: Shape `(batch, heads, q_length, head_dim)`, any strides.
            key: Shape `(batch, kv_heads, kv_length, head_dim)`, any strides.
            value: Shape `(batch, kv_heads, kv_length, value_head_dim)`, any strides.

        Returns:
            Query, key and value, shape `(tokens, heads, size)`; where all slots are taken and head_dim fits, views.
        """
        views = self._views
        if views is not None and views.fit(query, key, value):
            return views.of(query, key, value)
        query_slots, key_slots = self._slots
        size = self._size
        if query_slots is None and key_slots is None and query.shape[-1] == value.shape[-1] == size:
            sides = (query, key, value)
            if all(_is_one_run(side) for side in sides):
                flat = (_flat(query), _flat(key), _flat(value))
                self._views = _Views.made(sides, flat)
                return flat
        if self._fused is None and use_triton(query):
            from . import triton_pad

            self._fused = triton_pad.Packer(query_slots, key_slots, size)
        if self._fused is None:
            return (
                _pack_one(query, query_slots, size), _pack_one(key, key_slots, size), _pack_one(value, key_slots, size),
            )  # fmt: skip
        if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
            query, key, value = (side.contiguous() for side in (query, key, value))
        return self._fused(query, key, value)


@dataclass(frozen=True, slots=True)
class _Views:
    """How tensors of some strides are seen as ragged ones; a third of the host time of finding out again."""

    strides: tuple[tuple[int, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    flat_strides: tuple[tuple[int, ...], ...]

    @classmethod
    def made(cls, sides: tuple[torch.Tensor, ...], flat: tuple[torch.Tensor, ...]) -> _Views:
        return cls(
            tuple(side.stride() for side in sides),
            tuple(tuple(view.shape) for view in flat),
            tuple(view.stride() for view in flat),
        )

    def fit(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether these, of the same shapes as the first ones, lie in memory as those did."""
        is_aligned = not (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15
        return is_aligned and (query.stride(), key.stride(), value.stride()) == self.strides

    def of(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shapes, strides = self.shapes, self.flat_strides
        return (
            query.as_strided(shapes[0], strides[0]),
            key.as_strided(shapes[1], strides[1]),
            value.as_strided(shapes[2], strides[2]),
        )


class Unpacker:
    """Spreads ragged output over a padded batch and crops its head_dim; zeros in padding.

    Args:
        tokens: The token of each slot, -1 for padding, int32; None where slots are tokens.
        shape: Rows and slots of the padded batch.
        head_dim: To keep.
    """

    def __init__(self, tokens: torch.Tensor | None, shape: tuple[int, int], head_dim: int) -> None:
        self._tokens = tokens
        self._shape = shape
        self._head_dim = head_dim
        self._fused: triton_pad.Unpacker | None = None

    def __call__(self, packed: torch.Tensor) -> torch.Tensor:
        """Unpacks; all calls of one unpacker take tensors of the same shape, on the current device if that is a GPU.

        Args:
            packed: Shape `(total_tokens, heads, size)`, contiguous.

        Returns:
            Shape `(*shape, heads, head_dim)`, contiguous.
        """
        tokens, head_dim = self._tokens, self._head_dim
        if tokens is None and head_dim == packed.shape[-1]:
            return packed.view(*self._shape, *packed.shape[1:])
        if self._fused is None and use_triton(packed):
            from . import triton_pad

            self._fused = triton_pad.Unpacker(tokens, self._shape, head_dim)
        if self._fused is not None:
            return self._fused(packed)
        cropped = packed[..., :head_dim]
        if tokens is None:
            return cropped.reshape(*self._shape, *cropped.shape[1:]).contiguous()
        if not len(packed):
            return packed.new_zeros(*self._shape, packed.shape[1], head_dim)
        padded = cropped.index_select(0, tokens.clamp(min=0)).masked_fill_((tokens < 0)[:, None, None], 0)
        return padded.view(*self._shape, *cropped.shape[1:])


def aligned(side: torch.Tensor) -> torch.Tensor:
    """Returns a tensor as it is, or a copy where kernels that read 16 bytes at once could not read it.

    torch's own attention does not refuse such views in half precision; torch 2.11 returned wrong numbers for them.

    Args:
        side: Shape `(batch, heads, length, head_dim)`, head_dim a multiple of 16 bytes.
    """
    row, head, slot, last = side.stride()
    size = side.element_size()
    fits = last == 1 and not (side.data_ptr() | row * size | head * size | slot * size) & 15
    # Not `contiguous`, which returns what has no gaps wherever it starts.
    return side if fits else side.clone(memory_format=torch.contiguous_format)


def _is_one_run(side: torch.Tensor) -> bool:
    """Whether rows follow each other at the distance of slots, so that batch and slots are one dimension."""
    row, head, slot, last = side.stride()
    is_run = last == 1 and (row == slot * side.shape[2] or side.shape[0] == 1)
    # Kernels read 16 bytes at once, and some count elements in 32 bits.
    is_aligned = not (side.data_ptr() | head * side.element_size() | slot * side.element_size()) & 15
    return is_run and is_aligned and side.shape[0] * side.shape[2] * slot < 2**32


def _flat(side: torch.Tensor) -> torch.Tensor:
    return side.transpose(1, 2).flatten(0, 1)


def _pack_one(side: torch.Tensor, slots: torch.Tensor | None, size: int) -> torch.Tensor:
    flat = _flat(side)
    if slots is not None:
        flat = flat.index_select(0, slots)
    return flat if flat.shape[-1] == size else F.pad(flat, (0, size - flat.shape[-1]))
