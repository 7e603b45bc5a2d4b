"""A bias on the logits of padded attention, kept where ragged attention can read it: by slots, not by tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["LogitsBias"]


@dataclass(frozen=True, slots=True)
class LogitsBias:
    """What a model adds to the logits, as it came, for the slots of the padded batch.

    A row's query and key slots pick its part. Nothing is gathered: T5's bias is one for all rows, and as large as a
    mask.

    Args:
        values: Float, shape `(batch, heads, q_length, kv_length)`, any strides; expanded where it is the same for all.
    """

    values: torch.Tensor

    @classmethod
    def fit(cls, bias: torch.Tensor, shape: tuple[int, int, int, int]) -> LogitsBias | None:
        """Spreads a bias over `(batch, heads, q_length, kv_length)`; None where it does not broadcast to that."""
        if bias.ndim != 4 or any(size not in (1, full) for size, full in zip(bias.shape, shape)):
            return None
        return cls(bias.expand(shape))

    def of_row(self, row: int, query_slots: torch.Tensor | None, key_slots: torch.Tensor | None) -> torch.Tensor:
        """Returns the bias of one row's tokens, shape `(heads, queries, keys)`; differentiable.

        Args:
            row: Of the padded batch.
            query_slots: Where the row's queries are, integers, shape `(queries,)`; None for all slots in order.
            key_slots: The same of the keys.
        """
        bias = self.values[row]
        if query_slots is not None:
            bias = bias.index_select(1, query_slots)
        return bias if key_slots is None else bias.index_select(2, key_slots)
