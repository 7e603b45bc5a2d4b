"""Recorded calls of FlashInfer's compiled modules: the one place that knows private names of its wrapper.

`plan()` and `run()` of FlashInfer's wrapper check and assemble two dozen arguments at each call, 0.2 ms and 30 us of
host time, before they call a compiled module. All forwards of one kind differ in nothing but lengths, and all layers of
one forward in nothing but tensors. So the module's calls are recorded once, and repeated with what differs exchanged.
Where an argument is not recognised, the public methods are called instead: slower, never wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from ..layout import RaggedLayout

__all__ = ["CallRecorder", "Lengths", "device_offsets_of", "find", "learn_planner", "recording", "share_workspace"]


class Lengths(NamedTuple):
    """What a plan depends on besides constants.

    Args:
        query_offsets: First token of each row, then their number, int32 on the host, shape `(rows + 1,)`.
        key_offsets: The same of the keys.
        key_lengths: Keys of each row, int32 on the host, shape `(rows,)`.
        query_lengths: The same of the queries.
        query_tokens: Queries of all rows.
        key_tokens: Keys of all rows.
        rows: How many.
        longest_query: Queries of the longest row.
        longest_key: Keys of the row with most keys.
    """

    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    key_lengths: torch.Tensor
    query_lengths: torch.Tensor
    query_tokens: int
    key_tokens: int
    rows: int
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, layout: RaggedLayout) -> Lengths:
        query, key = layout.query, layout.key
        return cls(
            query.cu_seqlens_host, key.cu_seqlens_host, key.lengths_host, query.lengths_host, query.total_tokens,
            key.total_tokens, len(query.lengths), query.max_length, key.max_length,
        )  # fmt: skip


class CallRecorder:
    """Forwards to a compiled module and keeps the arguments of the last `plan` and the last `ragged_run`."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.plan_arguments: tuple[Any, ...] | None = None
        self.plan_result: Any = None
        self.run_arguments: tuple[Any, ...] | None = None

    def plan(self, *arguments: Any) -> Any:
        self.plan_arguments = arguments
        self.plan_result = self.module.plan(*arguments)
        return self.plan_result

    def ragged_run(self, *arguments: Any) -> Any:
        self.run_arguments = arguments
        return self.module.ragged_run(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@functools.cache
def recording(base: type[Any]) -> type[Any]:
    """Returns a subclass of FlashInfer's wrapper whose compiled module is behind a `CallRecorder`, its `recorder`.

    A release that keeps its module under another name leaves `recorder` None, and nothing is repeated.
    """

    class RecordingWrapper(base):  # type: ignore[misc]
        recorder: CallRecorder | None = None
        # What `learn_planner` found out, by kernel, whether it adds a bias, and whether it plans for captured graphs.
        planners: ClassVar[dict[tuple[str, bool, bool], tuple[str | None, ...] | str]] = {}

        @property
        def _cached_module(self) -> CallRecorder | None:
            return self.recorder

        @_cached_module.setter
        def _cached_module(self, module: Any) -> None:
            if module is None or (self.recorder is not None and self.recorder.module is module):
                return
            self.recorder = CallRecorder(module)

    return RecordingWrapper


def device_offsets_of(prefill: Any) -> tuple[Any, Any]:
    """Returns the device tensors that a wrapper's last plan copied its offsets to, as its `run` passes them."""
    return getattr(prefill, "_qo_indptr_buf", None), getattr(prefill, "_kv_indptr_buf", None)


def share_workspace(prefill: Any, float_buffer: torch.Tensor, buffer: torch.Tensor, pinned: torch.Tensor) -> None:
    """Has a wrapper plan into buffers of somebody else's, in place of 16 MiB of its own."""
    prefill.reset_workspace_buffer(float_buffer, buffer)
    if hasattr(prefill, "_pin_memory_int_workspace_buffer"):
        prefill._pin_memory_int_workspace_buffer = pinned


def find(arguments: Sequence[Any], wanted: Sequence[Any]) -> tuple[int, ...] | None:
    """Returns where each of some objects is among arguments; None unless all are, at places of their own."""
    places = [next((at for at, found in enumerate(arguments) if found is one), -1) for one in wanted]
    return None if -1 in places or len(set(places)) < len(places) else tuple(places)


def _probe(query_lengths: Sequence[int], key_lengths: Sequence[int], rows: int) -> Lengths:
    queries, keys = np.zeros(rows, dtype=np.int32), np.zeros(rows, dtype=np.int32)
    queries[: len(query_lengths)], keys[: len(key_lengths)] = query_lengths, key_lengths
    return Lengths(
        _offsets(queries), _offsets(keys), torch.from_numpy(keys), torch.from_numpy(queries), sum(query_lengths),
        sum(key_lengths), rows, max(query_lengths), max(key_lengths),
    )  # fmt: skip


def _offsets(lengths: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def learn_planner(
    plan: Callable[[Lengths], CallRecorder | None], *, fixed_rows: int | None = None
) -> tuple[str | None, ...] | str:
    """Finds out which arguments of a module's `plan` depend on lengths, from plans for different ones.

    Args:
        plan: Plans through the public method, and returns what recorded it.
        fixed_rows: Rows that each plan must have, at least 4, with room for 64 tokens; any number by default.

    Returns:
        For each argument the field of `Lengths` that it is, None if it is a constant; or why that is not known.
    """
    # In each of them, no two fields are alike.
    probes = [
        _probe(queries, keys, fixed_rows or len(queries))
        for queries, keys in (
            ((3, 11, 5), (4, 12, 9)), ((7, 2, 13, 9), (8, 3, 14, 17)), ((1, 23), (6, 25)),
        )
    ]  # fmt: skip
    recorded = []
    for lengths in probes:
        recorder = plan(lengths)
        if recorder is None or recorder.plan_arguments is None:
            return "its compiled module is not where it was"
        recorded.append(recorder.plan_arguments)
    if len(set(map(len, recorded))) > 1:
        return "its planner takes another number of arguments each time"
    fields: list[str | None] = []
    for place, values in enumerate(zip(*recorded)):
        first = values[0]
        is_tensor = isinstance(first, torch.Tensor)
        if all(value is first or (not is_tensor and _is_equal(value, first)) for value in values):
            fields.append(None)
            continue
        # Offsets are exchanged by what they hold: what is passed on may be a copy of what was passed.
        alike = (
            field
            for field in Lengths._fields
            if all(_is_equal(value, getattr(probe, field)) for value, probe in zip(values, probes))
        )
        if (field := next(alike, None)) is None:
            return f"argument {place} of its planner depends on lengths in an unknown way"
        fields.append(field)
    return tuple(fields)


def _is_equal(value: Any, other: Any) -> bool:
    if type(value) is not type(other):
        return False
    if not isinstance(value, torch.Tensor):
        return bool(value == other)
    # Never of a tensor on a GPU, for which the host would wait.
    on_host = value.device.type == other.device.type == "cpu"
    return on_host and value.dtype == other.dtype and torch.equal(value, other)
