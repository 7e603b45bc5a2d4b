"""Attention patterns, padding aside: `Band` (full, causal or sliding window) or `Opaque` (any other mask)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import ClassVar, TypeAlias

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from .mask_functions import TensorLikePosition, interpret

__all__ = ["CAUSAL", "FULL", "Band", "MaskFunction", "Opaque", "Pattern", "recognise"]

MaskFunction = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class Band:
    """Full, causal or sliding-window attention.

    Args:
        left: Number of keys before its own position that a query sees; None for all.
        right: Number of keys after its own position that a query sees; None for all, 0 for causal attention.
    """

    left: int | None = None
    right: int | None = None

    @property
    def name(self) -> str:
        """Name in messages and traces."""
        if self.left is None and self.right in (None, 0):
            return "full" if self.right is None else "causal"
        left, right = ("all" if bound is None else bound for bound in (self.left, self.right))
        return f"window ({left} before, {right} after)"

    @property
    def is_window(self) -> bool:
        """Whether attention is limited to a window, other than causality."""
        return self.left is not None or self.right not in (None, 0)

    @property
    def is_causal(self) -> bool:
        """Whether no query sees a later key."""
        return self.right == 0


@dataclass(frozen=True, slots=True)
class Opaque:
    """Attention that is not a recognised band and needs the whole mask; `name` is for messages and traces."""

    name: str
    left: ClassVar[None] = None
    right: ClassVar[None] = None
    is_window: ClassVar[bool] = False
    is_causal: ClassVar[bool] = False


Pattern: TypeAlias = "Band | Opaque"
FULL, CAUSAL = Band(), Band(right=0)


def recognise(mask_function: MaskFunction) -> tuple[Pattern, torch.Tensor | None, torch.Tensor | None]:
    """Recognises a mask function exactly; any uncertainty makes it `Opaque`.

    Returns:
        The pattern; the sequence index of each token for packed sequences, shape `(batch, tokens)`, or None; and the
        positions that the band counts in, of the same shape, or None if the band counts token indices.
    """
    if mask_function is bidirectional_mask_function:
        return FULL, None, None
    if mask_function is causal_mask_function:
        return CAUSAL, None, None
    visible = interpret(mask_function, TensorLikePosition)
    if visible is None:
        return Opaque(_describe(mask_function)), None, None
    return Band(visible.left, visible.right), visible.packed, visible.positions


def _describe(mask_function: object) -> str:
    name = getattr(mask_function, "__qualname__", type(mask_function).__name__).split(".<locals>")[0]
    cells = mask_function.__closure__ or () if isinstance(mask_function, FunctionType) else ()
    closed = [cell.cell_contents for cell in cells]
    parts = [_describe(part) for value in closed if isinstance(value, tuple) for part in value if callable(part)]
    return f"{name}({', '.join(parts)})" if parts else name
