"""Head-dim padding: gathers query, key and value to ragged tensors of a supported head_dim, and scatters the output.

Triton kernels move the data if Triton can run, torch otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from ..ragged.token_map import use_triton

if TYPE_CHECKING:
    from ..ragged.triton_tokens import Launch

__all__ = ["GatherQkv", "ScatterOutput", "aligned", "scratch_bytes"]

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class GatherQkv:
    """Gathers query, key and value of a layer and pads their head_dim with zeros, in one launch or as views.

    Args:
        query_positions: Padded positions to gather, int32, shape `(query_tokens,)`; None for all.
        key_positions: The same for keys and values.
        size: head_dim of the result, a power of two.
        scratch: Memory for the packed tensors, uint8, `scratch_bytes` long; None to allocate in each call.
    """

    def __init__(
        self,
        query_positions: torch.Tensor | None,
        key_positions: torch.Tensor | None,
        size: int,
        scratch: torch.Tensor | None = None,
    ) -> None:
        self._positions = query_positions, key_positions
        self._size = size
        self._scratch = scratch
        self._cached: _CachedGather | None = None
        self._buffers: tuple[torch.Tensor, ...] | None = None

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Qkv:
        """Packs tensors; all calls must have the same shapes and dtypes, and GPU tensors be on the current device.

        Args:
            query: Shape `(batch, heads, q_length, head_dim)`, any strides.
            key: Shape `(batch, kv_heads, kv_length, head_dim)`, any strides.
            value: Shape `(batch, kv_heads, kv_length, value_head_dim)`, any strides.

        Returns:
            Query, key and value, shape `(tokens, heads, size)`. Heads of values may overlap: the padding of a head is
            then the next head of its token, and zeros after the last head.
        """
        pointers = query.data_ptr(), key.data_ptr(), value.data_ptr()
        cached = self._cached
        if (
            cached is None
            or (pointers[0] | pointers[1] | pointers[2]) & 15
            or (query.stride(), key.stride(), value.stride()) != cached.strides
        ):
            return self._gather(query, key, value)
        if cached.launch is None:
            one, two, three = cached.views
            return query.as_strided(*one), key.as_strided(*two), value.as_strided(*three)
        buffers = self._buffers
        if buffers is not None:
            cached.launch(*pointers, *cached.pointers)
            return buffers[0], buffers[1], buffers[2]
        made = self._make_buffers(query, key, value)
        positions = [pointer or pointers[0] for pointer in cached.pointers]
        cached.launch(*pointers, *(buffer.data_ptr() for buffer in made), *positions)
        return made[0], made[1], made[2]

    @property
    def output_buffer(self) -> torch.Tensor | None:
        """Scratch memory for the packed output, shape `(query_tokens, heads, size)`; None to allocate it."""
        return None if self._buffers is None else self._buffers[3]

    def _gather(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Qkv:
        sides, size = (query, key, value), self._size
        queries, keys = self._positions
        takes_all = queries is None and keys is None and query.shape[-1] == value.shape[-1] == size
        if takes_all and all(map(_is_one_run, sides)):
            flat = _flat(query), _flat(key), _flat(value)
            views = tuple((tuple(view.shape), view.stride()) for view in flat)
            self._cached = _CachedGather((query.stride(), key.stride(), value.stride()), None, views, ())
            return flat
        if not use_triton(query):
            return _gather_one(query, queries, size), _gather_one(key, keys, size), _gather_one(value, keys, size)
        from . import triton_pad

        if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
            query, key, value = (side.contiguous() for side in sides)
            sides = (query, key, value)
        buffers = self._make_buffers(query, key, value)
        launch = triton_pad.gather_qkv(sides, buffers[:3], self._positions, size)
        if launch.can_repeat and not any(side.data_ptr() & 15 for side in sides):
            # Positions that are None need a pointer that is not read: to scratch memory, or 0 for the query's.
            spare = buffers[0].data_ptr() if self._scratch is not None else 0
            fixed = tuple(spare if side is None else side.data_ptr() for side in self._positions)
            if self._scratch is not None:
                fixed = (*(buffer.data_ptr() for buffer in buffers[:3]), *fixed)
            strides = query.stride(), key.stride(), value.stride()
            self._cached = _CachedGather(strides, launch, (), fixed)
        self._buffers = buffers if self._scratch is not None else None
        return buffers[0], buffers[1], buffers[2]

    def _make_buffers(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns memory for packed query, key and value, and for the output if there is scratch memory."""
        batch, heads, q_length, _ = query.shape
        _, kv_heads, kv_length, value_head_dim = value.shape
        size, (queries, keys) = self._size, self._positions
        num_queries = batch * q_length if queries is None else queries.shape[0]
        num_keys = batch * kv_length if keys is None else keys.shape[0]
        width = _value_width(value_head_dim, size, query.element_size())
        values = ((num_keys, kv_heads, size), (kv_heads * width + size - width, width, 1))
        counts = _buffer_elements(num_queries, num_keys, heads, kv_heads, size, width)
        if self._scratch is None:
            parts = [torch.empty(count, dtype=query.dtype, device=query.device) for count in counts[:3]]
            return (
                parts[0].view(num_queries, heads, size),
                parts[1].view(num_keys, kv_heads, size),
                parts[2].as_strided(*values),
            )
        parts, start = [], 0
        for count in counts:
            num_bytes = count * query.element_size()
            parts.append(self._scratch[start : start + num_bytes].view(query.dtype))
            start += _rounded(num_bytes)
        packed = parts[0].view(num_queries, heads, size), parts[1].view(num_keys, kv_heads, size)
        return *packed, parts[2].as_strided(*values), parts[3].view(num_queries, heads, size)


def scratch_bytes(
    num_queries: int, num_keys: int, heads: int, kv_heads: int, size: int, value_head_dim: int, itemsize: int
) -> int:
    """Returns the size of scratch memory for packed query, key, value and output."""
    width = _value_width(value_head_dim, size, itemsize)
    counts = _buffer_elements(num_queries, num_keys, heads, kv_heads, size, width)
    return sum(_rounded(count * itemsize) for count in counts)


def _value_width(value_head_dim: int, size: int, itemsize: int) -> int:
    """Returns the head stride of packed values.

    Output columns beyond head_dim are cropped, so heads of values may overlap if each starts at a multiple of 16 bytes.
    Keys must be padded with zeros: an infinity of the next head times the zeros of the query would be NaN.
    """
    return value_head_dim if value_head_dim % (16 // itemsize) == 0 else size


def _buffer_elements(
    num_queries: int, num_keys: int, heads: int, kv_heads: int, size: int, width: int
) -> tuple[int, int, int, int]:
    queries = num_queries * heads * size
    return queries, num_keys * kv_heads * size, num_keys * (kv_heads * width + size - width), queries


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // 256) * 256


class _CachedGather(NamedTuple):
    """Cached launch or views of the last gather, for calls with the same strides; immutable, for threads.

    Args:
        strides: Strides of query, key and value.
        launch: The launch; None for views.
        views: Shape and strides of the views.
        pointers: Launch arguments after query, key and value: pointers to scratch memory, if any, and to positions.
    """

    strides: tuple[tuple[int, ...], ...]
    launch: Launch | None
    views: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    pointers: tuple[int, ...]


class ScatterOutput:
    """Scatters packed output to a padded batch and crops its head_dim; zeros in padding.

    Args:
        tokens: Token at each padded position, -1 for padding, int32; None without padding.
        shape: Rows and length of the padded batch.
        head_dim: head_dim of the result.
    """

    def __init__(self, tokens: torch.Tensor | None, shape: tuple[int, int], head_dim: int) -> None:
        self._tokens = tokens
        self._shape = shape
        self._head_dim = head_dim
        self._launch: Launch | None = None

    def is_view(self, size: int) -> bool:
        """Whether packed output of head_dim `size` is returned as a view."""
        return self._tokens is None and self._head_dim == size

    def __call__(self, packed: torch.Tensor) -> torch.Tensor:
        """Unpacks `(total_tokens, heads, size)` to `(*shape, heads, head_dim)`, both contiguous.

        All calls must have the same shape. GPU tensors must be on the current device.
        """
        count, heads, size = packed.shape
        tokens, head_dim = self._tokens, self._head_dim
        if self.is_view(size):
            return packed.view(*self._shape, heads, size)
        if use_triton(packed):
            padded = torch.empty((*self._shape, heads, head_dim), dtype=packed.dtype, device=packed.device)
            if self._launch is not None and packed.data_ptr() & 15 == 0:
                self._launch(packed.data_ptr(), (packed if tokens is None else tokens).data_ptr(), padded.data_ptr())
                return padded
            from . import triton_pad

            launch = triton_pad.scatter_output(packed, tokens, padded)
            self._launch = launch if launch.can_repeat and packed.data_ptr() & 15 == 0 else None
            return padded
        cropped = packed[..., :head_dim]
        if tokens is None:
            return cropped.reshape(*self._shape, heads, head_dim).contiguous()
        if not count:
            return packed.new_zeros(*self._shape, heads, head_dim)
        padded = cropped.index_select(0, tokens.clamp(min=0)).masked_fill_((tokens < 0)[:, None, None], 0)
        return padded.view(*self._shape, heads, head_dim)


def aligned(side: torch.Tensor) -> torch.Tensor:
    """Returns a tensor, or a copy if kernels that read 16 bytes at once could not read it.

    torch's attention accepts unaligned views in half precision, and torch 2.11 returned wrong numbers for them. The
    shape is `(batch, heads, length, head_dim)`, and head_dim a multiple of 16 bytes.
    """
    row, head, position, last = side.stride()
    size = side.element_size()
    fits = last == 1 and not (side.data_ptr() | row * size | head * size | position * size) & 15
    # Not `contiguous`, which ignores the alignment of the pointer.
    return side if fits else side.clone(memory_format=torch.contiguous_format)


def _is_one_run(side: torch.Tensor) -> bool:
    """Whether batch and length can be flattened to one dimension of a view that kernels can read."""
    row, head, position, last = side.stride()
    is_run = last == 1 and (row == position * side.shape[2] or side.shape[0] == 1)
    # Kernels read 16 bytes at once, and some count elements in 32 bits.
    fits = not (side.data_ptr() | head * side.element_size() | position * side.element_size()) & 15
    return is_run and fits and side.shape[0] * side.shape[2] * position < 2**32


def _flat(side: torch.Tensor) -> torch.Tensor:
    return side.transpose(1, 2).flatten(0, 1)


def _gather_one(side: torch.Tensor, positions: torch.Tensor | None, size: int) -> torch.Tensor:
    flat = _flat(side)
    if positions is not None:
        flat = flat.index_select(0, positions)
    # Zeros: a NaN in a padded column of the keys would reach every logit.
    return flat if flat.shape[-1] == size else F.pad(flat, (0, size - flat.shape[-1]))
