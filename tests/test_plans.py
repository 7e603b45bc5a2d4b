"""Plans repeated with recorded arguments, on FlashInfer's own wrapper; compiled modules are stand-ins."""

from __future__ import annotations

import dataclasses
import re
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hf_flashinfer_attn
from hf_flashinfer_attn.kernels import wrapper_pool as wrappers
from hf_flashinfer_attn.kernels.recorded_calls import find
from hf_flashinfer_attn.kernels.wrapper_pool import (
    GraphWorkspace,
    GraphWrapper,
    PlanKey,
    Wrapper,
    keep_captured,
    plan_graph,
    planned,
    planning_ways,
)
from hf_flashinfer_attn.ragged.layout import RaggedLayout

flashinfer = pytest.importorskip("flashinfer")
prefill = pytest.importorskip("flashinfer.prefill")
WRAPPER = "BatchPrefillWithRaggedKVCacheWrapper"
CPU = torch.device("cpu")


class StandIn(SimpleNamespace):
    """A compiled module that keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__(plans=[], runs=[], extra=())

    def plan(self, *arguments: Any) -> list[int]:
        self.plans.append(arguments)
        return [1, 2, 3]

    def ragged_run(self, *arguments: Any) -> None:
        self.runs.append(arguments)


class NoEvent:
    def record(self, stream: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Replaces what needs a GPU: pinned memory, events, and compiled modules."""
    module, empty = StandIn(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    monkeypatch.setattr(torch.cuda, "Event", NoEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(prefill, "get_batch_prefill_module", lambda *arguments: module)
    # Another class each time: what is learnt of one is kept with it.
    monkeypatch.setattr(flashinfer, WRAPPER, type("Release", (getattr(flashinfer, WRAPPER),), {}))
    return module


def key_of(kernel: wrappers.Kernel, **changes: Any) -> PlanKey:
    return PlanKey(**{
        "kernel": kernel, "num_heads": 12, "num_kv_heads": 12, "head_dim": 64, "dtype": torch.float16, "causal": False,
        "window_left": -1, "sm_scale": 0.125, "softcap": 0.0, "device": CPU, "stream": 0, "biased": False,
        "sinks": False, **changes,
    })  # fmt: skip


def made(module: wrappers.Kernel) -> Wrapper:
    return Wrapper(wrappers.ModuleKind(module, None), torch.empty(16, dtype=torch.uint8))


def run(wrapper: Wrapper, layout: RaggedLayout) -> tuple[torch.Tensor, ...]:
    query, output = (torch.zeros(layout.query.total_tokens, 12, 64, dtype=torch.float16) for _ in range(2))
    key, value = (torch.zeros(layout.key.total_tokens, 12, 64, dtype=torch.float16) for _ in range(2))
    wrapper.run(query, key, value, output)
    return query, key, value, output


def plain(arguments: tuple[Any, ...]) -> list[Any]:
    """Numbers and the values of small tensors; of workspaces, which they are."""
    return [
        (value.tolist() if value.numel() < 100 else id(value)) if isinstance(value, torch.Tensor) else value
        for value in arguments
    ]


# Two sides also where they are alike: without a GPU, a tensor is its own copy on the device.
LAYOUTS = [
    RaggedLayout.from_lengths(queries, keys)
    for queries, keys in [
        ([5, 1, 30], [5, 1, 30]),
        ([12], [12]),
        ([1] * 12, [1] * 12),
        ([2, 7, 3, 12], [4, 9, 64, 12]),
        ([64, 128], [64, 128]),
    ]
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["fa2", "fa3"])
def test_recorded_plans_and_runs_are_those_of_the_public_methods(module, kernel: wrappers.Kernel, causal: bool) -> None:
    key, recorded = key_of(kernel, causal=causal), made(kernel)
    recorded.plan(key, LAYOUTS[0])
    run(recorded, LAYOUTS[0])
    for layout in LAYOUTS:
        recorded.plan(key, layout)
        tensors = run(recorded, layout)
        repeated, repeated_run = module.plans[-1], module.runs[-1]
        # What FlashInfer itself passes for these lengths, with the same workspaces.
        recorded.prefill.plan(
            layout.query.cu_seqlens_host, layout.key.cu_seqlens_host, 12, 12, 64, causal=causal, sm_scale=0.125,
            q_data_type=torch.float16, disable_split_kv=True,
        )  # fmt: skip
        recorded.prefill.run(*tensors[:3], out=tensors[3])
        assert plain(repeated) == plain(module.plans[-1])
        assert [type(value) for value in repeated] == [type(value) for value in module.plans[-1]]
        assert plain(repeated_run) == plain(module.runs[-1])
        assert all(any(value is tensor for value in repeated_run) for tensor in tensors)
    assert planning_ways() == {kernel: "recorded arguments"}


def test_a_recorded_plan_does_without_the_public_one(module, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper, key = made("fa3"), key_of("fa3")
    for layout in LAYOUTS[:2]:
        wrapper.plan(key, layout)
        run(wrapper, layout)
    plans = len(module.plans)
    monkeypatch.setattr(wrapper.prefill, "plan", lambda *arguments, **options: pytest.fail("the public plan"))
    wrapper.plan(key, LAYOUTS[2])
    assert len(module.plans) == plans + 1
    # Another key has other constants.
    with pytest.raises(pytest.fail.Exception, match="the public plan"):
        wrapper.plan(key_of("fa3", causal=True), LAYOUTS[2])


def graph_layout(workspace: GraphWorkspace) -> RaggedLayout:
    return RaggedLayout.for_graph([9, 4], rows=8, tokens=128, workspace=workspace)


@pytest.mark.parametrize("kernel", ["fa2", "fa3"])
def test_a_graph_is_planned_like_publicly(module, kernel: wrappers.Kernel) -> None:
    key, layout = key_of(kernel), graph_layout(GraphWorkspace(CPU))
    wrapper = GraphWrapper(key, layout, 0)
    wrapper.plan(key, layout)
    layout.plans[key] = wrapper
    # FlashInfer refuses queries of another number than the last offset that its public `plan` was given.
    run(wrapper, RaggedLayout.from_lengths([128]))
    assert planning_ways() == {f"{kernel}, captured graphs": "recorded arguments"}
    for lengths in ([3], [1] * 8, [100, 2, 26]):
        plan_graph(layout, lengths)
        repeated = module.plans[-1]
        offsets = next(value for value in repeated if isinstance(value, torch.Tensor) and value.shape == (9,))
        assert offsets.diff().tolist() == lengths + [0] * (8 - len(lengths))
        wrapper.prefill.plan(
            offsets, offsets.clone(), 12, 12, 64, sm_scale=0.125, q_data_type=torch.float16, disable_split_kv=True
        )
        pinned = {id(ring) for ring, _ in layout.graph_workspace.part(0)[1]}
        same = [one == other or {one, other} <= pinned for one, other in zip(plain(repeated), plain(module.plans[-1]))]
        assert all(same)
        assert len(repeated) == len(module.plans[-1])


def test_a_graph_that_would_launch_something_else_is_an_error(module) -> None:
    key, layout = key_of("fa2"), graph_layout(GraphWorkspace(CPU))
    layout.plans[key] = wrapper = GraphWrapper(key, layout, 0)
    wrapper.plan(key, layout)
    module.plan = lambda *arguments: [1, 2, 4]
    with pytest.raises(RuntimeError, match="other launches"):
        plan_graph(layout, [3])


class LaterRelease:
    """A wrapper of a release whose planner takes one more argument."""

    def __init__(
        self, float_workspace: torch.Tensor, *layout: str, use_cuda_graph: bool = False, **options: Any
    ) -> None:
        self.workspaces = [float_workspace, *(torch.empty(16, dtype=torch.uint8) for _ in range(2))]
        self.most: int | None = None
        self.in_graph = use_cuda_graph

    def reset_workspace_buffer(self, float_workspace: torch.Tensor, workspace: torch.Tensor) -> None:
        self.workspaces[:2] = float_workspace, workspace

    def plan(self, queries: torch.Tensor, keys: torch.Tensor, heads: int, *numbers: int, **options: Any) -> None:
        self._cached_module = prefill.get_batch_prefill_module()
        self._qo_indptr_buf, self._kv_indptr_buf = queries.clone(), keys.clone()
        tokens = int(queries[-1])
        self.most = (self.most or tokens) if self.in_graph else tokens
        self._plan_info = self._cached_module.plan(
            *self.workspaces, queries, keys, keys.diff(), self.most, len(queries) - 1, heads, self.extra(queries)
        )

    def run(self, *tensors: torch.Tensor, out: torch.Tensor) -> None:
        self._cached_module.ragged_run(self._plan_info, *tensors, out, self._qo_indptr_buf, self._kv_indptr_buf)

    def extra(self, offsets: torch.Tensor) -> object:
        raise NotImplementedError


EXTRA = {
    "constant": lambda offsets: "new",
    "known": lambda offsets: int(offsets.diff().max()),
    "unknown": lambda offsets: int(offsets.diff().square().sum()),
}


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("extra", EXTRA)
def test_a_release_with_one_more_planner_argument_is_planned_right(
    module: StandIn, monkeypatch: pytest.MonkeyPatch, extra: str, in_graph: bool
) -> None:
    public: list[int] = []

    class Release(LaterRelease):
        def plan(self, *arguments: Any, **options: Any) -> None:
            public.append(len(arguments[0]))
            super().plan(*arguments, **options)

        def extra(self, offsets: torch.Tensor) -> object:
            return EXTRA[extra](offsets)

    monkeypatch.setattr(flashinfer, WRAPPER, Release)
    key, cases = key_of("fa2"), [[3, 8], [9, 9, 9, 2], [5], [1] * 8]
    wrapper = made("fa2")
    layout = graph_layout(GraphWorkspace(CPU))
    if in_graph:
        layout.plans[key] = wrapper = GraphWrapper(key, layout, 0)
        wrapper.plan(key, layout)
    for lengths in cases:
        before = len(public)
        if in_graph:
            plan_graph(layout, lengths)
            lengths = lengths + [0] * (8 - len(lengths))
        else:
            wrapper.plan(key, RaggedLayout.from_lengths(lengths))
            run(wrapper, RaggedLayout.from_lengths(lengths))
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        planned = module.plans[-1]
        assert planned[3].tolist() == planned[4].tolist() == offsets.tolist()
        assert planned[5].tolist() == lengths
        assert planned[6:] == (128 if in_graph else sum(lengths), len(lengths), 12, EXTRA[extra](offsets))
    assert (len(public) > before) == (extra == "unknown")
    (way,) = planning_ways().values()
    expected = "recorded arguments" if extra != "unknown" else "public plan.*argument 9 of its planner depends on"
    assert re.search(expected, way)


def test_a_release_with_other_private_names_is_called_publicly(
    module: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Release(LaterRelease):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.renamed = module

        # Neither kept where it was, nor behind the name that it had.
        def plan(self, queries: torch.Tensor, keys: torch.Tensor, heads: int, *numbers: int, **options: Any) -> None:
            self.renamed.plan(*self.workspaces, queries, keys, keys.diff(), int(queries[-1]))

        def run(self, *tensors: torch.Tensor, out: torch.Tensor) -> None:
            self.renamed.ragged_run(*tensors, out)

    monkeypatch.setattr(flashinfer, WRAPPER, Release)
    wrapper, key = made("fa3"), key_of("fa3")
    for layout in LAYOUTS[:3]:
        wrapper.plan(key, layout)
        tensors = run(wrapper, layout)
        assert module.plans[-1][3].tolist() == list(layout.query.offsets)
        assert find(module.runs[-1], tensors) is not None


def test_pools_of_wrappers_are_bounded(module: StandIn) -> None:
    key = key_of("fa2")
    made: list[weakref.ref[Wrapper]] = []
    for stream in range(40):
        layouts = [RaggedLayout.from_lengths([stream + 1]) for _ in range(6)]
        made += [weakref.ref(planned(layout, dataclasses.replace(key, stream=stream))) for layout in layouts]
        del layouts
    # 16 pools of 4 that are free, and those of the last one that wait to be freed.
    assert sum(one() is not None for one in made) <= 16 * 4 + 2


def test_a_device_keeps_its_pools_while_another_has_many(module: StandIn) -> None:
    kind, other = wrappers.ModuleKind("fa2", None), torch.device("meta")
    kept = wrappers._pool_of(kind, other, 0)
    for stream in range(40):
        wrappers._pool_of(kind, CPU, stream)
    assert wrappers._pool_of(kind, other, 0) is kept
    for stream in range(1, 17):
        wrappers._pool_of(kind, other, stream)
    assert kept.is_evicted


def test_plans_of_captured_graphs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrappers, "_captured", set())
    layouts = [RaggedLayout.from_lengths([1]) for _ in range(257)]
    for layout in layouts[:256] + layouts[:256]:
        keep_captured(layout)
    with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match="more than 256 CUDA graphs"):
        keep_captured(layouts[256])
