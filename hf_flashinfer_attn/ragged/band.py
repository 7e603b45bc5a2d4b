"""Attention patterns, padding aside: `Band`, which keys around its position a query sees, or `Opaque`."""

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
        """What messages and traces call it."""
        if self.left is None and self.right in (None, 0):
            return "full" if self.right is None else "causal"
        left, right = ("all" if bound is None else bound for bound in (self.left, self.right))
        return f"window ({left} before, {right} after)"

    @property
    def is_window(self) -> bool:
        """Whether distances matter, beyond before and after."""
        return self.left is not None or self.right not in (None, 0)

    @property
    def is_causal(self) -> bool:
        """Whether no query sees a later key."""
        return self.right == 0


@dataclass(frozen=True, slots=True)
class Opaque:
    """Attention that is not known to be a band, and needs the whole mask.

    Args:
        name: What messages and traces call it.
    """

    name: str
    left: ClassVar[None] = None
    right: ClassVar[None] = None
    is_window: ClassVar[bool] = False
    is_causal: ClassVar[bool] = False


Pattern: TypeAlias = "Band | Opaque"
FULL, CAUSAL = Band(), Band(right=0)


def recognise(mask_function: MaskFunction) -> tuple[Pattern, torch.Tensor | None, torch.Tensor | None]:
    """Recognises a mask function exactly; a function that is not known for certain is `Opaque`.

    Args:
        mask_function: As transformers' mask helpers pass it to a mask interface.

    Returns:
        The pattern; for packed sequences, the sequence index of each position, shape `(batch, tokens)`; and the
        positions that the band is measured in, of the same shape, if these are not the indices.
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
