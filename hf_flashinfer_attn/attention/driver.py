"""Attention driver: parses a call into a spec, selects a backend, makes or reuses a plan, and runs it."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..errors import UnsupportedAttentionError
from ..kernels import dense
from ..ragged.forward_state import attached_state
from ..settings import current_settings
from ..tracing import AttentionCall, is_tracing, record_call
from .dense_mask import bias_of_packed, dense_mask_of
from .plan import AttentionPlan, TorchPlan, make_plan, plan_cache_key
from .recorders import refuse_recording
from .select import Backend, Choice, select
from .spec import WINDOW_KEEPS, AttentionInputs, AttentionSpec

__all__ = ["attend", "is_of_graph"]

_MOST_PLANS = 64


def attend(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor | None, AttentionPlan | None]:
    """Computes attention.

    Args:
        inputs: Tensors and parsed arguments.

    Returns:
        The output, shape `(batch, q_length, heads, value_head_dim)`; the weights, or None; and the plan if later layers
        of the forward may reuse it, or None.

    Raises:
        BackendUnavailableError: If the backend of the settings cannot run.
        UnsupportedAttentionError: If the call is not supported, or the settings forbid its fallback.
    """
    refuse_recording()
    settings, spec = current_settings(), inputs.spec()
    choice = select(spec, settings)
    _refuse_lengths_in_graph(inputs, choice)
    if choice.backend is Backend.DENSE:
        output, weights = _attend_dense(inputs, spec, choice)
        return output, weights, None
    if choice.backend is not Backend.TORCH and not inputs.query.dtype == inputs.key.dtype == inputs.value.dtype:
        raise UnsupportedAttentionError(
            f"query, key and value of dtypes {inputs.query.dtype}, {inputs.key.dtype} and {inputs.value.dtype}",
            "Make the dtypes of the model and of its cache the same.",
        )
    state = inputs.find_state()
    if spec.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A captured graph owns its memory, so its plan must not be cached.
        return _run(make_plan(spec, choice, state, settings), inputs), None, None
    key = plan_cache_key(spec, state, settings)
    cached: AttentionPlan | None = state.plans.get(key)
    if cached is None:
        cached = make_plan(spec, choice, state, settings)
        if choice.backend is not Backend.TORCH and isinstance(cached, TorchPlan):
            # FlashInfer's kernel is still compiling.
            return _run(cached, inputs), None, None
        if len(state.plans) >= _MOST_PLANS:
            state.plans.clear()
        state.plans[key] = cached
    return _run(cached, inputs), None, cached


def _run(plan: AttentionPlan, inputs: AttentionInputs) -> torch.Tensor:
    """Runs a plan, and records the call if a trace is active."""
    sinks = None if inputs.sinks is None else inputs.sinks.reshape(-1)
    output = plan(inputs.query, inputs.key, inputs.value, inputs.bias(), sinks)
    if is_tracing():
        record_call(replace(plan.record, layer=inputs.name))
    return output


def _attend_dense(
    inputs: AttentionInputs, spec: AttentionSpec, choice: Choice
) -> tuple[torch.Tensor, torch.Tensor | None]:
    cu_seqlens, position_bias = inputs.cu_seqlens, inputs.position_bias
    if inputs.images is not None:
        side = inputs.find_state().layout().query.cu_seqlens_host
        cu_seqlens = side, side
    if inputs.is_packed and (bias := inputs.bias()) is not None:
        position_bias = bias_of_packed(bias, inputs.find_state().layout())
    output, weights = dense.attend(
        inputs.query,
        inputs.key,
        inputs.value,
        dense_mask_of(inputs.mask, cu_seqlens, position_bias, inputs.query, inputs.key, inputs.pattern),
        sm_scale=spec.sm_scale,
        softcap=spec.softcap,
        sinks=None if inputs.sinks is None else inputs.sinks.reshape(-1),
        dropout=spec.dropout,
        return_weights=spec.needs_weights,
    )
    if is_tracing():
        head_dim = spec.widest_head_dim
        note = spec.padded_queries if spec.whole_mask == WINDOW_KEEPS else None
        record_call(AttentionCall(inputs.name, spec.pattern.name, "dense", head_dim, head_dim, choice.reason, note))
    return output, weights


def is_of_graph(cu_seqlens: torch.Tensor) -> bool:
    """Whether cu_seqlens belong to a captured graph, which is replayed with other lengths."""
    state = attached_state(cu_seqlens)
    return state is not None and state.layout().graph_workspace is not None


def _refuse_lengths_in_graph(inputs: AttentionInputs, choice: Choice) -> None:
    """Raises if a captured graph would read lengths on the host: its replays would repeat the captured lengths."""
    if inputs.cu_seqlens is None or not is_of_graph(inputs.cu_seqlens[0]):
        return
    if choice.backend is Backend.FLASHINFER and inputs.position_bias is None:
        return
    is_biased = inputs.position_bias is not None
    what = "a position_bias" if is_biased else f"{choice.backend.value} attention ({choice.reason})"
    raise UnsupportedAttentionError(f"{what} in a captured graph", "Use unpad without cuda_graphs for this model.")
