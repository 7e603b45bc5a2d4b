"""Attention plans: host work done once per spec and forward. Running a plan only launches kernels."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

from ..kernels import flashinfer, torch_ragged
from ..kernels.flashinfer import Kernel, KernelPlan
from ..kernels.pad_head_dim import GatherQkv, ScatterOutput, aligned, scratch_bytes
from ..kernels.scratch import scratch_of
from ..kernels.wrapper_pool import PlanKey
from ..log import log_once
from ..ragged.band import CAUSAL
from ..ragged.forward_state import ForwardState
from ..ragged.layout import RaggedLayout
from ..ragged.mask_state import MaskState
from ..settings import Settings
from ..tracing import AttentionCall
from .select import Backend, Choice, compiling_reason, select_kernel, uses_flash_directly
from .spec import AttentionSpec

__all__ = ["AttentionPlan", "FlashInferPlan", "SdpaPlan", "TorchPlan", "make_plan", "plan_flashinfer"]


@dataclass(frozen=True, slots=True)
class FlashInferPlan:
    """One gather, FlashInfer's kernels, one scatter.

    Args:
        kernels: The planned kernels.
        gather: Packs query, key and value.
        scatter: Unpacks the output.
        record: Trace of a call, without its layer.
    """

    kernels: KernelPlan
    gather: GatherQkv
    scatter: ScatterOutput
    record: AttentionCall

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes attention.

        Args:
            query: Shape `(batch, heads, q_length, head_dim)`.
            key: Shape `(batch, kv_heads, kv_length, head_dim)`.
            value: Shape `(batch, kv_heads, kv_length, value_head_dim)`.
            bias: Added to the logits by padded position, shape `(rows, heads, q_length, kv_length)`.
            sinks: Attention sinks, one logit per head, shape `(heads,)`.

        Returns:
            Shape `(batch, q_length, heads, value_head_dim)`, contiguous, zero in padding.
        """
        if query.is_cuda and torch._C._cuda_getDevice() != query.get_device():
            # Kernels run on the current device, even if their tensors are on another one.
            with torch.cuda.device(query.device):
                return self(query, key, value, bias, sinks)
        packed_query, packed_key, packed_value = self.gather(query, key, value)
        output = None if self.scatter.is_view(packed_query.shape[2]) else self.gather.output_buffer
        if output is None:
            # Tokens of no row get no output, but become keys and values of the next layer. fa3 reads some of them with
            # the last row, at weight zero: a NaN there would stay NaN.
            make = torch.zeros if self.kernels.in_graph else torch.empty
            output = make(packed_query.shape, dtype=query.dtype, device=query.device)
        self.kernels.run(packed_query, packed_key, packed_value, output, bias, sinks)
        return self.scatter(output)


@dataclass(frozen=True, slots=True)
class SdpaPlan:
    """torch's fused kernels on padded tensors, without bias and sinks; called like [`FlashInferPlan`].

    Args:
        is_causal: Whether no query sees a later key.
        sm_scale: Factor of the logits.
        mask: Added to the logits, shape `(batch, 1, 1, kv_length)`; or None.
        calls_directly: Whether to call torch's flash or memory-efficient kernel directly, if `sdpa_kernel` allows it:
            they have no per-shape planning, unlike cuDNN's.
        record: Trace of a call, without its layer.
    """

    is_causal: bool
    sm_scale: float
    mask: torch.Tensor | None
    calls_directly: bool
    record: AttentionCall

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        sides, mask = (aligned(query), aligned(key), aligned(value)), self.mask
        # `sdpa_kernel` may change between calls.
        if not (self.calls_directly and _may_call_directly(mask)):
            output = F.scaled_dot_product_attention(
                *sides, mask, is_causal=self.is_causal, scale=self.sm_scale, enable_gqa=query.shape[1] != key.shape[1]
            )
        elif mask is None:
            output = torch.ops.aten._scaled_dot_product_flash_attention(
                *sides, 0.0, self.is_causal, False, scale=self.sm_scale
            )[0]
        else:
            whole = mask.expand(-1, query.shape[1], query.shape[2], -1)
            output = torch.ops.aten._scaled_dot_product_efficient_attention(
                *sides, whole, False, 0.0, self.is_causal, scale=self.sm_scale
            )[0]
        return output.transpose(1, 2).contiguous()


def _may_call_directly(mask: torch.Tensor | None) -> bool:
    """Whether cuDNN's kernel and the one that replaces it are both enabled."""
    switches = torch.backends.cuda
    is_on: bool = switches.flash_sdp_enabled() if mask is None else switches.mem_efficient_sdp_enabled()
    return is_on and bool(switches.cudnn_sdp_enabled())


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """Ragged attention in torch, differentiable; called like [`FlashInferPlan`]."""

    layout: RaggedLayout
    spec: AttentionSpec
    record: AttentionCall

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        layout, spec = self.layout, self.spec
        output = torch_ragged.attend(
            layout.query.gather(query.transpose(1, 2)),
            layout.key.gather(key.transpose(1, 2)),
            layout.key.gather(value.transpose(1, 2)),
            layout,
            left=spec.pattern.left,
            right=spec.pattern.right,
            sm_scale=spec.sm_scale,
            softcap=spec.softcap,
            bias=bias,
            sinks=sinks,
            dropout=spec.dropout,
        )
        return layout.query.scatter(output)


AttentionPlan: TypeAlias = FlashInferPlan | SdpaPlan | TorchPlan


def make_plan(spec: AttentionSpec, choice: Choice, state: ForwardState, settings: Settings) -> AttentionPlan:
    """Makes the plan of a spec, not for dense attention; the host may wait for row lengths.

    Raises:
        UnsupportedAttentionError: If a CUDA graph is being captured and FlashInfer has no plan, or a batch is too large
            for the kernel's addresses.
        BackendUnavailableError: If a kernel cannot be compiled, or the settings forbid it.
    """
    if choice.backend is Backend.SDPA:
        assert isinstance(state, MaskState)
        state.require_unwritten()
        return _sdpa_plan(spec, _additive_mask(spec, state))
    layout = state.layout(keep_padded_queries=spec.keeps_padded_queries)
    note = spec.padded_queries if layout.keeps_padded_queries else None
    if note is not None:
        log_once(note)
    if choice.backend is Backend.FLASHINFER:
        backend, kernel = select_kernel(spec, layout, settings)
        if backend is Backend.SDPA:
            return _sdpa_plan(spec, None)
        made = plan_flashinfer(spec, layout, kernel, settings, state=state, note=note)
        if isinstance(made, FlashInferPlan):
            return made
        choice = Choice(Backend.TORCH, made)
    return TorchPlan(layout, spec, _record(spec, "torch", spec.widest_head_dim, choice.reason, note))


def plan_flashinfer(
    spec: AttentionSpec,
    layout: RaggedLayout,
    kernel: Kernel,
    settings: Settings,
    *,
    state: ForwardState | None = None,
    note: str | None = None,
) -> FlashInferPlan | str:
    """Plans a kernel of FlashInfer; returns the reason of a fallback while the kernel is not compiled.

    `state` leases scratch memory (without it, each call allocates); `note` is for traces.
    """
    band, device = spec.pattern, spec.device
    size, stream = flashinfer.padded_head_dim(spec.widest_head_dim), _stream_of(device)
    softcap = 0.0 if spec.softcap is None else float(spec.softcap)
    key = PlanKey(
        kernel, spec.num_heads, spec.num_kv_heads, size, spec.dtype, False, -1, spec.sm_scale, softcap, device, stream,
        spec.biased, spec.sinks,
    )  # fmt: skip
    module = flashinfer.module_of(layout, key, band.left)
    reason = compiling_reason(module, settings, in_graph=layout.graph_workspace is not None)
    if reason is not None:
        return reason
    plan = flashinfer.make_plan(layout, key, band.left, band.right)
    with torch.cuda.device(device):
        queries, tokens, keys = _moves(layout, plan, device, stream)
    scratch = None
    # A captured graph would never return its lease.
    is_of_graph = layout.graph_workspace is not None or torch.cuda.is_current_stream_capturing()
    if state is not None and not is_of_graph:
        num_queries = spec.rows * spec.q_length if queries is None else len(queries)
        num_keys = spec.rows * spec.kv_length if keys is None else len(keys)
        if queries is not None or keys is not None or spec.head_dim < size or spec.value_head_dim < size:
            num_bytes = scratch_bytes(
                num_queries, num_keys, spec.num_heads, spec.num_kv_heads, size, spec.value_head_dim, spec.dtype.itemsize
            )
            scratch = scratch_of(state, device, stream, num_bytes)
    return FlashInferPlan(
        plan,
        GatherQkv(queries, keys, size, scratch),
        ScatterOutput(tokens, (spec.rows, spec.q_length), spec.value_head_dim),
        _record(spec, f"flashinfer-{kernel}", size, None, note),
    )


_Moves = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _moves(layout: RaggedLayout, plan: KernelPlan, device: torch.device, stream: int) -> _Moves:
    """Returns the padded positions of packed queries, the token at each padded position, and key positions."""
    queries, keys, order = layout.query.token_map(device), layout.key.token_map(device), plan.order
    if order is None:
        return (
            None if queries is None else queries.positions,
            None if queries is None else queries.tokens,
            None if keys is None else keys.positions,
        )
    # The layout keeps the order alive, so its id is unique.
    name: Hashable = "moves", id(order), device, stream
    moves: _Moves | None = layout.derived.get(name)
    if moves is None:
        query_order, key_order = (side.to(device, non_blocking=True) for side in (order.queries, order.keys))
        positions = query_order.to(torch.int32) if queries is None else queries.positions[query_order]
        # Inverse of `positions`; -1 for padding.
        tokens = positions.new_full((layout.query.padded_shape[0] * layout.query.padded_shape[1],), -1)
        tokens.index_copy_(0, positions.long(), torch.arange(len(positions), dtype=torch.int32, device=device))
        moves = positions, tokens, key_order.to(torch.int32) if keys is None else keys.positions[key_order]
        layout.derived[name] = moves
    return moves


def _sdpa_plan(spec: AttentionSpec, mask: torch.Tensor | None) -> SdpaPlan:
    record = _record(spec, "sdpa", spec.head_dim, None, None)
    directly = uses_flash_directly(spec, masked=mask is not None)
    return SdpaPlan(mask is None and spec.pattern == CAUSAL, spec.sm_scale, mask, directly, record)


def _additive_mask(spec: AttentionSpec, state: MaskState) -> torch.Tensor:
    """Returns the additive mask of valid keys, shape `(batch, 1, 1, kv_length)`; no row lengths are read."""
    mask, kv_length = state.spec, spec.kv_length
    assert mask.padding_mask is not None
    valid = mask.padding_mask[:, None, None, mask.kv_offset : mask.kv_offset + kv_length].to(spec.device)
    # An all-padding row sees all keys: its result is unused but must be finite, and a fully masked row may be NaN.
    valid = valid | ~valid.any(-1, keepdim=True)
    # Row strides are multiples of 8; otherwise torch copies the mask in every layer.
    least = torch.finfo(spec.dtype).min
    values = torch.full((spec.rows, 1, 1, -(-kv_length // 8) * 8), least, dtype=spec.dtype, device=spec.device)
    return values[..., :kv_length].masked_fill_(valid, 0)


def _record(
    spec: AttentionSpec, kernel: str, padded_head_dim: int, reason: str | None, note: str | None
) -> AttentionCall:
    return AttentionCall("", spec.pattern.name, kernel, spec.widest_head_dim, padded_head_dim, reason, note)


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def plan_cache_key(spec: AttentionSpec, state: ForwardState, settings: Settings) -> Hashable:
    """Returns the key of a plan in the plan cache of its forward."""
    # A forward's scratch memory belongs to one thread.
    thread = 0 if state.is_shared else threading.get_ident()
    return spec, _stream_of(spec.device), thread, settings
