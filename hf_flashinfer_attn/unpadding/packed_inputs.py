"""Inputs of a backbone for tokens that were never padded."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
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

__all__ = ["packed_inputs", "reason_against_packed_inputs"]


def reason_against_packed_inputs(backbone: torch.nn.Module) -> str | None:
    """Returns why a model cannot be given `packed_inputs`; None if it can."""
    family = family_of(backbone)
    if family is None or HANDLES not in vars(backbone):
        return f"{type(backbone).__name__} is not unpadded"
    if not family.packs_ids_alone:
        return f"{type(backbone).__name__} reads more of a row than its token ids"
    assert isinstance(backbone, PreTrainedModel)
    ids = torch.zeros(1, 1, dtype=torch.long)
    return reason_to_stay(backbone, {"input_ids": ids, "attention_mask": ids, "use_cache": False})


def packed_inputs(
    backbone: PreTrainedModel,
    ids: np.ndarray[Any, Any],
    lengths: np.ndarray[Any, Any],
    type_ids: np.ndarray[Any, Any] | None,
    device: torch.device,
    extras: Mapping[str, np.ndarray[Any, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Makes the keyword arguments of a forward on packed tokens, with one copy to the device.

    The output is packed, too: `last_hidden_state` has the shape `(1, total_tokens, hidden_size)`.

    Args:
        backbone: An unpadded model, which `reason_against_packed_inputs` has nothing against.
        ids: Token ids, int64, shape `(total_tokens,)`.
        lengths: Tokens of each row, int64, shape `(rows,)`.
        type_ids: Token type ids, int64, shape `(total_tokens,)`; None for a model that takes none.
        device: Device of the model.
        extras: More numbers of each token, int64, shape `(total_tokens,)`, to copy along.

    Returns:
        `input_ids`, `position_ids`, `token_type_ids` and `extras` by their names, int64, shape `(1, total_tokens)`;
        `cu_seq_lens_q` and `cu_seq_lens_k`, one tensor on the device, int64, shape `(rows + 1,)`; `max_length_q`,
        `max_length_k` and the flags that the model needs.

    Raises:
        IndexError: If a row is longer than the model's table of positions.
    """
    longest = int(lengths.max())
    require_positions(backbone, longest)
    total, rows = len(ids), len(lengths)
    per_token = {"input_ids": ids, **({} if type_ids is None else {"token_type_ids": type_ids}), **extras}
    names = ["position_ids", *per_token]
    # Without pinned memory the host would wait for all that was launched before.
    host = torch.empty(len(names) * total + rows + 1, dtype=torch.long, device="cpu", pin_memory=device.type == "cuda")
    numbers = host.numpy()
    offsets = numbers[len(names) * total :]
    offsets[0] = 0
    np.cumsum(lengths, out=offsets[1:])
    np.concatenate(
        [_positions(backbone, ids, lengths, offsets), *per_token.values()], out=numbers[: len(names) * total]
    )
    layout = RaggedLayout.from_lengths(lengths.tolist())
    with torch.inference_mode(False):
        moved = host.to(device, non_blocking=True)
        sent = moved[: len(names) * total].view(len(names), 1, total)
        cu_seqlens = moved[len(names) * total :]
    inputs: dict[str, Any] = dict(zip(names, sent))
    carry_layout(cu_seqlens, layout)
    setattr(cu_seqlens, RIDER, Packing((1, total), layout, False, True, {}))
    if required_family(backbone).is_causal:
        # Keeps transformers from detecting packed sequences in the positions.
        inputs["attention_mask"] = mask_of_ones(1, total, device)
        inputs["use_cache"] = False
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
