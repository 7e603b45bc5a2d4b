"""FlashInfer's path on a CPU: its wrapper is replaced by one that computes in torch, and a CPU passes for an H100.

Everything else is the package's own: selection, plans, packing, reuse. Triton's kernels run as torch's indexing does.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from contextvars import Context
from typing import Any, ClassVar

import pytest
import torch

from hf_flashinfer_attn.kernels import flashinfer as kernels
from hf_flashinfer_attn.kernels import jit, torch_ragged, wrapper_pool
from hf_flashinfer_attn.ragged.layout import RaggedLayout


class Module:
    """A compiled module: plans keep what they were made for, runs compute it."""

    def plan(self, *arguments: Any) -> list[Any]:
        return list(arguments)

    def ragged_run(self, *arguments: Any) -> None:
        # The layout made here is none of the package's: no trace counts it.
        Context().run(self._compute, *arguments)

    def _compute(self, plan: list[Any], query_offsets: Any, key_offsets: Any, *sides: Any) -> None:
        queries, keys, rows, causal, left, scale, softcap, dtype, size = plan
        output = sides[-1]
        assert {side.dtype for side in sides} == {dtype}
        assert {side.shape[2] for side in sides} == {size}
        assert torch.equal(query_offsets, queries)
        assert torch.equal(key_offsets, keys)
        assert len(queries) == rows + 1
        layout = RaggedLayout.from_lengths(queries.diff().tolist(), keys.diff().tolist())
        tokens = slice(0, layout.query.total_tokens), slice(0, layout.key.total_tokens)
        exact = [side[place].double() for side, place in zip(sides, (tokens[0], tokens[1], tokens[1]))]
        result = torch_ragged.attend(
            *exact, layout, left=None if left < 0 else left, right=0 if causal else None, sm_scale=scale,
            softcap=softcap or None,
        )  # fmt: skip
        output[tokens[0]] = result.to(dtype)


class Wrapper:
    """The part of FlashInfer's wrapper that the package calls, with the private attributes that it records."""

    # Calls of the public methods, of all instances and subclasses.
    counts: ClassVar[dict[str, int]]

    def __init__(self, workspace: torch.Tensor, layout: str, backend: str, jit_args: Any = None) -> None:
        assert layout == "NHD"
        self._jit_args = jit_args

    def plan(
        self, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, heads: int, kv_heads: int, head_dim: int, *,
        causal: bool, window_left: int, sm_scale: float, logits_soft_cap: float, q_data_type: torch.dtype,
        disable_split_kv: bool,
    ) -> None:  # fmt: skip
        assert disable_split_kv
        self.counts["plan"] += 1
        self._cached_module: Any = Module()
        self._qo_indptr_buf, self._kv_indptr_buf = qo_indptr.clone(), kv_indptr.clone()
        self._info = self._cached_module.plan(
            qo_indptr, kv_indptr, len(qo_indptr) - 1, causal, window_left, sm_scale, logits_soft_cap, q_data_type,
            head_dim,
        )  # fmt: skip

    def run(self, query: Any, key: Any, value: Any, *, out: torch.Tensor) -> torch.Tensor:
        self.counts["run"] += 1
        self._cached_module.ragged_run(self._info, self._qo_indptr_buf, self._kv_indptr_buf, query, key, value, out)
        return out


class Event:
    def record(self, stream: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


@pytest.fixture
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> type[Wrapper]:
    """Has tensors on the CPU go FlashInfer's way; returns the class that counts plans and runs."""
    flashinfer = pytest.importorskip("flashinfer")
    counting = type("Counting", (Wrapper,), {"counts": {"plan": 0, "run": 0}})
    monkeypatch.setattr(flashinfer, "BatchPrefillWithRaggedKVCacheWrapper", counting)
    # Pools outlive a forward, and those of another test hold wrappers of another class.
    monkeypatch.setattr(wrapper_pool, "_pools", OrderedDict())
    monkeypatch.setattr(kernels, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(jit, "require", lambda module: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return counting
