"""A bias on the logits, kept where ragged attention can read it: by the slots of rows, not by tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .layout import RaggedLayout

__all__ = ["LogitsBias"]


@dataclass(frozen=True, slots=True)
class LogitsBias:
    """What a model adds to the logits, as it came, for the slots of the padded batch.

    A row's query and key slots pick its part. Nothing is gathered: T5's bias is one for all rows, and as large as a
    mask. Packed sequences have no padding: their tokens are their slots, and the longest one gives the lengths.

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

    def over(self, layout: RaggedLayout) -> torch.Tensor:
        """Returns the bias of packed sequences on all of their tokens, zero where two sequences meet.

        Args:
            layout: Of the packed sequences.

        Returns:
            Shape `(1, heads, total_query_tokens, total_key_tokens)`; differentiable.
        """
        whole = self.values.new_zeros(1, self.values.shape[1], layout.query.total_tokens, layout.key.total_tokens)
        for row, (query, key) in enumerate(zip(layout.query.offsets[:-1], layout.key.offsets[:-1])):
            queries, keys = layout.query.lengths[row], layout.key.lengths[row]
            whole[0, :, query : query + queries, key : key + keys] = self.values[row, :, :queries, :keys]
        return whole
