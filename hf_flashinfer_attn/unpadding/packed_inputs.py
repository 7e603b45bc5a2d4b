"""Inputs of a backbone for tokens that were never padded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..layout import RaggedLayout, carry_layout
from ..mask import mask_of_ones
from .families import Positions, family_of, required_family
from .hooks import HANDLES
from .packing import RIDER, Packing
from .reasons import reason_to_stay, require_positions

__all__ = ["PackedTokens", "reason_against_packed_inputs"]


def reason_against_packed_inputs(backbone: torch.nn.Module) -> str | None:
    """Returns why a model cannot be given `PackedTokens`; None if it can."""
    family = family_of(backbone)
    if family is None or HANDLES not in vars(backbone):
        return f"{type(backbone).__name__} is not unpadded"
    if not family.packs_ids_alone:
        return f"{type(backbone).__name__} reads more of a row than its token ids"
    assert isinstance(backbone, PreTrainedModel)
    ids = torch.zeros(1, 1, dtype=torch.long)
    return reason_to_stay(backbone, {"input_ids": ids, "attention_mask": ids, "use_cache": False})


class PackedTokens:
    """Tokens on the host, ready for one copy to a device. May be made in another thread than the model runs in.

    Args:
        backbone: An unpadded model, which `reason_against_packed_inputs` has nothing against.
        device: Device of the model.
        lengths: Tokens of each row, int64, shape `(rows,)`.
        ids: Token ids, int64, shape `(total_tokens,)`.
        others: More numbers of each token by their names, int64, shape `(total_tokens,)`, such as `token_type_ids`.

    Raises:
        IndexError: If a row is longer than the model's table of positions.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        device: torch.device,
        lengths: np.ndarray[Any, Any],
        ids: np.ndarray[Any, Any],
        others: Mapping[str, np.ndarray[Any, Any]],
    ) -> None:
        self._family, self._device = required_family(backbone), device
        self._lengths: list[int] = lengths.tolist()
        require_positions(backbone, max(self._lengths))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        per_token = {"input_ids": ids, "position_ids": _positions(backbone, ids, lengths, offsets), **others}
        self._names = list(per_token)
        # Without pinned memory the host would wait for all that was launched before. Pinning takes the current device.
        on_gpu = device.type == "cuda"
        with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            size = len(per_token) * len(ids) + len(offsets)
            self._numbers = torch.empty(size, dtype=torch.long, device="cpu", pin_memory=on_gpu)
        np.concatenate([*per_token.values(), offsets], out=self._numbers.numpy())

    def inputs(self) -> dict[str, Any]:
        """Copies the tokens to the device, without a wait, and returns the keyword arguments of a forward.

        The forward's output is packed, too: `last_hidden_state` has the shape `(1, total_tokens, hidden_size)`.

        Returns:
            `input_ids`, `position_ids` and the other numbers, int64, shape `(1, total_tokens)`; `cu_seq_lens_q` and
            `cu_seq_lens_k`, one tensor on the device, int64, shape `(rows + 1,)`; `max_length_q`, `max_length_k`, and
            what else the model needs.
        """
        layout = RaggedLayout.from_lengths(self._lengths)
        total, longest, count = layout.query.total_tokens, layout.query.max_length, len(self._names)
        moved = self._numbers.to(self._device, non_blocking=True)
        per_token, cu_seqlens = moved[: count * total].view(count, 1, total), moved[count * total :]
        carry_layout(cu_seqlens, layout)
        setattr(cu_seqlens, RIDER, Packing((1, total), layout, False, True, {}))
        inputs: dict[str, Any] = dict(zip(self._names, per_token))
        if self._family.is_causal:
            # The mask keeps transformers from detecting packed sequences in the positions.
            inputs.update(attention_mask=mask_of_ones(1, total, self._device), use_cache=False)
        inputs.update(
            cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=longest, max_length_k=longest,
            return_dict=True,
        )  # fmt: skip
        return inputs


def _positions(
    backbone: PreTrainedModel,
    ids: np.ndarray[Any, Any],
    lengths: np.ndarray[Any, Any],
    offsets: np.ndarray[Any, Any],
) -> np.ndarray[Any, Any]:
    positions: np.ndarray[Any, Any]
    starts = np.repeat(offsets[:-1], lengths)
    if required_family(backbone).positions is Positions.SLOTS:
        positions = np.arange(len(ids)) - starts
        return positions
    padding_id: int = backbone.embeddings.padding_idx
    is_token = ids != padding_id
    counts = np.concatenate([[0], np.cumsum(is_token)])
    positions = (counts[1:] - counts[starts]) * is_token + padding_id
    return positions
