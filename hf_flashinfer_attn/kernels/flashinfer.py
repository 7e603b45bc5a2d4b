"""The FlashInfer backend: head-dim padding, plans and workspaces of its ragged prefill kernels.

FlashInfer is imported on first use, never on import of this module. Facts about it were checked on 0.7.2 and 0.7.4.
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
from ..ragged.bias import LogitsBias
from ..ragged.layout import RaggedLayout
from . import jit
from .modules import KernelModule
from .wrapper_pool import Kernel, PlanKey, Wrapper, keep_captured, planned

__all__ = [
    "Kernel",
    "KernelPlan",
    "PackOrder",
    "attend",
    "capability_dtype_reason",
    "capability_kernel",
    "capability_reason",
    "choose_kernel",
    "head_dim_reason",
    "make_plan",
    "module_of",
    "padded_head_dim",
    "unavailable_reason",
]

# Sizes that the kernels really have. Others fail to build, raise, or silently compute garbage (upstream #4299);
# fa2 at 192 raises as soon as its plan takes the larger query tile.
KERNEL_HEAD_DIMS: dict[Kernel, tuple[int, ...]] = {
    "fa2": (64, 128, 256),
    "fa3": (64, 128, 256),
    "auto": (64, 128, 256),
}
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
    # The package of compiled kernels needs none.
    if importlib.util.find_spec("flashinfer_jit_cache") is None and jit.nvcc_path() is None:
        return jit.NO_NVCC, jit.GET_NVCC
    return None


def capability_reason(capability: tuple[int, int]) -> str | None:
    """Returns why FlashInfer does not run on GPUs of a compute capability; None if it does."""
    if capability < (7, 5):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, FlashInfer needs 7.5 or newer"
    return None


def dtype_reason(dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns why the kernels cannot take `dtype` on `device`; None if they can."""
    if dtype not in DTYPES:
        return f"dtype {dtype} (FlashInfer takes torch.float16 and torch.bfloat16)"
    return capability_dtype_reason(dtype, torch.cuda.get_device_capability(device)) if device.type == "cuda" else None


def capability_dtype_reason(dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """Returns why the kernels cannot take `dtype`, one of theirs, on GPUs of a compute capability; None if they can."""
    needed = _MIN_CAPABILITY[dtype]
    if capability < needed:
        return f"dtype {dtype} on a GPU older than compute capability {needed[0]}.{needed[1]}"
    return None


def head_dim_reason(head_dim: int) -> str | None:
    """Returns why the kernels cannot take `head_dim`, even padded; None if they can."""
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} (FlashInfer's prefill kernels go up to {MAX_HEAD_DIM})"
    return None


def padded_head_dim(head_dim: int, kernel: Kernel) -> int:
    """Returns the smallest size that `kernel` has for `head_dim`.

    Raises:
        ValueError: If `head_dim` is above 256.

    Examples:
        >>> from hf_flashinfer_attn.kernels.flashinfer import padded_head_dim
        >>> padded_head_dim(32, "fa3"), padded_head_dim(72, "fa2"), padded_head_dim(160, "fa2")
        (64, 128, 256)
    """
    for size in KERNEL_HEAD_DIMS[kernel]:
        if head_dim <= size:
            return size
    raise ValueError(f"head_dim={head_dim} is not supported; expected at most {MAX_HEAD_DIM}. Use backend='torch'.")


# Below this many keys per query fa2's smaller tiles win over fa3's speed: benchmarks/results/attention_alone.json.
_FA3_REACH = 256


def choose_kernel(
    device: torch.device, head_dim: int, *, biased: bool = False, sinks: bool = False, reach: float | None = None
) -> Kernel:
    """Returns the kernel to use: on Hopper fa3, or fa2 where queries see few keys; elsewhere fa2, or what FlashInfer
    chooses on Blackwell.

    Args:
        device: A CUDA device.
        head_dim: The widest of the query's and the value's.
        biased: Whether a bias is added to the logits; fa3 tells its variants neither row nor head.
        sinks: Whether there are attention sinks, which need the kernel's logsumexp.
        reach: How many keys a query sees on average; None for many.
    """
    capability = torch.cuda.get_device_capability(device)
    return capability_kernel(capability, head_dim, biased=biased, sinks=sinks, reach=reach)


def capability_kernel(
    capability: tuple[int, int], head_dim: int, *, biased: bool = False, sinks: bool = False, reach: float | None = None
) -> Kernel:
    """Returns the kernel to use on GPUs of a compute capability; arguments are those of [`choose_kernel`]."""
    if biased:
        return "fa2"
    major, minor = capability
    if (major, minor) == (9, 0):
        return "fa2" if reach is not None and reach < _FA3_REACH else "fa3"
    if major in (10, 11) and padded_head_dim(head_dim, "auto") == 128 and not sinks:
        return "auto"
    return "fa2"


@dataclass(frozen=True, slots=True)
class _Part:
    """One kernel call: a run of the packed queries over a run of the packed keys."""

    wrapper: Wrapper
    queries: slice
    keys: slice


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """All that is fixed about a call before its tensors are there.

    Args:
        kernel: What runs.
        size: The head_dim that query, key and value must be padded to.
        order: How queries and keys must be packed; None for the order of the layout.
    """

    kernel: Kernel
    size: int
    order: PackOrder | None
    _parts: tuple[_Part, ...]
    _key: PlanKey
    _layout_slots: tuple[torch.Tensor | None, torch.Tensor | None]
    _is_of_graph: bool = False

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: LogitsBias | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the kernel on packed tensors.

        Args:
            query: Shape `(query_tokens, heads, size)`.
            key: Shape `(key_tokens, kv_heads, size)`.
            value: Shape `(key_tokens, kv_heads, size)`.
            bias: Added to the logits, where the plan was made for one.
            sinks: One logit per head that takes weight and gives nothing, shape `(heads,)`.

        Returns:
            Shape `(query_tokens, heads, size)`, contiguous.
        """
        if not self._parts:
            return torch.zeros_like(query, memory_format=torch.contiguous_format)
        # Tokens of no row get no output. What is in their place becomes keys and values of the next layer, of which fa3
        # reads some with those of the last row: with a weight of zero, which makes NaN of NaN.
        make = torch.zeros_like if self._is_of_graph else torch.empty_like
        output = make(query, memory_format=torch.contiguous_format)
        if bias is None and sinks is None:
            if len(self._parts) == 1:
                self._parts[0].wrapper.run(query, key, value, output)
                return output
            for part in self._parts:
                part.wrapper.run(query[part.queries], key[part.keys], value[part.keys], output[part.queries])
            return output
        extras = () if bias is None else self._bias_arguments(bias)
        for part in self._parts:
            prefill, some = part.wrapper.prefill, output[part.queries]
            sides = query[part.queries], key[part.keys], value[part.keys]
            if sinks is None:
                prefill.run(*sides, *extras, out=some)
                continue
            _, logsumexp = prefill.run(*sides, *extras, out=some, return_lse=True, lse_base="ln")
            # A sink only makes the softmax's denominator larger, and what that was is known.
            share = torch.sigmoid(logsumexp.nan_to_num(nan=-math.inf) - sinks.float())
            some.mul_(share[..., None])
        return output

    def _bias_arguments(self, bias: LogitsBias) -> tuple[Any, ...]:
        """Returns what the kernel with a bias takes after query, key and value."""
        values = bias.values.to(self._key.dtype)
        if values.stride(-1) != 1:
            # Threads next to each other read keys next to each other; rows and heads that are all the same stay one.
            values = values[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in values.stride())]
            values = values.contiguous().expand(bias.values.shape)
        return values, *self._layout_slots, self._key.sm_scale, *values.stride()


def _left_bound(left: int | None, layout: RaggedLayout) -> int | None:
    """Returns a bound, or None if no row reaches it: windows need kernels of their own."""
    return None if left is not None and left >= layout.key.max_length - 1 else left


def module_of(
    layout: RaggedLayout,
    *,
    head_dim: int,
    dtype: torch.dtype,
    left: int | None,
    softcap: float | None,
    biased: bool,
    kernel: Kernel,
) -> KernelModule | None:
    """Returns the compiled module that a plan needs; arguments are those of [`make_plan`].

    Returns:
        None where there is nothing to compute, or only FlashInfer's plan knows, as with kernel="auto".
    """
    if kernel == "auto" or not (layout.query.total_tokens and layout.key.total_tokens):
        return None
    window, size = _left_bound(left, layout) is not None, padded_head_dim(head_dim, kernel)
    return KernelModule(kernel, dtype, size, window, softcap is not None and softcap > 0, biased)


def make_plan(
    layout: RaggedLayout,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    left: int | None = None,
    right: int | None = None,
    sm_scale: float,
    softcap: float | None = None,
    biased: bool = False,
    sinks: bool = False,
    kernel: Kernel,
) -> KernelPlan:
    """Plans attention on the current stream; once per layout, whatever is asked for again.

    The first plan of a kernel compiles it, unless that was done before.

    Args:
        layout: Which tokens belong to which row.
        num_heads: Of the query.
        num_kv_heads: Of key and value.
        head_dim: The widest of the query's and the value's.
        dtype: float16 or bfloat16.
        device: A CUDA device.
        left: How many keys before its own position a query sees; None for all.
        right: How many keys after its own position a query sees; None for all, 0 for causal attention.
        sm_scale: What logits are multiplied with.
        softcap: Caps logits to `softcap * tanh(logits / softcap)`.
        biased: Whether a bias is added to the logits; with "fa2" alone, and neither a window nor softcap.
        sinks: Whether there are attention sinks.
        kernel: "fa2", "fa3" or "auto".

    Raises:
        UnsupportedAttentionError: If a CUDA graph is being captured and nothing was planned before, or a batch is too
            large for the kernel's addresses.
        BackendUnavailableError: If the kernel cannot be compiled, or must not be.
        ValueError: If `head_dim` is above 256, or a bias comes with what its kernel lacks.
    """
    left = _left_bound(left, layout)
    right = None if right is not None and right >= layout.query.max_length - 1 else right
    if biased and (kernel != "fa2" or left is not None or right not in (None, 0) or softcap is not None):
        raise ValueError(
            f"a bias with kernel={kernel!r}, left={left}, right={right}, softcap={softcap}; "
            "expected kernel='fa2', full or causal attention, no softcap. Use backend='torch'."
        )
    size = padded_head_dim(head_dim, kernel)
    elements = max(layout.query.total_tokens * num_heads, layout.key.total_tokens * num_kv_heads) * size
    if kernel == "fa2" and elements >= 2**32:
        raise UnsupportedAttentionError(
            f"{elements:,} elements in a query or key, which fa2 addresses with 32 bits", "Use smaller batches."
        )
    module = module_of(layout, head_dim=head_dim, dtype=dtype, left=left, softcap=softcap, biased=biased, kernel=kernel)
    if module is not None:
        jit.require(module)
    with torch.cuda.device(device):
        key = PlanKey(
            kernel=kernel,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=size,
            dtype=dtype,
            causal=right == 0,
            window_left=-1 if left is None else left,
            sm_scale=float(sm_scale),
            softcap=0.0 if softcap is None else float(softcap),
            device=device,
            stream=torch.cuda.current_stream(device).cuda_stream,
            biased=biased,
            sinks=sinks,
        )
        order, parts = None, []
        if layout.query.total_tokens and layout.key.total_tokens:
            if right is None or right == 0:
                parts = [_Part(planned(layout, key), slice(None), slice(None))]
            else:
                order, parts = _plan_ahead(layout, key, left, right)
        slots = (layout.query.slots(device), layout.key.slots(device)) if biased else (None, None)
    return KernelPlan(kernel, size, order, tuple(parts), key, slots, layout.graph_workspace is not None)


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
    bias: LogitsBias | None = None,
    sinks: torch.Tensor | None = None,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """Computes attention on ragged tensors with FlashInfer, forward only.

    Query i of a row stands at the row's key position `i + key_length - query_length`: the last query at the last key.

    Args:
        query: Shape `(total_query_tokens, heads, head_dim)`, float16 or bfloat16, on a CUDA device.
        key: Shape `(total_key_tokens, kv_heads, head_dim)`; `heads` must be a multiple of `kv_heads`.
        value: Shape `(total_key_tokens, kv_heads, value_head_dim)`.
        layout: Which tokens belong to which row.
        left: How many keys before its own position a query sees; None for all.
        right: How many keys after its own position a query sees; None for all, 0 for causal attention.
        sm_scale: What logits are multiplied with: that of the head_dim before padding.
        softcap: Caps logits to `softcap * tanh(logits / softcap)`.
        bias: Added to the logits; with "fa2" alone, and neither a window nor softcap.
        sinks: One logit per head that takes weight and gives nothing, shape `(heads,)`.
        kernel: "fa2", "fa3" or "auto"; by default what `choose_kernel` says.

    Returns:
        Shape `(total_query_tokens, heads, value_head_dim)`, the dtype of `query`. Rows without keys are zero.

    Raises:
        ValueError: If a head_dim is above 256, or a bias comes with what its kernel lacks.
    """
    value_head_dim = value.shape[-1]
    head_dim = max(query.shape[-1], value_head_dim)
    if kernel is None:
        kernel = choose_kernel(query.device, head_dim, biased=bias is not None, sinks=sinks is not None)
    plan = make_plan(
        layout,
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=head_dim,
        dtype=query.dtype,
        device=query.device,
        left=left,
        right=right,
        sm_scale=sm_scale,
        softcap=softcap,
        biased=bias is not None,
        sinks=sinks is not None,
        kernel=kernel,
    )
    query, key, value = (_pad(side, plan.size) for side in (query, key, value))
    if plan.order is None:
        output = plan.run(query, key, value, bias, sinks)
    else:
        queries, keys = plan.order.on(query.device, plan._key.stream)
        packed = plan.run(query.index_select(0, queries), key.index_select(0, keys), value.index_select(0, keys),
                          bias, sinks)  # fmt: skip
        output = torch.empty_like(packed).index_copy_(0, queries, packed)
    return output if value_head_dim == plan.size else output[..., :value_head_dim]


@dataclass(frozen=True, slots=True)
class PackOrder:
    """The order in which queries and keys are packed for a plan of several parts, as tokens of the layout.

    Args:
        queries: A permutation of the queries, int64, on the host.
        keys: Keys, some of them twice, int64, on the host.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    _moved: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor]]

    def on(self, device: torch.device, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns both on a device, copied once per stream: another stream would not wait for the copy."""
        if (device, stream) not in self._moved:
            queries, keys = (side.to(device, non_blocking=True) for side in (self.queries, self.keys))
            self._moved[device, stream] = queries, keys
        return self._moved[device, stream]


@dataclass(frozen=True, slots=True)
class _SplitLayout:
    """The queries of each row that are bounded by keys ahead, and the last ones that are not."""

    head: RaggedLayout
    tail: RaggedLayout
    order: PackOrder

    @classmethod
    def make(cls, layout: RaggedLayout, left: int | None, right: int) -> _SplitLayout:
        heads = [max(0, length - right) for length in layout.query.lengths]
        tails = [length - head for length, head in zip(layout.query.lengths, heads)]
        seen = [keys if left is None else min(keys, tail + left) for keys, tail in zip(layout.key.lengths, tails)]
        starts, ends = layout.query.offsets[:-1], layout.query.offsets[1:]
        queries = _ranges([*starts, *(end - tail for end, tail in zip(ends, tails))], [*heads, *tails])
        tail_keys = _ranges([end - length for end, length in zip(layout.key.offsets[1:], seen)], seen)
        keys = torch.cat([torch.arange(layout.key.total_tokens, device="cpu"), tail_keys])
        return cls(
            RaggedLayout.from_lengths(heads, layout.key.lengths),
            RaggedLayout.from_lengths(tails, seen),
            PackOrder(queries, keys, {}),
        )


def _plan_ahead(layout: RaggedLayout, key: PlanKey, left: int | None, right: int) -> tuple[PackOrder, list[_Part]]:
    """Plans attention with a bound on later keys, which the kernels do not have, as two calls that do.

    Causal attention aligns the last query with the last key. Without its last `right` queries a row is therefore causal
    attention shifted by `right`: query i sees keys up to `i + right`, and `left + right` before that. The last `right`
    queries have no bound ahead of them; they see the last `right + left` keys.
    """
    if layout.graph_workspace is not None:
        raise UnsupportedAttentionError(
            "a window that looks ahead, whose parts change with the lengths, in a captured graph",
            "Use unpad without cuda_graphs for this model.",
        )
    if torch.cuda.is_current_stream_capturing():
        # The graph reads the positions that the layout owns, besides the plans of its parts.
        keep_captured(layout)
    split: _SplitLayout | None = layout.derived.get(("ahead", left, right))
    if split is None:
        with layout.lock:
            split = layout.derived.setdefault(("ahead", left, right), _SplitLayout.make(layout, left, right))
    bounded = replace(key, causal=True, window_left=-1 if left is None else left + right)
    num_heads, num_keys = split.head.query.total_tokens, split.head.key.total_tokens
    parts = []
    if num_heads:
        parts.append(_Part(planned(split.head, bounded), slice(0, num_heads), slice(0, num_keys)))
    if split.tail.query.total_tokens:
        parts.append(_Part(planned(split.tail, key), slice(num_heads, None), slice(num_keys, None)))
    return split.order, parts


def _ranges(starts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """Returns the positions of consecutive ranges, one after another, int64 on the host."""
    counts = torch.tensor(lengths, device="cpu")
    first = torch.tensor(starts, device="cpu") - (counts.cumsum(0) - counts)
    return torch.arange(int(counts.sum()), device="cpu") + first.repeat_interleave(counts)


def _pad(tensor: torch.Tensor, size: int) -> torch.Tensor:
    # Zeros, not fresh memory: a NaN in a padded column of the keys would reach every logit.
    return tensor if tensor.shape[-1] == size else F.pad(tensor, (0, size - tensor.shape[-1]))
