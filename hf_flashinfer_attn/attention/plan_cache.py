"""Per-forward plan cache: later layers reuse the plan of an earlier layer if their guards are equal."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch

from ..ragged.forward_state import ForwardState, attached_state, uniform_state
from ..ragged.lazy_mask import RaggedMask
from ..settings import current_settings
from .plan import AttentionPlan
from .quirks import PACKED_IMAGES, is_one_of
from .spec import LayerArguments

__all__ = ["Found", "find_plan"]


class Found(NamedTuple):
    """Result of a lookup: the state of the forward, the guard of the call, and the cached plan or None."""

    state: ForwardState
    pattern: object
    guard: tuple[Any, ...]
    plan: AttentionPlan | None

    def keep(self, plan: AttentionPlan) -> None:
        """Caches a plan for the next layers."""
        self.state.recent[self.pattern] = self.guard, plan


def find_plan(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    arguments: LayerArguments,
) -> Found | None:
    """Looks up the plan of an earlier layer of the forward, without parsing the arguments of the call.

    Returns:
        None if no plan may be reused: the call has other tensors than query, key and value, needs gradients or weights,
        is recorded or captured, is on the meta device, or its mask was modified.
    """
    has_other_tensors = arguments.position_bias is not None or arguments.s_aux is not None
    if arguments.dropout or arguments.output_attentions or has_other_tensors:
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    is_cuda = query.is_cuda
    # The cast of float32 depends on autocast and the layer. Other devices have streams that cannot be compared.
    if query.dtype == torch.float32 if is_cuda else query.device.type != "cpu":
        return None
    # Tensor factors may change between calls. Tangents, tracers and captures need the driver's checks.
    if (
        isinstance(arguments.scaling, torch.Tensor)
        or isinstance(arguments.softcap, torch.Tensor)
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or (is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return None
    state: ForwardState | None
    pattern: object = None
    cu_seqlens = arguments.cu_seq_lens_q
    if isinstance(mask, RaggedMask):
        if mask.was_modified:
            return None
        state, pattern = mask.state, mask.state.spec.pattern
        if cu_seqlens is not None and state.spec.padding_mask is not None:
            return None
    elif mask is not None or arguments.sliding_window is not None:
        return None
    else:
        state = None
    if cu_seqlens is not None and arguments.cu_seq_lens_k is not None:
        packed = attached_state(cu_seqlens)
        shapes = (query.shape[0], query.shape[2]), (key.shape[0], key.shape[2])
        if packed is None or not packed.is_of(module, cu_seqlens, arguments.cu_seq_lens_k, shapes):
            return None
        state = packed
    elif state is None:
        if query.shape[0] != key.shape[0]:
            return None
        if arguments.position_ids is not None and is_one_of(type(module), PACKED_IMAGES):
            return None
        state = uniform_state(query.shape[0], query.shape[2], key.shape[2])
    device = query.get_device() if is_cuda else -1
    guard = (
        # The config outlives the mask, so its id is unique. Without one, only causality depends on the module.
        type(module), id(getattr(module, "config", None)), getattr(module, "is_causal", None), query.shape, key.shape,
        value.shape, query.dtype, key.dtype, value.dtype, arguments.scaling, arguments.is_causal, arguments.softcap,
        device, torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0, current_settings(),
        0 if state.is_shared else threading.get_ident(),
    )  # fmt: skip
    recent = state.recent.get(pattern)
    return Found(state, pattern, guard, recent[1] if recent is not None and recent[0] == guard else None)
