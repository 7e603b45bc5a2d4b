"""Backbone inputs from tokens that were never padded."""

from __future__ import annotations

import contextlib
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedModel

from ..ragged.forward_state import attach_state
from ..ragged.layout import RaggedLayout
from ..ragged.mask_state import mask_of_ones
from .families import Positions, family_of, required_family
from .graphs import is_copied_with
from .hooks import HANDLES
from .packing import Packing
from .reasons import reason_to_stay, require_positions

__all__ = ["Numbers", "PackedTokens", "reason_against_packed_inputs"]

Numbers: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

_ONE_TOKEN = torch.zeros(1, 1, dtype=torch.long, device="cpu")


def reason_against_packed_inputs(backbone: torch.nn.Module) -> str | None:
    """Returns the reason if a model cannot take `PackedTokens`."""
    family = family_of(backbone)
    if family is None or HANDLES not in vars(backbone):
        return f"{type(backbone).__name__} is not unpadded"
    if not family.packs_ids_alone:
        return f"{type(backbone).__name__} needs padded rows, not only token ids"
    if is_copied_with(backbone):
        return f"this {type(backbone).__name__} is a copy that shares its forward with the original"
    assert isinstance(backbone, PreTrainedModel)
    return reason_to_stay(backbone, {"input_ids": _ONE_TOKEN, "attention_mask": _ONE_TOKEN, "use_cache": False})


class PackedTokens:
    """Packed tokens on the CPU, for one copy to a device. Any thread may create them.

    All arrays are int64. `slots`, of shape `(rows,)`, has the padded position of each row's first token; None if the
    rows are not padded again. Raises an `IndexError` if a row is longer than the model's position table.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        device: torch.device,
        lengths: Numbers,
        ids: Numbers,
        type_ids: Numbers | None = None,
        slots: Numbers | None = None,
    ) -> None:
        self._family, self._device = required_family(backbone), device
        self._lengths: list[int] = lengths.tolist()
        require_positions(backbone, max(self._lengths))
        parts = {"input_ids": ids, "token_type_ids": type_ids, "slots": slots}
        self._first_position = 0
        if self._family.positions is Positions.AFTER_PADDING_ID:
            padding_id: int = backbone.embeddings.padding_idx
            self._first_position = padding_id + 1
            if (ids == padding_id).any():
                parts["position_ids"] = _positions_after(padding_id, ids, lengths)
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._sizes = [len(part) for part in self._parts.values()]
        # Pinned, since copies from pageable memory wait for all earlier launches. Pinning uses the current device.
        on_gpu = device.type == "cuda"
        with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            size = sum(self._sizes) + len(lengths) + 1
            self._numbers = torch.empty(size, dtype=torch.long, device="cpu", pin_memory=on_gpu)
        np.concatenate([*self._parts.values(), [0], np.cumsum(lengths)], out=self._numbers.numpy())

    def inputs(self) -> dict[str, Any]:
        """Copies the tokens to the device asynchronously; returns the keyword arguments of a packed forward.

        Per-token tensors, including `slots` (padded positions), are int64, of shape `(1, total_tokens)`;
        `cu_seq_lens_q` is int64, of shape `(rows + 1,)`.
        """
        layout = RaggedLayout.from_lengths(self._lengths)
        total, longest, rows = layout.query.total_tokens, layout.query.max_length, len(self._lengths)
        moved = self._numbers.to(self._device, non_blocking=True)
        *parts, cu_seqlens = moved.split([*self._sizes, rows + 1])
        inputs: dict[str, Any] = {name: part[None] for name, part in zip(self._parts, parts)}
        positions = torch.arange(total, device=self._device)
        if rows > 1:
            row_of = torch.repeat_interleave(cu_seqlens.diff(), output_size=total)
            positions -= cu_seqlens[row_of]
            if "slots" in inputs:
                inputs["slots"] = (inputs["slots"][0, row_of] + positions)[None]
        if "position_ids" not in inputs:
            inputs["position_ids"] = (positions + self._first_position if self._first_position else positions)[None]
        attach_state(cu_seqlens, layout).packing = Packing((1, total), returns_dict=True, layout=layout)
        if self._family.is_causal:
            # A mask stops transformers from detecting packed sequences in the position ids.
            inputs.update(attention_mask=mask_of_ones(1, total, self._device), use_cache=False)
        inputs.update(
            cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=longest, max_length_k=longest,
            return_dict=True,
        )  # fmt: skip
        return inputs


def _positions_after(padding_id: int, ids: Numbers, lengths: Numbers) -> Numbers:
    """Returns RoBERTa's position ids: padding ids get padding_idx, other tokens count from padding_idx + 1."""
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    is_token = ids != padding_id
    counts = np.concatenate([[0], np.cumsum(is_token)])
    positions: Numbers = (counts[1:] - counts[starts]) * is_token + padding_id
    return positions
