"""Triton kernels that gather query, key and value, and scatter the output, on the current device and stream.

A padded position counts through all rows; `row_position` counts in one row. A token is an index of a ragged tensor.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..ragged.triton_tokens import Launch

__all__ = ["gather_qkv", "scatter_output"]

# Bytes per program and tensor: enough to saturate the memory, and few enough for many programs in a small batch.
_TILE_BYTES = 8192


@triton.jit
def _copy_heads(
    source, stride_row, stride_position, stride_head, target, row, row_position, token, inside, first_head,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, HEADS * COLUMNS)
    head = first_head + column // COLUMNS
    dim = column % COLUMNS
    kept = (head < NUM_HEADS) & (dim < WIDTH)
    address = row * stride_row + row_position * stride_position
    offset = head.to(tl.int64) * stride_head + dim
    # Zeros beyond head_dim: a NaN in a padded column would reach every logit.
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
    query, key, value, packed_query, packed_key, packed_value, query_positions, key_positions,
    query_stride_row, query_stride_position, query_stride_head, key_stride_row, key_stride_position, key_stride_head,
    value_stride_row, value_stride_position, value_stride_head, num_queries, query_width, num_keys, key_width,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HAS_QUERY_POSITIONS: tl.constexpr,
    HAS_KEY_POSITIONS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_HEAD_DIM: tl.constexpr, SIZE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_COLUMNS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    query_parts = (QUERY_HEADS + HEADS - 1) // HEADS
    key_parts = (KEY_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    if part < query_parts:
        inside = token < num_queries
        position = token
        if HAS_QUERY_POSITIONS:
            position = tl.load(query_positions + token, mask=inside, other=0)
        row = (position // query_width).to(tl.int64)
        row_position = (position % query_width).to(tl.int64)
        _copy_heads(query, query_stride_row, query_stride_position, query_stride_head, packed_query, row, row_position,
                    token, inside, part * HEADS, QUERY_HEADS, HEAD_DIM, SIZE, SIZE, 0, HEADS)  # fmt: skip
    else:
        inside = token < num_keys
        position = token
        if HAS_KEY_POSITIONS:
            position = tl.load(key_positions + token, mask=inside, other=0)
        row = (position // key_width).to(tl.int64)
        row_position = (position % key_width).to(tl.int64)
        if part < query_parts + key_parts:
            _copy_heads(key, key_stride_row, key_stride_position, key_stride_head, packed_key, row, row_position, token,
                        inside, (part - query_parts) * HEADS, KEY_HEADS, HEAD_DIM, SIZE, SIZE, 0,
                        HEADS)  # fmt: skip
        else:
            _copy_heads(value, value_stride_row, value_stride_position, value_stride_head, packed_value, row,
                        row_position, token, inside, (part - query_parts - key_parts) * HEADS, KEY_HEADS,
                        VALUE_HEAD_DIM, VALUE_WIDTH, VALUE_COLUMNS, SIZE - VALUE_WIDTH, HEADS)  # fmt: skip


@triton.jit(do_not_specialize=["num_positions"])
def _unpack_kernel(
    packed, tokens, padded, num_positions, num_heads: tl.constexpr, HAS_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, SIZE: tl.constexpr, POSITIONS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    inside = position < num_positions
    token = position
    if HAS_TOKENS:
        token = tl.load(tokens + position, mask=inside, other=-1)
    column = tl.arange(0, HEADS * COLUMNS)
    head = tl.program_id(1) * HEADS + column // COLUMNS
    dim = column % COLUMNS
    kept = ((head < num_heads) & (dim < HEAD_DIM))[None, :]
    source = token.to(tl.int64)[:, None] * (num_heads * SIZE) + (head * SIZE + dim)[None, :]
    values = tl.load(packed + source, mask=kept & (inside & (token >= 0))[:, None], other=0.0)
    target = position.to(tl.int64)[:, None] * (num_heads * HEAD_DIM) + (head * HEAD_DIM + dim)[None, :]
    tl.store(padded + target, values, mask=kept & inside[:, None])


@functools.lru_cache(maxsize=64)
def _tile(columns: int, num_heads: int, itemsize: int) -> tuple[int, int]:
    """Returns the number of tokens and heads per program."""
    heads = min(triton.next_power_of_2(num_heads), max(1, 512 // columns))
    return max(1, _TILE_BYTES // (heads * columns * itemsize)), heads


def gather_qkv(
    sides: tuple[torch.Tensor, ...],
    packed: tuple[torch.Tensor, ...],
    positions: tuple[torch.Tensor | None, torch.Tensor | None],
    size: int,
) -> Launch:
    """Gathers query, key and value from padded tensors, and returns the launch.

    Args:
        sides: Query, key and value, shape `(batch, heads, length, head_dim)`, the last stride 1.
        packed: The results, shape `(tokens, heads, size)`; the head stride of values is their head_dim or `size`.
        positions: Padded positions of queries and of keys, int32, shape `(tokens,)`; None for all.
        size: head_dim of the results.
    """
    query = sides[0]
    _, query_heads, q_length, head_dim = query.shape
    _, key_heads, kv_length, value_head_dim = sides[2].shape
    num_queries, num_keys, width = packed[0].shape[0], packed[1].shape[0], packed[2].stride(1)
    tokens, heads = _tile(size, query_heads, query.element_size())
    parts = -(-query_heads // heads) + 2 * -(-key_heads // heads)
    strides = [(side.stride(0), side.stride(2), side.stride(1)) for side in sides]
    return Launch(
        _pack_kernel,
        (-(-max(num_queries, num_keys) // tokens), parts, 1),
        # Positions that are None need a pointer that is not read.
        (*sides, *packed, *(query if side is None else side for side in positions)),
        (*strides[0], *strides[1], *strides[2]),
        (num_queries, q_length, num_keys, kv_length),
        (
            query_heads, key_heads, positions[0] is not None, positions[1] is not None, head_dim, value_head_dim, size,
            width, triton.next_power_of_2(width), tokens, heads,
        ),
    )  # fmt: skip


def scatter_output(packed: torch.Tensor, tokens: torch.Tensor | None, padded: torch.Tensor) -> Launch:
    """Scatters packed output to a padded batch, cropped, with zeros in padding, and returns the launch.

    Args:
        packed: Shape `(total_tokens, heads, size)`, contiguous.
        tokens: Token at each padded position, -1 for padding, int32; None without padding.
        padded: The result, shape `(rows, length, heads, head_dim)`, contiguous.
    """
    _, num_heads, size = packed.shape
    rows, length, _, head_dim = padded.shape
    columns = triton.next_power_of_2(head_dim)
    positions, heads = _tile(columns, num_heads, packed.element_size())
    return Launch(
        _unpack_kernel,
        (-(-rows * length // positions), -(-num_heads // heads), 1),
        (packed, packed if tokens is None else tokens, padded),
        (),
        (rows * length,),
        (num_heads, tokens is not None, head_dim, columns, size, positions, heads),
    )
