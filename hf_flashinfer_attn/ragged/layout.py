"""Padded to ragged: where the tokens of a padded batch go once padding is dropped, and back.

A ragged tensor holds the valid tokens of all rows one after another, shape `(total_tokens, heads, head_dim)`; row `i`
is `[cu_seqlens[i], cu_seqlens[i + 1])`. Kernels plan from lengths on the host and move data with indices on the device.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import torch

from ..errors import UnsupportedAttentionError
from ..tracing import record_host_copy, record_layout
from .token_map import TokenMap, sent

__all__ = [
    "LengthsRead",
    "PackedCarrier",
    "PreparedStore",
    "RaggedLayout",
    "RaggedSide",
    "carry_layout",
    "is_of_graph",
    "known_layout",
    "offsets_of",
    "packed_layout",
    "uniform_layout",
    "versions_of",
    "with_versions",
]


class LengthsRead:
    """A device-to-host copy of row lengths, started at construction and waited for when `values` is first used.

    The copy goes to pinned memory while the model's first projections are still being launched, so that the wait is
    short. Elsewhere the host waits for the GPU only to learn the position of a static cache, when a mask is made, and
    before a plan buffer is filled again that is still being copied from.

    Args:
        counts: Valid tokens per row, integer, any shape, any device.

    Raises:
        UnsupportedAttentionError: If a CUDA graph is being captured, where the host cannot read lengths.
    """

    def __init__(self, counts: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._on_cpu = counts.device.type == "cpu"
        if counts.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise UnsupportedAttentionError(
                    "reading row lengths of a padding mask while a CUDA graph is captured",
                    "Capture without an attention_mask (every row full), or run this forward outside the graph.",
                )
            self._host = torch.empty(counts.shape, dtype=counts.dtype, device="cpu", pin_memory=True)
            self._host.copy_(counts, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(counts.device))
        else:
            self._host = counts.to("cpu")

    @functools.cached_property
    def values(self) -> Any:
        """The counts as (nested) lists of int; the first use waits for the copy if it is under way."""
        if self._event is not None:
            self._event.synchronize()
        if not self._on_cpu:
            record_host_copy()
        return self._host.tolist()


_Place: TypeAlias = tuple[torch.device, int]


def _place_of(device: torch.device) -> _Place:
    """Returns the cache key of tensors on a device. It includes the stream: others would not wait for the copy."""
    return device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class RaggedSide:
    """One side, queries or keys, of a batch.

    Args:
        lengths: Valid tokens of each row, on the host.
        padded_shape: Rows and slots per row of the padded tensor; `(1, total_tokens)` for packed input.
        valid: Which slots hold a token, bool, shape `padded_shape`; None when all of them do.

    Raises:
        ValueError: If there are slots without a token and `valid` does not say which.
    """

    def __init__(self, lengths: Sequence[int], padded_shape: tuple[int, int], valid: torch.Tensor | None) -> None:
        self.lengths = tuple(lengths)
        self.padded_shape = padded_shape
        self.offsets = (0, *accumulate(self.lengths))
        self.total_tokens = self.offsets[-1]
        self.max_length = max(self.lengths, default=0)
        self.is_full = self.total_tokens == padded_shape[0] * padded_shape[1]
        self._valid = None if self.is_full else valid
        self._maps: dict[_Place, TokenMap] = {}
        self._slots: dict[_Place, torch.Tensor] = {}
        self._cu_seqlens: dict[_Place, torch.Tensor] = {}
        if not self.is_full and valid is None:
            raise ValueError(
                f"{self.total_tokens} tokens in {padded_shape} slots need a mask of the valid slots. Pass valid=, "
                f"bool, of shape {padded_shape}; for packed tokens, padded_shape=(1, {self.total_tokens}) needs none."
            )

    @functools.cached_property
    def cu_seqlens_host(self) -> torch.Tensor:
        """Offsets of the rows on the host, int32, shape `(batch + 1,)`."""
        return torch.tensor(self.offsets, dtype=torch.int32, device="cpu")

    def cu_seqlens(self, device: torch.device) -> torch.Tensor:
        """Offsets of the rows on `device`, int32, shape `(batch + 1,)`, copied once per stream."""
        place = _place_of(device)
        if (offsets := self._cu_seqlens.get(place)) is None:
            offsets = self._cu_seqlens[place] = self.cu_seqlens_host.to(device, non_blocking=True)
        return offsets

    @functools.cached_property
    def lengths_host(self) -> torch.Tensor:
        """Tokens of the rows on the host, int32, shape `(batch,)`."""
        return torch.tensor(self.lengths, dtype=torch.int32, device="cpu")

    def token_map(self, device: torch.device) -> TokenMap | None:
        """Where the tokens are on `device`; None when no slot is padding."""
        if self._valid is None:
            return None
        place = _place_of(device)
        if (found := self._maps.get(place)) is None:
            found = self._maps[place] = TokenMap.of(sent(self._valid, device), self.total_tokens)
        return found

    def slots(self, device: torch.device) -> torch.Tensor | None:
        """Slot of each token within its row on `device`, int32, shape `(total_tokens,)`; None without padding."""
        found = self.token_map(device)
        if found is None:
            return None
        place = _place_of(device)
        if (slots := self._slots.get(place)) is None:
            slots = self._slots[place] = found.slots % self.padded_shape[1]
        return slots

    def gather(self, padded: torch.Tensor) -> torch.Tensor:
        """Drops padding: `(*padded_shape, heads, dim)` to `(total_tokens, heads, dim)`; differentiable."""
        flat = padded.reshape(-1, *padded.shape[2:])
        found = self.token_map(padded.device)
        return flat if found is None else flat.index_select(0, found.slots)

    def scatter(self, ragged: torch.Tensor) -> torch.Tensor:
        """Undoes `gather`, with zeros in padded slots; differentiable."""
        shape = (*self.padded_shape, *ragged.shape[1:])
        found = self.token_map(ragged.device)
        if found is None:
            # A cropped head_dim leaves gaps, and models call `view` on what eager attention gives them without any.
            return ragged.reshape(shape).contiguous()
        padded = ragged.new_zeros(self.padded_shape[0] * self.padded_shape[1], *ragged.shape[1:])
        return padded.index_copy_(0, found.slots.long(), ragged).reshape(shape)


class PreparedStore:
    """What one layer of a forward leaves for the next ones, by the signature of its call.

    Most layers are alike, so the last one is looked at before anything is hashed.
    """

    __slots__ = ("_kept", "last")

    def __init__(self) -> None:
        self.last: tuple[tuple[Any, ...], Any] | None = None
        self._kept: dict[tuple[Any, ...], Any] = {}

    def find(self, signature: tuple[Any, ...]) -> Any | None:
        last = self.last
        if last is not None and last[0] == signature:
            return last[1]
        return self._kept.get(signature)

    def keep(self, signature: tuple[Any, ...], prepared: Any) -> None:
        self._kept[signature] = prepared
        self.last = signature, prepared


class RaggedLayout:
    """The ragged layout of one forward: its queries, its keys, and the plans that backends made for it.

    A layout is made once per forward and travels with the attention mask. In self-attention both sides are one object.

    Args:
        query: The queries' side.
        key: The keys' side; the queries' own when not given.

    Examples:
        >>> import torch
        >>> from hf_flashinfer_attn.ragged.layout import RaggedLayout
        >>> layout = RaggedLayout.from_padding_mask(torch.tensor([[1, 1, 0], [1, 1, 1]]))
        >>> layout.query.lengths, layout.query.total_tokens
        ((2, 3), 5)
        >>> padded = torch.arange(6.0).reshape(2, 3, 1, 1)
        >>> layout.query.gather(padded).flatten().tolist()
        [0.0, 1.0, 3.0, 4.0, 5.0]
    """

    def __init__(self, query: RaggedSide, key: RaggedSide | None = None) -> None:
        self.query = query
        self.key = query if key is None else key
        # What backends derive from the layout, so that it lives and dies with the forward.
        self.plans: dict[Hashable, Any] = {}
        self.derived: dict[Hashable, Any] = {}
        self.prepared = PreparedStore()
        self.lock = threading.Lock()
        # Memory for plans that captured graphs read again and again, for other lengths each time; whose owner keeps
        # this layout too.
        self.graph_workspace: Any = None
        record_layout()

    @property
    def is_self_attention(self) -> bool:
        return self.key is self.query

    @property
    def keeps_padded_queries(self) -> bool:
        """Whether queries include padding that the keys exclude."""
        return self.query.padded_shape == self.key.padded_shape and self.query.is_full and not self.key.is_full

    @classmethod
    def from_padding_mask(cls, padding_mask: torch.Tensor) -> RaggedLayout:
        """Makes a self-attention layout from a 2D mask of ones and zeros, waiting for one device-to-host copy."""
        valid = padding_mask.to(torch.bool)
        lengths = LengthsRead(valid.sum(-1, dtype=torch.int32)).values
        return cls(RaggedSide(lengths, (valid.shape[0], valid.shape[1]), valid))

    @classmethod
    def from_lengths(cls, query_lengths: Sequence[int], key_lengths: Sequence[int] | None = None) -> RaggedLayout:
        """Makes a layout of packed input, shape `(1, total_tokens, ...)`, where there is no padding to drop."""
        query = RaggedSide(query_lengths, (1, sum(query_lengths)), None)
        return cls(query, None if key_lengths is None else RaggedSide(key_lengths, (1, sum(key_lengths)), None))

    @classmethod
    def for_graph(cls, lengths: Sequence[int], rows: int, tokens: int, workspace: Any) -> RaggedLayout:
        """Makes the layout of packed input that is topped up to the size of a captured graph.

        Args:
            lengths: Of the rows that there are; more of length 0 follow.
            rows: Of the graph.
            tokens: Of the graph; those after the last row belong to none and mean nothing.
            workspace: The backend's, for plans.
        """
        side = RaggedSide([*lengths, *(0,) * (rows - len(lengths))], (1, sum(lengths)), None)
        side.padded_shape = (1, tokens)
        # A replay may have one row of all tokens: bounds that no row reaches now, some row will.
        side.max_length = tokens
        layout = cls(side)
        layout.graph_workspace = workspace
        return layout

    @classmethod
    def from_offsets(
        cls,
        query_offsets: torch.Tensor,
        key_offsets: torch.Tensor,
        query_shape: tuple[int, int],
        key_shape: tuple[int, int],
    ) -> RaggedLayout:
        """Makes a layout of packed input from cu_seqlens, waiting for one device-to-host copy if they are on a GPU.

        Offsets with the same values make a self-attention layout, be they one tensor or two.

        Args:
            query_offsets: Integers, shape `(sequences + 1,)`.
            key_offsets: The same of the keys; may be the very same tensor.
            query_shape: Rows and slots of the packed queries, usually `(1, total_tokens)`.
            key_shape: The same of the keys.

        Raises:
            ValueError: If offsets do not start at 0, decrease, or do not end at the number of slots.
        """
        read = LengthsRead(
            query_offsets[None] if query_offsets is key_offsets else torch.stack([query_offsets, key_offsets])
        ).values
        sides = dict.fromkeys(zip(map(tuple, read), (query_shape, key_shape)))
        return cls(*(RaggedSide(_lengths_of(offsets, shape), shape, None) for offsets, shape in sides))


def _lengths_of(offsets: Sequence[int], shape: tuple[int, int]) -> list[int]:
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] != shape[0] * shape[1] or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens from {offsets[0]} to {offsets[-1]} do not describe {shape[0] * shape[1]} packed tokens: "
            "expected offsets that start at 0, never decrease, and end at the number of tokens."
        )
    return lengths


@functools.lru_cache(maxsize=8)
def uniform_layout(batch_size: int, query_length: int, key_length: int) -> RaggedLayout:
    """Returns the layout of a batch without padding. It depends on nothing but these numbers, so it is shared."""
    query = RaggedSide((query_length,) * batch_size, (batch_size, query_length), None)
    if query_length == key_length:
        return RaggedLayout(query)
    return RaggedLayout(query, RaggedSide((key_length,) * batch_size, (batch_size, key_length), None))


def offsets_of(layout: RaggedLayout) -> torch.Tensor:
    """Returns the offsets of packed sequences on the host, int32, with their layout cached on them.

    Layers that are handed these, as `cu_seq_lens_q` and `cu_seq_lens_k` both, read no lengths.
    """
    # A tensor of its own: the layout must not own what owns the layout.
    offsets = torch.tensor(layout.query.offsets, dtype=torch.int32, device="cpu")
    carry_layout(offsets, layout)
    return offsets


def carry_layout(offsets: torch.Tensor, layout: RaggedLayout) -> None:
    """Caches a layout on the offsets of its packed sequences, integers on any device."""
    shapes = (layout.query.padded_shape, layout.key.padded_shape)
    riding = _PackedLayout(None, None, versions_of(offsets, offsets), shapes, layout)
    offsets._packed_layout = riding  # type: ignore[attr-defined]


class PackedCarrier:
    """What the masks of one forward share, so that the layout of packed sequences is read once for all of them.

    The offsets themselves cannot carry it where nothing tells whether they were written to, as in inference mode.
    """

    __slots__ = ("__weakref__", "_packed_layout")

    def __init__(self) -> None:
        self._packed_layout: _PackedLayout | None = None

    @classmethod
    def of_forward(cls) -> PackedCarrier:
        """Returns the carrier for a mask that is being made, in this thread.

        A forward makes its masks before its layers read lengths. One that carries a layout is of an earlier forward.
        """
        latest: weakref.ref[PackedCarrier] | None = getattr(_latest, "carrier", None)
        carrier = None if latest is None else latest()
        if carrier is None or carrier._packed_layout is not None:
            carrier = cls()
            _latest.carrier = weakref.ref(carrier)
        return carrier


_latest = threading.local()


def packed_layout(
    carrier: Any,
    query_offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    shapes: tuple[tuple[int, int], tuple[int, int]],
) -> RaggedLayout:
    """Returns the layout of packed sequences, read from their offsets once and then carried along.

    Args:
        carrier: What travels with the forward: what its masks share, a mask, or the offsets themselves; the layout
            is cached on it.
        query_offsets: Integers, shape `(sequences + 1,)`.
        key_offsets: The same of the keys; may be the very same tensor.
        shapes: Rows and slots of the packed queries, and of the packed keys.

    Raises:
        ValueError: If the offsets do not describe tensors of these shapes.
    """
    if query_offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedAttentionError(
            "packed sequences while a CUDA graph is captured, whose lengths every replay would take from the capture",
            "Capture without cu_seqlens, or run this forward outside the graph.",
        )
    known = known_layout(carrier, query_offsets, key_offsets, shapes)
    if known is not None:
        return known
    versions = versions_of(query_offsets, key_offsets)
    layout = RaggedLayout.from_offsets(query_offsets, key_offsets, *shapes)
    # Offsets may outlive the forward, and without a version counter nothing tells whether they were written to.
    if carrier is not query_offsets or versions is not None:
        # The carrier itself is not named, so that no cycle keeps plans alive until a garbage collection.
        queries, keys = (None if side is carrier else side for side in (query_offsets, key_offsets))
        carrier._packed_layout = _PackedLayout(queries, keys, versions, shapes, layout)
    return layout


def known_layout(
    carrier: Any,
    query_offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    shapes: tuple[tuple[int, int], tuple[int, int]],
) -> RaggedLayout | None:
    """Returns the layout cached on the offsets or the carrier, if it is still valid; reads no lengths."""
    versions = versions_of(query_offsets, key_offsets)
    for place in (query_offsets, carrier):
        known: _PackedLayout | None = getattr(place, "_packed_layout", None)
        if known is not None and known.is_of(place, query_offsets, key_offsets, versions, shapes):
            return known.layout
    return None


def is_of_graph(offsets: torch.Tensor) -> bool:
    """Whether offsets are those of a captured graph, whose lengths are others in each replay."""
    known: _PackedLayout | None = getattr(offsets, "_packed_layout", None)
    return known is not None and known.layout.graph_workspace is not None


def versions_of(query_offsets: torch.Tensor, key_offsets: torch.Tensor) -> tuple[int, int] | None:
    """Returns what changes when offsets are written to; None where nobody counts that."""
    untracked = query_offsets.is_inference() or key_offsets.is_inference()
    return None if untracked else (query_offsets._version, key_offsets._version)


def with_versions(layer: object, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns copies that count versions of inference tensors that every layer of a forward is given; others as is.

    Nothing tells whether an inference tensor was written to. The copies are made once per forward: a layer that is
    given the same tensors a second time, or one of another model, is in another forward.

    Args:
        layer: That is given the tensors; layers of one model share their `config`.
        tensors: Offsets or positions. Offsets of this package are never written to.
    """
    first, *others = tensors
    if not any(tensor.is_inference() for tensor in tensors) or hasattr(first, "_packed_layout"):
        return tensors
    # What is the first tensor itself is not named, so that no cycle keeps it alive.
    of = [getattr(layer, "config", object()), *(None if other is first else other for other in others)]
    known: tuple[Any, Any, set[int]] | None = getattr(first, "_with_versions", None)
    if known is None or id(layer) in known[2] or any(one is not other for one, other in zip(known[1], of)):
        with torch.inference_mode(False), torch.no_grad():
            made = {id(tensor): tensor.clone() for tensor in tensors}
        known = tuple(made[id(tensor)] for tensor in tensors), of, set()
        first._with_versions = known  # type: ignore[attr-defined]
    known[2].add(id(layer))
    copies: tuple[torch.Tensor, ...] = known[0]
    return copies


@dataclass(frozen=True, slots=True)
class _PackedLayout:
    """A layout and the offsets that it was read from, as they were then; None for what carries this."""

    query_offsets: torch.Tensor | None
    key_offsets: torch.Tensor | None
    versions: tuple[int, int] | None
    shapes: tuple[tuple[int, int], tuple[int, int]]
    layout: RaggedLayout

    def __reduce__(self) -> tuple[Any, ...]:
        # Offsets are often the user's. A copy, or what is loaded from a file, has lengths of its own to be read.
        return type(None), ()

    def is_of(
        self,
        carrier: Any,
        query_offsets: torch.Tensor,
        key_offsets: torch.Tensor,
        versions: tuple[int, int] | None,
        shapes: tuple[tuple[int, int], tuple[int, int]],
    ) -> bool:
        return (
            (carrier if self.query_offsets is None else self.query_offsets) is query_offsets
            and (carrier if self.key_offsets is None else self.key_offsets) is key_offsets
            and (self.versions, self.shapes) == (versions, shapes)
        )
