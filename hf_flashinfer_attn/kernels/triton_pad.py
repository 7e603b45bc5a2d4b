"""Triton kernels that move data between padded and ragged tensors. Imported by `pad_head_dim`.

A slot is a place in a padded batch, row by row; a token is a place in a ragged tensor. Kernels are launched on the
current device and stream.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..ragged.triton_tokens import Launch

__all__ = ["Packer", "Unpacker"]

# Bytes that one program moves for one tensor: enough in flight for the memory, enough programs for a small batch.
_TILE_BYTES = 8192


@triton.jit
def _copy_heads(
    source, stride_row, stride_slot, stride_head, target, row, place, token, inside, first_head,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, HEADS * COLUMNS)
    head = first_head + column // COLUMNS
    dim = column % COLUMNS
    kept = (head < NUM_HEADS) & (dim < WIDTH)
    address = row * stride_row + place * stride_slot
    offset = head.to(tl.int64) * stride_head + dim
    # Zeros beyond head_dim, not whatever is there: a NaN in a padded column would reach every logit.
    read = inside[:, None] & (kept & (dim < HEAD_DIM))[None, :]
    values = tl.load(source + address[:, None] + offset[None, :], mask=read, other=0.0)
    start = token.to(tl.int64)[:, None] * (NUM_HEADS * WIDTH + TAIL)
    tl.store(target + start + (head * WIDTH + dim)[None, :], values, mask=inside[:, None] & kept[None, :])
    if TAIL > 0:  # noqa: SIM102 - known when the kernel is compiled
        if first_head + HEADS >= NUM_HEADS:
            beyond = tl.arange(0, COLUMNS)
            for begin in tl.static_range(0, TAIL, COLUMNS):
                there = inside[:, None] & (begin + beyond < TAIL)[None, :]
                zeros = tl.full([token.shape[0], COLUMNS], 0.0, dtype=target.dtype.element_ty)
                tl.store(target + start + (NUM_HEADS * WIDTH + begin + beyond)[None, :], zeros, mask=there)


@triton.jit(do_not_specialize=["num_queries", "query_width", "num_keys", "key_width"])
def _pack_kernel(
    query, key, value, packed_query, packed_key, packed_value, query_slots, key_slots,
    query_row, query_slot, query_head, key_row, key_slot, key_head, value_row, value_slot, value_head,
    num_queries, query_width, num_keys, key_width, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    HAS_QUERY_SLOTS: tl.constexpr, HAS_KEY_SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    query_parts = (QUERY_HEADS + HEADS - 1) // HEADS
    key_parts = (KEY_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    if part < query_parts:
        inside = token < num_queries
        slot = token
        if HAS_QUERY_SLOTS:
            slot = tl.load(query_slots + token, mask=inside, other=0)
        row = (slot // query_width).to(tl.int64)
        place = (slot % query_width).to(tl.int64)
        _copy_heads(query, query_row, query_slot, query_head, packed_query, row, place, token, inside, part * HEADS,
                    QUERY_HEADS, HEAD_DIM, SIZE, SIZE, 0, HEADS)  # fmt: skip
    else:
        inside = token < num_keys
        slot = token
        if HAS_KEY_SLOTS:
            slot = tl.load(key_slots + token, mask=inside, other=0)
        row = (slot // key_width).to(tl.int64)
        place = (slot % key_width).to(tl.int64)
        if part < query_parts + key_parts:
            _copy_heads(key, key_row, key_slot, key_head, packed_key, row, place, token, inside,
                        (part - query_parts) * HEADS, KEY_HEADS, HEAD_DIM, SIZE, SIZE, 0, HEADS)  # fmt: skip
        else:
            _copy_heads(value, value_row, value_slot, value_head, packed_value, row, place, token, inside,
                        (part - query_parts - key_parts) * HEADS, KEY_HEADS, VALUE_HEAD_DIM, VALUE_WIDTH,
                        VALUE_COLUMNS, SIZE - VALUE_WIDTH, HEADS)  # fmt: skip


@triton.jit(do_not_specialize=["num_slots"])
def _unpack_kernel(
    packed, tokens, padded, num_slots, num_heads: tl.constexpr, HAS_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    inside = slot < num_slots
    token = slot
    if HAS_TOKENS:
        token = tl.load(tokens + slot, mask=inside, other=-1)
    column = tl.arange(0, HEADS * COLUMNS)
    head = tl.program_id(1) * HEADS + column // COLUMNS
    dim = column % COLUMNS
    kept = ((head < num_heads) & (dim < HEAD_DIM))[None, :]
    source = token.to(tl.int64)[:, None] * (num_heads * SIZE) + (head * SIZE + dim)[None, :]
    values = tl.load(packed + source, mask=kept & (inside & (token >= 0))[:, None], other=0.0)
    target = slot.to(tl.int64)[:, None] * (num_heads * HEAD_DIM) + (head * HEAD_DIM + dim)[None, :]
    tl.store(padded + target, values, mask=kept & inside[:, None])


@functools.lru_cache(maxsize=64)
def _tile(columns: int, num_heads: int, itemsize: int) -> tuple[int, int]:
    """Returns how many tokens and heads one program moves."""
    heads = min(triton.next_power_of_2(num_heads), max(1, 512 // columns))
    return max(1, _TILE_BYTES // (heads * columns * itemsize)), heads


class Packer:
    """Gathers query, key and value of a layer from padded tensors of any strides, in one launch.

    Args:
        query_slots: Slots to take, int32, shape `(query_tokens,)`; None for all.
        key_slots: The same of keys and values.
        size: The head_dim to write, a power of two, with zeros beyond that of the input.
    """

    def __init__(self, query_slots: torch.Tensor | None, key_slots: torch.Tensor | None, size: int) -> None:
        self._slots = query_slots, key_slots
        self._size = size
        self._known: _KnownPack | None = None

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Packs; all calls of one packer take tensors of the same shapes.

        Args:
            query: Shape `(batch, heads, q_length, head_dim)`, the last stride 1.
            key: Shape `(batch, kv_heads, kv_length, head_dim)`, the last stride 1.
            value: Shape `(batch, kv_heads, kv_length, value_head_dim)`, the last stride 1.

        Returns:
            Query, key and value, shape `(tokens, heads, size)`. Values with a head_dim below `size` overlap: a head is
            followed by the next head of its token, the last head by zeros.
        """
        pointers = (query.data_ptr(), key.data_ptr(), value.data_ptr())
        seen = (query.stride(), key.stride(), value.stride())
        known = self._known
        if known is None or known.strides != seen or (pointers[0] | pointers[1] | pointers[2]) & 15:
            return self._pack_anew(query, key, value)
        packed = known.packed.make(query.dtype, query.device)
        known.launch(
            *pointers, packed[0].data_ptr(), packed[1].data_ptr(), packed[2].data_ptr(),
            known.slots[0] or pointers[0], known.slots[1] or pointers[0],
        )  # fmt: skip
        return packed

    def _pack_anew(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query_slots, key_slots = self._slots
        batch, query_heads, query_width, head_dim = query.shape
        _, key_heads, key_width, value_head_dim = value.shape
        num_queries = batch * query_width if query_slots is None else query_slots.shape[0]
        num_keys = batch * key_width if key_slots is None else key_slots.shape[0]
        size = self._size
        # Outputs beyond head_dim are cropped, so values may overlap, if each head starts at a multiple of 16 bytes.
        # Keys need zeros there: an infinity of the next head times the zeros of the query is NaN.
        width = value_head_dim if value_head_dim % (16 // query.element_size()) == 0 else size
        shape = _PackedShape((num_queries, query_heads, size), (num_keys, key_heads, size), width)
        packed = shape.make(query.dtype, query.device)
        tokens, heads = _tile(size, query_heads, query.element_size())
        parts = -(-query_heads // heads) + 2 * -(-key_heads // heads)
        row, head, slot, _ = query.stride()
        key_row, key_head, key_slot, _ = key.stride()
        value_row, value_head, value_slot, _ = value.stride()
        launch = Launch(
            _pack_kernel,
            (-(-max(num_queries, num_keys) // tokens), parts, 1),
            # A pointer that is not used, where all slots are taken.
            (
                query, key, value, *packed, query if query_slots is None else query_slots,
                query if key_slots is None else key_slots,
            ),
            (row, slot, head, key_row, key_slot, key_head, value_row, value_slot, value_head),
            (num_queries, query_width, num_keys, key_width),
            (
                query_heads, key_heads, query_slots is not None, key_slots is not None, head_dim, value_head_dim, size,
                width, triton.next_power_of_2(width), tokens, heads,
            ),
        )  # fmt: skip
        if launch.can_repeat and not any(side.data_ptr() & 15 for side in (query, key, value)):
            slots = tuple(0 if side is None else side.data_ptr() for side in (query_slots, key_slots))
            self._known = _KnownPack((query.stride(), key.stride(), value.stride()), launch, shape, slots)
        return packed


@dataclass(frozen=True, slots=True)
class _PackedShape:
    """Shapes of packed queries and of packed keys or values, and the head stride of values."""

    query: tuple[int, int, int]
    key: tuple[int, int, int]
    width: int

    def make(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_keys, heads, size = self.key
        stride = heads * self.width + size - self.width
        query = torch.empty(self.query, dtype=dtype, device=device)
        key = torch.empty(self.key, dtype=dtype, device=device)
        values = torch.empty(num_keys * stride, dtype=dtype, device=device)
        return query, key, values.as_strided(self.key, (stride, self.width, 1))


@dataclass(frozen=True, slots=True)
class _KnownPack:
    """A launch that can be repeated for tensors of the same strides, and the pointers of its slots."""

    strides: tuple[tuple[int, ...], ...]
    launch: Launch
    packed: _PackedShape
    slots: tuple[int, ...]


class Unpacker:
    """Spreads ragged output over the slots of a padded batch, cropped, with zeros in padding, in one launch.

    Args:
        tokens: The token of each slot, -1 for padding, int32, shape `(num_slots,)`; None where slots are tokens.
        shape: Rows and slots of the padded batch.
        head_dim: To keep.
    """

    def __init__(self, tokens: torch.Tensor | None, shape: tuple[int, int], head_dim: int) -> None:
        self._tokens = tokens
        self._shape = shape
        self._head_dim = head_dim
        self._launch: Launch | None = None

    def __call__(self, packed: torch.Tensor) -> torch.Tensor:
        """Unpacks; all calls of one unpacker take tensors of the same shape.

        Args:
            packed: Shape `(total_tokens, heads, size)`, contiguous, fresh memory.

        Returns:
            Shape `(*shape, heads, head_dim)`, contiguous.
        """
        _, num_heads, size = packed.shape
        head_dim, tokens = self._head_dim, packed if self._tokens is None else self._tokens
        padded = torch.empty((*self._shape, num_heads, head_dim), dtype=packed.dtype, device=packed.device)
        if self._launch is not None and packed.data_ptr() & 15 == 0:
            self._launch(packed.data_ptr(), tokens.data_ptr(), padded.data_ptr())
            return padded
        num_slots = self._shape[0] * self._shape[1]
        columns = triton.next_power_of_2(head_dim)
        slots, heads = _tile(columns, num_heads, packed.element_size())
        launch = Launch(
            _unpack_kernel,
            (-(-num_slots // slots), -(-num_heads // heads), 1),
            (packed, tokens, padded),
            (),
            (num_slots,),
            (num_heads, self._tokens is not None, head_dim, columns, size, slots, heads),
        )
        if launch.can_repeat and packed.data_ptr() & 15 == 0:
            self._launch = launch
        return padded
