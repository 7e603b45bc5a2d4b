"""Which attention a transformers mask function asks for: full, causal, or something only a dense mask can express."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

__all__ = ["CAUSAL", "FULL", "Pattern", "PatternKind", "recognise"]


class PatternKind(Enum):
    FULL = "full"
    CAUSAL = "causal"
    DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which keys a query may see, padding aside.

    Args:
        kind: FULL and CAUSAL run on ragged tokens; DENSE needs the whole mask.
        name: What to call it in a message, such as "sliding_window_overlay".
    """

    kind: PatternKind
    name: str

    @property
    def is_causal(self) -> bool:
        return self.kind is PatternKind.CAUSAL


FULL = Pattern(PatternKind.FULL, "full")
CAUSAL = Pattern(PatternKind.CAUSAL, "causal")


def recognise(mask_function: Callable[..., torch.Tensor]) -> Pattern:
    """Labels a mask function. What is not known for certain is DENSE: a guess would be a silently wrong number."""
    if mask_function is bidirectional_mask_function:
        return FULL
    if mask_function is causal_mask_function:
        return CAUSAL
    return Pattern(PatternKind.DENSE, _describe(mask_function))


def _describe(mask_function: Callable[..., torch.Tensor]) -> str:
    name = getattr(mask_function, "__qualname__", type(mask_function).__name__).split(".<locals>")[0]
    parts: list[str] = []
    for cell in getattr(mask_function, "__closure__", None) or ():
        if isinstance(cell.cell_contents, tuple):
            parts.extend(_describe(part) for part in cell.cell_contents if callable(part))
    return f"{name}({', '.join(parts)})" if parts else name
