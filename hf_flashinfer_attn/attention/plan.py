"""FlashInfer attention on padded tensors, resolved once per forward: one gather, the kernels, one scatter.

Every layer of a forward asks for the same thing with other tensors. The first one makes a `PreparedAttention`, which
travels with the layout; the others find it by its signature and do nothing on the host but launch.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..kernels import flashinfer
from ..kernels.pad_head_dim import Packer, Unpacker, aligned
from ..ragged.band import CAUSAL, FULL, Pattern
from ..ragged.bias import LogitsBias
from ..ragged.layout import RaggedLayout
from ..ragged.lazy_mask import MaskSpec
from ..settings import current_settings
from ..tracing import AttentionCall, is_tracing, record_call
from .select import Decision, Path, decide_compiled

__all__ = [
    "NativeAttention",
    "PreparedAttention",
    "native",
    "native_masked",
    "prepare",
    "prepared_on",
    "takes_padding_mask",
]


@dataclass(frozen=True, slots=True)
class PreparedAttention:
    """What is fixed about the attention of one forward on one device and stream.

    Args:
        plan: The kernels, planned.
        pack: Takes query, key and value to the order of the plan.
        unpack: Takes the output back.
        record: What a trace says of a call, but for the layer.
    """

    plan: flashinfer.KernelPlan
    pack: Packer
    unpack: Unpacker
    record: AttentionCall

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: str,
        bias: LogitsBias | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes attention.

        Args:
            query: Shape `(batch, heads, q_length, head_dim)`.
            key: Shape `(batch, kv_heads, kv_length, head_dim)`.
            value: Shape `(batch, kv_heads, kv_length, value_head_dim)`.
            layer: What to call the layer in a trace.
            bias: Added to the logits.
            sinks: One logit per head that takes weight and gives nothing, shape `(heads,)`.

        Returns:
            Shape `(batch, q_length, heads, value_head_dim)`, contiguous, zero in padding.
        """
        if torch._C._cuda_getDevice() != query.get_device():
            # Kernels run on the current device, whatever device their tensors are on.
            with torch.cuda.device(query.device):
                return self(query, key, value, layer, bias, sinks)
        packed = self.pack(query, key, value)
        output = self.plan.run(*packed, bias, sinks)
        # Their memory serves the padded output.
        del packed
        output = self.unpack(output)
        if is_tracing():
            record_call(replace(self.record, layer=layer))
        return output


# Logits of padded attention in one layer below which torch's own kernel with a padding mask costs less than a wait for
# the lengths, a plan, a gather and a scatter: 0.18 ms on an H200, whatever the head_dim up to 64
# (benchmarks/results/attention_alone.json, benchmarks/NOTES.md).
SMALL_LOGITS = 1 << 26
# Slots of a batch without padding below which no plan of cuDNN's is made for its shape, unless heads are grouped.
PLANNED_SLOTS = 8192


@dataclass(frozen=True, slots=True)
class NativeAttention:
    """torch's own attention where it is the faster choice.

    That is a batch without padding, of a head_dim that FlashInfer's kernels would have to pad or of a length at which
    cuDNN is faster; and a batch so small that neither lengths nor plans are worth their host time.

    Args:
        is_causal: Whether no query sees a later key.
        sm_scale: What logits are multiplied with.
        mask: Added to the logits, shape `(batch, 1, 1, kv_length)`; or None.
        plans_nothing: Whether to call a kernel that needs no planning per shape directly, if `sdpa_kernel` allows it.
        record: What a trace says of a call, but for the layer.
    """

    is_causal: bool
    sm_scale: float
    mask: torch.Tensor | None
    plans_nothing: bool
    record: AttentionCall

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: str,
        bias: LogitsBias | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes attention; shapes as those of [`PreparedAttention`]. There is neither bias nor sinks."""
        sides, mask = (aligned(query), aligned(key), aligned(value)), self.mask
        # `sdpa_kernel` may differ from call to call.
        if not (self.plans_nothing and _may_call_by_name(mask)):
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
        if is_tracing():
            record_call(replace(self.record, layer=layer))
        return output.transpose(1, 2).contiguous()


def native(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RaggedLayout,
    pattern: Pattern,
    *,
    sm_scale: float,
    softcap: float | None,
) -> NativeAttention | None:
    """Returns torch's own attention where it is the faster choice, and the very same function.

    Arguments are those of [`prepare`].
    """
    head_dim = query.shape[-1]
    same_length = query.shape[2] == key.shape[2]
    fits = (
        layout.query.is_full
        and layout.key.is_full
        # Not packed sequences, which are rows of a layout but not of the tensors.
        and layout.query.lengths == (query.shape[2],) * query.shape[0]
        and layout.key.lengths == (key.shape[2],) * key.shape[0]
        and (pattern == FULL or (pattern == CAUSAL and same_length))
        and softcap is None
        and head_dim == value.shape[-1]
        and head_dim % 8 == 0
        and _is_faster(query.device, head_dim, query.shape[2])
        # Older GPUs have no fused kernel for grouped heads.
        and (query.shape[1] == key.shape[1] or torch.cuda.get_device_capability(query.device) >= (8, 0))
    )
    if not fits:
        return None
    record = AttentionCall("", pattern.name, "sdpa", head_dim, head_dim, None)
    is_small = query.shape[0] * query.shape[2] < PLANNED_SLOTS and query.shape[1] == key.shape[1]
    plans_nothing = is_small and _plans_shapes(query, key)
    return NativeAttention(pattern == CAUSAL, sm_scale, None, plans_nothing, record)


def _plans_shapes(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether sdpa would select cuDNN's kernel if it is enabled, which is slow to plan each new shape.

    Another kernel is then called directly: `sdpa_kernel` would select it for all threads.
    """
    # torch's choice takes empty tensors, which not every kernel does.
    is_empty = 0 in query.shape or 0 in key.shape
    is_hopper = torch.cuda.get_device_capability(query.device) == (9, 0)
    return is_hopper and not is_empty


def _may_call_by_name(mask: torch.Tensor | None) -> bool:
    """Whether cuDNN's kernel and the one that replaces it are both enabled."""
    switches = torch.backends.cuda
    is_on: bool = switches.flash_sdp_enabled() if mask is None else switches.mem_efficient_sdp_enabled()
    return is_on and bool(switches.cudnn_sdp_enabled())


def _is_faster(device: torch.device, head_dim: int, length: int) -> bool:
    """Whether torch's own attention is faster on rows of one length."""
    if head_dim not in flashinfer.KERNEL_HEAD_DIMS["auto"]:
        return True
    # There it is cuDNN's. On an H200 it takes 4% to 33% less time than our best from 128 to 1,024 slots, 8% less to
    # 3% more at 2,048, and mostly more below 128: benchmarks/results/full_batches.json. Below
    # PLANNED_SLOTS torch's flash kernel stands in for it, and takes up to 14% more: benchmarks/results/new_shapes.json.
    return head_dim <= 128 and 128 <= length <= 1024 and torch.cuda.get_device_capability(device) == (9, 0)


def takes_padding_mask(
    num_heads: int, num_kv_heads: int, head_dim: int, value_head_dim: int, softcap: float | None
) -> bool:
    """Whether full attention with a padding mask is torch's own to compute where a batch is small."""
    return softcap is None and num_heads == num_kv_heads and head_dim == value_head_dim and head_dim % 8 == 0


def native_masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spec: MaskSpec,
    *,
    sm_scale: float,
    softcap: float | None,
) -> NativeAttention | None:
    """Returns torch's own attention with a padding mask where the batch is small; else None.

    Arguments are those of [`prepare`], and what the mask was asked for. No length is read.
    """
    batch, heads, q_length, head_dim = query.shape
    kv_length = key.shape[2]
    # One query that sees all keys so far is not bounded by causality.
    is_full = spec.pattern == FULL or (
        spec.pattern == CAUSAL and q_length == 1 and spec.q_offset + 1 == spec.kv_offset + kv_length
    )
    fits = (
        is_full
        and spec.packed is None
        and takes_padding_mask(heads, key.shape[1], head_dim, value.shape[3], softcap)
        and batch * heads * q_length * kv_length < SMALL_LOGITS
    )
    if not fits or spec.padding_mask is None:
        return None
    valid = spec.padding_mask[:, None, None, spec.kv_offset : spec.kv_offset + kv_length].to(query.device)
    # A row of padding only attends to its padding: anything finite will do, and a masked row may be NaN.
    valid = valid | ~valid.any(-1, keepdim=True)
    # Rows of a multiple of 8, or else torch copies the mask in every layer.
    least = torch.finfo(query.dtype).min
    mask = torch.full((batch, 1, 1, -(-kv_length // 8) * 8), least, dtype=query.dtype, device=query.device)
    mask = mask[..., :kv_length].masked_fill_(valid, 0)
    record = AttentionCall("", spec.pattern.name, "sdpa", head_dim, head_dim, None)
    return NativeAttention(False, sm_scale, mask, _plans_shapes(query, key), record)


def prepare(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RaggedLayout,
    pattern: Pattern,
    *,
    sm_scale: float,
    softcap: float | None,
    biased: bool = False,
    sinks: bool = False,
    kernel: flashinfer.Kernel | None = None,
    note: str | None = None,
) -> PreparedAttention | Decision:
    """Plans attention of padded tensors on a layout, or decides for torch while the kernel is not compiled.

    Args:
        query: Shape `(batch, heads, q_length, head_dim)`; only its shape, dtype and device matter.
        key: Shape `(batch, kv_heads, kv_length, head_dim)`, likewise.
        value: Shape `(batch, kv_heads, kv_length, value_head_dim)`, likewise.
        layout: Which slots hold a token.
        pattern: Which keys of its row a query sees; a band.
        sm_scale: What logits are multiplied with.
        softcap: Caps logits to `softcap * tanh(logits / softcap)`.
        biased: Whether a bias will be added to the logits.
        sinks: Whether there will be attention sinks.
        kernel: What to run; by default what `choose_kernel` says.
        note: Note for traces.
    """
    device = query.device
    value_head_dim = value.shape[-1]
    head_dim = max(query.shape[-1], value_head_dim)
    if kernel is None:
        kernel = flashinfer.choose_kernel(device, head_dim, biased=biased, sinks=sinks, reach=_reach(layout, pattern))
    module = flashinfer.module_of(
        layout, head_dim=head_dim, dtype=query.dtype, left=pattern.left, softcap=softcap, biased=biased, kernel=kernel
    )
    decision = decide_compiled(module, current_settings(), of_graph=layout.graph_workspace is not None)
    if decision.path is not Path.FLASHINFER:
        return decision
    plan = flashinfer.make_plan(
        layout,
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=head_dim,
        dtype=query.dtype,
        device=device,
        left=pattern.left,
        right=pattern.right,
        sm_scale=sm_scale,
        softcap=softcap,
        biased=biased,
        sinks=sinks,
        kernel=kernel,
    )
    with torch.cuda.device(device):
        query_slots, query_tokens, key_slots = _places(layout, pattern, plan, device)
    return PreparedAttention(
        plan,
        Packer(query_slots, key_slots, plan.size),
        Unpacker(query_tokens, (query.shape[0], query.shape[2]), value_head_dim),
        AttentionCall("", pattern.name, f"flashinfer-{kernel}", head_dim, plan.size, None, note),
    )


def _reach(layout: RaggedLayout, pattern: Pattern) -> float:
    """Returns how many keys a query sees on average, causality aside."""
    total = layout.query.total_tokens
    keys = sum(q * k for q, k in zip(layout.query.lengths, layout.key.lengths)) / total if total else 0.0
    if pattern.left is None or pattern.right is None:
        return keys
    return min(keys, pattern.left + pattern.right + 1)


def prepared_on(
    layout: RaggedLayout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Pattern,
    *,
    sm_scale: float,
    softcap: float | None,
    note: str | None,
) -> PreparedAttention | Decision:
    """Returns attention that was prepared on a layout before, or prepares it; all as [`prepare`] does."""
    stream = torch.cuda.current_stream(query.device).cuda_stream
    shapes = query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype
    name = (*shapes, query.device, stream, pattern, sm_scale, softcap)
    found: PreparedAttention | None = layout.prepared.find(name)
    if found is None or torch.cuda.is_current_stream_capturing():
        made = prepare(query, key, value, layout, pattern, sm_scale=sm_scale, softcap=softcap, note=note)
        if isinstance(made, Decision):
            return made
        layout.prepared.keep(name, found := made)
    return found


_Places = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _places(layout: RaggedLayout, pattern: Pattern, plan: flashinfer.KernelPlan, device: torch.device) -> _Places:
    queries, keys = layout.query.token_map(device), layout.key.token_map(device)
    if plan.order is None:
        return (
            None if queries is None else queries.slots,
            None if queries is None else queries.tokens,
            None if keys is None else keys.slots,
        )
    stream = torch.cuda.current_stream(device).cuda_stream
    name: Hashable = ("places", pattern, device, stream)
    places: _Places | None = layout.derived.get(name)
    if places is None:
        query_order, key_order = plan.order.on(device, stream)
        slots = query_order.to(torch.int32) if queries is None else queries.slots[query_order]
        # Padding is nobody's token; the slots of queries get theirs in the new order.
        tokens = slots.new_full((layout.query.padded_shape[0] * layout.query.padded_shape[1],), -1)
        tokens.index_copy_(0, slots.long(), torch.arange(len(slots), dtype=torch.int32, device=device))
        key_slots = key_order.to(torch.int32) if keys is None else keys.slots[key_order]
        places = layout.derived[name] = slots, tokens, key_slots
    return places
