"""Parsed attention arguments: the tensors of a call (`AttentionInputs`) and their hashable spec (`AttentionSpec`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from ..errors import UnsupportedAttentionError
from ..ragged.band import CAUSAL, FULL, Opaque, Pattern
from ..ragged.forward_state import ForwardState, image_state, packed_state, uniform_state
from ..ragged.layout import RaggedLayout
from ..ragged.lazy_mask import RaggedMask
from ..settings import current_settings
from .quirks import CAUSAL_BY_MASK, CAUSAL_PADDING_IS_READ, PACKED_IMAGES, is_one_of, layer_name, padded_queries_reason

__all__ = [
    "WHOLE_MASK_FEATURES",
    "WINDOW_KEEPS",
    "AttentionInputs",
    "AttentionSpec",
    "LayerArguments",
    "cast_as_flash",
    "is_cast_as_flash",
    "needs_grad",
    "pattern_of",
    "require_2d_mask_fits",
]

_PACKED_BIAS = "position_bias over packed sequences by slot, or of a shape of its own"
_HOLES = "a window over padding with holes, packed sequences in pieces"
WINDOW_KEEPS = "a window over padding in a layer that keeps padded queries"
_CAUSAL_PADDING = "causal attention over padding that the model reads later"
_KEEP = "padded_queries='keep' with causal attention, a window, a row of padding only or a 2D mask"
_OTHER_SHAPE = "a mask of another shape than the call"
_MODIFIED = "a mask that the model wrote to"
# Reasons why a call needs the whole mask, besides its pattern.
WHOLE_MASK_FEATURES = (_PACKED_BIAS, _HOLES, WINDOW_KEEPS, _CAUSAL_PADDING, _KEEP, _OTHER_SHAPE, _MODIFIED)


class LayerArguments(NamedTuple):
    """Arguments of `attention_forward` besides query, key, value and mask; a tuple that survives graph breaks."""

    dropout: float
    scaling: float | None
    is_causal: bool | None
    sliding_window: int | None
    softcap: float | None
    s_aux: torch.Tensor | None
    position_bias: torch.Tensor | None
    output_attentions: bool | None
    cu_seq_lens_q: torch.Tensor | None
    cu_seq_lens_k: torch.Tensor | None
    position_ids: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Everything that selects and parametrises a plan, apart from row lengths. Hashable: part of a plan's cache key.

    Args:
        pattern: Attention pattern, padding aside.
        device: Device of the tensors.
        dtype: dtype of query, key and value.
        rows: Rows of the padded batch.
        q_length: Padded length of the queries.
        kv_length: Padded length of the keys.
        num_heads: Heads of the query.
        num_kv_heads: Heads of key and value.
        head_dim: head_dim of query and key.
        value_head_dim: head_dim of value.
        sm_scale: Factor of the logits.
        softcap: Caps logits to `softcap * tanh(logits / softcap)`; None for no cap.
        biased: Whether a bias is added to the logits.
        sinks: Whether there are attention sinks.
        dropout: Probability of dropping an attention weight.
        needs_grad: Whether gradients must flow.
        needs_weights: Whether the attention weights are returned.
        whole_mask: Why the call needs the whole mask, one of `WHOLE_MASK_FEATURES`; None if the pattern is enough.
        has_lazy_mask: Whether the mask is lazy.
        sees_all_valid: Whether every query sees all valid keys, so that a padding mask is enough without row lengths.
        padded_queries: Why the layer needs padded queries; None if no valid output depends on them.
        keeps_padded_queries: Whether padded queries are computed, for that reason or by the settings.
    """

    pattern: Pattern
    device: torch.device
    dtype: torch.dtype
    rows: int
    q_length: int
    kv_length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    sm_scale: float
    softcap: float | None = None
    biased: bool = False
    sinks: bool = False
    dropout: float = 0.0
    needs_grad: bool = False
    needs_weights: bool = False
    whole_mask: str | None = None
    has_lazy_mask: bool = False
    sees_all_valid: bool = False
    padded_queries: str | None = None
    keeps_padded_queries: bool = False

    @property
    def widest_head_dim(self) -> int:
        """The larger head_dim of query and value."""
        return max(self.head_dim, self.value_head_dim)

    @property
    def is_plain(self) -> bool:
        """Whether there is neither a bias nor sinks."""
        return not self.biased and not self.sinks


@dataclass(slots=True)
class AttentionInputs:
    """Tensors and parsed arguments of one attention call.

    Args:
        query: Shape `(batch, heads, q_length, head_dim)`.
        key: Shape `(batch, kv_heads, kv_length, head_dim)`.
        value: Shape `(batch, kv_heads, kv_length, value_head_dim)`.
        pattern: Attention pattern, padding aside.
        sm_scale: Factor of the logits.
        name: Layer name in traces.
        layer: The attention layer; any new object for a single call.
        mask: Lazy mask, 4D mask (bool or additive), 2D padding mask, or None.
        softcap: Caps logits to `softcap * tanh(logits / softcap)`.
        cu_seqlens: cu_seqlens of packed queries and keys, integers, shape `(sequences + 1,)`; None unless packed.
        images: position_ids of packed images, which restart at zero in each image; None unless packed so.
        position_bias: Added to the logits, broadcastable as for `attention_forward`.
        sinks: Attention sinks, one logit per head.
        dropout: Probability of dropping an attention weight.
        output_attentions: Whether to return the weights.
        padded_queries: Why the layer needs padded queries; None if no valid output depends on them.
        reads_causal_padding: Whether the model reads padded hidden states of causal attention.
        state: State of the forward; None before `find_state`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pattern: Pattern
    sm_scale: float
    name: str
    layer: object
    mask: torch.Tensor | None = None
    softcap: float | None = None
    cu_seqlens: tuple[torch.Tensor, torch.Tensor] | None = None
    images: torch.Tensor | None = None
    position_bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    dropout: float = 0.0
    output_attentions: bool = False
    padded_queries: str | None = None
    reads_causal_padding: bool = False
    state: ForwardState | None = None

    @classmethod
    def of_layer(
        cls,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        arguments: LayerArguments,
        *,
        has_values: bool = True,
    ) -> AttentionInputs:
        """Parses the arguments of `attention_forward`; `has_values` is False on the meta device.

        Raises:
            UnsupportedAttentionError: If arguments contradict each other, or are not supported by any backend.
        """
        sm_scale = query.shape[-1] ** -0.5 if arguments.scaling is None else float(arguments.scaling)
        if is_cast_as_flash(query) or (query.dtype == torch.float32 and not has_values):
            query, key, value = cast_as_flash(module, query, key, value)
        is_causal = arguments.is_causal
        if isinstance(mask, RaggedMask) and has_values and not mask.spec.fits(query, key) and mask.hides_nothing:
            # Some models pass on the mask of another sequence. Eager attention would get None here.
            mask, is_causal = None, False
        cu_seqlens = None
        if arguments.cu_seq_lens_q is not None and arguments.cu_seq_lens_k is not None:
            cu_seqlens = arguments.cu_seq_lens_q, arguments.cu_seq_lens_k
        holds_images = mask is None and cu_seqlens is None and has_values and is_one_of(type(module), PACKED_IMAGES)
        pattern = pattern_of(module, mask, is_causal)
        if mask is None and arguments.sliding_window is not None and key.shape[2] > arguments.sliding_window:
            raise UnsupportedAttentionError(
                f"sliding_window={arguments.sliding_window} without a mask over {key.shape[2]} keys",
                "Use attn_implementation='eager' for this model.",
            )
        return cls(
            query, key, value, pattern, sm_scale, layer_name(module), module, mask, arguments.softcap, cu_seqlens,
            arguments.position_ids if holds_images else None, arguments.position_bias, arguments.s_aux,
            arguments.dropout, bool(arguments.output_attentions),
            padded_queries_reason(module, is_causal=pattern.is_causal), is_one_of(type(module), CAUSAL_PADDING_IS_READ),
        )  # fmt: skip

    @property
    def lazy(self) -> RaggedMask | None:
        """The mask, if it is lazy."""
        return self.mask if isinstance(self.mask, RaggedMask) else None

    @property
    def is_packed(self) -> bool:
        """Whether rows hold packed sequences, separated by cu_seqlens or image positions."""
        return self.cu_seqlens is not None or self.images is not None

    def packed_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns rows and length of the packed queries and keys.

        Raises:
            UnsupportedAttentionError: If packed sequences come with a padding mask.
        """
        if self.cu_seqlens is not None and self.lazy is not None and self.lazy.state.has_padding:
            raise UnsupportedAttentionError(
                "cu_seq_lens_q and cu_seq_lens_k together with a padding mask",
                "Packed input has no padding: leave the attention_mask out.",
            )
        return (self.query.shape[0], self.query.shape[2]), (self.key.shape[0], self.key.shape[2])

    def find_state(self) -> ForwardState:
        """Returns the state of the forward.

        Raises:
            UnsupportedAttentionError: If packed sequences come with a padding mask, or a 2D mask does not fit.
        """
        if self.state is not None:
            return self.state
        query, key, lazy = self.query, self.key, self.lazy
        if self.cu_seqlens is not None:
            self.state = packed_state(self.layer, *self.cu_seqlens, self.packed_shapes())
        elif self.images is not None:
            self.state = image_state(self.layer, self.images, self.packed_shapes())
        elif lazy is not None:
            self.state = lazy.state
        elif self.mask is None:
            self.state = uniform_state(query.shape[0], query.shape[2], key.shape[2])
        else:
            # A few models pass the 2D mask to every layer.
            require_2d_mask_fits(self.mask, query, key)
            if query.shape[2] != key.shape[2]:
                raise UnsupportedAttentionError(
                    f"a 2D attention mask of shape {tuple(self.mask.shape)} for {query.shape[2]} queries",
                    "Use attn_implementation='eager' for this model.",
                )
            self.state = ForwardState(RaggedLayout.from_padding_mask(self.mask))
        return self.state

    def bias(self) -> torch.Tensor | None:
        """Returns the bias by padded position, shape `(rows, heads, q_length, kv_length)`; None if it does not fit.

        For packed sequences, rows are sequences and positions count in the sequence.
        """
        bias, query, key = self.position_bias, self.query, self.key
        if bias is None:
            return None
        shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        if self.is_packed:
            if query.shape[0] != 1 or key.shape[0] != 1 or query.is_meta:
                return None
            layout = self.find_state().layout()
            shape = len(layout.query.lengths), query.shape[1], layout.query.max_length, layout.key.max_length
        if bias.ndim != 4 or any(size not in (1, full) for size, full in zip(bias.shape, shape)):
            return None
        return bias.expand(shape)

    def spec(self, *, has_values: bool = True) -> AttentionSpec:
        """Returns the spec of the call; tensors without values are assumed to be padded on the right."""
        query, key, value, lazy, pattern = self.query, self.key, self.value, self.lazy, self.pattern
        keeps_on_request = current_settings().padded_queries == "keep"
        return AttentionSpec(
            pattern=pattern,
            device=query.device,
            dtype=query.dtype,
            rows=query.shape[0],
            q_length=query.shape[2],
            kv_length=key.shape[2],
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[-1],
            value_head_dim=value.shape[-1],
            sm_scale=self.sm_scale,
            softcap=None if self.softcap is None else float(self.softcap),
            biased=self.position_bias is not None,
            sinks=self.sinks is not None,
            dropout=self.dropout,
            needs_grad=needs_grad(query, key, value, self.position_bias, self.sinks),
            needs_weights=self.output_attentions,
            whole_mask=self._whole_mask(keeps_on_request, has_values),
            has_lazy_mask=lazy is not None,
            sees_all_valid=lazy is not None and not self.is_packed and _sees_all_valid(lazy),
            padded_queries=self.padded_queries,
            keeps_padded_queries=self.padded_queries is not None or keeps_on_request,
        )

    def _whole_mask(self, keeps_on_request: bool, has_values: bool) -> str | None:
        lazy, pattern = self.lazy, self.pattern
        packed = lazy is not None and lazy.spec.packed is not None
        if self.position_bias is not None and (packed or self.bias() is None):
            return _PACKED_BIAS
        if isinstance(pattern, Opaque):
            return None
        if lazy is not None:
            # With cu_seqlens, the packed sequences of the mask need not be read.
            if has_values and not (self.cu_seqlens is not None and packed) and lazy.state.has_holes:
                return _HOLES
            keeps = pattern.is_window and self.padded_queries is not None
            is_read = keeps or (pattern.is_causal and self.reads_causal_padding)
            if is_read and (not has_values or lazy.state.has_padding):
                return WINDOW_KEEPS if keeps else _CAUSAL_PADDING
        if keeps_on_request and self.mask is not None:
            if lazy is None:
                # A 2D mask covers keys only: padded queries are unknown.
                needs_mask = self.mask.ndim == 2
            elif has_values:
                needs_mask = lazy.state.padded_queries_need_mask
            else:
                needs_mask = pattern.is_causal or pattern.is_window
            if needs_mask:
                return _KEEP
        if self.query.shape[0] != self.key.shape[0] or (lazy is not None and not lazy.spec.fits(self.query, self.key)):
            return _OTHER_SHAPE
        return _MODIFIED if lazy is not None and lazy.was_modified else None


def _sees_all_valid(mask: RaggedMask) -> bool:
    spec = mask.spec
    if spec.padding_mask is None or spec.packed is not None:
        return False
    # Causality does not limit a single query at the last position.
    is_last = spec.q_length == 1 and spec.q_offset + 1 == spec.kv_offset + spec.kv_length
    return spec.pattern == FULL or (spec.pattern == CAUSAL and is_last)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd needs gradients of these inputs.

    Raises:
        UnsupportedAttentionError: If an input has a forward-mode tangent, which the kernel would silently drop.
    """
    if forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise UnsupportedAttentionError(
            "forward-mode differentiation (torch.autograd.forward_ad, torch.func.jvp)",
            "Use attn_implementation='eager', or reverse mode.",
        )
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def pattern_of(module: torch.nn.Module, mask: torch.Tensor | None, is_causal: bool | None) -> Pattern:
    """Returns the attention pattern of a call, padding aside.

    Raises:
        UnsupportedAttentionError: If the mask has neither 2 nor 4 dimensions.
    """
    if isinstance(mask, RaggedMask):
        return mask.spec.pattern
    if mask is None or mask.ndim == 2:
        # Only without a lazy mask: its pattern is more reliable than `module.is_causal` (False in UMT5's decoder).
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        if is_causal is None and mask is None and is_one_of(type(module), CAUSAL_BY_MASK):
            causal = False
        return CAUSAL if causal else FULL
    if mask.ndim == 4:
        return Opaque("given as a 4D tensor")
    raise UnsupportedAttentionError(
        f"an attention mask of shape {tuple(mask.shape)}, expected 2 or 4 dimensions",
        "Use attn_implementation='eager' for this model.",
    )


def require_2d_mask_fits(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
    """Raises `UnsupportedAttentionError` if a 2D mask is not of shape `(batch, kv_length)`."""
    expected = (key.shape[0], key.shape[2])
    if tuple(mask.shape) != expected:
        raise UnsupportedAttentionError(
            f"a 2D attention mask of shape {tuple(mask.shape)} for {query.shape[2]} queries, expected {expected}",
            "Use attn_implementation='eager' for this model.",
        )


def is_cast_as_flash(query: torch.Tensor) -> bool:
    """Whether transformers would cast the input of a flash kernel to half precision."""
    return query.is_cuda and query.dtype == torch.float32


def cast_as_flash(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Casts float32 input as transformers does for flash kernels: to the dtype of autocast or of the layer.

    Attention of a half-precision model gets float32 if its layer norms are in float32, as with PEFT.
    """
    device_type = query.device.type
    if not query.is_meta and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    else:
        dtype = next((parameter.dtype for parameter in module.parameters() if parameter.ndim == 2), torch.float32)
    return (query.to(dtype), key.to(dtype), value.to(dtype)) if dtype.itemsize == 2 else (query, key, value)
