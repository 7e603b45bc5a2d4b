"""Padded to ragged and back for one attention call: Triton where it is there, torch everywhere else."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["TokenMap", "pack", "unpack"]


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _use_triton(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and _has_triton()


@dataclass(frozen=True, slots=True)
class TokenMap:
    """Where the tokens of a padded batch are, on one device.

    Args:
        slots: The slot of each token, int32, shape `(total_tokens,)`.
        tokens: The token of each slot, int32, shape `(num_slots,)`; -1 for padding.
    """

    slots: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of(cls, valid: torch.Tensor, total_tokens: int) -> TokenMap:
        """Numbers the tokens row by row, without a wait for the device.

        Args:
            valid: Which slots hold a token, bool, shape `(batch, slots)`.
            total_tokens: How many do.
        """
        flat = valid.reshape(-1)
        ranks = flat.cumsum(0, dtype=torch.int32)
        if _use_triton(valid):
            from . import kernels

            return cls(*kernels.number_tokens(flat.contiguous(), ranks, total_tokens))
        tokens = torch.where(flat, ranks - 1, -1)
        return cls(_inverse(tokens, total_tokens), tokens)

    def reordered(self, order: torch.Tensor) -> TokenMap:
        """Returns the map after tokens were put in another order: the new token `i` is the old `order[i]`."""
        slots = self.slots[order]
        places = torch.arange(len(order), dtype=torch.int32, device=slots.device)
        return TokenMap(slots, torch.full_like(self.tokens, -1).index_copy_(0, slots.long(), places))


def _inverse(tokens: torch.Tensor, total_tokens: int) -> torch.Tensor:
    # Not `nonzero`, which would wait for the GPU to learn the size: padding slots all land in one extra place.
    destination = torch.where(tokens >= 0, tokens, total_tokens).long()
    slots = torch.arange(tokens.numel(), dtype=torch.int32, device=tokens.device)
    return slots.new_empty(total_tokens + 1).scatter_(0, destination, slots)[:total_tokens]


def pack(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_slots: torch.Tensor | None,
    key_slots: torch.Tensor | None,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gathers query, key and value of a layer and pads their head_dim with zeros.

    Args:
        query: Shape `(batch, heads, q_length, head_dim)`, any strides.
        key: Shape `(batch, kv_heads, kv_length, head_dim)`, any strides.
        value: Shape `(batch, kv_heads, kv_length, value_head_dim)`, any strides.
        query_slots: Slots to take, int32, shape `(query_tokens,)`; None for all.
        key_slots: The same of keys and values.
        size: The head_dim to return.

    Returns:
        Query, key and value, shape `(tokens, heads, size)`; where all slots are taken and head_dim fits, views.
    """
    if query_slots is None and key_slots is None and query.shape[-1] == value.shape[-1] == size:
        sides = (query, key, value)
        if all(_is_one_run(side) for side in sides):
            return (_flat(query), _flat(key), _flat(value))
    if _use_triton(query):
        from . import kernels

        query, key, value = (side if side.stride(-1) == 1 else side.contiguous() for side in (query, key, value))
        return kernels.pack(query, key, value, query_slots, key_slots, size)
    return (
        _pack_one(query, query_slots, size),
        _pack_one(key, key_slots, size),
        _pack_one(value, key_slots, size),
    )


def unpack(packed: torch.Tensor, tokens: torch.Tensor | None, shape: tuple[int, int], head_dim: int) -> torch.Tensor:
    """Spreads ragged output over a padded batch and crops its head_dim; zeros in padding.

    Args:
        packed: Shape `(total_tokens, heads, size)`, contiguous.
        tokens: The token of each slot, -1 for padding; None where slots are tokens.
        shape: Rows and slots of the padded batch.
        head_dim: At most `size`.

    Returns:
        Shape `(*shape, heads, head_dim)`, contiguous.
    """
    size = packed.shape[-1]
    if tokens is None and head_dim == size:
        return packed.view(*shape, *packed.shape[1:])
    if _use_triton(packed):
        from . import kernels

        return kernels.unpack(packed, tokens, shape[0] * shape[1], head_dim).view(*shape, -1, head_dim)
    cropped = packed[..., :head_dim]
    if tokens is None:
        return cropped.reshape(*shape, *cropped.shape[1:]).contiguous()
    if not len(packed):
        return packed.new_zeros(*shape, packed.shape[1], head_dim)
    padded = cropped.index_select(0, tokens.clamp(min=0)).masked_fill_((tokens < 0)[:, None, None], 0)
    return padded.view(*shape, *cropped.shape[1:])


def _is_one_run(side: torch.Tensor) -> bool:
    """Whether rows follow each other at the distance of slots, so that batch and slots are one dimension."""
    row, _, slot, last = side.stride()
    return last == 1 and (row == slot * side.shape[2] or side.shape[0] == 1)


def _flat(side: torch.Tensor) -> torch.Tensor:
    return side.transpose(1, 2).flatten(0, 1)


def _pack_one(side: torch.Tensor, slots: torch.Tensor | None, size: int) -> torch.Tensor:
    flat = _flat(side)
    if slots is not None:
        flat = flat.index_select(0, slots)
    return flat if flat.shape[-1] == size else F.pad(flat, (0, size - flat.shape[-1]))
