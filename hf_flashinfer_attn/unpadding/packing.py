"""A padded batch and the packed one that a model computes in its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..layout import LengthsRead, RaggedLayout, RaggedSide

__all__ = ["Packing"]


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the tokens of a padded batch are.

    Args:
        rows: The padded batch, of shape `(batch, slots)`.
        layout: The packed batch, of shape `(1, total_tokens)`.
        has_holes: Whether padding splits a row.
        returns_dict: Whether the caller wants an output object rather than a tuple.
    """

    rows: RaggedSide
    layout: RaggedLayout
    has_holes: bool
    returns_dict: bool

    @classmethod
    def of(cls, attention_mask: torch.Tensor, *, returns_dict: bool) -> Packing:
        """Reads a mask of ones and zeros, shape `(batch, slots)`; the host waits for it if it is on another device."""
        valid = attention_mask.to(torch.bool)
        starts = F.pad(valid, (1, 0)).to(torch.int8).diff(dim=1) == 1
        lengths, runs = LengthsRead(torch.stack([valid.sum(-1), starts.sum(-1)])).values
        rows = RaggedSide(lengths, (valid.shape[0], valid.shape[1]), valid)
        return cls(rows, RaggedLayout.from_lengths(lengths), max(runs, default=0) > 1, returns_dict)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Drops padding, where the tensor is: `(batch, slots, ...)` to `(1, total_tokens, ...)`."""
        return self.rows.gather(padded).unsqueeze(0)

    def spread(self, packed: torch.Tensor) -> torch.Tensor:
        """Undoes `pack`, with zeros in padding."""
        return self.rows.scatter(packed.squeeze(0))
