"""One attention call on ragged tokens: the numbers, and the record of it for `trace`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from ..errors import UnsupportedAttentionError
from ..kernels import flashinfer
from ..kernels import torch_ragged as reference
from ..log import log_once
from ..ragged.band import Pattern
from ..ragged.bias import LogitsBias
from ..ragged.layout import RaggedLayout
from ..settings import current_settings
from ..tracing import AttentionCall, is_tracing, record_call
from .select import AttentionRequest, Decision, Path, decide, decide_compiled

__all__ = ["RaggedCall", "attend_ragged", "decide_ragged", "needs_grad", "note_of"]


@dataclass(frozen=True, slots=True)
class RaggedCall:
    """Attention over ragged tokens.

    Args:
        query: Shape `(total_query_tokens, heads, head_dim)`.
        key: Shape `(total_key_tokens, kv_heads, head_dim)`.
        value: Shape `(total_key_tokens, kv_heads, value_head_dim)`.
        layout: Which tokens belong to which row.
        pattern: Which keys of its row a query sees; a band.
        sm_scale: What logits are multiplied with.
        softcap: Caps logits to `softcap * tanh(logits / softcap)`.
        dropout: Probability of dropping an attention weight.
        layer: What to call the layer in a trace.
        bias: Added to the logits.
        sinks: One logit per head that takes weight and gives nothing, shape `(heads,)`.
        note: Shown in traces, besides the fallback reason.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: RaggedLayout
    pattern: Pattern
    sm_scale: float
    softcap: float | None
    dropout: float
    layer: str
    bias: LogitsBias | None = None
    sinks: torch.Tensor | None = None
    note: str | None = None


def note_of(layout: RaggedLayout, kept_queries: str | None) -> str | None:
    """Logs once why padded queries are computed, and returns the reason; None if they are not.

    Args:
        layout: Layout of the call.
        kept_queries: Why padded queries, if there are any, must be computed.
    """
    if kept_queries is None or not layout.keeps_padded_queries:
        return None
    log_once(kept_queries)
    return kept_queries


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd expects a gradient through a call with these inputs.

    Raises:
        UnsupportedAttentionError: If it expects a tangent, which the kernel would silently drop.
    """
    if forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    ):
        raise UnsupportedAttentionError(
            "forward-mode differentiation (torch.autograd.forward_ad, torch.func.jvp)",
            "Use attn_implementation='eager', or reverse mode.",
        )
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def decide_ragged(call: RaggedCall) -> Decision:
    """Chooses the path of a call that comes without a mask.

    Raises:
        BackendUnavailableError: If the backend asked for by name cannot run.
        UnsupportedAttentionError: If a fallback is needed and forbidden.
    """
    request = AttentionRequest(
        pattern=call.pattern,
        device=call.query.device,
        dtype=call.query.dtype,
        head_dim=max(call.query.shape[-1], call.value.shape[-1]),
        needs_grad=needs_grad(call.query, call.key, call.value, call.sinks),
        dropout=call.dropout,
    )
    return decide(request, current_settings())


def attend_ragged(call: RaggedCall, decision: Decision) -> torch.Tensor:
    """Runs a call on the ragged path that was decided on.

    Returns:
        Shape `(total_query_tokens, heads, value_head_dim)`.
    """
    query, value, pattern = call.query, call.value, call.pattern
    if (len(query), len(call.key)) != (call.layout.query.total_tokens, call.layout.key.total_tokens):
        raise ValueError(
            f"{len(query)} queries and {len(call.key)} keys do not fit a layout of {call.layout.query.total_tokens} "
            f"and {call.layout.key.total_tokens} tokens; gather them with the layout's own sides."
        )
    head_dim = max(query.shape[-1], value.shape[-1])
    name, padded_head_dim = "torch", head_dim
    if decision.path is Path.FLASHINFER:
        kernel = flashinfer.choose_kernel(
            query.device, head_dim, biased=call.bias is not None, sinks=call.sinks is not None
        )
        module = flashinfer.module_of(
            call.layout, head_dim=head_dim, dtype=query.dtype, left=pattern.left, softcap=call.softcap,
            biased=call.bias is not None, kernel=kernel,
        )  # fmt: skip
        decision = decide_compiled(module, current_settings(), of_graph=call.layout.graph_workspace is not None)
    if decision.path is Path.FLASHINFER:
        name, padded_head_dim = f"flashinfer-{kernel}", flashinfer.padded_head_dim(head_dim, kernel)
        output = flashinfer.attend(
            query,
            call.key,
            value,
            call.layout,
            left=pattern.left,
            right=pattern.right,
            sm_scale=call.sm_scale,
            softcap=call.softcap,
            bias=call.bias,
            sinks=call.sinks,
            kernel=kernel,
        )
    else:
        output = reference.attend(
            query,
            call.key,
            value,
            call.layout,
            left=pattern.left,
            right=pattern.right,
            sm_scale=call.sm_scale,
            softcap=call.softcap,
            bias=call.bias,
            sinks=call.sinks,
            dropout=call.dropout,
        )
    if is_tracing():
        record_call(
            AttentionCall(call.layer, pattern.name, name, head_dim, padded_head_dim, decision.reason, call.note)
        )
    return output
