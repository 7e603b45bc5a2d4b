"""From a request to the path that serves it: FlashInfer, a fallback with its reason, or an error. Needs no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from ..errors import BackendUnavailableError, UnsupportedAttentionError
from ..kernels import flashinfer, jit
from ..kernels.modules import KernelModule
from ..log import log_once
from ..ragged.band import Pattern, PatternKind
from ..settings import Settings

__all__ = [
    "RULES",
    "AttentionRequest",
    "Decision",
    "KernelPendingError",
    "Path",
    "Rule",
    "decide",
    "decide_compiled",
    "fallback_of",
]


class Path(Enum):
    """Who computes a call."""

    FLASHINFER = "flashinfer"
    TORCH = "torch"
    DENSE = "dense"


@dataclass(frozen=True, slots=True)
class AttentionRequest:
    """One call of the attention function, as far as the choice of a path depends on it.

    Args:
        pattern: Which keys a query may see, padding aside.
        device: Where the tensors are.
        dtype: Of query, key and value.
        head_dim: The widest of the query's and the value's.
        needs_grad: Whether gradients must flow.
        dropout: Probability of dropping an attention weight in this call.
        output_attentions: Whether the weights themselves are asked for.
        biased_packed: Whether a bias is added to the logits that is not told apart by the rows of the layout.
        biased_window: Whether a bias is added where there is a window or softcap too.
        mask_holes: Whether padding splits a row in which distances matter, or a packed sequence is in pieces.
        window_keeps_padded_queries: Whether distances matter, and padded queries, which have none, are kept.
        causal_padding_is_read: Whether a causal mask has padding whose hidden states the model reads later.
        padded_queries_need_mask: Whether `padded_queries="keep"` is set and padded queries attend to other keys than
            those of a ragged row.
        mask_shape_differs: Whether the mask was made for other lengths than those of this call.
        mask_modified: Whether the model wrote to the mask's values.
    """

    pattern: Pattern
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    needs_grad: bool = False
    dropout: float = 0.0
    output_attentions: bool = False
    biased_packed: bool = False
    biased_window: bool = False
    mask_holes: bool = False
    window_keeps_padded_queries: bool = False
    causal_padding_is_read: bool = False
    padded_queries_need_mask: bool = False
    mask_shape_differs: bool = False
    mask_modified: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """The path of a call, and why FlashInfer does not run it; `reason` is None if the settings select that path."""

    path: Path
    reason: str | None


@dataclass(frozen=True, slots=True)
class Rule:
    """A feature that FlashInfer's kernels do not compute here, and the path that does.

    Args:
        feature: What the support table calls it.
        path: Who computes it.
        reason: Names the feature of a request that has it, None for one that has not.
    """

    feature: str
    path: Path
    reason: Callable[[AttentionRequest], str | None]


def _flag(feature: str, path: Path, attribute: str) -> Rule:
    return Rule(feature, path, lambda request: feature if getattr(request, attribute) else None)


# In this order: what needs a whole mask first, then what only needs another kernel.
RULES: tuple[Rule, ...] = (
    _flag("output_attentions=True", Path.DENSE, "output_attentions"),
    _flag("position_bias over packed sequences by slot, or of a shape of its own", Path.DENSE, "biased_packed"),
    Rule(
        "user 4D masks, additive masks, chunks, image blocks, any mask that is not recognised",
        Path.DENSE,
        lambda request: f"the mask {request.pattern.name}" if request.pattern.kind is PatternKind.DENSE else None,
    ),
    _flag("a window over padding with holes, packed sequences in pieces", Path.DENSE, "mask_holes"),
    _flag("a window over padding in a layer that keeps padded queries", Path.DENSE, "window_keeps_padded_queries"),
    _flag("causal attention over padding that the model reads later", Path.DENSE, "causal_padding_is_read"),
    _flag(
        "padded_queries='keep' with causal attention, a window, a row of padding only or a 2D mask",
        Path.DENSE,
        "padded_queries_need_mask",
    ),
    _flag("a mask of another shape than the call", Path.DENSE, "mask_shape_differs"),
    _flag("a mask that the model wrote to", Path.DENSE, "mask_modified"),
    _flag("position_bias together with a window or softcap", Path.TORCH, "biased_window"),
    _flag("gradients (the kernels are forward only)", Path.TORCH, "needs_grad"),
    Rule(
        "dropout in training", Path.TORCH, lambda request: f"dropout {request.dropout}" if request.dropout > 0 else None
    ),
    Rule(
        "float32 and other dtypes than float16 and bfloat16",
        Path.TORCH,
        lambda request: flashinfer.dtype_reason(request.dtype, request.device),
    ),
    Rule("head_dim above 256", Path.TORCH, lambda request: flashinfer.head_dim_reason(request.head_dim)),
)


def fallback_of(request: AttentionRequest) -> tuple[Path, str] | None:
    """Returns who computes a request that FlashInfer's kernels do not compute, and why; None where they do."""
    for rule in RULES:
        if (feature := rule.reason(request)) is not None:
            return rule.path, feature
    return None


def decide(request: AttentionRequest, settings: Settings) -> Decision:
    """Chooses the path of a call.

    Raises:
        BackendUnavailableError: If FlashInfer cannot run on the request's device, and backend="flashinfer" or
            strict=True forbids a fallback.
        UnsupportedAttentionError: If the call would fall back and backend="flashinfer" or strict=True forbids it.
    """
    unavailable = flashinfer.unavailable_reason(request.device) if settings.backend != "torch" else None
    if unavailable is not None and settings.backend == "flashinfer":
        raise BackendUnavailableError("flashinfer", *unavailable)
    if unavailable is not None and settings.strict:
        reason, way_out = unavailable
        raise BackendUnavailableError("flashinfer", f"{reason}, and strict=True forbids a fallback", way_out)
    path, feature = fallback_of(request) or (Path.FLASHINFER, None)
    if settings.backend == "torch" or unavailable is not None:
        if unavailable is not None:
            log_once(f"attention runs on the torch backend: {unavailable[0]}")
        if path is Path.DENSE:
            return Decision(path, feature)
        return Decision(Path.TORCH, None if unavailable is None else unavailable[0])
    if feature is None:
        return Decision(Path.FLASHINFER, None)
    if settings.backend == "flashinfer" or settings.strict:
        named = "backend='flashinfer'" if settings.backend == "flashinfer" else "strict=True"
        raise UnsupportedAttentionError(
            f"FlashInfer's kernels do not compute {feature}, and {named} forbids a fallback",
            "Use hf_flashinfer_attn.configure(backend='auto', strict=False) to let "
            f"{'dense' if path is Path.DENSE else 'torch'} attention serve such calls.",
        )
    log_once(f"falling back to {path.value} attention: {feature}")
    return Decision(path, feature)


class KernelPendingError(UnsupportedAttentionError):
    """The kernel is still compiling; retry the capture later."""


def decide_compiled(module: KernelModule | None, settings: Settings, *, of_graph: bool) -> Decision:
    """Chooses the path of a call that FlashInfer computes, by whether its kernel is compiled.

    Where the kernel is to be waited for, that happens when the call is planned.

    Args:
        module: What the call needs; None where that is not known or nothing is computed.
        settings: Those in force.
        of_graph: Whether a graph of the whole model is captured from the call, which would keep a fallback for good.

    Raises:
        BackendUnavailableError: If the kernel must not be compiled and backend="flashinfer" was asked for.
        KernelPendingError: If a graph must not be captured yet.
        UnsupportedAttentionError: If strict=True or a graph that is captured forbids a fallback.
    """
    if module is None or settings.jit == "wait" or jit.is_ready(module):
        return _ON_FLASHINFER
    may_fall_back = settings.backend == "auto" and not settings.strict
    if settings.jit == "never":
        reason = jit.why_not(module)
    else:
        reason = jit.compile_in_background(module) if may_fall_back and not jit.is_waiting() else None
    if reason is None:
        return _ON_FLASHINFER
    if not may_fall_back:
        if settings.backend == "flashinfer":
            raise BackendUnavailableError("flashinfer", reason, jit.COMPILE_AHEAD)
        raise UnsupportedAttentionError(f"{reason}, and strict=True forbids a fallback", jit.COMPILE_AHEAD)
    if of_graph or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        error = KernelPendingError if jit.is_pending(module) else UnsupportedAttentionError
        raise error(f"a captured graph of attention: {reason}", jit.COMPILE_AHEAD)
    if settings.jit == "never":
        log_once(f"falling back to torch attention: {reason}")
    return Decision(Path.TORCH, reason)


_ON_FLASHINFER = Decision(Path.FLASHINFER, None)
