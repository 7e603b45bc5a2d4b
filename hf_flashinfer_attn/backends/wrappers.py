"""FlashInfer's wrappers: their plans, their pools, and the memory that plans of captured graphs share."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from packaging.version import Version

from .. import jit
from ..errors import UnsupportedAttentionError
from ..layout import RaggedLayout
from ..trace import record_plan
from .biased import biased_module_arguments

__all__ = ["GraphWorkspace", "Kernel", "PlanKey", "Wrapper", "keep_captured", "plan_graph", "planned"]

Kernel = Literal["fa2", "fa3", "auto"]


# Wrappers per kernel and stream that may be made just to let the host run ahead of the GPU, 8 MiB on the device each.
_RING = 4
# Only split-KV (switched off) and some Blackwell kernels take memory from it.
_FLOAT_WORKSPACE_BYTES = {"fa2": 1 << 20, "fa3": 1 << 20, "auto": 128 << 20}


@dataclass(frozen=True, slots=True)
class PlanKey:
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
    biased: bool
    sinks: bool


class _Recorder:
    """Stands before FlashInfer's compiled module and keeps the arguments of the last call."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.arguments: tuple[Any, ...] | None = None

    def ragged_run(self, *arguments: Any) -> Any:
        self.arguments = arguments
        return self.module.ragged_run(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@dataclass(slots=True)
class _Replay:
    """A call of FlashInfer's module as a wrapper's `run` made it, for other tensors and other lengths.

    `run` checks and assembles the same two dozen arguments at every call, about 30 us of host time, and `plan` as much
    again around the planner. All layers of a forward differ in nothing but their tensors, and forwards in lengths.
    """

    module: Any
    # Without the tensors, whose memory would live as long as the plan.
    arguments: list[Any]
    tensors: tuple[int, int, int, int]
    plan: int
    offsets: tuple[int, int]


def _find(arguments: Sequence[Any], wanted: Sequence[Any]) -> tuple[int, ...] | None:
    """Returns where each of some objects is among arguments; None unless all are, at places of their own."""
    places = [next((at for at, found in enumerate(arguments) if found is one), -1) for one in wanted]
    return None if -1 in places or len(set(places)) < len(places) else tuple(places)


@functools.cache
def _planner_is_known() -> bool:
    """Whether this FlashInfer's planner is known to take the arguments of `Wrapper._plan_again`."""
    import flashinfer

    return Version(flashinfer.__version__).release[:3] == (0, 7, 2)


def _planner_arguments(
    key: PlanKey,
    workspaces: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rows_on_host: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tokens: int,
    rows: int,
    *,
    for_graph: bool = False,
) -> list[Any]:
    """Returns what the planner of FlashInfer's compiled module takes.

    Args:
        key: What is planned.
        workspaces: For floats, for integers, and pinned for integers.
        rows_on_host: Offsets of the queries, offsets of the keys, and lengths of the keys, int32.
        tokens: Queries, those of no row included.
        rows: How many.
        for_graph: Whether plans for other lengths must ask for the same launches.
    """
    arguments = [
        *workspaces, *rows_on_host, tokens, rows, key.num_heads, key.num_kv_heads,
        1,  # tokens of a page
        for_graph, key.head_dim, key.head_dim, key.causal, key.window_left,
    ]  # fmt: skip
    if key.kernel == "fa2":
        arguments += [-1, True, 0, 0]  # no fixed split, no split at all, no other CTAs, no promise of equal lengths
    return arguments


class Wrapper:
    """A FlashInfer wrapper with its own plan buffers.

    `plan` fills a pinned buffer and returns while the copy of it to the GPU may still be under way: the next plan must
    not touch that buffer before `event` has passed.
    """

    def __init__(self, module: _Module, float_workspace: torch.Tensor, **options: Any) -> None:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        jit_args = None if module.biased is None else biased_module_arguments(*module.biased)
        self.prefill = BatchPrefillWithRaggedKVCacheWrapper(
            float_workspace, "NHD", backend=module.kernel, jit_args=jit_args, **options
        )
        self.event = torch.cuda.Event()
        self.key: PlanKey | None = None
        self._replay: _Replay | None = None

    def plan(self, key: PlanKey, layout: RaggedLayout) -> None:
        self.event.synchronize()
        # "auto" chooses by lengths, anew in every plan.
        if self._replay is not None and self.key == key and key.kernel != "auto" and _planner_is_known():
            self._plan_again(key, layout, self._replay)
        else:
            self.key, self._replay = None, None
            self._plan_anew(key, layout.query.cu_seqlens_host, layout.key.cu_seqlens_host)
            self.key = key
        self.event.record(torch.cuda.current_stream(key.device))
        record_plan()

    def _plan_anew(self, key: PlanKey, query_offsets: torch.Tensor, key_offsets: torch.Tensor) -> None:
        """Plans with all of FlashInfer's own checks; offsets are on the host, from where it need not copy them back."""
        name = f"{key.kernel}, {str(key.dtype).removeprefix('torch.')}, head_dim {key.head_dim}"
        # What "auto" takes is known to nobody else, nor whether it is compiled.
        with jit.watched(name) if key.kernel == "auto" else nullcontext():
            self.prefill.plan(
                query_offsets,
                key_offsets,
                key.num_heads,
                key.num_kv_heads,
                key.head_dim,
                causal=key.causal,
                window_left=key.window_left,
                sm_scale=key.sm_scale,
                logits_soft_cap=key.softcap,
                q_data_type=key.dtype,
                # Split-KV makes results depend on the batch around a row, and drops keys under some masks (upstream
                # #4972).
                disable_split_kv=True,
            )

    def _plan_again(self, key: PlanKey, layout: RaggedLayout, replay: _Replay) -> None:
        prefill = self.prefill
        arguments = _planner_arguments(
            key,
            (
                prefill._float_workspace_buffer,
                prefill._int_workspace_buffer,
                prefill._pin_memory_int_workspace_buffer,
            ),
            (layout.query.cu_seqlens_host, layout.key.cu_seqlens_host, layout.key.lengths_host),
            layout.query.total_tokens,
            len(layout.query.lengths),
        )
        replay.arguments[replay.plan] = replay.module.plan(*arguments)
        query_offsets = layout.query.cu_seqlens_host.to(key.device, non_blocking=True)
        key_offsets = query_offsets
        if layout.key is not layout.query:
            key_offsets = layout.key.cu_seqlens_host.to(key.device, non_blocking=True)
        replay.arguments[replay.offsets[0]], replay.arguments[replay.offsets[1]] = query_offsets, key_offsets

    def run(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> None:
        """Runs the planned kernel on contiguous ragged tensors, and writes to `output`."""
        replay = self._replay
        if replay is not None:
            arguments = replay.arguments.copy()
            for place, tensor in zip(replay.tensors, (query, key, value, output)):
                arguments[place] = tensor
            replay.module.ragged_run(*arguments)
            return
        prefill = self.prefill
        module = getattr(prefill, "_cached_module", None)
        if module is None or not hasattr(module, "ragged_run"):
            prefill.run(query, key, value, out=output)
            return
        if isinstance(module, _Recorder):  # another thread's, whose first call of this plan is under way
            module = module.module
        recorder = _Recorder(module)
        prefill._cached_module = recorder
        try:
            prefill.run(query, key, value, out=output)
        finally:
            prefill._cached_module = module
        if (recorded := recorder.arguments) is None:
            return
        tensors = _find(recorded, (query, key, value, output))
        fixed = [getattr(prefill, name, None) for name in ("_plan_info", "_qo_indptr_buf", "_kv_indptr_buf")]
        planned = None if any(one is None for one in fixed) else _find(recorded, fixed)
        if tensors is not None and planned is not None:
            arguments = [None if at in tensors else argument for at, argument in enumerate(recorded)]
            self._replay = _Replay(module, arguments, tensors, planned[0], planned[1:])  # type: ignore[arg-type]


class GraphWorkspace:
    """Memory for the plans of all graphs that are captured from one model and replayed one after another.

    Each kind of attention in the model has a buffer on the device, which every replay's plan fills anew, and a ring of
    pinned ones, so that the host need not wait for the copy of the last plan.
    """

    _BYTES, _PINNED = 4 << 20, 4

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.float_buffer = torch.empty(_FLOAT_WORKSPACE_BYTES["fa3"], dtype=torch.uint8, device=device)
        self._parts: list[tuple[torch.Tensor, deque[tuple[torch.Tensor, torch.cuda.Event]]]] = []

    def part(self, index: int) -> tuple[torch.Tensor, deque[tuple[torch.Tensor, torch.cuda.Event]]]:
        """Returns the device's buffer and the pinned ones of one kind of attention."""
        while len(self._parts) <= index:
            ring = deque(
                (torch.empty(self._BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
                for _ in range(self._PINNED)
            )
            self._parts.append((torch.empty(self._BYTES, dtype=torch.uint8, device=self.device), ring))
        return self._parts[index]


class GraphWrapper(Wrapper):
    """A wrapper whose plans ask for the same launches whatever the lengths, so that a captured graph can use them."""

    def __init__(self, key: PlanKey, layout: RaggedLayout, index: int) -> None:
        workspace: GraphWorkspace = layout.graph_workspace
        self._rows, self._tokens = len(layout.query.lengths), layout.query.padded_shape[1]
        self._offsets = torch.zeros(self._rows + 1, dtype=torch.int32, device=key.device)
        super().__init__(
            _Module.of(key),
            workspace.float_buffer,
            use_cuda_graph=True,
            qo_indptr_buf=self._offsets,
            kv_indptr_buf=self._offsets,
        )
        self._buffer, self._ring = workspace.part(index)
        self._plan_info: list[int] | None = None
        self._module: Any = None

    def plan(self, key: PlanKey, layout: RaggedLayout) -> None:
        prefill = self.prefill
        # `run` raises where the last plan was for another number of tokens. What follows plans for the true rows.
        whole = torch.tensor([0] + [self._tokens] * self._rows, dtype=torch.int32)
        self._plan_anew(key, whole, whole)
        self.key, self._module = key, prefill._cached_module
        # In place of the wrapper's own, 16 MiB for each graph: one for all.
        torch.cuda.current_stream(key.device).synchronize()
        prefill._int_workspace_buffer = self._buffer
        prefill._pin_memory_int_workspace_buffer = self._ring[0][0]
        prefill._plan_info = self._plan(layout.query.cu_seqlens_host, layout.query.lengths_host)
        self._plan_info = list(prefill._plan_info)

    def plan_again(self, offsets: torch.Tensor, lengths: torch.Tensor) -> None:
        """Plans for other lengths, on the current stream, before the graph is replayed there.

        Args:
            offsets: Of the rows, int32 on the host, shape `(rows + 1,)`.
            lengths: Of the rows, the same, shape `(rows,)`.
        """
        if list(self._plan(offsets, lengths)) != self._plan_info:
            raise RuntimeError("FlashInfer planned other launches than the captured ones; please report this.")

    def _plan(self, offsets: torch.Tensor, lengths: torch.Tensor) -> Any:
        key = self.key
        assert key is not None
        pinned, event = self._ring[0]
        self._ring.rotate(-1)
        event.synchronize()
        if key.kernel == "fa2":
            # fa3 finds them in the plan.
            self._offsets.copy_(offsets, non_blocking=True)
        arguments = _planner_arguments(
            key,
            (self.prefill._float_workspace_buffer, self._buffer, pinned),
            (offsets, offsets, lengths),
            self._tokens,
            self._rows,
            for_graph=True,
        )
        plan_info = self._module.plan(*arguments)
        event.record(torch.cuda.current_stream(key.device))
        record_plan()
        return plan_info


def plan_graph(layout: RaggedLayout, lengths: Sequence[int]) -> None:
    """Plans all attention of a captured graph for other lengths.

    Args:
        layout: What the graph was captured with.
        lengths: Of the rows; at most as many, with as many tokens in all, as the graph was made for.
    """
    rows = len(layout.query.lengths)
    counts = np.zeros(rows, dtype=np.int32)
    counts[: len(lengths)] = lengths
    offsets = np.zeros(rows + 1, dtype=np.int32)
    np.cumsum(counts, out=offsets[1:])
    for wrapper in layout.plans.values():
        wrapper.plan_again(torch.from_numpy(offsets), torch.from_numpy(counts))


@dataclass(frozen=True, slots=True)
class _Module:
    """What a wrapper can be planned for: any dtype and head_dim of a kernel, but one of the kernel with a bias."""

    kernel: Kernel
    biased: tuple[torch.dtype, int] | None

    @classmethod
    def of(cls, key: PlanKey) -> _Module:
        return cls(key.kernel, (key.dtype, key.head_dim) if key.biased else None)


class WrapperPool:
    """Wrappers of one kernel on one stream of one device; a plan holds one for as long as its layout lives."""

    def __init__(self, module: _Module, device: torch.device) -> None:
        self._module = module
        self._float_workspace = torch.empty(_FLOAT_WORKSPACE_BYTES[module.kernel], dtype=torch.uint8, device=device)
        self._free: deque[Wrapper] = deque()
        self._made = 0

    def take(self, key: PlanKey) -> Wrapper:
        # Planned for the same before, or else the one that came back first: the copy of its last plan is the likeliest
        # to be over. Wrappers come back whenever garbage is collected, so nothing here may be locked.
        wrapper: Wrapper | None = None
        others: list[Wrapper] = []
        with suppress(IndexError):
            while (free := self._free.popleft()).key != key:
                others.append(free)
            wrapper = free
        if wrapper is None and others:
            wrapper = others.pop(0)
        self._free.extendleft(reversed(others))
        if wrapper is not None:
            if self._made >= _RING or wrapper.event.query():
                return wrapper
            # Rather another wrapper than a wait for the GPU, up to a point.
            self._free.appendleft(wrapper)
        self._made += 1
        return Wrapper(self._module, self._float_workspace)

    def give_back(self, wrapper: Wrapper) -> None:
        self._free.append(wrapper)


_pools: dict[tuple[_Module, torch.device, int], WrapperPool] = {}
_pools_lock = threading.Lock()
# Layouts whose plans captured graphs read, kept for good: see `planned`.
_captured: set[RaggedLayout] = set()


def keep_captured(layout: RaggedLayout) -> None:
    """Keeps a layout whose plans a captured graph reads until the process ends."""
    _captured.add(layout)


def _not_planned(layout: RaggedLayout, key: PlanKey) -> str:
    """Says where a layout has a plan and where not; streams by their handles, as `cuda_stream` gives them."""
    plans = [plan for plan in list(layout.plans) if isinstance(plan, PlanKey)]
    streams = sorted({f"{plan.stream:#x}" for plan in plans if replace(plan, stream=key.stream) == key})
    missing = f"these lengths have no plan on the capturing stream {key.stream:#x} of {key.device}"
    return f"{missing}, only on {', '.join(streams)}" if streams else f"{missing}, nor on another stream"


def planned(layout: RaggedLayout, key: PlanKey) -> Wrapper:
    """Returns a wrapper planned for `key` on `layout`, planning at most once per layout.

    A plan that a CUDA graph is captured with must outlive the graph, and nobody tells which graph that is, or when it
    is gone. It is therefore kept until the process ends, at 8 MiB on the device and 8 MiB pinned for each. Another
    capture on the same stream takes the same plan while the layout of its shape is cached. So a graph per shape costs
    one plan each, and capturing anew all the time, with many shapes in between, costs one each time.
    """
    wrapper: Wrapper | None = layout.plans.get(key)
    if torch.cuda.is_current_stream_capturing():
        if wrapper is None:
            raise UnsupportedAttentionError(
                f"planning FlashInfer attention while a CUDA graph is captured: {_not_planned(layout, key)}",
                "Run the model once on the same shapes, without padding, on the capturing stream before the capture.",
            )
        # The graph will read this plan at every replay: its buffers must never serve another.
        if layout.graph_workspace is None:
            keep_captured(layout)
    elif wrapper is None and layout.graph_workspace is not None:
        if key.kernel == "auto" or not _planner_is_known():
            raise UnsupportedAttentionError(
                f"a captured graph of kernel {key.kernel!r} of this version of FlashInfer, whose planner is not known",
                "Use unpad without cuda_graphs, or flashinfer-python 0.7.2 on a GPU of another kind.",
            )
        wrapper = GraphWrapper(key, layout, len(layout.plans))
        wrapper.plan(key, layout)
        layout.plans[key] = wrapper
    elif wrapper is None:
        with layout.lock:
            wrapper = layout.plans.get(key)
            if wrapper is None:
                module = _Module.of(key)
                with _pools_lock:
                    pool = _pools.get((module, key.device, key.stream))
                    if pool is None:
                        pool = _pools[module, key.device, key.stream] = WrapperPool(module, key.device)
                wrapper = pool.take(key)
                try:
                    wrapper.plan(key, layout)
                except BaseException:
                    pool.give_back(wrapper)
                    raise
                layout.plans[key] = wrapper
                weakref.finalize(layout, pool.give_back, wrapper).atexit = False
    assert wrapper is not None
    return wrapper
