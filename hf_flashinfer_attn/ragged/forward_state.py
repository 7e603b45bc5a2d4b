"""State of one forward: its layouts and attention plans, shared by all layers.

The state is an attribute of the lazy mask or of the cu_seqlens that every layer receives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..errors import UnsupportedAttentionError
from .host_copy import HostCopy
from .layout import RaggedLayout, RaggedSide, lengths_of, uniform_layout

__all__ = [
    "ForwardState",
    "PackedState",
    "attach_state",
    "attached_state",
    "cu_seqlens_of",
    "image_state",
    "packed_state",
    "uniform_state",
]

_ATTRIBUTE = "_flashinfer_state"


class ForwardState:
    """Layouts and plans of one forward.

    Args:
        layout: Ragged layout; None if a subclass makes it.
        is_shared: Whether several threads may use the state at a time.
    """

    __slots__ = ("__weakref__", "_layout", "is_shared", "plans", "recent", "scratch")

    def __init__(self, layout: RaggedLayout | None, *, is_shared: bool = False) -> None:
        self._layout = layout
        self.is_shared = is_shared
        # Attention plans by `plan_cache_key`, and the last guard and plan of each pattern.
        self.plans: dict[Hashable, Any] = {}
        self.recent: dict[Hashable, tuple[tuple[Any, ...], Any]] = {}
        self.scratch: dict[Hashable, Any] = {}

    def layout(self, *, keep_padded_queries: bool = False) -> RaggedLayout:
        """Returns the layout of the forward, padded queries included or not; the host may wait for row lengths."""
        assert self._layout is not None
        return self._layout

    @property
    def has_padding(self) -> bool:
        """Whether the batch has padding; the host may wait for row lengths."""
        return False


@functools.lru_cache(maxsize=8)
def uniform_state(batch_size: int, query_length: int, key_length: int) -> ForwardState:
    """Returns the state of a batch without padding, shared by all forwards of this shape."""
    return ForwardState(uniform_layout(batch_size, query_length, key_length), is_shared=True)


Shapes = tuple[tuple[int, int], tuple[int, int]]


class PackedState(ForwardState):
    """State of packed sequences; an attribute of their cu_seqlens.

    Args:
        layout: The layout.
        versions: Version counters of the tensors that the layout was read from; None for inference tensors.
        key: cu_seqlens of the keys; None if queries and keys share one tensor.
        layers: Replacement for version counters: the config of the model, and the ids of the layers that used the
            state. A second call of a layer, or a layer of another model, starts a new forward. None for cu_seqlens of
            this package, which are never written to.
    """

    __slots__ = ("key", "layers", "model_state", "packing", "shapes", "versions")

    def __init__(
        self,
        layout: RaggedLayout,
        versions: tuple[int, ...] | None,
        key: torch.Tensor | None = None,
        layers: tuple[object, set[int]] | None = None,
    ) -> None:
        super().__init__(layout)
        self.shapes: Shapes = layout.query.padded_shape, layout.key.padded_shape
        self.versions, self.key, self.layers = versions, key, layers
        # Set by `unpad`: the padded batch, and the verified fingerprint of the model.
        self.packing: Any = None
        self.model_state: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or pickled tensor must not share the state.
        return type(None), ()

    def is_of(self, layer: object, owner: torch.Tensor, key: torch.Tensor, shapes: Shapes) -> bool:
        """Whether the state, an attribute of `owner`, is still valid for a layer; `shapes` as for [`packed_state`]."""
        if key is not (owner if self.key is None else self.key) or shapes != self.shapes:
            return False
        if self.versions is not None:
            return self.versions == _versions_of(owner, key)
        if self.layers is None:
            return True
        config, layer_ids = self.layers
        if id(layer) in layer_ids or config is not getattr(layer, "config", layer):
            return False
        layer_ids.add(id(layer))
        return True


def _versions_of(*tensors: torch.Tensor) -> tuple[int, ...] | None:
    """Returns the version counters of tensors; None if one is an inference tensor, which has no counter."""
    return None if any(tensor.is_inference() for tensor in tensors) else tuple(tensor._version for tensor in tensors)


def attached_state(owner: torch.Tensor | None) -> PackedState | None:
    """Returns the state that is an attribute of a tensor, valid or not."""
    return getattr(owner, _ATTRIBUTE, None)


def cu_seqlens_of(layout: RaggedLayout) -> torch.Tensor:
    """Returns cu_seqlens of packed queries on the host, int32, shape `(rows + 1,)`, with their state attached."""
    # Not the layout's own tensor: that would be a reference cycle.
    cu_seqlens = torch.tensor(layout.query.offsets, dtype=torch.int32, device="cpu")
    attach_state(cu_seqlens, layout)
    return cu_seqlens


def attach_state(cu_seqlens: torch.Tensor, layout: RaggedLayout) -> PackedState:
    """Attaches the state of a layout to its cu_seqlens, which must never be written to."""
    state = PackedState(layout, _versions_of(cu_seqlens, cu_seqlens))
    setattr(cu_seqlens, _ATTRIBUTE, state)
    return state


def packed_state(
    layer: object,
    query_cu_seqlens: torch.Tensor,
    key_cu_seqlens: torch.Tensor,
    shapes: Shapes,
    mask: torch.Tensor | None = None,
) -> PackedState:
    """Returns the state of packed sequences; row lengths are read once per forward.

    Args:
        layer: The attention layer; any new object for a single call.
        query_cu_seqlens: Integers, shape `(sequences + 1,)`.
        key_cu_seqlens: The same for the keys; may be the same tensor.
        shapes: Rows and length of the packed queries and keys.
        mask: Mask of the forward, which holds the state if cu_seqlens are inference tensors. The caller ensures that
            cu_seqlens are not written to while the mask lives.

    Raises:
        ValueError: If cu_seqlens do not describe tensors of these shapes.
        UnsupportedAttentionError: If a CUDA graph is being captured and cu_seqlens are on a GPU.
    """
    if query_cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedAttentionError(
            "packed sequences while a CUDA graph is captured, whose lengths every replay would take from the capture",
            "Capture without cu_seqlens, or run this forward outside the graph.",
        )

    def read() -> RaggedLayout:
        return RaggedLayout.from_cu_seqlens(query_cu_seqlens, key_cu_seqlens, *shapes)

    if mask is not None and _versions_of(query_cu_seqlens, key_cu_seqlens) is None:
        # cu_seqlens of this package have a state already.
        state = attached_state(query_cu_seqlens)
        if state is not None and state.is_of(layer, query_cu_seqlens, key_cu_seqlens, shapes):
            return state
        # The state holds both tensors, so that no other tensor gets their ids.
        state, sources = attached_state(mask), (query_cu_seqlens, key_cu_seqlens)
        cached: Any = () if state is None or state.layers is None else state.layers[0]
        if state is None or state.shapes != shapes or list(map(id, cached)) != list(map(id, sources)):
            state = PackedState(read(), None, layers=(sources, set()))
            state.shapes = shapes
            setattr(mask, _ATTRIBUTE, state)
        return state
    return _find_or_read(layer, query_cu_seqlens, key_cu_seqlens, shapes, read)


def image_state(layer: object, position_ids: torch.Tensor, shapes: Shapes) -> PackedState:
    """Returns the state of images packed in one row.

    `position_ids` restart at zero in each image. Their shape is `(tokens, 2)`, or `(1, tokens)` in older versions of
    transformers.
    """

    def read() -> RaggedLayout:
        starts = (position_ids == 0).all(-1) if position_ids.shape[-1] == 2 else position_ids.flatten() == 0
        flags: list[bool] = HostCopy(starts).values
        cu_seqlens = [token for token, is_start in enumerate(flags) if is_start] + [len(flags)]
        return RaggedLayout(RaggedSide(lengths_of(cu_seqlens, shapes[0]), shapes[0], None))

    return _find_or_read(layer, position_ids, position_ids, shapes, read)


def _find_or_read(
    layer: object, owner: torch.Tensor, key: torch.Tensor, shapes: Shapes, read: Callable[[], RaggedLayout]
) -> PackedState:
    attached = attached_state(owner)
    if attached is not None and attached.is_of(layer, owner, key, shapes):
        return attached
    versions, layout = _versions_of(owner, key), read()
    layers = (getattr(layer, "config", layer), {id(layer)}) if versions is None else None
    state = PackedState(layout, versions, None if key is owner else key, layers)
    # A self-attention layout has one padded shape, where the call may have two.
    state.shapes = shapes
    # `unpad` needs its own state again to pad the outputs.
    if attached is None or attached.packing is None:
        setattr(owner, _ATTRIBUTE, state)
    return state
