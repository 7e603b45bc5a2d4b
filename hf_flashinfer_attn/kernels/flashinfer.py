"""FlashInfer's ragged prefill kernels: supported features, and plans for the row lengths of a batch.

FlashInfer is imported on first use. Its behaviour was checked on versions 0.7.2 and 0.7.4.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import UnsupportedAttentionError
from ..ragged.layout import RaggedLayout
from . import jit
from .modules import KernelModule
from .wrapper_pool import Kernel, PlanKey, Wrapper, keep_captured, planned

__all__ = [
    "KERNEL_HEAD_DIMS",
    "Kernel",
    "KernelPlan",
    "PackOrder",
    "attend",
    "capability_reason",
    "dtype_reason",
    "head_dim_reason",
    "make_plan",
    "module_of",
    "padded_head_dim",
    "unavailable_reason",
]

# Supported sizes. Others fail to build, raise, or silently compute garbage (upstream #4299); fa2 at 192 raises if its
# plan uses the larger query tile.
KERNEL_HEAD_DIMS = (64, 128, 256)
MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16)
_MIN_CAPABILITY = {torch.float16: (7, 5), torch.bfloat16: (8, 0)}


@functools.lru_cache(maxsize=64)
def unavailable_reason(device: torch.device) -> tuple[str, str] | None:
    """Returns why FlashInfer cannot run on `device`, and the way out; None if it can."""
    if device.type != "cuda":
        way_out = "Move the model to a CUDA GPU, or use hf_flashinfer_attn.configure(backend='torch')."
        return f"the tensors are on {device.type!r}, not on a CUDA device", way_out
    if torch.version.hip is not None:
        return "this is a ROCm build of torch", "Use hf_flashinfer_attn.configure(backend='torch')."
    if importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer is not installed", "Install it: pip install flashinfer-python (Linux)."
    if (reason := capability_reason(torch.cuda.get_device_capability(device))) is not None:
        return reason, "Use hf_flashinfer_attn.configure(backend='torch')."
    # flashinfer-jit-cache has compiled kernels and needs no nvcc.
    if importlib.util.find_spec("flashinfer_jit_cache") is None and jit.nvcc_path() is None:
        return jit.NO_NVCC, jit.GET_NVCC
    return None


def capability_reason(capability: tuple[int, int]) -> str | None:
    """Returns why FlashInfer does not run on GPUs of a compute capability; None if it does."""
    if capability < (7, 5):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, FlashInfer needs 7.5 or newer"
    return None


def dtype_reason(dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    """Returns why the kernels do not support `dtype` on GPUs of a compute capability (None: any); None if they do."""
    if dtype not in DTYPES:
        return f"dtype {dtype} (FlashInfer takes torch.float16 and torch.bfloat16)"
    needed = _MIN_CAPABILITY[dtype]
    if capability is not None and capability < needed:
        return f"dtype {dtype} on a GPU older than compute capability {needed[0]}.{needed[1]}"
    return None


def head_dim_reason(head_dim: int) -> str | None:
    """Returns why the kernels do not support `head_dim`, even padded; None if they do."""
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} (FlashInfer's prefill kernels go up to {MAX_HEAD_DIM})"
    return None


def padded_head_dim(head_dim: int) -> int:
    """Returns the smallest size that the kernels support for `head_dim`.

    Raises:
        ValueError: If `head_dim` is above 256.

    Examples:
        >>> from hf_flashinfer_attn.kernels.flashinfer import padded_head_dim
        >>> padded_head_dim(32), padded_head_dim(72), padded_head_dim(160)
        (64, 128, 256)
    """
    for size in KERNEL_HEAD_DIMS:
        if head_dim <= size:
            return size
    raise ValueError(f"head_dim={head_dim} is not supported; expected at most {MAX_HEAD_DIM}. Use backend='torch'.")


@dataclass(frozen=True, slots=True)
class _Part:
    """One kernel call over a slice of the packed queries and keys."""

    wrapper: Wrapper
    queries: slice
    keys: slice


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """A planned kernel.

    Args:
        key: Arguments of the plan; query, key and value must be padded to its `head_dim`.
        order: Order in which queries and keys must be packed; None for the order of the layout.
        in_graph: Whether a captured graph runs the plan; its last tokens may belong to no row.
    """

    key: PlanKey
    order: PackOrder | None
    in_graph: bool
    _parts: tuple[_Part, ...]
    _positions: tuple[torch.Tensor | None, torch.Tensor | None]

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        bias: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Runs the kernel on packed tensors.

        Args:
            query: Shape `(query_tokens, heads, head_dim)`.
            key: Shape `(key_tokens, kv_heads, head_dim)`.
            value: Shape `(key_tokens, kv_heads, head_dim)`.
            output: Shape of `query`, contiguous; zeros in a graph, since tokens of no row get no output.
            bias: Added to the logits by padded position, shape `(rows, heads, q_length, kv_length)`.
            sinks: Attention sinks, one logit per head, shape `(heads,)`.
        """
        if not self._parts:
            output.zero_()
            return
        if bias is None and sinks is None:
            for part in self._parts:
                if len(self._parts) == 1:
                    part.wrapper.run(query, key, value, output)
                else:
                    part.wrapper.run(query[part.queries], key[part.keys], value[part.keys], output[part.queries])
            return
        extras = () if bias is None else self._bias_arguments(bias)
        for part in self._parts:
            prefill, out = part.wrapper.prefill, output[part.queries]
            sides = query[part.queries], key[part.keys], value[part.keys]
            if sinks is None:
                prefill.run(*sides, *extras, out=out)
                continue
            _, logsumexp = prefill.run(*sides, *extras, out=out, return_lse=True, lse_base="ln")
            # A sink adds to the denominator of the softmax; the logsumexp is its logarithm.
            share = torch.sigmoid(logsumexp.nan_to_num(nan=-math.inf) - sinks.float())
            out.mul_(share[..., None])

    def _bias_arguments(self, bias: torch.Tensor) -> tuple[Any, ...]:
        """Returns the arguments that the biased kernel takes after query, key and value."""
        values = bias.to(self.key.dtype)
        if values.stride(-1) != 1:
            # Contiguous keys, since neighbouring threads read neighbouring keys; expanded rows and heads stay expanded.
            values = values[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in values.stride())]
            values = values.contiguous().expand(bias.shape)
        return values, *self._positions, self.key.sm_scale, *values.stride()


def _left_bound(left: int | None, layout: RaggedLayout) -> int | None:
    """Returns a bound, or None if no row is long enough to need it: windows need other kernels."""
    return None if left is not None and left >= layout.key.max_length - 1 else left


def module_of(layout: RaggedLayout, key: PlanKey, left: int | None) -> KernelModule | None:
    """Returns the compiled module of a plan; None if there is nothing to compute, or if FlashInfer selects the module
    in its plan (kernel "auto"). Arguments as for [`make_plan`].
    """
    if key.kernel == "auto" or not (layout.query.total_tokens and layout.key.total_tokens):
        return None
    has_window = _left_bound(left, layout) is not None
    return KernelModule(key.kernel, key.dtype, key.head_dim, has_window, key.softcap > 0, key.biased)


def make_plan(layout: RaggedLayout, key: PlanKey, left: int | None = None, right: int | None = None) -> KernelPlan:
    """Plans attention on the current stream, or returns the cached plan of the layout.

    Query i of a row is at key position `i + key_length - query_length`, so the last query is aligned with the last key.
    The first plan of a kernel compiles it.

    Args:
        layout: Row lengths.
        key: Other arguments of the plan; `causal` and `window_left` are set from the bounds.
        left: Number of keys before its own position that a query sees; None for all.
        right: Number of keys after its own position that a query sees; None for all, 0 for causal attention.

    Raises:
        UnsupportedAttentionError: If a CUDA graph is being captured and there is no plan, or a batch is too large for
            the kernel's addresses.
        BackendUnavailableError: If the kernel cannot be compiled, or the settings forbid it.
        ValueError: If a bias comes with another kernel than "fa2", a window or softcap.
    """
    left = _left_bound(left, layout)
    right = None if right is not None and right >= layout.query.max_length - 1 else right
    if key.biased and (key.kernel != "fa2" or left is not None or right not in (None, 0) or key.softcap > 0):
        raise ValueError(
            f"a bias with kernel={key.kernel!r}, left={left}, right={right}, softcap={key.softcap}; "
            "expected kernel='fa2', full or causal attention, no softcap. Use backend='torch'."
        )
    elements = max(layout.query.total_tokens * key.num_heads, layout.key.total_tokens * key.num_kv_heads) * key.head_dim
    if key.kernel == "fa2" and elements >= 2**32:
        raise UnsupportedAttentionError(
            f"{elements:,} elements in a query or key, which fa2 addresses with 32 bits", "Use smaller batches."
        )
    if (module := module_of(layout, key, left)) is not None:
        jit.require(module)
    with torch.cuda.device(key.device):
        key = replace(key, causal=right == 0, window_left=-1 if left is None else left)
        order, parts = None, []
        if layout.query.total_tokens and layout.key.total_tokens:
            if right is None or right == 0:
                parts = [_Part(planned(layout, key), slice(None), slice(None))]
            else:
                order, parts = _plan_ahead(layout, key, left, right)
        positions: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
        if key.biased:
            positions = layout.query.positions_in_row(key.device), layout.key.positions_in_row(key.device)
    return KernelPlan(key, order, layout.graph_workspace is not None, tuple(parts), positions)


@dataclass(frozen=True, slots=True)
class PackOrder:
    """Order in which queries and keys are packed for a plan of several parts, as tokens of the layout.

    Args:
        queries: A permutation of the queries, int64, on the host.
        keys: Keys, some of them twice, int64, on the host.
    """

    queries: torch.Tensor
    keys: torch.Tensor


def _split(layout: RaggedLayout, left: int | None, right: int) -> tuple[RaggedLayout, RaggedLayout, PackOrder]:
    """Splits each row into its first queries, bounded on the right, and its last `right` queries, which are not."""
    firsts = [max(0, length - right) for length in layout.query.lengths]
    lasts = [length - first for length, first in zip(layout.query.lengths, firsts)]
    seen = [keys if left is None else min(keys, last + left) for keys, last in zip(layout.key.lengths, lasts)]
    starts, ends = layout.query.offsets[:-1], layout.query.offsets[1:]
    queries = _ranges([*starts, *(end - last for end, last in zip(ends, lasts))], [*firsts, *lasts])
    last_keys = _ranges([end - length for end, length in zip(layout.key.offsets[1:], seen)], seen)
    keys = torch.cat([torch.arange(layout.key.total_tokens, device="cpu"), last_keys])
    return (
        RaggedLayout.from_lengths(firsts, layout.key.lengths), RaggedLayout.from_lengths(lasts, seen),
        PackOrder(queries, keys),
    )  # fmt: skip


def _plan_ahead(layout: RaggedLayout, key: PlanKey, left: int | None, right: int) -> tuple[PackOrder, list[_Part]]:
    """Plans a window with a right bound, which the kernels lack, as two kernel calls.

    Causal attention aligns the last query with the last key. A row without its last `right` queries is therefore causal
    attention shifted by `right`: query i sees keys up to `i + right`, and `left + right` keys before that one. The last
    `right` queries have no right bound; they see the last `right + left` keys.
    """
    if layout.graph_workspace is not None:
        raise UnsupportedAttentionError(
            "a window that looks ahead, whose parts change with the lengths, in a captured graph",
            "Use unpad without cuda_graphs for this model.",
        )
    if torch.cuda.is_current_stream_capturing():
        # The graph reads positions that the layout owns.
        keep_captured(layout)
    name = "ahead", left, right
    if name not in layout.derived:
        with layout.lock:
            if name not in layout.derived:
                layout.derived[name] = _split(layout, left, right)
    first, last, order = layout.derived[name]
    bounded = replace(key, causal=True, window_left=-1 if left is None else left + right)
    num_queries, num_keys = first.query.total_tokens, first.key.total_tokens
    parts = []
    if num_queries:
        parts.append(_Part(planned(first, bounded), slice(0, num_queries), slice(0, num_keys)))
    if last.query.total_tokens:
        parts.append(_Part(planned(last, key), slice(num_queries, None), slice(num_keys, None)))
    return order, parts


def _ranges(starts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """Returns concatenated ranges, int64 on the host."""
    counts = torch.tensor(lengths, device="cpu")
    first = torch.tensor(starts, device="cpu") - (counts.cumsum(0) - counts)
    return torch.arange(int(counts.sum()), device="cpu") + first.repeat_interleave(counts)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RaggedLayout,
    *,
    left: int | None = None,
    right: int | None = None,
    sm_scale: float,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    kernel: Kernel = "fa2",
) -> torch.Tensor:
    """Computes attention on ragged tensors with one kernel, for accuracy checks; forward only.

    Args:
        query: Shape `(total_query_tokens, heads, head_dim)`, float16 or bfloat16, on a CUDA device.
        key: Shape `(total_key_tokens, kv_heads, head_dim)`; `heads` must be a multiple of `kv_heads`.
        value: Shape `(total_key_tokens, kv_heads, value_head_dim)`.
        layout: Row lengths.
        left: As for [`make_plan`].
        right: As for [`make_plan`].
        sm_scale: Factor of the logits.
        softcap: Caps logits to `softcap * tanh(logits / softcap)`.
        bias: As for [`KernelPlan.run`].
        sinks: As for [`KernelPlan.run`].
        kernel: The kernel.

    Returns:
        Shape `(total_query_tokens, heads, value_head_dim)`, the dtype of `query`. Rows without keys are zero.

    Raises:
        ValueError: If a head_dim is above 256, or the kernel does not support the bias.
    """
    size, value_head_dim = padded_head_dim(max(query.shape[-1], value.shape[-1])), value.shape[-1]
    stream = torch.cuda.current_stream(query.device).cuda_stream
    plan_key = PlanKey(
        kernel, query.shape[1], key.shape[1], size, query.dtype, False, -1, float(sm_scale), float(softcap or 0.0),
        query.device, stream, bias is not None, sinks is not None,
    )  # fmt: skip
    plan = make_plan(layout, plan_key, left, right)
    sides = [F.pad(side, (0, size - side.shape[-1])) for side in (query, key, value)]
    if plan.order is not None:
        orders = [plan.order.queries, plan.order.keys, plan.order.keys]
        sides = [side.index_select(0, order.to(side.device)) for side, order in zip(sides, orders)]
    output = torch.empty_like(sides[0], memory_format=torch.contiguous_format)
    plan.run(sides[0], sides[1], sides[2], output, bias, sinks)
    if plan.order is not None:
        output = torch.empty_like(output).index_copy_(0, plan.order.queries.to(output.device), output)
    return output[..., :value_head_dim]
