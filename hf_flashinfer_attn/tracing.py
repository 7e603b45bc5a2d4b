"""Traces of forwards: counts of layouts, host copies and plans, and one record per attention call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from .tables import html_table, text_table

__all__ = ["AttentionCall", "Trace", "trace"]


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of the attention function.

    Args:
        layer: Class of the attention layer, and its index if it has one.
        pattern: Attention pattern, such as "full" or "causal".
        kernel: Kernel that ran.
        head_dim: The larger head_dim of query and value.
        padded_head_dim: head_dim of the kernel, padding included.
        reason: Reason of the fallback; None if FlashInfer ran, if the settings selected another kernel, or if another
            kernel was selected because it is faster.
        note: Reason why padded queries were computed; None if they were not.

    Examples:
        >>> from hf_flashinfer_attn import AttentionCall
        >>> call = AttentionCall("BertSelfAttention[0]", "full", "flashinfer-fa3", 32, 64, None)
        >>> call.kernel, call.padded_head_dim
        ('flashinfer-fa3', 64)
    """

    layer: str
    pattern: str
    kernel: str
    head_dim: int
    padded_head_dim: int
    reason: str | None
    note: str | None = None


@dataclass(slots=True)
class Trace:
    """Record of a `with hf_flashinfer_attn.trace()` block, in this thread.

    `print(trace)` shows a table, and so does a notebook.

    Args:
        calls: One record per attention call, in the order of the calls.
        layouts: Number of ragged layouts made.
        host_copies: Number of device-to-host copies that the host waited for.
        plans: Number of FlashInfer plans made.

    Examples:
        >>> from hf_flashinfer_attn import AttentionCall, Trace
        >>> call = AttentionCall("BertSelfAttention[0]", "full", "dense", 32, 32, "output_attentions=True")
        >>> trace = Trace(calls=[call, call])
        >>> trace.kernels, trace.fallbacks
        (('dense',), ('output_attentions=True',))
    """

    calls: list[AttentionCall] = field(default_factory=list)
    layouts: int = 0
    host_copies: int = 0
    plans: int = 0

    @property
    def kernels(self) -> tuple[str, ...]:
        """The distinct kernels that ran, in order of first use."""
        return tuple(dict.fromkeys(call.kernel for call in self.calls))

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """The distinct reasons of fallbacks, in order of first use."""
        return tuple(dict.fromkeys(call.reason for call in self.calls if call.reason is not None))

    @property
    def notes(self) -> tuple[str, ...]:
        """The distinct notes of the calls, in order of first use."""
        return tuple(dict.fromkeys(call.note for call in self.calls if call.note is not None))

    def __str__(self) -> str:
        return f"{text_table(_HEADER, map(_cells, self.calls))}\n{self._footer}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        # A loop of forwards makes thousands of rows.
        omitted = len(self.calls) - _MOST_ROWS
        more = f"and {omitted} more calls\n" if omitted > 0 else ""
        return html_table(_HEADER, map(_cells, self.calls[:_MOST_ROWS]), note=f"{more}{self._footer}")

    @property
    def _footer(self) -> str:
        return "\n".join([*self.notes, f"layouts {self.layouts}, host copies {self.host_copies}, plans {self.plans}"])


_HEADER = ("layer", "pattern", "kernel", "head_dim", "fallback reason")
_MOST_ROWS = 100


def _cells(call: AttentionCall) -> tuple[str, ...]:
    padded = "" if call.padded_head_dim == call.head_dim else f" -> {call.padded_head_dim}"
    return call.layer, call.pattern, call.kernel, f"{call.head_dim}{padded}", call.reason or ""


_active: ContextVar[Trace | None] = ContextVar("hf_flashinfer_attn_trace", default=None)


@contextmanager
def trace() -> Iterator[Trace]:
    """Records every attention call of this thread inside the block.

    Yields:
        The [`Trace`], filled while the block runs. Compiled graphs and replayed CUDA graphs add their calls too.

    Examples:
        >>> import torch, hf_flashinfer_attn
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> config._attn_implementation = "flashinfer"
        >>> model = BertModel(config).eval()
        >>> with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
        ...     mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
        ...     _ = model(torch.ones(2, 3, dtype=torch.long), attention_mask=mask)
        >>> len(trace.calls), trace.layouts
        (2, 1)
    """
    recording = Trace()
    token = _active.set(recording)
    try:
        yield recording
    finally:
        _active.reset(token)


def record_layout() -> None:
    if (active := _active.get()) is not None:
        active.layouts += 1


def record_host_copy() -> None:
    if (active := _active.get()) is not None:
        active.host_copies += 1


def record_plan() -> None:
    if (active := _active.get()) is not None:
        active.plans += 1


def record_call(call: AttentionCall) -> None:
    if (active := _active.get()) is not None:
        active.calls.append(call)


def is_tracing() -> bool:
    return _active.get() is not None
