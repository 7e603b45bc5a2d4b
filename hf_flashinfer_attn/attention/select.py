"""Selection of a backend and a kernel for a spec: all rules, thresholds and fallbacks. Runs without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from ..errors import BackendUnavailableError, UnsupportedAttentionError
from ..kernels import flashinfer, jit
from ..kernels.flashinfer import Kernel
from ..kernels.modules import KernelModule
from ..log import log_once
from ..ragged.band import CAUSAL, FULL, Opaque
from ..ragged.layout import RaggedLayout
from ..settings import Settings
from .spec import WHOLE_MASK_FEATURES, AttentionSpec

__all__ = [
    "RULES",
    "Backend",
    "Choice",
    "KernelPendingError",
    "Rule",
    "compiling_reason",
    "fallback_of",
    "kernel_for",
    "may_run_sdpa",
    "select",
    "select_kernel",
    "uses_flash_directly",
]


class Backend(Enum):
    """Implementations of attention."""

    FLASHINFER = "flashinfer"
    SDPA = "sdpa"
    TORCH = "torch"
    DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend, and the reason of a fallback; None if the settings select the backend or it is faster."""

    backend: Backend
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """A feature that FlashInfer's kernels do not support, and the backend that does.

    Args:
        feature: Name in the support table.
        backend: Backend that supports it.
        reason: Returns the reason of the fallback if a spec has the feature; None otherwise.
    """

    feature: str
    backend: Backend
    reason: Callable[[AttentionSpec], str | None]


def _flag(feature: str, backend: Backend, applies: Callable[[AttentionSpec], bool]) -> Rule:
    return Rule(feature, backend, lambda spec: feature if applies(spec) else None)


def _needs_whole_mask(feature: str) -> Rule:
    return _flag(feature, Backend.DENSE, lambda spec: spec.whole_mask == feature)


# In order: features that need the whole mask, then features that need another kernel.
RULES: tuple[Rule, ...] = (
    _flag("output_attentions=True", Backend.DENSE, lambda spec: spec.needs_weights),
    _needs_whole_mask(WHOLE_MASK_FEATURES[0]),
    Rule(
        "user 4D masks, additive masks, chunks, image blocks, any mask that is not recognised",
        Backend.DENSE,
        lambda spec: f"the mask {spec.pattern.name}" if isinstance(spec.pattern, Opaque) else None,
    ),
    *map(_needs_whole_mask, WHOLE_MASK_FEATURES[1:]),
    _flag(
        "position_bias together with a window or softcap",
        Backend.TORCH,
        lambda spec: spec.biased and (spec.pattern.is_window or spec.softcap is not None),
    ),
    _flag("gradients (the kernels are forward only)", Backend.TORCH, lambda spec: spec.needs_grad),
    Rule("dropout in training", Backend.TORCH, lambda spec: f"dropout {spec.dropout}" if spec.dropout > 0 else None),
    Rule(
        "float32 and other dtypes than float16 and bfloat16",
        Backend.TORCH,
        lambda spec: flashinfer.dtype_reason(spec.dtype, _capability(spec.device)),
    ),
    Rule("head_dim above 256", Backend.TORCH, lambda spec: flashinfer.head_dim_reason(spec.widest_head_dim)),
)

# Below this number of logits per layer, torch's kernel with a padding mask is faster: it needs no row lengths, plan,
# gather or scatter, which cost 0.18 ms on an H200 at any head_dim up to 64 (benchmarks/results/attention_alone.json,
# benchmarks/NOTES.md).
SMALL_LOGITS = 1 << 26
# Below this number of padded positions, cuDNN is not used: it plans each new shape.
PLANNED_POSITIONS = 8192
# Below this number of keys per query, fa2's smaller tiles beat fa3 (benchmarks/results/attention_alone.json).
FA3_KEYS = 256


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def fallback_of(spec: AttentionSpec) -> Choice | None:
    """Returns the fallback of a spec and its reason; None if FlashInfer's kernels support the spec."""
    for rule in RULES:
        if (feature := rule.reason(spec)) is not None:
            return Choice(rule.backend, feature)
    return None


def select(spec: AttentionSpec, settings: Settings) -> Choice:
    """Selects a backend before row lengths are known.

    Returns:
        The backend; for `Backend.FLASHINFER`, [`select_kernel`] selects again once lengths are known.

    Raises:
        BackendUnavailableError: If FlashInfer cannot run on the device, and backend="flashinfer" or strict=True forbids
            a fallback.
        UnsupportedAttentionError: If FlashInfer does not support the spec, and backend="flashinfer" or strict=True
            forbids a fallback.
    """
    unavailable = flashinfer.unavailable_reason(spec.device) if settings.backend != "torch" else None
    if unavailable is not None and settings.backend == "flashinfer":
        raise BackendUnavailableError("flashinfer", *unavailable)
    if unavailable is not None and settings.strict:
        reason, way_out = unavailable
        raise BackendUnavailableError("flashinfer", f"{reason}, and strict=True forbids a fallback", way_out)
    fallback = fallback_of(spec)
    if settings.backend == "torch" or unavailable is not None:
        if unavailable is not None:
            log_once(f"attention runs on the torch backend: {unavailable[0]}")
        if fallback is not None and fallback.backend is Backend.DENSE:
            return fallback
        return Choice(Backend.TORCH, None if unavailable is None else unavailable[0])
    if fallback is None:
        logits = spec.rows * spec.num_heads * spec.q_length * spec.kv_length
        if settings.backend == "auto" and may_run_sdpa(spec) and spec.sees_all_valid and logits < SMALL_LOGITS:
            return Choice(Backend.SDPA)
        return Choice(Backend.FLASHINFER)
    if settings.backend == "flashinfer" or settings.strict:
        named = "backend='flashinfer'" if settings.backend == "flashinfer" else "strict=True"
        raise UnsupportedAttentionError(
            f"FlashInfer's kernels do not compute {fallback.reason}, and {named} forbids a fallback",
            "Use hf_flashinfer_attn.configure(backend='auto', strict=False) to let "
            f"{'dense' if fallback.backend is Backend.DENSE else 'torch'} attention serve such calls.",
        )
    log_once(f"falling back to {fallback.backend.value} attention: {fallback.reason}")
    return fallback


def may_run_sdpa(spec: AttentionSpec) -> bool:
    """Whether torch's fused kernels with a padding mask support the spec."""
    return (
        spec.is_plain
        and spec.softcap is None
        and spec.num_heads == spec.num_kv_heads
        and spec.head_dim == spec.value_head_dim
        and spec.head_dim % 8 == 0
    )


def select_kernel(spec: AttentionSpec, layout: RaggedLayout, settings: Settings) -> tuple[Backend, Kernel]:
    """Selects torch's fused kernels or a kernel of FlashInfer, for a spec that FlashInfer supports."""
    capability = torch.cuda.get_device_capability(spec.device)
    if settings.backend == "auto" and _is_faster_on_sdpa(spec, layout, capability):
        return Backend.SDPA, "auto"
    keys = _keys_per_query(spec, layout)
    kernel = kernel_for(capability, spec.widest_head_dim, keys, biased=spec.biased, sinks=spec.sinks)
    return Backend.FLASHINFER, kernel


def _is_faster_on_sdpa(spec: AttentionSpec, layout: RaggedLayout, capability: tuple[int, int]) -> bool:
    """Whether the batch has no padding and torch's fused kernels are faster."""
    is_sdpa_pattern = spec.pattern == FULL or (spec.pattern == CAUSAL and spec.q_length == spec.kv_length)
    if not (
        is_sdpa_pattern
        and spec.is_plain
        and spec.softcap is None
        and spec.head_dim == spec.value_head_dim
        and spec.head_dim % 8 == 0
        # Older GPUs have no fused kernel for grouped heads.
        and (spec.num_heads == spec.num_kv_heads or capability >= (8, 0))
    ):
        return False
    # Packed sequences are rows of a layout, not of the tensors.
    if (layout.query.lengths, layout.key.lengths) != (
        (spec.q_length,) * spec.rows, (spec.kv_length,) * spec.rows
    ):  # fmt: skip
        return False
    if spec.head_dim not in flashinfer.KERNEL_HEAD_DIMS:
        return True
    # Here sdpa runs cuDNN's kernel. Compared with FlashInfer on an H200, it takes 4% to 33% less time from 128 to 1,024
    # tokens, 8% less to 3% more at 2,048, and mostly more below 128 (benchmarks/results/full_batches.json). Below
    # PLANNED_POSITIONS torch's flash kernel replaces it and takes up to 14% more (benchmarks/results/new_shapes.json).
    return spec.head_dim <= 128 and 128 <= spec.q_length <= 1024 and capability == (9, 0)


def _keys_per_query(spec: AttentionSpec, layout: RaggedLayout) -> float:
    """Returns the average number of keys per query, causality aside."""
    total, band = layout.query.total_tokens, spec.pattern
    keys = sum(q * k for q, k in zip(layout.query.lengths, layout.key.lengths)) / total if total else 0.0
    return keys if band.left is None or band.right is None else min(keys, band.left + band.right + 1)


def kernel_for(
    capability: tuple[int, int], head_dim: int, keys_per_query: float, *, biased: bool = False, sinks: bool = False
) -> Kernel:
    """Returns FlashInfer's kernel: fa2, fa3 on Hopper if queries see enough keys, or "auto" on Blackwell.

    A bias needs fa2: custom variants of fa3 have no access to row and head. Sinks need the logsumexp.
    """
    if capability == (9, 0) and not biased:
        return "fa2" if keys_per_query < FA3_KEYS else "fa3"
    is_blackwell = capability[0] in (10, 11) and not biased and not sinks
    return "auto" if is_blackwell and flashinfer.padded_head_dim(head_dim) == 128 else "fa2"


def uses_flash_directly(spec: AttentionSpec, *, masked: bool) -> bool:
    """Whether to call torch's flash or memory-efficient kernel directly: cuDNN's plans each new shape.

    `sdpa_kernel` would select a kernel for all threads.
    """
    # Not every kernel supports empty tensors; sdpa does.
    is_empty = 0 in (spec.rows, spec.q_length, spec.kv_length)
    is_small = spec.rows * spec.q_length < PLANNED_POSITIONS and spec.num_heads == spec.num_kv_heads
    return (masked or is_small) and not is_empty and torch.cuda.get_device_capability(spec.device) == (9, 0)


class KernelPendingError(UnsupportedAttentionError):
    """The kernel is still compiling; retry the capture later."""


def compiling_reason(module: KernelModule | None, settings: Settings, *, in_graph: bool) -> str | None:
    """Returns why torch attention runs while a kernel is not compiled; None if FlashInfer runs.

    With jit="wait", the kernel is compiled when the call is planned.

    Args:
        module: Module of the kernel; None if FlashInfer selects it.
        settings: Settings in force.
        in_graph: Whether `unpad` is capturing a graph of the whole model, which would make a fallback permanent.

    Raises:
        BackendUnavailableError: If backend="flashinfer" and jit="never".
        KernelPendingError: If a graph is captured while the kernel is compiling.
        UnsupportedAttentionError: If strict=True or a captured graph forbids a fallback.
    """
    if module is None or settings.jit == "wait" or jit.is_ready(module):
        return None
    may_fall_back = settings.backend == "auto" and not settings.strict
    if settings.jit == "never":
        reason = jit.why_not(module)
    else:
        reason = jit.compile_in_background(module) if may_fall_back and not jit.is_waiting() else None
    if reason is None:
        return None
    if not may_fall_back:
        if settings.backend == "flashinfer":
            raise BackendUnavailableError("flashinfer", reason, jit.COMPILE_AHEAD)
        raise UnsupportedAttentionError(f"{reason}, and strict=True forbids a fallback", jit.COMPILE_AHEAD)
    if in_graph or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        # The thread that compiles it may have finished meanwhile.
        pending = jit.is_pending(module) or jit.is_ready(module)
        error = KernelPendingError if pending else UnsupportedAttentionError
        raise error(f"a captured graph of attention: {reason}", jit.COMPILE_AHEAD)
    if settings.jit == "never":
        log_once(f"falling back to torch attention: {reason}")
    return reason
