"""Records and repeats calls of compiled modules. Only this file uses private names of FlashInfer's wrapper.

`plan()` and `run()` of FlashInfer's wrapper spend 0.2 ms and 30 us of host time on two dozen arguments before they call
a compiled module. Most arguments are constant: forwards of one kind differ in row lengths, layers of one forward in
tensors. Calls of the module are therefore recorded once and repeated with these arguments replaced. If an argument is
not recognised, the public methods run instead, which are slower but correct.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from ..ragged.layout import RaggedLayout

__all__ = ["CallRecorder", "Lengths", "device_offsets_of", "find", "learn_planner", "recording", "share_workspace"]


class Lengths(NamedTuple):
    """Arguments of a plan that differ between batches.

    Args:
        query_offsets: cu_seqlens of the queries, int32 on the host, shape `(rows + 1,)`.
        key_offsets: The same for the keys.
        key_lengths: Keys of each row, int32 on the host, shape `(rows,)`.
        query_lengths: The same for the queries.
        query_tokens: Number of queries.
        key_tokens: Number of keys.
        rows: Number of rows.
        longest_query: Largest number of queries in a row.
        longest_key: Largest number of keys in a row.
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

    @classmethod
    def of_rows(cls, rows: int, lengths: Sequence[int], key_lengths: Sequence[int] | None = None) -> Lengths:
        """Returns the arguments for `rows` rows; missing lengths are zero, and key lengths default to `lengths`."""
        queries, query_offsets = _filled(lengths, rows)
        keys, key_offsets = (queries, query_offsets) if key_lengths is None else _filled(key_lengths, rows)
        key_lengths = lengths if key_lengths is None else key_lengths
        return cls(
            query_offsets, key_offsets, keys, queries, sum(lengths), sum(key_lengths), rows, max(lengths, default=0),
            max(key_lengths, default=0),
        )  # fmt: skip


class CallRecorder:
    """Proxy of a compiled module that records the arguments of the last `plan` and the last `ragged_run`."""

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
    """Returns a subclass of FlashInfer's wrapper that calls its compiled module through `recorder`, a `CallRecorder`.

    If a release of FlashInfer renames the attribute `_cached_module`, `recorder` stays None and calls are not repeated.
    """

    class RecordingWrapper(base):  # type: ignore[misc]
        recorder: CallRecorder | None = None
        # Results of `learn_planner`; keys are the kernel, whether it adds a bias, and whether for captured graphs.
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
    """Returns the device copies of the last plan's cu_seqlens, arguments of the wrapper's `run`."""
    return getattr(prefill, "_qo_indptr_buf", None), getattr(prefill, "_kv_indptr_buf", None)


def share_workspace(prefill: Any, float_buffer: torch.Tensor, buffer: torch.Tensor, pinned: torch.Tensor) -> None:
    """Replaces a wrapper's own 16 MiB of plan buffers by shared ones."""
    prefill.reset_workspace_buffer(float_buffer, buffer)
    if hasattr(prefill, "_pin_memory_int_workspace_buffer"):
        prefill._pin_memory_int_workspace_buffer = pinned


def find(arguments: Sequence[Any], wanted: Sequence[Any]) -> tuple[int, ...] | None:
    """Returns the index of each wanted object among arguments; None unless all are found at distinct indices."""
    indices = [next((i for i, argument in enumerate(arguments) if argument is one), -1) for one in wanted]
    return None if -1 in indices or len(set(indices)) < len(indices) else tuple(indices)


def _filled(lengths: Sequence[int], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns row lengths and cu_seqlens, int32; missing lengths are zero."""
    counts, cu_seqlens = np.zeros(rows, dtype=np.int32), np.zeros(rows + 1, dtype=np.int32)
    counts[: len(lengths)] = lengths
    np.cumsum(counts, out=cu_seqlens[1:])
    return torch.from_numpy(counts), torch.from_numpy(cu_seqlens)


def learn_planner(
    plan: Callable[[Lengths], CallRecorder | None], *, fixed_rows: int | None = None
) -> tuple[str | None, ...] | str:
    """Finds which arguments of a module's `plan` depend on lengths, by planning for different lengths.

    Args:
        plan: Plans through the public method and returns the recorder.
        fixed_rows: Number of rows of every plan, at least 4, for at least 64 tokens; None if rows may vary.

    Returns:
        The name of its field in `Lengths` for each argument, None for a constant; or a string, the reason of a failure.
    """
    # All fields of a probe differ. The long rows exceed the tokens of a captured graph.
    rows = [((3, 11, 5), (4, 12, 9)), ((7, 2, 13, 9), (8, 3, 14, 17)), ((1, 23), (6, 25))]
    if fixed_rows is None:
        rows.append(((4_000, 300), (5_000, 400)))
    probes = [Lengths.of_rows(fixed_rows or len(queries), queries, keys) for queries, keys in rows]
    recorded = []
    for lengths in probes:
        recorder = plan(lengths)
        if recorder is None or recorder.plan_arguments is None:
            return "the wrapper's compiled module was not found"
        recorded.append(recorder.plan_arguments)
    if len(set(map(len, recorded))) > 1:
        return "the number of its planner's arguments varies"
    fields: list[str | None] = []
    for index, values in enumerate(zip(*recorded)):
        first = values[0]
        is_tensor = isinstance(first, torch.Tensor)
        if all(value is first or (not is_tensor and _is_equal(value, first)) for value in values):
            fields.append(None)
            continue
        # Tensors are compared by value: FlashInfer may pass on a copy.
        matches = (
            field
            for field in Lengths._fields
            if all(_is_equal(value, getattr(probe, field)) for value, probe in zip(values, probes))
        )
        if (field := next(matches, None)) is None:
            return f"argument {index} of its planner depends on lengths in an unknown way"
        fields.append(field)
    return tuple(fields)


def _is_equal(value: Any, other: Any) -> bool:
    if type(value) is not type(other):
        return False
    if not isinstance(value, torch.Tensor):
        return bool(value == other)
    # Comparing GPU tensors would make the host wait.
    on_host = value.device.type == other.device.type == "cpu"
    return on_host and value.dtype == other.dtype and torch.equal(value, other)
