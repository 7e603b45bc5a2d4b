"""FlashInfer's wrappers: their plans, pools per stream, and shared memory for plans of captured graphs."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch

from ..errors import UnsupportedAttentionError
from ..ragged.layout import RaggedLayout
from ..tracing import record_plan
from . import jit
from .biased import biased_module_arguments
from .recorded_calls import CallRecorder, Lengths, device_offsets_of, find, learn_planner, recording, share_workspace

__all__ = [
    "GraphWorkspace",
    "Kernel",
    "ModuleKind",
    "PlanKey",
    "Wrapper",
    "keep_captured",
    "plan_graph",
    "planned",
    "planning_ways",
]

Kernel = Literal["fa2", "fa3", "auto"]


# Wrappers per kernel and stream, so that the host can run ahead of the GPU; each has 8 MiB on the device.
_RING = 4
# Used only by split-KV, which is disabled, and by some Blackwell kernels.
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


@dataclass(slots=True)
class _Replay:
    """A recorded `run` call of a compiled module, without its tensors, so as not to keep them alive."""

    launch: Callable[..., Any]
    arguments: list[Any]
    tensors: tuple[int, int, int, int]
    plan: int
    offsets: tuple[int, int]


def planning_ways() -> dict[str, str]:
    """Returns, by kernel, how plans after the first one are made in this process."""
    if (flashinfer := sys.modules.get("flashinfer")) is None:
        return {}
    ways = {}
    for (kernel, biased, in_graphs), fields in list(_recording_class(flashinfer).planners.items()):
        name = kernel + " with a bias" * biased + ", captured graphs" * in_graphs
        slow = f"FlashInfer's public plan(), about 0.2 ms slower per forward: {fields}"
        ways[name] = slow if isinstance(fields, str) else "recorded arguments"
    return ways


def _recording_class(flashinfer: ModuleType) -> type[Any]:
    return recording(flashinfer.BatchPrefillWithRaggedKVCacheWrapper)


class Wrapper:
    """A FlashInfer wrapper with its own plan buffers.

    `plan` fills a pinned buffer and returns before the buffer is copied to the GPU. The next plan must not write to it
    before `event` has completed.
    """

    def __init__(self, module: ModuleKind, float_workspace: torch.Tensor, **options: Any) -> None:
        import flashinfer

        # "auto" selects a kernel by row lengths in every plan, so its calls cannot be repeated.
        is_auto = module.kernel == "auto"
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper if is_auto else _recording_class(flashinfer)
        jit_args = None if module.biased is None else biased_module_arguments(*module.biased)
        self.prefill = wrapper(float_workspace, "NHD", backend=module.kernel, jit_args=jit_args, **options)
        self.event = torch.cuda.Event()
        self.key: PlanKey | None = None
        self._replay: _Replay | None = None

    @property
    def _recorder(self) -> CallRecorder | None:
        recorder: CallRecorder | None = getattr(self.prefill, "recorder", None)
        return recorder

    def plan(self, key: PlanKey, layout: RaggedLayout) -> None:
        self.event.synchronize()
        lengths = Lengths.of(layout)
        if self._replay is None or self.key != key or not self._plan_recorded(key, lengths, self._replay):
            self.key, self._replay = None, None
            self._plan_publicly(key, lengths)
            self.key = key
        self.event.record(torch.cuda.current_stream(key.device))
        record_plan()

    def _plan_publicly(self, key: PlanKey, lengths: Lengths) -> CallRecorder | None:
        """Plans with FlashInfer's public method; cu_seqlens are on the host, so no copy from the GPU is needed."""
        name = f"{key.kernel}, {str(key.dtype).removeprefix('torch.')}, head_dim {key.head_dim}"
        # FlashInfer selects the kernel of "auto" and may compile it.
        with jit.watched(name) if key.kernel == "auto" else nullcontext():
            self.prefill.plan(
                lengths.query_offsets,
                lengths.key_offsets,
                key.num_heads,
                key.num_kv_heads,
                key.head_dim,
                causal=key.causal,
                window_left=key.window_left,
                sm_scale=key.sm_scale,
                logits_soft_cap=key.softcap,
                q_data_type=key.dtype,
                # Split-KV makes a row's result depend on its batch, and drops keys under some masks (upstream #4972).
                disable_split_kv=True,
            )
        return self._recorder

    def _planner(
        self, key: PlanKey, lengths: Lengths, *, fixed_rows: int | None = None
    ) -> tuple[str | None, ...] | None:
        """Returns the field of `Lengths` for each planner argument; None if only the public method can be used.

        `learn_planner` plans for other lengths, so `lengths` are planned again afterwards.
        """
        planners = type(self.prefill).planners
        kind = key.kernel, key.biased, fixed_rows is not None
        if kind not in planners:
            planners[kind] = learn_planner(lambda probe: self._plan_publicly(key, probe), fixed_rows=fixed_rows)
            self._plan_publicly(key, lengths)
        fields = planners[kind]
        return None if isinstance(fields, str) else fields

    def _plan_recorded(self, key: PlanKey, lengths: Lengths, replay: _Replay) -> bool:
        """Plans with recorded arguments; returns False if they are not recognised."""
        fields, recorder = self._planner(key, lengths), self._recorder
        if fields is None or recorder is None or recorder.plan_arguments is None:
            return False
        replay.arguments[replay.plan] = recorder.module.plan(*_with_lengths(recorder.plan_arguments, fields, lengths))
        query_offsets = lengths.query_offsets.to(key.device, non_blocking=True)
        key_offsets = query_offsets
        if lengths.key_offsets is not lengths.query_offsets:
            key_offsets = lengths.key_offsets.to(key.device, non_blocking=True)
        replay.arguments[replay.offsets[0]], replay.arguments[replay.offsets[1]] = query_offsets, key_offsets
        return True

    def run(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> None:
        """Runs the planned kernel on contiguous ragged tensors, and writes to `output`."""
        replay = self._replay
        if replay is not None:
            # A copy, since two threads may run one plan.
            arguments = replay.arguments.copy()
            first, second, third, last = replay.tensors
            arguments[first], arguments[second], arguments[third], arguments[last] = query, key, value, output
            replay.launch(*arguments)
            return
        self.prefill.run(query, key, value, out=output)
        if (recorder := self._recorder) is None:
            return
        # Fails, harmlessly, if another thread ran the same plan meanwhile.
        recorded, recorder.run_arguments = recorder.run_arguments or (), None
        tensors = find(recorded, (query, key, value, output))
        fixed = find(recorded, (recorder.plan_result, *device_offsets_of(self.prefill)))
        if tensors is not None and fixed is not None:
            arguments = [None if index in tensors else argument for index, argument in enumerate(recorded)]
            launch = recorder.module.ragged_run
            self._replay = _Replay(launch, arguments, tensors, fixed[0], fixed[1:])  # type: ignore[arg-type]


def _with_lengths(arguments: Sequence[Any], fields: Sequence[str | None], lengths: Lengths) -> list[Any]:
    return [value if field is None else getattr(lengths, field) for value, field in zip(arguments, fields)]


_PinnedRing = deque[tuple[torch.Tensor, torch.cuda.Event]]


class GraphWorkspace:
    """Memory for the plans of all graphs of one model; graphs are replayed one at a time.

    Each kind of attention in the model has a device buffer, which every replay overwrites with its plan, and a ring
    of pinned buffers, so that the host need not wait until the last plan is copied.
    """

    _BYTES, _PINNED = 4 << 20, 4

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.float_buffer = torch.empty(_FLOAT_WORKSPACE_BYTES["fa3"], dtype=torch.uint8, device=device)
        self._parts: list[tuple[torch.Tensor, _PinnedRing]] = []

    def part(self, index: int) -> tuple[torch.Tensor, _PinnedRing]:
        """Returns the device buffer and the pinned buffers of one kind of attention."""
        while len(self._parts) <= index:
            ring = deque(
                (torch.empty(self._BYTES, dtype=torch.uint8, device="cpu", pin_memory=True), torch.cuda.Event())
                for _ in range(self._PINNED)
            )
            self._parts.append((torch.empty(self._BYTES, dtype=torch.uint8, device=self.device), ring))
        return self._parts[index]


class GraphWrapper(Wrapper):
    """A wrapper for captured graphs: its plans have the same launches for all lengths."""

    def __init__(self, key: PlanKey, layout: RaggedLayout, index: int) -> None:
        workspace: GraphWorkspace = layout.graph_workspace
        self._rows, self._tokens = len(layout.query.lengths), layout.query.padded_shape[1]
        self._offsets = torch.zeros(self._rows + 1, dtype=torch.int32, device=key.device)
        super().__init__(
            ModuleKind.of(key),
            workspace.float_buffer,
            use_cuda_graph=True,
            qo_indptr_buf=self._offsets,
            kv_indptr_buf=self._offsets,
        )
        buffer, self._ring = workspace.part(index)
        # For the public `plan`; recorded calls replace it by the next buffer of the ring.
        self._pinned, self._pinned_event = self._ring[0]
        share_workspace(self.prefill, workspace.float_buffer, buffer, self._pinned)
        self._fields: tuple[str | None, ...] | None = None
        self._plan_info: list[Any] | None = None

    def plan(self, key: PlanKey, layout: RaggedLayout) -> None:
        # Plans for the maximum, since `run` checks the number of tokens. `plan_again` plans for the actual lengths.
        whole = Lengths.of_rows(self._rows, [self._tokens])
        self._pinned_event.synchronize()
        self._plan_publicly(key, whole)
        if self._rows >= 4 and self._tokens >= 64:
            self._fields = self._planner(key, whole, fixed_rows=self._rows)
        self._pinned_event.record(torch.cuda.current_stream(key.device))
        self.key = key
        if self._recorder is not None and self._recorder.plan_result is not None:
            self._plan_info = list(self._recorder.plan_result)
        record_plan()
        if self._fields is not None:
            self.plan_again(Lengths.of(layout))

    def plan_again(self, lengths: Lengths) -> None:
        """Plans for other lengths, on the current stream, before the graph is replayed there."""
        key, recorder = self.key, self._recorder
        assert key is not None, "planned before its graph was captured"
        if self._fields is None or recorder is None or recorder.plan_arguments is None:
            self._pinned_event.synchronize()
            recorder = self._plan_publicly(key, lengths)
            plan_info, event = None if recorder is None else recorder.plan_result, self._pinned_event
        else:
            pinned, event = self._ring[0]
            self._ring.rotate(-1)
            event.synchronize()
            # Kernels read cu_seqlens from this buffer or from the plan.
            self._offsets.copy_(lengths.query_offsets, non_blocking=True)
            arguments = _with_lengths(recorder.plan_arguments, self._fields, lengths)
            plan_info = recorder.module.plan(*(pinned if value is self._pinned else value for value in arguments))
        event.record(torch.cuda.current_stream(key.device))
        record_plan()
        if plan_info is not None and list(plan_info) != self._plan_info:
            raise RuntimeError("FlashInfer planned other launches than the captured ones; please report this.")


def plan_graph(layout: RaggedLayout, lengths: Sequence[int]) -> None:
    """Plans all attention of a captured graph for other row lengths; `layout` is that of the capture."""
    arguments = Lengths.of_rows(len(layout.query.lengths), lengths)
    for wrapper in layout.plans.values():
        wrapper.plan_again(arguments)


@dataclass(frozen=True, slots=True)
class ModuleKind:
    """Key of a wrapper pool: the kernel, and for a bias also dtype and head_dim."""

    kernel: Kernel
    biased: tuple[torch.dtype, int] | None

    @classmethod
    def of(cls, key: PlanKey) -> ModuleKind:
        return cls(key.kernel, (key.dtype, key.head_dim) if key.biased else None)


class WrapperPool:
    """Pool of wrappers of one kernel, device and stream. A plan holds its wrapper until its layout is freed."""

    def __init__(self, module: ModuleKind, device: torch.device) -> None:
        self._module = module
        self._float_workspace = torch.empty(_FLOAT_WORKSPACE_BYTES[module.kernel], dtype=torch.uint8, device=device)
        self._free: deque[Wrapper] = deque()
        self._made = 0
        self.is_evicted = False

    def take(self, key: PlanKey) -> Wrapper:
        # Prefers a wrapper with the same key, then the one that was returned first: its copy has most likely finished.
        # Finalizers return wrappers at any time, so this must not take a lock.
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
            # Makes up to _RING wrappers rather than wait for the GPU.
            self._free.appendleft(wrapper)
        self._made += 1
        return Wrapper(self._module, self._float_workspace)

    def give_back(self, wrapper: Wrapper) -> None:
        if self.is_evicted or len(self._free) >= _RING:
            self._made -= 1
            _evicted.append(wrapper)
        else:
            self._free.append(wrapper)

    def evict(self) -> None:
        self.is_evicted = True
        with suppress(IndexError):
            while True:
                _evicted.append(self._free.popleft())


# Least recently used first; bounded, since servers may make a stream per request.
_pools: OrderedDict[tuple[ModuleKind, torch.device, int], WrapperPool] = OrderedDict()
_pools_lock = threading.Lock()
# Pools per device.
_MOST_POOLS = 16
# Wrappers to be freed when the copies from their pinned memory have finished.
_evicted: deque[Wrapper] = deque()
# Layouts of captured graphs, never freed: see `planned`.
_captured: set[RaggedLayout] = set()
_MOST_CAPTURED = 256


def _pool_of(module: ModuleKind, device: torch.device, stream: int) -> WrapperPool:
    with _pools_lock:
        for _ in range(len(_evicted)):
            wrapper = _evicted.popleft()
            if not wrapper.event.query():
                _evicted.append(wrapper)
        pool = _pools.get((module, device, stream))
        if pool is None:
            on_device = [key for key in _pools if key[1] == device]
            if len(on_device) >= _MOST_POOLS:
                _pools.pop(on_device[0]).evict()
            pool = _pools[module, device, stream] = WrapperPool(module, device)
        _pools.move_to_end((module, device, stream))
        return pool


def keep_captured(layout: RaggedLayout) -> None:
    """Keeps the plans of a captured graph until the process ends.

    Raises:
        UnsupportedAttentionError: If there are 256 already, which take 4 GiB of GPU and pinned memory.
    """
    if layout not in _captured and len(_captured) >= _MOST_CAPTURED:
        raise UnsupportedAttentionError(
            f"capturing more than {_MOST_CAPTURED} CUDA graphs of different shapes, whose plans are never freed",
            "Capture fewer shapes, or use unpad(model, cuda_graphs=True), whose graphs share memory.",
        )
    _captured.add(layout)


def _not_planned(layout: RaggedLayout, key: PlanKey) -> str:
    """Returns the error text for a missing plan; it lists the streams (`cuda_stream` handles) that have one."""
    plans = [plan for plan in list(layout.plans) if isinstance(plan, PlanKey)]
    streams = sorted({f"{plan.stream:#x}" for plan in plans if replace(plan, stream=key.stream) == key})
    missing = f"these lengths have no plan on the capturing stream {key.stream:#x} of {key.device}"
    return f"{missing}, only on {', '.join(streams)}" if streams else f"{missing}, nor on another stream"


def planned(layout: RaggedLayout, key: PlanKey) -> Wrapper:
    """Returns a wrapper planned for `key` on `layout`; plans at most once per layout.

    A plan in a user's CUDA graph must outlive the graph, whose end cannot be observed. It is therefore kept until the
    process ends, and takes 8 MiB on the device and 8 MiB of pinned memory. Another capture on the same stream reuses
    the plan while the layout of its shape is cached. One graph per shape thus costs one plan; repeated captures with
    many shapes in between cost one plan each.
    """
    wrapper: Wrapper | None = layout.plans.get(key)
    if torch.cuda.is_current_stream_capturing():
        if wrapper is None:
            raise UnsupportedAttentionError(
                f"planning FlashInfer attention while a CUDA graph is captured: {_not_planned(layout, key)}",
                "Run the model once on the same shapes, without padding, on the capturing stream before the capture.",
            )
        # Every replay reads the plan, so its buffers must not be reused.
        if layout.graph_workspace is None:
            keep_captured(layout)
    elif wrapper is None and layout.graph_workspace is not None:
        if key.kernel == "auto":
            raise UnsupportedAttentionError(
                "kernel 'auto', which chooses by lengths, in a captured graph", "Use unpad without cuda_graphs."
            )
        wrapper = GraphWrapper(key, layout, len(layout.plans))
        wrapper.plan(key, layout)
        layout.plans[key] = wrapper
    elif wrapper is None:
        with layout.lock:
            wrapper = layout.plans.get(key)
            if wrapper is None:
                pool = _pool_of(ModuleKind.of(key), key.device, key.stream)
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
