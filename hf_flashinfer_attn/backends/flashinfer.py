"""The FlashInfer backend: head-dim padding, plans and workspaces of its ragged prefill kernels.

FlashInfer is imported on first use, never on import of this module. Facts about it were read from and run on 0.7.2.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..errors import UnsupportedAttentionError
from ..layout import RaggedLayout
from ..trace import record_plan

__all__ = ["Kernel", "attend", "choose_kernel", "head_dim_reason", "padded_head_dim", "unavailable_reason"]

Kernel = Literal["fa2", "fa3", "auto"]

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

# Wrappers per kernel and stream that may be made just to let the host run ahead of the GPU, 8 MiB on the device each.
_RING = 4
# Only split-KV (switched off) and some Blackwell kernels take memory from it.
_FLOAT_WORKSPACE_BYTES = {"fa2": 1 << 20, "fa3": 1 << 20, "auto": 128 << 20}


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
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 5):
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}, FlashInfer needs 7.5 or newer",
            "Use hf_flashinfer_attn.configure(backend='torch').",
        )
    if not _can_compile():
        return (
            "there is no nvcc to compile its kernels with (looked at CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)",
            "Install the CUDA toolkit, or the package flashinfer-jit-cache with compiled kernels.",
        )
    return None


def _can_compile() -> bool:
    if importlib.util.find_spec("flashinfer_jit_cache") is not None or shutil.which("nvcc") is not None:
        return True
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    return any(home and os.path.exists(os.path.join(home, "bin", "nvcc")) for home in homes)


def dtype_reason(dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns why the kernels cannot take `dtype` on `device`; None if they can."""
    if dtype not in DTYPES:
        return f"dtype {dtype} (FlashInfer takes torch.float16 and torch.bfloat16)"
    needed = _MIN_CAPABILITY[dtype]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < needed:
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
        >>> from hf_flashinfer_attn.backends.flashinfer import padded_head_dim
        >>> padded_head_dim(32, "fa3"), padded_head_dim(72, "fa2"), padded_head_dim(160, "fa2")
        (64, 128, 256)
    """
    for size in KERNEL_HEAD_DIMS[kernel]:
        if head_dim <= size:
            return size
    raise ValueError(f"head_dim={head_dim} is not supported; expected at most {MAX_HEAD_DIM}. Use backend='torch'.")


@functools.lru_cache(maxsize=64)
def choose_kernel(device: torch.device, head_dim: int) -> Kernel:
    """Returns the kernel to use on `device`: fa3 on Hopper, fa2 elsewhere, FlashInfer's own choice on Blackwell."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (9, 0):
        return "fa3"
    if major in (10, 11) and padded_head_dim(head_dim, "auto") == 128:
        return "auto"
    return "fa2"


@dataclass(frozen=True, slots=True)
class _PlanKey:
    kernel: Kernel
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    causal: bool
    window_left: int
    sm_scale: float
    softcap: float
    device: torch.device
    stream: int


class _Wrapper:
    """A FlashInfer wrapper with its own plan buffers.

    `plan` fills a pinned buffer and returns while the copy of it to the GPU may still be under way: the next plan must
    not touch that buffer before `event` has passed.
    """

    def __init__(self, kernel: Kernel, float_workspace: torch.Tensor) -> None:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        self.prefill = BatchPrefillWithRaggedKVCacheWrapper(float_workspace, "NHD", backend=kernel)
        self.event = torch.cuda.Event()

    def plan(self, key: _PlanKey, layout: RaggedLayout) -> None:
        self.event.synchronize()
        self.prefill.plan(
            # On the host, so that FlashInfer need not copy them back.
            layout.query.cu_seqlens_host,
            layout.key.cu_seqlens_host,
            key.num_heads,
            key.num_kv_heads,
            key.head_dim,
            causal=key.causal,
            window_left=key.window_left,
            sm_scale=key.sm_scale,
            logits_soft_cap=key.softcap,
            q_data_type=key.dtype,
            # Split-KV makes results depend on the batch around a row, and drops keys under some masks (upstream #4972).
            disable_split_kv=True,
        )
        self.event.record(torch.cuda.current_stream(key.device))
        record_plan()


class _WrapperPool:
    """Wrappers of one kernel on one stream of one device; a plan holds one for as long as its layout lives."""

    def __init__(self, kernel: Kernel, device: torch.device) -> None:
        self._kernel: Kernel = kernel
        self._float_workspace = torch.empty(_FLOAT_WORKSPACE_BYTES[kernel], dtype=torch.uint8, device=device)
        self._free: deque[_Wrapper] = deque()
        self._made = 0

    def take(self) -> _Wrapper:
        wrapper: _Wrapper | None = None
        with suppress(IndexError):
            # The one that came back first: the copy of its last plan is the likeliest to be over.
            wrapper = self._free.popleft()
        if wrapper is not None:
            if self._made >= _RING or wrapper.event.query():
                return wrapper
            # Rather another wrapper than a wait for the GPU, up to a point.
            self._free.appendleft(wrapper)
        self._made += 1
        return _Wrapper(self._kernel, self._float_workspace)

    def give_back(self, wrapper: _Wrapper) -> None:
        self._free.append(wrapper)


_pools: dict[tuple[Kernel, torch.device, int], _WrapperPool] = {}
_pools_lock = threading.Lock()
# Layouts whose plans captured graphs read, kept for good: see `_planned`.
_captured: set[RaggedLayout] = set()


def _not_planned(layout: RaggedLayout, key: _PlanKey) -> str:
    """Says where a layout has a plan and where not; streams by their handles, as `cuda_stream` gives them."""
    plans = [plan for plan in list(layout.plans) if isinstance(plan, _PlanKey)]
    streams = sorted({f"{plan.stream:#x}" for plan in plans if replace(plan, stream=key.stream) == key})
    missing = f"these lengths have no plan on the capturing stream {key.stream:#x} of {key.device}"
    return f"{missing}, only on {', '.join(streams)}" if streams else f"{missing}, nor on another stream"


def _planned(layout: RaggedLayout, key: _PlanKey) -> Any:
    """Returns a wrapper planned for `key` on `layout`, planning at most once per layout.

    A plan that a CUDA graph is captured with must outlive the graph, and nobody tells which graph that is, or when it
    is gone. It is therefore kept until the process ends, at 8 MiB on the device and 8 MiB pinned for each. Another
    capture on the same stream takes the same plan while the layout of its shape is cached. So a graph per shape costs
    one plan each, and capturing anew all the time, with many shapes in between, costs one each time.
    """
    wrapper: _Wrapper | None = layout.plans.get(key)
    if torch.cuda.is_current_stream_capturing():
        if wrapper is None:
            raise UnsupportedAttentionError(
                f"planning FlashInfer attention while a CUDA graph is captured: {_not_planned(layout, key)}",
                "Run the model once on the same shapes, without padding, on the capturing stream before the capture.",
            )
        # The graph will read this plan at every replay: its buffers must never serve another.
        _captured.add(layout)
    elif wrapper is None:
        with layout.lock:
            wrapper = layout.plans.get(key)
            if wrapper is None:
                with _pools_lock:
                    pool = _pools.get((key.kernel, key.device, key.stream))
                    if pool is None:
                        pool = _pools[key.kernel, key.device, key.stream] = _WrapperPool(key.kernel, key.device)
                wrapper = pool.take()
                try:
                    wrapper.plan(key, layout)
                except BaseException:
                    pool.give_back(wrapper)
                    raise
                layout.plans[key] = wrapper
                weakref.finalize(layout, pool.give_back, wrapper).atexit = False
    assert wrapper is not None
    return wrapper.prefill


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
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """Computes ragged attention with FlashInfer, forward only.

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
        kernel: "fa2", "fa3" or "auto"; by default what `choose_kernel` says.

    Returns:
        Shape `(total_query_tokens, heads, value_head_dim)`, the dtype of `query`. Rows without keys are zero.

    Raises:
        ValueError: If a head_dim is above 256.
    """
    device, value_head_dim = query.device, value.shape[-1]
    if layout.query.total_tokens == 0 or layout.key.total_tokens == 0:
        return query.new_zeros(*query.shape[:-1], value_head_dim)
    widest = max(query.shape[-1], value_head_dim)
    kernel = choose_kernel(device, widest) if kernel is None else kernel
    size = padded_head_dim(widest, kernel)
    query, key, value = _pad(query, size), _pad(key, size), _pad(value, size)
    # A bound that no row reaches is none: windows need kernels of their own.
    left = None if left is not None and left >= layout.key.max_length - 1 else left
    right = None if right is not None and right >= layout.query.max_length - 1 else right
    with torch.cuda.device(device):
        plan_key = _PlanKey(
            kernel=kernel,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=size,
            dtype=query.dtype,
            causal=right == 0,
            window_left=-1 if left is None else left,
            sm_scale=float(sm_scale),
            softcap=0.0 if softcap is None else float(softcap),
            device=device,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )
        output: torch.Tensor
        if right is None or right == 0:
            output = _planned(layout, plan_key).run(query, key, value)
        else:
            output = _attend_ahead(query, key, value, layout, plan_key, left, right)
    return output if value_head_dim == size else output[..., :value_head_dim]


def _attend_ahead(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RaggedLayout,
    plan_key: _PlanKey,
    left: int | None,
    right: int,
) -> torch.Tensor:
    """Attention with a bound on later keys, which the kernels do not have, from two calls that do.

    Causal attention aligns the last query with the last key. Without its last `right` queries a row is therefore causal
    attention shifted by `right`: query i sees keys up to `i + right`, and `left + right` before that. The last `right`
    queries have no bound ahead of them; they see the last `right + left` keys.
    """
    if torch.cuda.is_current_stream_capturing():
        # The graph reads the positions that the layout owns, besides the plans of its parts.
        _captured.add(layout)
    split = layout.derived.get(("ahead", left, right))
    if split is None:
        with layout.lock:
            split = layout.derived.setdefault(("ahead", left, right), _SplitLayout.make(layout, left, right))
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    causal_key = replace(plan_key, causal=True, window_left=-1 if left is None else left + right)
    for part, part_key in ((split.head, causal_key), (split.tail, plan_key)):
        if part.layout.query.total_tokens:
            rows, keys = part.on(query.device, plan_key.stream)
            run = _planned(part.layout, part_key).run
            some = (key, value) if keys is None else (key.index_select(0, keys), value.index_select(0, keys))
            output[rows] = run(query.index_select(0, rows), *some)
    return output


@dataclass(frozen=True, slots=True)
class _LayoutPart:
    """Some queries of a layout and the keys they see, as positions in its ragged tensors; `keys` None for all."""

    layout: RaggedLayout
    rows: torch.Tensor
    keys: torch.Tensor | None
    moved: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor | None]]

    def on(self, device: torch.device, stream: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns rows and keys on a device, copied once per stream: another stream would not wait for the copy."""
        if (device, stream) not in self.moved:
            keys = None if self.keys is None else self.keys.to(device, non_blocking=True)
            self.moved[device, stream] = self.rows.to(device, non_blocking=True), keys
        return self.moved[device, stream]


@dataclass(frozen=True, slots=True)
class _SplitLayout:
    """The queries of each row that are bounded by keys ahead, and the last ones that are not."""

    head: _LayoutPart
    tail: _LayoutPart

    @classmethod
    def make(cls, layout: RaggedLayout, left: int | None, right: int) -> _SplitLayout:
        heads = [max(0, length - right) for length in layout.query.lengths]
        tails = [length - head for length, head in zip(layout.query.lengths, heads)]
        seen = [keys if left is None else min(keys, tail + left) for keys, tail in zip(layout.key.lengths, tails)]
        starts, ends = layout.query.offsets[:-1], layout.query.offsets[1:]
        return cls(
            _LayoutPart(RaggedLayout.from_lengths(heads, layout.key.lengths), _ranges(starts, heads), None, {}),
            _LayoutPart(
                RaggedLayout.from_lengths(tails, seen),
                _ranges([end - tail for end, tail in zip(ends, tails)], tails),
                _ranges([end - length for end, length in zip(layout.key.offsets[1:], seen)], seen),
                {},
            ),
        )


def _ranges(starts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """Returns the positions of consecutive ranges, one after another, int64 on the host."""
    counts = torch.tensor(lengths)
    first = torch.tensor(starts) - (counts.cumsum(0) - counts)
    return torch.arange(int(counts.sum())) + first.repeat_interleave(counts)


def _pad(tensor: torch.Tensor, size: int) -> torch.Tensor:
    # Zeros, not fresh memory: a NaN in a padded column of the keys would reach every logit.
    return tensor if tensor.shape[-1] == size else F.pad(tensor, (0, size - tensor.shape[-1]))
