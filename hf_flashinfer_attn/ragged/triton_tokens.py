"""Triton kernel that numbers the tokens of a padded batch; repeated launches of compiled Triton kernels."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["Launch", "number_tokens"]


@triton.jit(do_not_specialize=["num_slots"])
def _number_tokens_kernel(valid, ranks, slots, tokens, num_slots, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < num_slots
    is_token = (tl.load(valid + slot, mask=inside, other=0) != 0) & inside
    token = tl.load(ranks + slot, mask=inside, other=0) - 1
    tl.store(slots + token, slot, mask=is_token)
    tl.store(tokens + slot, tl.where(is_token, token, -1), mask=inside)


_compiled: dict[Hashable, Any] = {}


class Launch:
    """A compiled kernel and its arguments but for the pointers.

    Triton looks at every argument of every launch to find the compiled kernel that fits, 3 us each. What it looks at
    is the key here: dtypes and constants, and of pointers and strides whether 16 divides them. Sizes are not
    specialised.

    Args:
        kernel: Takes, in this order, tensors, strides, sizes and constants.
        grid: Programs along three axes.
        tensors: The first launch is theirs.
        strides: Of any of the tensors.
        sizes: Of any of the tensors.
        constants: Known when the kernel is compiled.
    """

    __slots__ = ("_launch", "_rest")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor, ...],
        strides: tuple[int, ...],
        sizes: tuple[int, ...],
        constants: tuple[Hashable, ...],
    ) -> None:
        fits: list[int] = [tensor.data_ptr() & 15 == 0 for tensor in tensors]
        fits += [-1 if stride == 1 else 2 * (stride > 0x7FFFFFFF) + (stride & 15 == 0) for stride in strides]
        key = (kernel, tensors[0].device, *(tensor.dtype for tensor in tensors), constants, *fits)
        self._rest = (*strides, *sizes, *constants)
        compiled: Any = _compiled.get(key)
        if compiled is None:
            compiled = kernel[grid](*tensors, *self._rest)
            # None where kernels are interpreted.
            self._launch: Any = None if compiled is None else compiled[grid]
            if compiled is not None:
                _compiled[key] = compiled
        else:
            self._launch = compiled[grid]
            self(*(tensor.data_ptr() for tensor in tensors))

    @property
    def can_repeat(self) -> bool:
        return self._launch is not None

    def __call__(self, *pointers: int) -> None:
        """Launches the kernel on other tensors, whose pointers are as divisible by 16 as the first ones were."""
        self._launch(*pointers, *self._rest)


def number_tokens(
    valid: torch.Tensor, ranks: torch.Tensor, total_tokens: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers the tokens of a padded batch.

    Args:
        valid: Which slots hold a token, bool, contiguous, any shape.
        ranks: How many slots up to each one, itself included, hold a token, int32, contiguous.
        total_tokens: How many do; None for as many as there are slots at most.

    Returns:
        The slot of each token, int32, shape `(total_tokens,)`, or zeros after the last one; and the token of each slot,
        -1 for padding, int32.
    """
    num_slots, block = valid.numel(), 1024
    tokens = torch.empty(num_slots, dtype=torch.int32, device=valid.device)
    slots = torch.zeros_like(tokens) if total_tokens is None else tokens.new_empty(total_tokens)
    grid = (triton.cdiv(num_slots, block), 1, 1)
    Launch(_number_tokens_kernel, grid, (valid.view(torch.uint8), ranks, slots, tokens), (), (num_slots,), (block,))
    return slots, tokens
