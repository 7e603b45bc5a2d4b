"""Packing of a padded batch, and padding of packed outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ..ragged.host_copy import HostCopy, to_device_async
from ..ragged.layout import RaggedLayout
from ..ragged.token_map import TokenMap

__all__ = ["CALLER", "Packing", "leave_sizes_open"]

# Keyword argument of a shared forward: weak reference to the calling module, if that is a shallow copy or replica.
CALLER = "_flashinfer_caller"


class Packing:
    """Positions of the tokens in a padded batch of shape `(rows, padded_length)`.

    The row lengths of a mask on a GPU are copied to the host asynchronously; `finish` waits for them. Until then the
    packing is pending: `pack` and `position_ids` return `rows * padded_length` tokens, and the first `total_tokens` are
    valid.

    Args:
        returns_dict: Whether the forward returns an output object instead of a tuple.
        layout: Layout of the packed batch; None while pending.
        positions: Padded position of each token in the flattened batch, by device; empty without padding.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        returns_dict: bool,
        layout: RaggedLayout | None = None,
        positions: Mapping[torch.device, torch.Tensor] | None = None,
    ) -> None:
        self.shape = shape
        self.returns_dict = returns_dict
        # Whether padding splits a row; only computed with `find_holes`.
        self.has_holes = False
        # Packed inputs by name, and the model's fingerprint if it was verified while pending.
        self.packed: dict[str, torch.Tensor] = {}
        self.model_state: Any = None
        self._layout = layout
        self._read: HostCopy | None = None
        self._positions = dict(positions or {})

    @classmethod
    def of(cls, attention_mask: torch.Tensor, *, returns_dict: bool, find_holes: bool) -> Packing:
        """Makes a packing from a mask of ones and zeros, shape `(rows, padded_length)`; pending if it is on a GPU."""
        if attention_mask.device.type != "cpu":
            return cls.pending(attention_mask.to(torch.bool), returns_dict=returns_dict, find_holes=find_holes)
        rows, length = attention_mask.shape
        # numpy is faster than torch here, whose threads must wake up first.
        valid = attention_mask.to(torch.bool) if attention_mask.is_floating_point() else attention_mask
        positions = np.flatnonzero(valid.numpy() != 0)
        ends = np.searchsorted(positions, np.arange(rows + 1) * length)
        layout = RaggedLayout.from_lengths(np.diff(ends).tolist())
        packing = cls((rows, length), returns_dict=returns_dict, layout=layout)
        packing.has_holes = find_holes and _has_holes(positions, length)
        if not packing.is_full:
            packing._positions[attention_mask.device] = torch.from_numpy(positions)
        return packing

    @classmethod
    def pending(cls, valid: torch.Tensor, *, returns_dict: bool, find_holes: bool) -> Packing:
        """Makes a pending packing from a bool mask, shape `(rows, padded_length)`, on any device."""
        counts = valid.sum(-1, dtype=torch.int32)
        if find_holes:
            starts = torch.nn.functional.pad(valid, (1, 0)).to(torch.int8).diff(dim=1) == 1
            counts = torch.stack([counts, starts.sum(-1, dtype=torch.int32)])
        read, positions = HostCopy(counts), TokenMap.of(valid, None).positions
        shape = (valid.shape[0], valid.shape[1])
        packing = cls(shape, returns_dict=returns_dict, positions={valid.device: positions})
        packing._read = read
        return packing

    @property
    def is_pending(self) -> bool:
        """Whether the copy of the row lengths is not finished yet."""
        return self._read is not None

    def finish(self) -> Packing:
        """Waits for the row lengths."""
        if self._read is not None:
            read, self._read = self._read.values, None
            lengths, runs = read if read and isinstance(read[0], list) else (read, ())
            self._layout = RaggedLayout.from_lengths(lengths)
            self.has_holes = max(runs, default=0) > 1
            total = self._layout.query.total_tokens
            self._positions = {} if self.is_full else {at: each[:total] for at, each in self._positions.items()}
            self.packed = {name: value[:, :total] for name, value in self.packed.items()}
        return self

    @property
    def layout(self) -> RaggedLayout:
        """Layout of the packed batch, of shape `(1, total_tokens)`."""
        assert self._layout is not None, "after `finish`"
        return self._layout

    @property
    def is_full(self) -> bool:
        """Whether the batch has no padding."""
        return self.layout.query.total_tokens == self.shape[0] * self.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the mask; the CPU if there is no padding."""
        return next(iter(self._positions), torch.device("cpu"))

    def _positions_on(self, device: torch.device) -> torch.Tensor | None:
        """Returns the padded position of each token; None if there is no padding."""
        if not self._positions:
            return None
        if device not in self._positions:
            self._positions[device] = to_device_async(next(iter(self._positions.values())), device)
        return self._positions[device]

    def position_ids(self, device: torch.device) -> torch.Tensor:
        """Returns each token's padded position in its row, int64, shape `(1, tokens)`."""
        positions = self._positions_on(device)
        if positions is None:
            return torch.arange(self.shape[1], device=device).repeat(self.shape[0])[None]
        if device.type == "cpu":
            starts = np.arange(self.shape[0]) * self.shape[1]
            return torch.from_numpy(positions.numpy() - np.repeat(starts, self.layout.query.lengths))[None]
        return positions.remainder(self.shape[1]).long()[None]

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Drops padding, on the tensor's device: `(rows, padded_length, ...)` to `(1, tokens, ...)`."""
        flat = padded.expand(*self.shape, *padded.shape[2:]).reshape(-1, *padded.shape[2:])
        positions = self._positions_on(padded.device)
        if positions is None:
            return flat[None]
        if _is_host_integer(padded):
            return torch.from_numpy(flat.numpy().take(positions.numpy()))[None]
        return flat.index_select(0, positions)[None]

    def move(self, packed: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        """Copies packed inputs to a device; int64 CPU tensors in one copy, with the positions for `spread`."""
        integers = [name for name, value in packed.items() if _is_host_integer(value)]
        if device.type != "cuda" or not integers:
            return {name: to_device_async(value, device) for name, value in packed.items()}
        rows = [packed[name] for name in integers]
        positions = self._positions.get(torch.device("cpu"))
        if positions is not None and device not in self._positions:
            rows.append(positions[None])
        # One pinned buffer for all, otherwise like `to_device_async`.
        pinned = torch.empty(len(rows), rows[0].shape[1], dtype=torch.long, device="cpu", pin_memory=True)
        np.concatenate([row.numpy() for row in rows], out=pinned.numpy())
        moved = pinned.to(device, non_blocking=True).unsqueeze(1)
        if len(rows) > len(integers):
            self._positions[device] = moved[-1, 0]
        others = {name: to_device_async(value, device) for name, value in packed.items() if name not in integers}
        return others | dict(zip(integers, moved))

    def spread(self, packed: torch.Tensor) -> torch.Tensor:
        """Undoes `pack`: scatters tokens into rows padded with zeros; differentiable."""
        positions = self._positions_on(packed.device)
        if positions is None:
            return packed.view(*self.shape, *packed.shape[2:])
        padded = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[2:])
        padded.index_copy_(0, positions.long(), packed[0])
        return padded.view(*self.shape, *packed.shape[2:])


def leave_sizes_open(inputs: Iterable[torch.Tensor | None], cu_seqlens: torch.Tensor) -> None:
    """Marks the token dimension of packed inputs, shape `(1, total_tokens, ...)`, as dynamic for torch.compile."""
    for value in inputs:
        if value is not None:
            torch._dynamo.maybe_mark_dynamic(value, 1)
    torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)


def _has_holes(positions: np.ndarray[Any, Any], length: int) -> bool:
    before, after = positions[:-1], positions[1:]
    return bool(((after - before != 1) & (after // length == before // length)).any())


def _is_host_integer(value: torch.Tensor) -> bool:
    return value.dtype == torch.long and value.device.type == "cpu" and value.ndim == 2
