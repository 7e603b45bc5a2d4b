"""Per-forward plan cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..ragged.layout import PreparedStore, known_layout, uniform_layout, versions_of
from ..ragged.lazy_mask import RaggedMask
from ..settings import current_settings
from .quirks import PACKED_IMAGES, is_one_of
from .ragged_call import needs_grad
from .recorders import recorder

__all__ = ["Kept", "kept_of", "signature_of"]


def signature_of(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    is_causal: bool | None,
    softcap: float | None,
) -> tuple[Any, ...]:
    """Cache key of a plan: what it depends on besides the mask or layout that holds the cache."""
    device = query.get_device()
    return (
        # The configuration lives longer than a mask; where there is none, nothing but causality depends on the module.
        type(module), id(getattr(module, "config", None)), getattr(module, "is_causal", None), query.shape, key.shape,
        value.shape, query.dtype, key.dtype, value.dtype, scaling, is_causal, softcap, device,
        torch._C._cuda_getCurrentRawStream(device), current_settings(),
    )  # fmt: skip


class Kept(NamedTuple):
    """Cached plans and the object that keeps them alive; a tuple, as one is made in every call."""

    owner: object
    store: PreparedStore


class _PackedLane(NamedTuple):
    """Plan cache of packed sequences, an attribute of the mask; signatures distinguish shapes."""

    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    versions: tuple[int, int] | None
    kept: Kept

    def is_of(self, query_offsets: torch.Tensor, key_offsets: torch.Tensor) -> bool:
        return (
            self.query_offsets is query_offsets
            and self.key_offsets is key_offsets
            and self.versions == versions_of(query_offsets, key_offsets)
        )


def kept_of(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sliding_window: int | None,
    offsets: tuple[torch.Tensor, torch.Tensor] | None,
    position_ids: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Kept | None:
    """Returns the plan cache of a call; None if the call cannot be cached."""
    if torch.cuda.is_current_stream_capturing() or recorder() is not None:
        return None
    # Tensors may be written to between two calls.
    if isinstance(scaling, torch.Tensor) or isinstance(softcap, torch.Tensor):
        return None
    if needs_grad(query, key, value):
        return None
    if offsets is not None:
        return _kept_of_packed(query, key, mask, sliding_window, offsets)
    if isinstance(mask, RaggedMask):
        return None if mask.was_modified else Kept(mask, mask.prepared)
    if mask is not None or sliding_window is not None or query.shape[0] != key.shape[0]:
        return None
    if position_ids is not None and is_one_of(type(module), PACKED_IMAGES):
        return None
    layout = uniform_layout(query.shape[0], query.shape[2], key.shape[2])
    return Kept(layout, layout.prepared)


def _kept_of_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    sliding_window: int | None,
    offsets: tuple[torch.Tensor, torch.Tensor],
) -> Kept | None:
    """Returns the plan cache of packed sequences; None before their layout is known."""
    pattern, carrier = None, None
    if isinstance(mask, RaggedMask):
        if mask.was_modified or mask.spec.padding_mask is not None:
            return None
        lane: _PackedLane | None = mask.packed_lane
        if lane is not None and lane.is_of(*offsets):
            return lane.kept
        pattern, carrier = mask.spec.pattern, mask.carrier
    elif mask is not None or sliding_window is not None:
        return None
    layout = known_layout(carrier, *offsets, ((query.shape[0], query.shape[2]), (key.shape[0], key.shape[2])))
    if layout is None:
        return None
    # Layers with another band share the layout, and nothing else.
    kept = Kept(layout, layout.derived.setdefault(("prepared", pattern), PreparedStore()))
    if isinstance(mask, RaggedMask):
        mask.packed_lane = _PackedLane(*offsets, versions_of(*offsets), kept)
    return kept
