"""MPNet, which computes attention in its own code: two of its classes, with this package's attention.

MPNet's layers receive only a mask and a bias, and transformers 5.5 makes the mask again. cu_seqlens are therefore
passed to the encoder in a context variable, and to the layers together with the bias.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from types import MethodType
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention

from ..attention.driver import is_of_graph
from ..errors import UnsupportedAttentionError
from ..ragged.forward_state import packed_state
from ..ragged.lazy_mask import RaggedMask
from ..settings import NAME

__all__ = ["RaggedMPNetEncoder", "RaggedMPNetSelfAttention", "enter", "leave", "reason_to_refuse", "restore", "route"]


# Stack of the cu_seqlens of nested forwards (a hook may run another forward); None for a padded forward.
_entered: ContextVar[tuple[torch.Tensor | None, ...]] = ContextVar("flashinfer_mpnet_forwards", default=())


class PackedBias(NamedTuple):
    """Bias of the longest packed row, shape `(1, heads, longest, longest)`, and cu_seqlens.

    A tuple, because accelerate and checkpointing move the tensors of tuples.
    """

    values: torch.Tensor
    cu_seqlens: torch.Tensor


class RaggedMPNetEncoder(MPNetEncoder):  # type: ignore[misc]
    """MPNet's encoder with one bias for all rows, of the size of the longest row."""

    def compute_position_bias(
        self, x: torch.Tensor, position_ids: torch.Tensor | None = None, num_buckets: int = 32
    ) -> torch.Tensor | PackedBias:
        """Computes the bias for hidden states of shape `(batch, length, hidden_size)`."""
        if (cu_seqlens := next(reversed(_entered.get()), None)) is None:
            padded_bias: torch.Tensor = super().compute_position_bias(x[:1], position_ids, num_buckets)
            return padded_bias
        if is_of_graph(cu_seqlens):
            raise UnsupportedAttentionError(
                "a relative position bias, as large as the longest row, in a captured graph",
                "Use unpad without cuda_graphs for MPNet.",
            )
        shape = (x.shape[0], x.shape[1])
        longest = packed_state(self, cu_seqlens, cu_seqlens, (shape, shape)).layout().query.max_length
        # transformers reads only the shape and device of the hidden states.
        bias = super().compute_position_bias(x.new_empty(1, longest), position_ids, num_buckets)
        return PackedBias(bias, cu_seqlens)

    def relative_position_bucket(
        self, relative_position: torch.Tensor, num_buckets: int = 32, max_distance: int = 128
    ) -> torch.Tensor:
        """Computes the bucket of each distance once, instead of for each pair of positions."""
        if relative_position.ndim != 2:
            pairs: torch.Tensor = super().relative_position_bucket(relative_position, num_buckets, max_distance)
            return pairs
        length = relative_position.shape[-1]
        # On the same device as in the model, for the same rounding; then one small asynchronous copy to the GPU.
        distances = torch.arange(1 - length, length, device=relative_position.device)
        buckets: torch.Tensor = super().relative_position_bucket(distances, num_buckets, max_distance)
        device = self.relative_attention_bias.weight.device
        if device.type != "meta":
            buckets = buckets.to(device, non_blocking=True)
        # Row i of the result: distances from query i to all keys.
        return buckets.unfold(0, length, 1).flip(0)


class RaggedMPNetSelfAttention(MPNetSelfAttention):  # type: ignore[misc]
    """MPNet's attention by 'flashinfer', unless attention weights are requested or the mask is not a lazy mask."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | PackedBias | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Computes attention for hidden states of shape `(batch, length, hidden_size)`; returns the same shape."""
        bias, cu_seqlens = position_bias if isinstance(position_bias, PackedBias) else (position_bias, None)
        if cu_seqlens is None and (output_attentions or not isinstance(attention_mask, RaggedMask)):
            outputs: tuple[torch.Tensor, ...]
            outputs = super().forward(hidden_states, attention_mask, bias, output_attentions, **kwargs)
            return outputs
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        query, key, value = (side(hidden_states).view(shape).transpose(1, 2) for side in (self.q, self.k, self.v))
        output, _ = ALL_ATTENTION_FUNCTIONS[NAME](
            self,
            query,
            key,
            value,
            attention_mask if cu_seqlens is None else None,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.attention_head_size**-0.5,
            is_causal=False,
            position_bias=bias,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
        )
        return (self.o(output.flatten(2)),)


def reason_to_refuse(backbone: PreTrainedModel) -> str | None:
    """Returns the reason if the attention of a model cannot be replaced."""
    parameters = list(inspect.signature(MPNetSelfAttention.forward).parameters)[1:5]
    expected = ["hidden_states", "attention_mask", "position_bias", "output_attentions"]
    methods = ("compute_position_bias", "relative_position_bucket")
    if parameters != expected or not all(hasattr(MPNetEncoder, name) for name in methods):
        return "its attention is put together in another way in this version of transformers"
    if type(backbone.encoder) not in (MPNetEncoder, RaggedMPNetEncoder):
        return f"its encoder is a {type(backbone.encoder).__name__}"
    for layer in backbone.encoder.layer:
        attention = layer.attention.attn
        if type(attention) not in (MPNetSelfAttention, RaggedMPNetSelfAttention):
            return f"its attention is a {type(attention).__name__}"
        if not _own_forwards(attention) and "forward" in vars(attention):
            return "the forward of its attention was replaced"
    return None


def route(backbone: PreTrainedModel) -> None:
    """Replaces a model's attention by changing the classes of its modules; copies and pickles keep working."""
    _become(backbone, RaggedMPNetEncoder, RaggedMPNetSelfAttention)


def restore(backbone: PreTrainedModel) -> None:
    """Undoes `route`."""
    _become(backbone, MPNetEncoder, MPNetSelfAttention)


def _become(backbone: PreTrainedModel, encoder: type[MPNetEncoder], attention: type[MPNetSelfAttention]) -> None:
    changes = [(backbone.encoder, encoder), *((layer.attention.attn, attention) for layer in backbone.encoder.layer)]
    for module, new in changes:
        for name in _own_forwards(module):
            setattr(module, name, MethodType(new.forward, module))
        module.__class__ = new


def _own_forwards(module: torch.nn.Module) -> list[str]:
    """Returns the instance attributes in which accelerate stores the class's forward, bound to the module."""
    attributes, own = vars(module), type(module).forward
    return [name for name in ("forward", "_old_forward") if getattr(attributes.get(name), "__func__", None) is own]


def enter(cu_seqlens: torch.Tensor | None) -> None:
    """Pushes the cu_seqlens of a forward for the encoder, None if padded; `leave` pops them."""
    _entered.set((*_entered.get(), cu_seqlens))


def leave(cu_seqlens: torch.Tensor | None) -> None:
    """Pops the cu_seqlens of a forward; has no effect if others are on top."""
    if (entered := _entered.get()) and entered[-1] is cu_seqlens:
        _entered.set(entered[:-1])
