"""State of a lazy mask: padding and row lengths, read once per forward, and dense values, made once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import UnsupportedAttentionError
from .band import Opaque, Pattern
from .forward_state import ForwardState
from .host_copy import HostCopy
from .layout import RaggedLayout, RaggedSide, uniform_layout

__all__ = ["MaskSpec", "MaskState", "copy_of", "is_mask_of_ones", "mask_of_ones"]


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """Arguments of a mask function.

    Args:
        batch_size: Rows.
        q_length: Padded length of the queries.
        kv_length: Padded length of the keys.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        padding_mask: True for valid positions, shape `(batch, >= kv_offset + kv_length)`; None without padding.
        pattern: Attention pattern, padding aside.
        packed: Sequence index of each token, shape `(batch, q_length)`; None unless packed.
        positions: Positions that the band counts in, shape `(batch, q_length)`; None for token indices.
        densify: Makes the additive mask of eager attention, shape `(batch, 1, q_length, kv_length)`.
    """

    batch_size: int
    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    padding_mask: torch.Tensor | None
    pattern: Pattern
    packed: torch.Tensor | None
    positions: torch.Tensor | None
    densify: Callable[[torch.dtype, torch.device], torch.Tensor]

    def fits(self, query: torch.Tensor, key: torch.Tensor) -> bool:
        """Whether the mask was made for queries and keys of shape `(batch, heads, length, head_dim)`."""
        return (self.batch_size, self.q_length, self.kv_length) == (query.shape[0], query.shape[2], key.shape[2])


# Batches with fewer query-key pairs may run with a padding mask, which needs no row lengths.
_SMALL = 1 << 20


class MaskState(ForwardState):
    """Layouts and dense values of a mask, each made once and shared by copies of the mask on any device.

    Args:
        spec: Arguments of the mask function.
        device: Device of the mask function's tensors.
    """

    def __init__(self, spec: MaskSpec, device: torch.device) -> None:
        super().__init__(None)
        self.spec = spec
        self._device = device
        self._dense: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, int]] = {}
        self._padding_version = _version_of(spec.padding_mask)
        self._layouts: dict[bool, RaggedLayout] = {}
        self._started: HostCopy | None = None
        self._is_unread = False
        self._sides: tuple[RaggedSide, RaggedSide] | None = None
        # Causal queries see no key after the last query, such as unwritten keys of a static cache.
        end = spec.kv_offset + spec.kv_length
        if spec.pattern.is_causal:
            end = min(end, spec.q_offset + spec.q_length)
        self._seen_keys = end - spec.kv_offset
        if isinstance(spec.pattern, Opaque) or (spec.packed is None and spec.padding_mask is None):
            return
        # Starts the copy before the first projections are launched; a small batch may not need it.
        is_small = spec.batch_size * spec.q_length * spec.kv_length < _SMALL and not spec.pattern.is_window
        self._is_unread = is_small and spec.packed is None
        if not self._is_unread:
            self._start_read()

    @property
    def _read(self) -> HostCopy | None:
        if self._is_unread:
            self._start_read()
            self._is_unread = False
        return self._started

    def require_unwritten(self) -> None:
        """Raises an `UnsupportedAttentionError` if the padding mask was written to since the mask was made."""
        if _version_of(self.spec.padding_mask) != self._padding_version:
            raise UnsupportedAttentionError(
                "an attention mask that was written to between the making of the whole mask and the attention",
                "Make the whole mask after the last write, or of a copy: create_causal_mask(..., mask.clone()).",
            )

    def _start_read(self) -> None:
        self.require_unwritten()
        spec, end = self.spec, self.spec.kv_offset + self._seen_keys
        if spec.packed is not None:
            rows = spec.packed
            if spec.positions is not None:
                # Last column: whether positions increase by one in every sequence, as indices do.
                steps = (spec.packed.diff() != 0) | (spec.positions.diff() == 1)
                rows = torch.cat([spec.packed, steps.all(-1, keepdim=True).to(spec.packed.dtype)], dim=1)
            self._started = HostCopy(rows)
            return
        assert spec.padding_mask is not None
        self._key_valid = spec.padding_mask[:, spec.kv_offset : end]
        self._query_valid = self._key_valid
        if self._seen_keys != spec.q_length:
            if not spec.pattern.is_causal:
                # The padding mask describes another sequence, so all queries are valid.
                self._query_valid = self._key_valid.new_ones(spec.batch_size, spec.q_length)
            else:
                self._query_valid = spec.padding_mask[:, spec.q_offset : spec.q_offset + spec.q_length]
        sides = [self._key_valid] if self._query_valid is self._key_valid else [self._query_valid, self._key_valid]
        counts = [side.sum(-1, dtype=torch.int32) for side in sides]
        if spec.pattern.is_window:
            starts = F.pad(self._key_valid, (1, 0)).to(torch.int8).diff(dim=1) == 1
            counts.append(starts.sum(-1, dtype=torch.int32))
        self._started = HostCopy(torch.stack(counts) if len(counts) > 1 else counts[0][None])

    @functools.cached_property
    def has_holes(self) -> bool:
        """Whether padding splits a row of windowed attention, or a packed sequence is split; reads row lengths."""
        spec = self.spec
        if (spec.packed is None and not spec.pattern.is_window) or self._read is None:
            return False
        if spec.packed is None:
            return max(self._read.values[-1], default=0) > 1
        if spec.positions is not None and not all(row[-1] for row in self._read.values):
            return True
        return any(len({sequence for sequence, _ in row}) < len(row) for row in self._packed_runs)

    @functools.cached_property
    def _packed_runs(self) -> list[list[tuple[int, int]]]:
        """Sequence index and number of tokens of each run of equal indices, for each row."""
        assert self._read is not None
        rows = (itertools.groupby(row[: self.spec.q_length]) for row in self._read.values)
        return [[(sequence, len(list(run))) for sequence, run in row] for row in rows]

    @property
    def has_padding(self) -> bool:
        spec = self.spec
        if spec.padding_mask is None:
            return False
        if isinstance(spec.pattern, Opaque):
            return not HostCopy(spec.padding_mask[:, spec.kv_offset : spec.kv_offset + spec.kv_length].all()).values
        return not self.layout().key.is_full

    @property
    def padded_queries_need_mask(self) -> bool:
        """Whether ragged attention computes padded queries differently from eager attention; reads row lengths.

        Eager attention lets padding attend to padding if it is causal or windowed. A query without keys averages all
        values.
        """
        spec = self.spec
        if spec.padding_mask is None or isinstance(spec.pattern, Opaque):
            return False
        layout = self.layout()
        if spec.pattern.is_causal or spec.pattern.is_window:
            return not layout.query.is_full
        return 0 in layout.key.lengths

    def dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Returns a copy of the additive mask, made from cached values unless they were written to."""
        # Writes to inference tensors are not counted.
        with torch.inference_mode(False), torch.no_grad():
            if (cached := self._unwritten(dtype, device)) is not None:
                return cached.clone()
            values = self._unwritten(dtype, self._device)
            if values is None:
                self.require_unwritten()
                # transformers may return an expanded view, which cannot be written to in place.
                values = self.spec.densify(dtype, self._device).contiguous()
                values = self._cache(values.clone() if values.is_inference() else values, self._device)
            return values if device == self._device else self._cache(values.to(device, copy=True), device)

    def _unwritten(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        values, version = self._dense.get((dtype, device), (None, 0))
        return values if values is not None and values._version == version else None

    def _cache(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        self._dense[values.dtype, device] = values, values._version
        return values

    def layout(self, *, keep_padded_queries: bool = False) -> RaggedLayout:
        # Causal attention is always self-attention, so its padded queries can be dropped.
        keep = keep_padded_queries and not self.spec.pattern.is_causal
        if (layout := self._layouts.get(keep)) is None:
            layout = self._layouts[keep] = self._make_layout(keep)
        return layout

    def _make_layout(self, keep_padded_queries: bool) -> RaggedLayout:
        self.require_unwritten()
        spec = self.spec
        queries, keys = (spec.batch_size, spec.q_length), (spec.batch_size, spec.kv_length)
        if spec.packed is not None and self._read is not None:
            return RaggedLayout(RaggedSide([length for row in self._packed_runs for _, length in row], queries, None))
        if self._sides is None:
            query_counts, key_counts = self._counts()
            query = RaggedSide(query_counts, queries, self._query_valid)
            if self._seen_keys == spec.q_length == spec.kv_length:
                self._sides = query, query
            else:
                unseen = spec.kv_length - self._seen_keys
                self._sides = query, RaggedSide(key_counts, keys, F.pad(self._key_valid, (0, unseen)))
        query, key = self._sides
        if keep_padded_queries and not query.is_full:
            query = RaggedSide((spec.q_length,) * spec.batch_size, queries, None)
        if query.is_full and key.is_full:
            return uniform_layout(spec.batch_size, spec.q_length, spec.kv_length)
        return RaggedLayout(query, key)

    def _counts(self) -> tuple[list[int], list[int]]:
        spec = self.spec
        if self._read is None:
            self._query_valid = torch.ones(spec.batch_size, spec.q_length, dtype=torch.bool, device="cpu")
            self._key_valid = torch.ones(spec.batch_size, self._seen_keys, dtype=torch.bool, device="cpu")
            return [spec.q_length] * spec.batch_size, [self._seen_keys] * spec.batch_size
        counts = self._read.values
        return counts[0], counts[0 if self._query_valid is self._key_valid else 1]


def _version_of(padding_mask: torch.Tensor | None) -> int | None:
    """Returns the version counter of a mask; None for inference tensors, which have none."""
    return None if padding_mask is None or padding_mask.is_inference() else padding_mask._version


_ONES = "_holds_no_padding"


def mask_of_ones(batch_size: int, length: int, device: torch.device) -> torch.Tensor:
    """Returns a mask of ones, bool, shape `(batch, length)`, tagged so that it is never copied to the host."""
    # Writes to inference tensors are not counted.
    with torch.inference_mode(False):
        mask = torch.ones(batch_size, length, dtype=torch.bool, device=device)
    setattr(mask, _ONES, mask._version)
    return mask


def is_mask_of_ones(padding_mask: torch.Tensor) -> bool:
    """Whether a mask comes from `mask_of_ones` and was not written to."""
    version: int | None = getattr(padding_mask, _ONES, None)
    return version is not None and version == padding_mask._version


def copy_of(padding_mask: torch.Tensor) -> torch.Tensor:
    """Copies a padding mask with its tag."""
    with torch.inference_mode(False), torch.no_grad():
        copy = padding_mask.clone()
    if is_mask_of_ones(padding_mask):
        setattr(copy, _ONES, copy._version)
    return copy
