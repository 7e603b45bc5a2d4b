"""Which attention a transformers mask function asks for: a band around the diagonal, packed sequences, or neither.

Full, causal and sliding-window attention are all bands: a query sees the keys from `left` before to `right` after its
own position. Mask functions are recognised exactly, by calling them with symbols; all others are dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import FunctionType

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from .mask_functions import TensorLikePosition, interpret

__all__ = ["CAUSAL", "FULL", "Pattern", "PatternKind", "band", "dense_pattern", "recognise"]

MaskFunction = Callable[..., torch.Tensor]


class PatternKind(Enum):
    """Whether a pattern can do without a mask."""

    BAND = "band"
    DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which keys a query may see, padding aside.

    Args:
        kind: A BAND runs on ragged tokens; DENSE needs the whole mask.
        name: What to call it in a message, such as "causal" or "sliding_window_overlay".
        left: How many keys before its own position a query sees; None for all.
        right: How many keys after its own position a query sees; None for all, 0 for causal attention.
    """

    kind: PatternKind
    name: str
    left: int | None = None
    right: int | None = None

    @property
    def is_window(self) -> bool:
        """Whether distances matter, beyond before and after."""
        return self.kind is PatternKind.BAND and (self.left is not None or self.right not in (None, 0))

    @property
    def is_causal(self) -> bool:
        """Whether no query sees a later key."""
        return self.kind is PatternKind.BAND and self.right == 0


FULL = Pattern(PatternKind.BAND, "full")
CAUSAL = Pattern(PatternKind.BAND, "causal", right=0)


def dense_pattern(name: str) -> Pattern:
    """Names what needs the whole mask."""
    return Pattern(PatternKind.DENSE, name)


def band(left: int | None, right: int | None) -> Pattern:
    """Names a band: `left` keys before a query's own position and `right` after; None for all."""
    if left is None and right is None:
        return FULL
    if left is None and right == 0:
        return CAUSAL
    bounds = "{} before".format("all" if left is None else left), "{} after".format("all" if right is None else right)
    return Pattern(PatternKind.BAND, f"window ({', '.join(bounds)})", left, right)


def recognise(mask_function: MaskFunction) -> tuple[Pattern, torch.Tensor | None, torch.Tensor | None]:
    """Labels a mask function. What is not known for certain is DENSE: a guess would be a silently wrong number.

    Args:
        mask_function: As transformers' mask helpers hand it to a mask interface.

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
        return dense_pattern(_describe(mask_function)), None, None
    return band(visible.left, visible.right), visible.packed, visible.positions


def _describe(mask_function: object) -> str:
    name = getattr(mask_function, "__qualname__", type(mask_function).__name__).split(".<locals>")[0]
    cells = mask_function.__closure__ or () if isinstance(mask_function, FunctionType) else ()
    closed = [cell.cell_contents for cell in cells]
    parts = [_describe(part) for value in closed if isinstance(value, tuple) for part in value if callable(part)]
    return f"{name}({', '.join(parts)})" if parts else name
