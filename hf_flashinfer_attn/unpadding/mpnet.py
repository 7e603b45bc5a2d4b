"""MPNet, which computes attention in its own code: two of its classes, with this package's attention.

Its layers pass on a mask and a bias, and nothing else; transformers 5.5 computes the mask anew. cu_seqlens therefore go
from the backbone to the encoder in a context variable, and from there to the layers with the bias.
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


# cu_seqlens of the forwards under way, None for padded ones: a hook in a forward may run another one.
_entered: ContextVar[tuple[torch.Tensor | None, ...]] = ContextVar("flashinfer_mpnet_forwards", default=())


class PackedBias(NamedTuple):
    """Bias of the longest packed row, `(1, heads, longest, longest)`, which contains the others', and cu_seqlens.

    A tuple, whose tensors accelerate and checkpoints know to move.
    """

    values: torch.Tensor
    offsets: torch.Tensor


class RaggedMPNetEncoder(MPNetEncoder):  # type: ignore[misc]
    """MPNet's encoder, whose bias is the same for all rows, and as wide as the longest."""

    def compute_position_bias(
        self, x: torch.Tensor, position_ids: torch.Tensor | None = None, num_buckets: int = 32
    ) -> torch.Tensor | PackedBias:
        """Makes the bias of a forward for hidden states of shape `(batch, slots, width)`."""
        if (offsets := next(reversed(_entered.get()), None)) is None:
            alone: torch.Tensor = super().compute_position_bias(x[:1], position_ids, num_buckets)
            return alone
        if is_of_graph(offsets):
            raise UnsupportedAttentionError(
                "a relative position bias, as large as the longest row, in a captured graph",
                "Use unpad without cuda_graphs for MPNet.",
            )
        shape = (x.shape[0], x.shape[1])
        longest = packed_state(self, offsets, offsets, (shape, shape)).layout().query.max_length
        # Of hidden states, only shape and device are read.
        bias = super().compute_position_bias(x.new_empty(1, longest), position_ids, num_buckets)
        return PackedBias(bias, offsets)

    def relative_position_bucket(
        self, relative_position: torch.Tensor, num_buckets: int = 32, max_distance: int = 128
    ) -> torch.Tensor:
        """Finds the bucket of each distance once, where the model would for each pair of slots."""
        if relative_position.ndim != 2:
            of_pairs: torch.Tensor = super().relative_position_bucket(relative_position, num_buckets, max_distance)
            return of_pairs
        length = relative_position.shape[-1]
        # Computed where the model does, for the same rounding. But what travels to a GPU is short, and nobody waits.
        distances = torch.arange(1 - length, length, device=relative_position.device)
        buckets: torch.Tensor = super().relative_position_bucket(distances, num_buckets, max_distance)
        device = self.relative_attention_bias.weight.device
        if device.type != "meta":
            buckets = buckets.to(device, non_blocking=True)
        # Query i is i slots ahead of the first key.
        return buckets.unfold(0, length, 1).flip(0)


class RaggedMPNetSelfAttention(MPNetSelfAttention):  # type: ignore[misc]
    """MPNet's attention, computed by ours where nobody asks for its weights and the mask is ours."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | PackedBias | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Projects hidden states of shape `(batch, slots, width)`, attends, and projects back to the same shape."""
        bias, offsets = position_bias if isinstance(position_bias, PackedBias) else (position_bias, None)
        if offsets is None and (output_attentions or not isinstance(attention_mask, RaggedMask)):
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
            attention_mask if offsets is None else None,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.attention_head_size**-0.5,
            is_causal=False,
            position_bias=bias,
            cu_seq_lens_q=offsets,
            cu_seq_lens_k=offsets,
        )
        return (self.o(output.flatten(2)),)


def reason_to_refuse(backbone: PreTrainedModel) -> str | None:
    """Returns why the attention of a model cannot be replaced; None if it can."""
    parameters = list(inspect.signature(MPNetSelfAttention.forward).parameters)[1:5]
    known = ["hidden_states", "attention_mask", "position_bias", "output_attentions"]
    methods = ("compute_position_bias", "relative_position_bucket")
    if parameters != known or not all(hasattr(MPNetEncoder, name) for name in methods):
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
    """Replaces a model's attention with ours. Only classes of modules change: copies, pickles and weights do not."""
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
    """Returns the attributes in which accelerate keeps the forward of a module's class, around hooks and after them."""
    kept, own = vars(module), type(module).forward
    return [name for name in ("forward", "_old_forward") if getattr(kept.get(name), "__func__", None) is own]


def enter(offsets: torch.Tensor | None) -> None:
    """Tells the encoder the cu_seqlens of a forward, None of a padded one, until `leave` is called with the same."""
    _entered.set((*_entered.get(), offsets))


def leave(offsets: torch.Tensor | None) -> None:
    """Returns to the outer forward; without effect where another one, of other cu_seqlens, was entered last."""
    if (entered := _entered.get()) and entered[-1] is offsets:
        _entered.set(entered[:-1])
