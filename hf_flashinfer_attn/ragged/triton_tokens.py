"""Triton kernel that numbers the tokens of a padded batch, and fast launches of compiled Triton kernels."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["Launch", "number_tokens"]


@triton.jit(do_not_specialize=["num_positions"])
def _number_tokens_kernel(valid, ranks, positions, tokens, num_positions, BLOCK: tl.constexpr):
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < num_positions
    is_token = (tl.load(valid + position, mask=inside, other=0) != 0) & inside
    token = tl.load(ranks + position, mask=inside, other=0) - 1
    tl.store(positions + token, position, mask=is_token)
    tl.store(tokens + position, tl.where(is_token, token, -1), mask=inside)


_compiled: dict[Hashable, Any] = {}


class Launch:
    """A compiled Triton kernel with all of its arguments except the pointers; launched once when it is made.

    Triton inspects every argument of every launch, 3 us each, to select a compiled kernel. This class caches compiled
    kernels by the same properties: dtypes, constants, and the divisibility of pointers and strides by 16. Kernels must
    not specialise sizes.

    Args:
        kernel: Triton kernel with the parameters tensors, strides, sizes and constants, in this order.
        grid: Number of programs along three axes.
        tensors: Tensors of the first launch.
        strides: Strides of the tensors.
        sizes: Integers that are not specialised.
        constants: Values of the constexpr parameters.
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
            # None if Triton interprets kernels.
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
        """Launches the kernel on other tensors; their pointers must be divisible by 16 where the first ones were."""
        self._launch(*pointers, *self._rest)


def number_tokens(
    valid: torch.Tensor, ranks: torch.Tensor, total_tokens: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers the tokens of a padded batch.

    Args:
        valid: True where a padded position holds a token, contiguous, any shape.
        ranks: Cumulative sum of `valid`, int32, contiguous.
        total_tokens: Number of tokens; None if it is still on the device.

    Returns:
        `positions` and `tokens` of a [`TokenMap`].
    """
    num_positions, block = valid.numel(), 1024
    tokens = torch.empty(num_positions, dtype=torch.int32, device=valid.device)
    positions = torch.zeros_like(tokens) if total_tokens is None else tokens.new_empty(total_tokens)
    tensors = valid.view(torch.uint8), ranks, positions, tokens
    Launch(_number_tokens_kernel, (triton.cdiv(num_positions, block), 1, 1), tensors, (), (num_positions,), (block,))
    return positions, tokens
