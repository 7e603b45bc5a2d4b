"""One attention call on ragged tokens, from the decision to the numbers, with its record for `trace`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .backends import flashinfer, reference
from .dispatch import AttentionRequest, Decision, Path, decide
from .layout import RaggedLayout
from .pattern import CAUSAL, FULL
from .settings import current_settings
from .trace import AttentionCall, is_tracing, record_call

__all__ = ["RaggedCall", "attend_ragged", "needs_grad"]


@dataclass(frozen=True, slots=True)
class RaggedCall:
    """Attention over ragged tokens.

    Args:
        query: Shape `(total_query_tokens, heads, head_dim)`.
        key: Shape `(total_key_tokens, kv_heads, head_dim)`.
        value: Shape `(total_key_tokens, kv_heads, value_head_dim)`.
        layout: Which tokens belong to which row.
        causal: Whether a query sees no later key; aligned to the last key of a row.
        sm_scale: What logits are multiplied with.
        dropout: Probability of dropping an attention weight.
        layer: What to call the layer in a trace.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: RaggedLayout
    causal: bool
    sm_scale: float
    dropout: float
    layer: str


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd expects a gradient through a call with these inputs."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def attend_ragged(call: RaggedCall, decision: Decision | None = None) -> torch.Tensor:
    """Runs a call on the path that `decision`, or else the dispatcher, chooses.

    Returns:
        Shape `(total_query_tokens, heads, value_head_dim)`.

    Raises:
        BackendUnavailableError: If the backend asked for by name cannot run.
        UnsupportedAttentionError: If a fallback is needed and forbidden.
    """
    query, key, value = call.query, call.key, call.value
    head_dim = max(query.shape[-1], value.shape[-1])
    pattern = CAUSAL if call.causal else FULL
    if decision is None:
        request = AttentionRequest(
            pattern=pattern,
            device=query.device,
            dtype=query.dtype,
            head_dim=head_dim,
            needs_grad=needs_grad(query, key, value),
            dropout=call.dropout,
        )
        decision = decide(request, current_settings())
    kernel, padded_head_dim = "torch", head_dim
    if decision.path is Path.FLASHINFER:
        choice = flashinfer.choose_kernel(query.device, head_dim)
        kernel, padded_head_dim = f"flashinfer-{choice}", flashinfer.padded_head_dim(head_dim, choice)
        output = flashinfer.attend(
            query, key, value, call.layout, causal=call.causal, sm_scale=call.sm_scale, kernel=choice
        )
    else:
        output = reference.attend(
            query, key, value, call.layout, causal=call.causal, sm_scale=call.sm_scale, dropout=call.dropout
        )
    if is_tracing():
        record_call(AttentionCall(call.layer, pattern.name, kernel, head_dim, padded_head_dim, decision.reason))
    return output
