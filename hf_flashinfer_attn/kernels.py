"""Triton kernels that move data between padded and ragged tensors. Imported by `movement` alone, where Triton is there.

A slot is a place in a padded batch, row by row; a token is a place in a ragged tensor. Kernels are launched on the
current device and stream.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["number_tokens", "pack", "unpack"]

# Bytes that one program moves for one tensor: enough in flight for the memory, enough programs for a small batch.
_TILE_BYTES = 8192


@triton.jit(do_not_specialize=["num_slots"])
def _number_tokens_kernel(valid, ranks, slots, tokens, num_slots, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < num_slots
    is_token = (tl.load(valid + slot, mask=inside, other=0) != 0) & inside
    token = tl.load(ranks + slot, mask=inside, other=0) - 1
    tl.store(slots + token, slot, mask=is_token)
    tl.store(tokens + slot, tl.where(is_token, token, -1), mask=inside)


@triton.jit
def _copy_heads(
    source, stride_row, stride_slot, stride_head, target, row, place, token, inside, first_head, num_heads,
    HEAD_DIM: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, HEADS * SIZE)
    head = first_head + column // SIZE
    dim = column % SIZE
    there = inside[:, None] & (head < num_heads)[None, :]
    address = row * stride_row + place * stride_slot
    offset = head.to(tl.int64) * stride_head + dim
    # Zeros beyond head_dim, not whatever is there: a NaN in a padded column would reach every logit.
    values = tl.load(source + address[:, None] + offset[None, :], mask=there & (dim < HEAD_DIM)[None, :], other=0.0)
    tl.store(target + token.to(tl.int64)[:, None] * (num_heads * SIZE) + (head * SIZE + dim)[None, :], values, there)


@triton.jit(do_not_specialize=["num_queries", "query_width", "num_keys", "key_width"])
def _pack_kernel(
    query, key, value, packed_query, packed_key, packed_value, query_slots, key_slots,
    query_row, query_slot, query_head, key_row, key_slot, key_head, value_row, value_slot, value_head,
    num_queries, query_width, num_keys, key_width, query_heads: tl.constexpr, key_heads: tl.constexpr,
    HAS_QUERY_SLOTS: tl.constexpr, HAS_KEY_SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    query_parts = (query_heads + HEADS - 1) // HEADS
    key_parts = (key_heads + HEADS - 1) // HEADS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    if part < query_parts:
        inside = token < num_queries
        slot = token
        if HAS_QUERY_SLOTS:
            slot = tl.load(query_slots + token, mask=inside, other=0)
        row = (slot // query_width).to(tl.int64)
        place = (slot % query_width).to(tl.int64)
        _copy_heads(query, query_row, query_slot, query_head, packed_query, row, place, token, inside, part * HEADS,
                    query_heads, HEAD_DIM, SIZE, HEADS)  # fmt: skip
    else:
        inside = token < num_keys
        slot = token
        if HAS_KEY_SLOTS:
            slot = tl.load(key_slots + token, mask=inside, other=0)
        row = (slot // key_width).to(tl.int64)
        place = (slot % key_width).to(tl.int64)
        if part < query_parts + key_parts:
            _copy_heads(key, key_row, key_slot, key_head, packed_key, row, place, token, inside,
                        (part - query_parts) * HEADS, key_heads, HEAD_DIM, SIZE, HEADS)  # fmt: skip
        else:
            _copy_heads(value, value_row, value_slot, value_head, packed_value, row, place, token, inside,
                        (part - query_parts - key_parts) * HEADS, key_heads, VALUE_HEAD_DIM, SIZE, HEADS)  # fmt: skip


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


def number_tokens(valid: torch.Tensor, ranks: torch.Tensor, total_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers the tokens of a padded batch.

    Args:
        valid: Which slots hold a token, bool, contiguous, any shape.
        ranks: How many slots up to each one, itself included, hold a token, int32, contiguous.
        total_tokens: How many do.

    Returns:
        The slot of each token, int32, shape `(total_tokens,)`; and the token of each slot, -1 for padding, int32.
    """
    num_slots, block = valid.numel(), 1024
    slots, tokens = (torch.empty(size, dtype=torch.int32, device=valid.device) for size in (total_tokens, num_slots))
    _number_tokens_kernel[(triton.cdiv(num_slots, block),)](
        valid.view(torch.uint8), ranks, slots, tokens, num_slots, BLOCK=block
    )
    return slots, tokens


@functools.lru_cache(maxsize=64)
def _tile(columns: int, num_heads: int, itemsize: int) -> tuple[int, int]:
    """Returns how many tokens and heads one program moves."""
    heads = min(triton.next_power_of_2(num_heads), max(1, 512 // columns))
    return max(1, _TILE_BYTES // (heads * columns * itemsize)), heads


_compiled: dict[Hashable, Any] = {}


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor, ...],
    strides: tuple[int, ...],
    sizes: tuple[int, ...],
    constants: tuple[Hashable, ...],
) -> None:
    """Launches a kernel whose parameters are, in this order, tensors, strides, sizes and constants.

    Triton looks at every argument of every launch to find the compiled kernel that fits, 3 us each. What it looks at
    is this key: dtypes and constants, and of pointers and strides whether 16 divides them. Sizes are not specialised.
    """
    pointers = [tensor.data_ptr() for tensor in tensors]
    fits: list[int] = [pointer & 15 == 0 for pointer in pointers]
    fits += [-1 if stride == 1 else 2 if stride > 0x7FFFFFFF else stride & 15 == 0 for stride in strides]
    key = (kernel, tensors[0].device, tensors[0].dtype, constants, *fits)
    compiled = _compiled.get(key)
    if compiled is None:
        # None where kernels are interpreted.
        if (compiled := kernel[grid](*tensors, *strides, *sizes, *constants)) is not None:
            _compiled[key] = compiled
    else:
        compiled[grid](*pointers, *strides, *sizes, *constants)


def pack(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_slots: torch.Tensor | None,
    key_slots: torch.Tensor | None,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gathers query, key and value of a layer from padded tensors of any strides, in one launch.

    Args:
        query: Shape `(batch, heads, q_length, head_dim)`, the last stride 1.
        key: Shape `(batch, kv_heads, kv_length, head_dim)`, the last stride 1.
        value: Shape `(batch, kv_heads, kv_length, value_head_dim)`, the last stride 1.
        query_slots: Slots to take, int32, shape `(query_tokens,)`; None for all.
        key_slots: The same of keys and values.
        size: The head_dim to write, a power of two, with zeros beyond that of the input.

    Returns:
        Query, key and value, contiguous, shape `(tokens, heads, size)`.
    """
    batch, query_heads, query_width, head_dim = query.shape
    _, key_heads, key_width, value_head_dim = value.shape
    num_queries = batch * query_width if query_slots is None else query_slots.shape[0]
    num_keys = batch * key_width if key_slots is None else key_slots.shape[0]
    dtype, device = query.dtype, query.device
    packed_query = torch.empty((num_queries, query_heads, size), dtype=dtype, device=device)
    packed_key = torch.empty((num_keys, key_heads, size), dtype=dtype, device=device)
    packed_value = torch.empty((num_keys, key_heads, size), dtype=dtype, device=device)
    tokens, heads = _tile(size, query_heads, query.element_size())
    parts = -(-query_heads // heads) + 2 * -(-key_heads // heads)
    row, head, slot, _ = query.stride()
    key_row, key_head, key_slot, _ = key.stride()
    value_row, value_head, value_slot, _ = value.stride()
    _launch(
        _pack_kernel,
        (-(-max(num_queries, num_keys) // tokens), parts, 1),
        (
            query, key, value, packed_query, packed_key, packed_value,
            # A pointer that is not used, where all slots are taken.
            query if query_slots is None else query_slots, key if key_slots is None else key_slots,
        ),
        (row, slot, head, key_row, key_slot, key_head, value_row, value_slot, value_head),
        (num_queries, query_width, num_keys, key_width),
        (
            query_heads, key_heads, query_slots is not None, key_slots is not None, head_dim, value_head_dim, size,
            tokens, heads,
        ),
    )  # fmt: skip
    return packed_query, packed_key, packed_value


def unpack(packed: torch.Tensor, tokens: torch.Tensor | None, num_slots: int, head_dim: int) -> torch.Tensor:
    """Spreads ragged output over the slots of a padded batch, cropped, with zeros in padding, in one launch.

    Args:
        packed: Shape `(total_tokens, heads, size)`, contiguous.
        tokens: The token of each slot, -1 for padding, int32, shape `(num_slots,)`; None where slots are tokens.
        num_slots: Of the padded batch.
        head_dim: At most `size`.

    Returns:
        Shape `(num_slots, heads, head_dim)`, contiguous.
    """
    _, num_heads, size = packed.shape
    padded = torch.empty((num_slots, num_heads, head_dim), dtype=packed.dtype, device=packed.device)
    columns = triton.next_power_of_2(head_dim)
    slots, heads = _tile(columns, num_heads, packed.element_size())
    _launch(
        _unpack_kernel,
        (-(-num_slots // slots), -(-num_heads // heads), 1),
        (packed, packed if tokens is None else tokens, padded),
        (),
        (num_slots,),
        (num_heads, tokens is not None, head_dim, columns, size, slots, heads),
    )
    return padded
