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

# Argument that tells a forward which module it was called of, by weak reference, if that is not its own.
CALLER = "_flashinfer_caller"


class Packing:
    """Where the tokens of a padded batch of a shape `(rows, padded_length)` are.

    The lengths of a mask on a GPU are on their way to the host until `finish`. Until then `pack` and `position_ids`
    return `rows * padded_length` tokens, of which the first `total_tokens` count.

    Args:
        shape: Rows and padded length.
        returns_dict: Whether the caller wants an output object rather than a tuple.
        layout: Layout of the packed batch, of shape `(1, total_tokens)`; None if it is not known yet.
        positions: Padded position of each token, counted through all rows, by device; none without padding.
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
        # Whether padding splits a row; False unless asked for.
        self.has_holes = False
        # Packed inputs by name, and the fingerprint of the model if it was verified before `finish`.
        self.packed: dict[str, torch.Tensor] = {}
        self.model_state: Any = None
        self._layout = layout
        self._read: HostCopy | None = None
        self._positions = dict(positions or {})

    @classmethod
    def of(cls, attention_mask: torch.Tensor, *, returns_dict: bool, find_holes: bool) -> Packing:
        """Reads a mask of ones and zeros, shape `(rows, padded_length)`; of one on a GPU, the copy is started."""
        if attention_mask.device.type != "cpu":
            return cls.pending(attention_mask.to(torch.bool), returns_dict=returns_dict, find_holes=find_holes)
        rows, length = attention_mask.shape
        # In numpy, which is done before torch's threads have woken up.
        known = attention_mask.to(torch.bool) if attention_mask.is_floating_point() else attention_mask
        positions = np.flatnonzero(known.numpy() != 0)
        ends = np.searchsorted(positions, np.arange(rows + 1) * length)
        layout = RaggedLayout.from_lengths(np.diff(ends).tolist())
        packing = cls((rows, length), returns_dict=returns_dict, layout=layout)
        packing.has_holes = find_holes and _has_holes(positions, length)
        if not packing.is_full:
            packing._positions[attention_mask.device] = torch.from_numpy(positions)
        return packing

    @classmethod
    def pending(cls, valid: torch.Tensor, *, returns_dict: bool, find_holes: bool) -> Packing:
        """Starts to read a mask, bool, shape `(rows, padded_length)`, on any device."""
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
        """Whether lengths are still on their way to the host."""
        return self._read is not None

    def finish(self) -> Packing:
        """Waits for the lengths."""
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
        """Whether there is no padding."""
        return self.layout.query.total_tokens == self.shape[0] * self.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the mask; the CPU without padding."""
        return next(iter(self._positions), torch.device("cpu"))

    def _positions_on(self, device: torch.device) -> torch.Tensor | None:
        """Returns the padded position of each token; None without padding."""
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
        if _is_host_number(padded):
            return torch.from_numpy(flat.numpy().take(positions.numpy()))[None]
        return flat.index_select(0, positions)[None]

    def move(self, packed: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        """Copies packed inputs to a device: integers of the CPU in one copy, with the positions that `spread` needs."""
        numbers = [name for name, value in packed.items() if _is_host_number(value)]
        if device.type != "cuda" or not numbers:
            return {name: to_device_async(value, device) for name, value in packed.items()}
        rows = [packed[name] for name in numbers]
        positions = self._positions.get(torch.device("cpu"))
        if positions is not None and device not in self._positions:
            rows.append(positions[None])
        # As `to_device_async` does, for all of them at once.
        pinned = torch.empty(len(rows), rows[0].shape[1], dtype=torch.long, device="cpu", pin_memory=True)
        np.concatenate([row.numpy() for row in rows], out=pinned.numpy())
        moved = pinned.to(device, non_blocking=True).unsqueeze(1)
        if len(rows) > len(numbers):
            self._positions[device] = moved[-1, 0]
        others = {name: to_device_async(value, device) for name, value in packed.items() if name not in numbers}
        return others | dict(zip(numbers, moved))

    def spread(self, packed: torch.Tensor) -> torch.Tensor:
        """Undoes `pack`, with zeros in padding; differentiable."""
        positions = self._positions_on(packed.device)
        if positions is None:
            return packed.view(*self.shape, *packed.shape[2:])
        padded = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[2:])
        padded.index_copy_(0, positions.long(), packed[0])
        return padded.view(*self.shape, *packed.shape[2:])


def leave_sizes_open(inputs: Iterable[torch.Tensor | None], cu_seqlens: torch.Tensor) -> None:
    """Has torch.compile make one graph for packed batches of all sizes; inputs have shape `(1, total_tokens, ...)`."""
    for value in inputs:
        if value is not None:
            torch._dynamo.maybe_mark_dynamic(value, 1)
    torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)


def _has_holes(positions: np.ndarray[Any, Any], length: int) -> bool:
    before, after = positions[:-1], positions[1:]
    return bool(((after - before != 1) & (after // length == before // length)).any())


def _is_host_number(value: torch.Tensor) -> bool:
    return value.dtype == torch.long and value.device.type == "cpu" and value.ndim == 2
