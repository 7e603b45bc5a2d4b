"""The lazy mask: what the mask function returns and every layer receives.

It has the shape, dtype and device of the additive mask that eager attention would get, but no memory. Our attention
function takes the ragged layout from it. A model that does its own attention, or any other tensor arithmetic, gets the
real values: the mask is made dense on first use, by transformers' own function for eager attention.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from transformers.masking_utils import eager_mask

from ..errors import UnsupportedAttentionError
from ..tracing import record_host_copy
from .band import Pattern, PatternKind, dense_pattern, recognise
from .layout import LengthsRead, PackedCarrier, PreparedStore, RaggedLayout, RaggedSide, uniform_layout

__all__ = ["MaskSpec", "RaggedMask", "copy_of", "is_mask_of_ones", "lazy_mask", "mask_of_ones"]

_ONES = "_holds_no_padding"


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """What transformers asked a mask function for.

    Args:
        batch_size: Rows.
        q_length: Query slots per row.
        kv_length: Key slots per row.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        padding_mask: Valid positions, bool, shape `(batch, >= kv_offset + kv_length)`; None when all are.
        pattern: What the mask function was recognised as.
        packed: The sequence that each position belongs to, shape `(batch, q_length)`; None unless packed.
        positions: Positions that the band is measured in, shape `(batch, q_length)`; None if it is measured in indices.
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


# Query-key pairs of a batch below which attention may be so little work that nobody asks for lengths.
_SMALL = 1 << 20


class _LazyLayout:
    """The layouts and the dense values of a spec, made at most once, for every copy of the mask on any device.

    Args:
        spec: What transformers asked for.
        device: What it asked for it on, where the tensors are that the mask function closes over.
    """

    def __init__(self, spec: MaskSpec, device: torch.device) -> None:
        self._spec = spec
        self._device = device
        self._dense: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, int]] = {}
        self._padding_version = _version_of(spec.padding_mask)
        self._layouts: dict[bool, RaggedLayout] = {}
        self.prepared = PreparedStore()
        self.carrier = PackedCarrier.of_forward()
        self._started: LengthsRead | None = None
        self._is_unread = False
        self._sides: tuple[RaggedSide, RaggedSide] | None = None
        if spec.pattern.kind is PatternKind.DENSE:
            return
        # Keys after the last query are out of every causal query's sight: unwritten slots of a static cache.
        end = spec.kv_offset + spec.kv_length
        if spec.pattern.is_causal:
            end = min(end, spec.q_offset + spec.q_length)
        self._seen_keys = end - spec.kv_offset
        if spec.packed is None and spec.padding_mask is None:
            return
        # The copy of the lengths is under way while the first projections are launched; a small batch may not need it.
        is_small = spec.batch_size * spec.q_length * spec.kv_length < _SMALL and not spec.pattern.is_window
        self._is_unread = is_small and spec.packed is None
        if not self._is_unread:
            self._start_read()

    @property
    def _read(self) -> LengthsRead | None:
        if self._is_unread:
            self._start_read()
            self._is_unread = False
        return self._started

    def require_unwritten(self) -> None:
        if _version_of(self._spec.padding_mask) != self._padding_version:
            raise UnsupportedAttentionError(
                "an attention mask that was written to between the making of the whole mask and the attention",
                "Make the whole mask after the last write, or of a copy: create_causal_mask(..., mask.clone()).",
            )

    def _start_read(self) -> None:
        self.require_unwritten()
        spec, end = self._spec, self._spec.kv_offset + self._seen_keys
        if spec.packed is not None:
            rows = spec.packed
            if spec.positions is not None:
                # The last column tells whether positions increase by one in every sequence, as indices do.
                steps = (spec.packed.diff() != 0) | (spec.positions.diff() == 1)
                rows = torch.cat([spec.packed, steps.all(-1, keepdim=True).to(spec.packed.dtype)], dim=1)
            self._started = LengthsRead(rows)
            return
        assert spec.padding_mask is not None
        self._key_valid = spec.padding_mask[:, spec.kv_offset : end]
        self._query_valid = self._key_valid
        if self._seen_keys != spec.q_length:
            if not spec.pattern.is_causal:
                # Keys of another sequence: nothing is known of the queries, all stay.
                self._query_valid = self._key_valid.new_ones(spec.batch_size, spec.q_length)
            else:
                self._query_valid = spec.padding_mask[:, spec.q_offset : spec.q_offset + spec.q_length]
        sides = [self._key_valid] if self._query_valid is self._key_valid else [self._query_valid, self._key_valid]
        counts = [side.sum(-1, dtype=torch.int32) for side in sides]
        if spec.pattern.is_window:
            starts = F.pad(self._key_valid, (1, 0)).to(torch.int8).diff(dim=1) == 1
            counts.append(starts.sum(-1, dtype=torch.int32))
        self._started = LengthsRead(torch.stack(counts) if len(counts) > 1 else counts[0][None])

    @functools.cached_property
    def has_holes(self) -> bool:
        """Whether padding splits a row whose distances matter, or a packed sequence is in pieces; waits for a copy."""
        if self._spec.packed is None and not self._spec.pattern.is_window:
            return False
        if self._read is None:
            return False
        if self._spec.packed is not None:
            if self._spec.positions is not None and not all(row[-1] for row in self._read.values):
                return True
            return any(len({sequence for sequence, _ in row}) < len(row) for row in self._packed_runs)
        return self._spec.pattern.is_window and max(self._read.values[-1], default=0) > 1

    @functools.cached_property
    def _packed_runs(self) -> list[list[tuple[int, int]]]:
        """The packed sequences of each row and how many tokens they have in a run."""
        assert self._read is not None
        rows = (itertools.groupby(row[: self._spec.q_length]) for row in self._read.values)
        return [[(sequence, len(list(run))) for sequence, run in row] for row in rows]

    @property
    def has_padding(self) -> bool:
        """Whether any slot is padding; waits for the copy of the lengths."""
        return self._spec.padding_mask is not None and not self.get(False).key.is_full

    @property
    def padded_queries_need_mask(self) -> bool:
        """Whether eager attention of padded queries differs from that of a ragged row; waits for the row lengths.

        In causal and windowed attention, padding attends to padding; a query without keys averages all values.
        """
        spec = self._spec
        if spec.padding_mask is None or spec.pattern.kind is PatternKind.DENSE:
            return False
        layout = self.get(False)
        if spec.pattern.is_causal or spec.pattern.is_window:
            return not layout.query.is_full
        return 0 in layout.key.lengths

    def dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Makes the additive mask in memory of its own, from values made before where nobody wrote to them."""
        # Inference tensors count no versions, and a write would go unseen.
        with torch.inference_mode(False), torch.no_grad():
            if (made := self._untouched(dtype, device)) is not None:
                return made.clone()
            values = self._untouched(dtype, self._device)
            if values is None:
                self.require_unwritten()
                # Contiguous: transformers may return an expanded view, where an in-place write fails.
                values = self._spec.densify(dtype, self._device).contiguous()
                values = self._keep(values.clone() if values.is_inference() else values, self._device)
            return values if device == self._device else self._keep(values.to(device, copy=True), device)

    def _untouched(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        values, version = self._dense.get((dtype, device), (None, 0))
        return values if values is not None and values._version == version else None

    def _keep(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        self._dense[values.dtype, device] = values, values._version
        return values

    def get(self, keep_padded_queries: bool) -> RaggedLayout:
        # A causal query is always of the sequence that the mask speaks of.
        keep = keep_padded_queries and not self._spec.pattern.is_causal
        if (layout := self._layouts.get(keep)) is None:
            layout = self._layouts[keep] = self._make(keep)
        return layout

    def _make(self, keep_padded_queries: bool) -> RaggedLayout:
        self.require_unwritten()
        spec = self._spec
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
        spec = self._spec
        if self._read is None:
            self._query_valid = torch.ones(spec.batch_size, spec.q_length, dtype=torch.bool, device="cpu")
            self._key_valid = torch.ones(spec.batch_size, self._seen_keys, dtype=torch.bool, device="cpu")
            return [spec.q_length] * spec.batch_size, [self._seen_keys] * spec.batch_size
        counts = self._read.values
        return counts[0], counts[0 if self._query_valid is self._key_valid else 1]


def _version_of(padding_mask: torch.Tensor | None) -> int | None:
    """Returns what changes when a mask is written to; None where nobody counts that."""
    return None if padding_mask is None or padding_mask.is_inference() else padding_mask._version


# Tensor methods that only read metadata, so that the mask may stay lazy.
_METADATA_METHODS = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "element_size",
        "is_floating_point", "is_complex", "is_signed", "get_device", "requires_grad_", "__len__", "__hash__",
        "__repr__", "__format__", "is_inference", "has_names",
    }
)  # fmt: skip
_DATA_PROPERTIES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
_NO_OP_METHODS = frozenset({"detach", "contiguous"})
# Hand out memory that may be written to without a trace.
_MEMORY_METHODS = frozenset({"numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage"})
_MOVE_METHODS = frozenset({"to", "cuda", "cpu", "half", "bfloat16", "float", "double", "type_as"})


def _is_metadata(function: Callable[..., Any]) -> bool:
    if (name := _property_of(function)) is not None:
        return name not in _DATA_PROPERTIES
    return getattr(function, "__name__", "") in _METADATA_METHODS


def _property_of(function: Callable[..., Any]) -> str | None:
    """Returns the name of the property that a function gets or sets; None if it is a method."""
    if getattr(function, "__name__", "") not in ("__get__", "__set__"):
        return None
    return getattr(getattr(function, "__self__", None), "__name__", "")


class RaggedMask(torch.Tensor):
    """An additive attention mask `(batch, 1, q_length, kv_length)` that knows its ragged layout.

    Values are 0 where a query sees a key and the dtype's minimum elsewhere, as in eager attention, and exist only once
    somebody computes with them. In-place changes are kept: they turn the mask into a dense one for good.
    """

    spec: MaskSpec
    _lazy_layout: _LazyLayout
    _dense: torch.Tensor | None
    _dense_version: int
    # The attention function's, for packed sequences.
    packed_lane: Any

    @staticmethod
    def __new__(
        cls, spec: MaskSpec, dtype: torch.dtype, device: torch.device, layout: _LazyLayout | None = None
    ) -> RaggedMask:
        mask: RaggedMask = torch.Tensor._make_wrapper_subclass(
            cls, (spec.batch_size, 1, spec.q_length, spec.kv_length), dtype=dtype, device=device
        )
        mask.spec = spec
        mask._lazy_layout = _LazyLayout(spec, device) if layout is None else layout
        mask._dense = None
        mask._dense_version = 0
        mask.packed_lane = None
        return mask

    def __init__(
        self, spec: MaskSpec, dtype: torch.dtype, device: torch.device, layout: _LazyLayout | None = None
    ) -> None:
        super().__init__()

    @property
    def was_modified(self) -> bool:
        """Whether somebody wrote to the dense values, so that the layout no longer tells the truth."""
        return self._dense is not None and self._dense._version != self._dense_version

    def layout_of_forward(self, *, keep_padded_queries: bool) -> RaggedLayout:
        """Returns the ragged layout, made on the first call and shared by all layers.

        Args:
            keep_padded_queries: Whether queries stay that the mask calls padding, because the mask may speak of the
                keys alone.
        """
        return self._lazy_layout.get(keep_padded_queries)

    def require_unwritten(self) -> None:
        """Raises if the padding mask is no longer what it was when this mask was made.

        Raises:
            UnsupportedAttentionError: If somebody wrote to it.
        """
        self._lazy_layout.require_unwritten()

    @property
    def prepared(self) -> PreparedStore:
        """What the attention function keeps for the next layers of this forward."""
        return self._lazy_layout.prepared

    @property
    def carrier(self) -> PackedCarrier:
        """What carries the layout of packed sequences from layer to layer, whatever mask a layer is given."""
        return self._lazy_layout.carrier

    @property
    def has_holes(self) -> bool:
        """Whether ragged neighbours are not true ones.

        Padding then splits a row in which distances matter, or tokens of another packed sequence split one.
        """
        return self._lazy_layout.has_holes

    @property
    def has_padding(self) -> bool:
        """Whether any slot is padding."""
        return self._lazy_layout.has_padding

    @property
    def padded_queries_need_mask(self) -> bool:
        """Whether eager attention of padded queries differs from that of a ragged row; waits for the row lengths."""
        return self._lazy_layout.padded_queries_need_mask

    @property
    def hides_nothing(self) -> bool:
        """Whether every query sees every key, so that eager attention would get no mask; waits for the lengths."""
        pattern, length = self.spec.pattern, self.spec.kv_length
        if pattern.kind is PatternKind.DENSE or pattern.is_causal or self.spec.packed is not None:
            return False
        reaches_all = all(reach is None or reach > length for reach in (pattern.left, pattern.right))
        return reaches_all and not self.has_padding and not self.was_modified

    def dense(self) -> torch.Tensor:
        """Returns the additive mask as a plain tensor, shape `(batch, 1, q_length, kv_length)`."""
        if self._dense is None:
            with torch._C.DisableTorchFunctionSubclass():
                dtype, device = self.dtype, self.device
            self._dense = self._lazy_layout.dense(dtype, device)
            self._dense_version = self._dense._version
        return self._dense

    def _moved(self, dtype: torch.dtype, device: torch.device) -> RaggedMask:
        return RaggedMask(self.spec, dtype, device, self._lazy_layout)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return (
                f"RaggedMask(shape={tuple(self.shape)}, pattern={self.spec.pattern.name!r}, dtype={self.dtype}, "
                f"device={str(self.device)!r})"
            )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _is_metadata(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        mask = args[0] if args and isinstance(args[0], RaggedMask) else None
        name = getattr(func, "__name__", "")
        if mask is not None and _property_of(func) == "data" and name == "__set__":
            raise UnsupportedAttentionError(
                "assigning to the data of a lazy mask", "Write in place: mask.copy_(values)."
            )
        if mask is not None and name in _MEMORY_METHODS:
            torch.autograd.graph.increment_version(mask.dense())
        if mask is not None and not mask.was_modified:
            # `data` as well: of a plain tensor it would be an alias whose writes are not counted.
            if name in _NO_OP_METHODS or _property_of(func) == "data":
                return mask
            if name in _MOVE_METHODS and (moved := _move(mask, func, args, kwargs)) is not None:
                return moved
            if name in ("__getitem__", "expand") and _keeps_everything(mask, name, args, kwargs):
                return mask
        return func(*tree_map(_to_dense, args), **tree_map(_to_dense, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Reached by calls that bypass __torch_function__, such as those made from C++.
        return func(*tree_map(_to_dense, args), **tree_map(_to_dense, kwargs or {}))


def _to_dense(value: Any) -> Any:
    return value.dense() if isinstance(value, RaggedMask) else value


def _move(
    mask: RaggedMask, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> RaggedMask | None:
    """Returns the mask on the dtype and device that a call such as `mask.to(...)` asks for; None if not a float one."""
    if kwargs.get("copy"):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        dtype, device = mask.dtype, mask.device
        # An empty tensor answers what the many spellings of these calls mean.
        probe: torch.Tensor = func(torch.empty(0, dtype=dtype, device=device), *args[1:], **kwargs)
    if not probe.dtype.is_floating_point:
        return None
    return mask if (probe.dtype, probe.device) == (dtype, device) else mask._moved(probe.dtype, probe.device)


def _keeps_everything(mask: RaggedMask, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a slice such as `mask[:, :, :, :kv_length]`, or an expand, is the whole mask again."""
    spec = mask.spec
    shape = (spec.batch_size, 1, spec.q_length, spec.kv_length)
    if name == "expand":
        sizes = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list, torch.Size)) else args[1:]
        return not kwargs and len(sizes) == 4 and all(size in (-1, full) for size, full in zip(sizes, shape))
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(part is Ellipsis for part in index):
        ellipses = [at for at, part in enumerate(index) if part is Ellipsis]
        if len(ellipses) > 1:
            return False
        at = ellipses[0]
        index = (*index[:at], *(slice(None),) * (4 - len(index) + 1), *index[at + 1 :])
    return len(index) <= 4 and all(
        isinstance(part, slice)
        and all(bound is None or isinstance(bound, int) for bound in (part.start, part.stop, part.step))
        and part.indices(full) == (0, full, 1)
        for part, full in zip(index, shape)
    )


def mask_of_ones(batch_size: int, length: int, device: torch.device) -> torch.Tensor:
    """Returns a mask of ones, bool, shape `(batch, length)`, tagged so that it is never copied to the host."""
    # Inference tensors count no versions, and a write would go unseen.
    with torch.inference_mode(False):
        mask = torch.ones(batch_size, length, dtype=torch.bool, device=device)
    setattr(mask, _ONES, mask._version)
    return mask


def is_mask_of_ones(padding_mask: torch.Tensor) -> bool:
    """Whether a mask is of `mask_of_ones`, and nobody wrote to it."""
    version: int | None = getattr(padding_mask, _ONES, None)
    return version is not None and version == padding_mask._version


def copy_of(padding_mask: torch.Tensor) -> torch.Tensor:
    """Copies a padding mask, and what is known of it without reading."""
    with torch.inference_mode(False), torch.no_grad():
        copy = padding_mask.clone()
    if is_mask_of_ones(padding_mask):
        setattr(copy, _ONES, copy._version)
    return copy


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str,
    use_vmap: bool,
) -> RaggedMask:
    """Makes the lazy mask of one forward from what transformers' mask helpers hand to a mask interface.

    Args:
        batch_size: Rows.
        q_length: Query slots per row.
        kv_length: Key slots per row.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        mask_function: Which keys a query may see, padding aside.
        attention_mask: Valid positions, bool, shape `(batch, tokens seen so far)`.
        dtype: Of the additive mask.
        device: Of the additive mask.
        use_vmap: Whether the mask function needs vmap to be evaluated.

    Raises:
        UnsupportedAttentionError: If the attention mask and the batch differ in their number of rows.
    """
    if attention_mask is not None and attention_mask.shape[0] != batch_size:
        raise UnsupportedAttentionError(
            f"an attention_mask of shape {tuple(attention_mask.shape)} for a batch of {batch_size} rows of "
            f"{kv_length} keys",
            "Pass one mask row for each row of the batch; attention_mask.expand(rows, -1) repeats a single one.",
        )
    if isinstance(q_offset, torch.Tensor) and q_offset.is_cuda:
        record_host_copy()
    # A static cache counts its tokens on the device, and counts on in place before a layer asks for the dense mask.
    first_query = int(q_offset)
    padding_mask = None
    if attention_mask is not None:
        # Without values there is no padding to be found.
        is_ones = is_mask_of_ones(attention_mask) or attention_mask.is_meta
        attention_mask = attention_mask.to(torch.bool)
        padding_mask = None if is_ones else attention_mask
    if padding_mask is not None and (missing := kv_length + kv_offset - padding_mask.shape[-1]) > 0:
        padding_mask = torch.nn.functional.pad(padding_mask, (0, missing))

    def densify(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        mask: torch.Tensor = eager_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=first_query,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask if attention_mask is None else attention_mask.to(device),
            dtype=dtype,
            use_vmap=use_vmap,
            device=device,
        )
        return mask

    pattern, packed, positions = recognise(mask_function)
    if packed is not None and (padding_mask is not None or q_length != kv_length):
        pattern, packed = dense_pattern("packed sequences with padding"), None
    tables = [table for table in (packed, positions) if table is not None]
    # Other dtypes may overflow or hold NaN.
    counts = {torch.bool, torch.int32, torch.int64}
    if any(table.shape != (batch_size, q_length) or table.dtype not in counts for table in tables):
        pattern, packed = dense_pattern("packed sequences of another shape than the batch"), None
    # Ragged attention aligns the last query with the last key; keys after a causal query are cut off before.
    aligned = first_query + q_length == kv_offset + kv_length
    if pattern.is_window and not pattern.is_causal and not aligned:
        pattern = dense_pattern("a window over keys of another sequence")
    spec = MaskSpec(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=first_query,
        kv_offset=kv_offset,
        padding_mask=padding_mask,
        pattern=pattern,
        packed=packed,
        positions=positions,
        densify=densify,
    )
    return RaggedMask(spec, dtype, torch.device(device))
