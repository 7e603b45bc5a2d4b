"""A padded batch and the packed one that a model computes in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..ragged.host_copy import HostCopy, to_device_async
from ..ragged.layout import RaggedLayout
from ..ragged.token_map import TokenMap

__all__ = ["CALLER", "Packing", "PackingAhead", "leave_sizes_open"]

# An argument that tells a forward which module it was called of, by weak reference, where that is not its own.
CALLER = "_flashinfer_caller"


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the tokens of a padded batch are.

    Args:
        shape: Rows and slots of the padded batch.
        layout: The packed batch, of shape `(1, total_tokens)`.
        has_holes: Whether padding splits a row; False where nobody asked.
        returns_dict: Whether the caller wants an output object rather than a tuple.
        slots: The slot of each token, counted through all rows, integers of shape `(total_tokens,)`, by device; none
            without padding.
        meanwhile: What was done while the host would else have waited.
    """

    shape: tuple[int, int]
    layout: RaggedLayout
    has_holes: bool
    returns_dict: bool
    slots: dict[torch.device, torch.Tensor]
    meanwhile: Any = None

    @classmethod
    def of(
        cls,
        attention_mask: torch.Tensor,
        *,
        returns_dict: bool,
        find_holes: bool,
        meanwhile: Callable[[PackingAhead], object] = lambda ahead: None,
    ) -> Packing:
        """Reads a mask of ones and zeros, shape `(batch, slots)`; the host waits for it if it is on another device.

        What there is to do meanwhile is called before the wait, if there is one.
        """
        rows, width = attention_mask.shape
        on_host = attention_mask.device.type == "cpu"
        if on_host:
            # In numpy: what is this little is done before torch's threads have woken up.
            known = attention_mask.to(torch.bool) if attention_mask.is_floating_point() else attention_mask
            slots = np.flatnonzero(known.numpy() != 0)
            ends = np.searchsorted(slots, np.arange(rows + 1) * width)
            layout = RaggedLayout.from_lengths(np.diff(ends).tolist())
            has_holes = find_holes and _has_holes(slots, width)
        else:
            valid = attention_mask.to(torch.bool)
            counts = valid.sum(-1, dtype=torch.int32)
            if find_holes:
                starts = torch.nn.functional.pad(valid, (1, 0)).to(torch.int8).diff(dim=1) == 1
                counts = torch.stack([counts, starts.sum(-1, dtype=torch.int32)])
            lengths_read = HostCopy(counts)
            ahead = PackingAhead((rows, width), TokenMap.of(valid, None).positions)
            done = meanwhile(ahead)
            read = lengths_read.values
            lengths, runs = read if find_holes else (read, ())
            layout = RaggedLayout.from_lengths(lengths)
            has_holes = max(runs, default=0) > 1
        packing = cls((rows, width), layout, has_holes, returns_dict, {}, None if on_host else done)
        if not packing.is_full:
            found = torch.from_numpy(slots) if on_host else ahead.slots[: layout.query.total_tokens]
            packing.slots[found.device] = found
        return packing

    @classmethod
    def full(cls, shape: tuple[int, int], *, returns_dict: bool) -> Packing:
        """Makes the packing of a batch without padding."""
        return cls(shape, RaggedLayout.from_lengths((shape[1],) * shape[0]), False, returns_dict, {})

    @property
    def is_full(self) -> bool:
        """Whether there is no padding."""
        return self.layout.query.total_tokens == self.shape[0] * self.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the mask was read; of a batch without padding, the CPU."""
        return next(iter(self.slots), torch.device("cpu"))

    def slots_on(self, device: torch.device) -> torch.Tensor:
        """Returns the slot of each token on a device."""
        if (slots := self.slots.get(device)) is None:
            slots = self.slots[device] = to_device_async(next(iter(self.slots.values())), device)
        return slots

    def positions(self, device: torch.device) -> torch.Tensor:
        """Returns the slot of each token within its row, int64, shape `(1, total_tokens)`."""
        if self.is_full:
            return torch.arange(self.shape[1], device=device).repeat(self.shape[0])[None]
        slots = self.slots_on(device)
        if device.type == "cpu":
            starts = np.arange(self.shape[0]) * self.shape[1]
            return torch.from_numpy(slots.numpy() - np.repeat(starts, self.layout.query.lengths))[None]
        return _slots_within(slots, self.shape[1])

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Drops padding, where the tensor is: `(batch, slots, ...)` to `(1, total_tokens, ...)`."""
        flat = _flat(padded, self.shape)
        if self.is_full:
            return flat[None]
        slots = self.slots_on(padded.device)
        if _is_host_number(padded):
            return torch.from_numpy(flat.numpy().take(slots.numpy()))[None]
        return flat.index_select(0, slots)[None]

    def move(self, packed: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        """Copies packed inputs to a device, integers of the CPU in one piece, and with them what `spread` needs."""
        numbers = [name for name, value in packed.items() if _is_host_number(value)]
        if device.type != "cuda" or not numbers:
            return {name: to_device_async(value, device) for name, value in packed.items()}
        rows = [packed[name] for name in numbers]
        slots = self.slots.get(torch.device("cpu"))
        if slots is not None and device not in self.slots:
            rows.append(slots[None])
        # As `to_device_async` does, but for all of them at once.
        pinned = torch.empty(len(rows), rows[0].shape[1], dtype=torch.long, device="cpu", pin_memory=True)
        np.concatenate([row.numpy() for row in rows], out=pinned.numpy())
        moved = pinned.to(device, non_blocking=True).unsqueeze(1)
        if len(rows) > len(numbers):
            self.slots[device] = moved[-1, 0]
        others = {name: to_device_async(value, device) for name, value in packed.items() if name not in numbers}
        return others | dict(zip(numbers, moved))

    def spread(self, packed: torch.Tensor) -> torch.Tensor:
        """Undoes `pack`, with zeros in padding; differentiable."""
        if self.is_full:
            return packed.view(*self.shape, *packed.shape[2:])
        padded = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[2:])
        padded.index_copy_(0, self.slots_on(packed.device).long(), packed[0])
        return padded.view(*self.shape, *packed.shape[2:])


@dataclass(frozen=True, slots=True)
class PackingAhead:
    """A packed batch of which the host does not know yet how many tokens it has.

    Args:
        shape: Rows and slots of the padded batch.
        slots: The slot of each token, counted through all rows, int32 of shape `(rows * slots,)`; zeros after the last.
    """

    shape: tuple[int, int]
    slots: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where the mask is."""
        return self.slots.device

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Drops padding: `(batch, slots, ...)` to `(1, batch * slots, ...)`; the last token is followed by anything."""
        return _flat(padded, self.shape).index_select(0, self.slots)[None]

    def positions(self, device: torch.device) -> torch.Tensor:
        """Returns the slot of each token within its row, int64, shape `(1, batch * slots)`, on the mask's device."""
        return _slots_within(self.slots, self.shape[1])


def _flat(padded: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return padded.expand(*shape, *padded.shape[2:]).reshape(-1, *padded.shape[2:])


def _slots_within(slots: torch.Tensor, width: int) -> torch.Tensor:
    return slots.remainder(width).long()[None]


def leave_sizes_open(inputs: Iterable[torch.Tensor | None], offsets: torch.Tensor) -> None:
    """Has torch.compile make one graph for packed batches of all sizes, not for those of the first one alone.

    Args:
        inputs: Of shape `(1, total_tokens)`; None for what there is not.
        offsets: Of the rows.
    """
    for value in inputs:
        if value is not None:
            torch._dynamo.maybe_mark_dynamic(value, 1)
    torch._dynamo.maybe_mark_dynamic(offsets, 0)


def _has_holes(slots: np.ndarray[Any, Any], width: int) -> bool:
    before, after = slots[:-1], slots[1:]
    return bool(((after - before != 1) & (after // width == before // width)).any())


def _is_host_number(value: torch.Tensor) -> bool:
    return value.dtype == torch.long and value.device.type == "cpu" and value.ndim == 2
