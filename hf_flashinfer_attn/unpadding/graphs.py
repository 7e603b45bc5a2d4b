"""CUDA graphs of a backbone on packed tokens: one launch replaces hundreds.

A graph has fixed shapes, so packed batches are padded to one of a few sizes: with empty rows, which cost attention
nothing, and with filler tokens outside of all rows. Filler values are never returned, but they must be finite: fa3
reads keys and values after the last row, and multiplies them by zero.
"""

from __future__ import annotations

import gc
import inspect
import threading
import time
import types
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..attention.select import KernelPendingError
from ..errors import UnsupportedAttentionError, first_line
from ..kernels.flashinfer import unavailable_reason
from ..kernels.wrapper_pool import GraphWorkspace, plan_graph
from ..log import log_once
from ..ragged.forward_state import PackedState, attached_state, cu_seqlens_of
from ..ragged.layout import RaggedLayout
from ..ragged.mask_state import is_mask_of_ones, mask_of_ones
from ..settings import Settings, current_settings
from ..tracing import AttentionCall, is_tracing, record_call, trace
from .graph_options import GraphOptions, GraphStatistics, row_bucket, token_bucket
from .model_state import ModelState, numerics
from .packing import CALLER, leave_sizes_open
from .reasons import is_asked_for

__all__ = ["GraphedForward", "graphs_of", "install_graphs", "is_copied_with", "uninstall_graphs"]

# Serialises captures: garbage collection is disabled process-wide.
_capture_lock = threading.Lock()
_INPUTS = ("input_ids", "token_type_ids", "position_ids")
# Arguments that do not need a graph of their own.
_KNOWN = frozenset(
    {
        *_INPUTS, "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "use_cache",
        "return_dict", "output_attentions", "output_hidden_states",
    }
)  # fmt: skip


@dataclass(slots=True)
class _Graph:
    """A captured forward. Its layout is planned again before each replay; `inputs` are kept alive for the graph."""

    graph: torch.cuda.CUDAGraph
    layout: RaggedLayout
    # Including filler tokens.
    tokens: int
    output_class: type[ModelOutput]
    has_pooler: bool
    # Recorded during capture, and added to traces by each replay.
    calls: tuple[AttentionCall, ...]
    inputs: dict[str, Any]


@dataclass(slots=True)
class _Failure:
    """Failed captures of one size: their number, and the number of forwards until the next attempt."""

    attempts: int = 0
    wait: int = 0


class _Memory:
    """Memory pool, stream, workspace and static tensors, shared by all graphs of a model."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.inputs: dict[str, torch.Tensor] = {}
        self.output: torch.Tensor | None = None
        self.workspace = GraphWorkspace(device)
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        # Event after the copy of the last replay's outputs, and the stream of that copy.
        self.done = torch.cuda.Event()
        self.last_stream: int | None = None
        # Number of replays since the pool was created.
        self.replayed = 0

    def pool_bytes(self) -> int:
        """Returns the size of the memory pool, including unused blocks."""
        return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(self.pool))


# Number of forwards between a failed capture and the next attempt for that size; each failure doubles it.
_FIRST_WAIT, _LONGEST_WAIT = 16, 4_096
# Minimum number of replays before a full pool is replaced, and its graphs evicted.
_REPLAYS_OF_A_POOL = 1_000


class GraphedForward:
    """Replacement of a backbone's `forward` that runs packed batches as CUDA graphs.

    Thread-safe: a lock serialises replays, and streams wait for each other. Outputs are copies. The backbone is weakly
    referenced.
    """

    # Slots, because accelerate's wrapper copies `__dict__` (by `functools.update_wrapper`).
    __slots__ = (
        "__dict__", "__weakref__", "_failures", "_graphs", "_lock", "_memory", "_module", "_refused", "_state",
        "options", "statistics",
    )  # fmt: skip

    def __init__(self, module: PreTrainedModel, options: GraphOptions) -> None:
        self._module = weakref.ref(module)
        self.options = options
        self.statistics = GraphStatistics()
        self.__signature__ = inspect.signature(types.MethodType(type(module).forward, module))
        self._lock = threading.Lock()
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._failures: dict[tuple[Any, ...], _Failure] = {}
        self._memory: _Memory | None = None
        self._state: ModelState | None = None
        # Reason, and the settings it depends on.
        self._refused: tuple[str, Settings] | None = None

    @property
    def module(self) -> PreTrainedModel | None:
        """The backbone; None if it was freed."""
        return self._module()

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedForward:
        module = self._required_module()
        return GraphedForward(memo.get(id(module), module), self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphedForward, (self._required_module(), self.options)

    def _required_module(self) -> PreTrainedModel:
        if (module := self._module()) is None:
            raise ReferenceError(
                "the model that this forward belongs to is gone; keep it, or call repad and unpad on its shallow copy"
            )
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        copied: weakref.ref[PreTrainedModel] | None = kwargs.pop(CALLER, None)
        module = self._required_module() if copied is None else copied()
        assert module is not None, "its forward was called"
        packed = None
        if copied is None and not torch.compiler.is_compiling() and not args:
            packed = self._accepted_state(module, kwargs)
        if packed is not None:
            with self._lock:
                # Another thread may have set a refusal while this one waited.
                if self.refusal() is None and (outputs := self._replay(module, packed, kwargs)) is not None:
                    return outputs
        return type(module).forward(module, *args, **kwargs)

    def takes(self, module: PreTrainedModel, device: torch.device, rows: int, tokens: int) -> bool:
        """Whether a batch of this size may run as a graph, from what is known before packing."""
        return (
            self.refusal() is None
            and 0 < tokens <= self.options.max_tokens
            and rows <= self.options.max_rows
            and not module.training
            and not torch.is_grad_enabled()
            and device.type == "cuda"
        )

    def look(self) -> ModelState | None:
        """Returns the fingerprint of the captured model if it still matches; called while row lengths are copied."""
        state = self._state
        return state if state is not None and state.refusal is None and state.holds() else None

    def reset(self) -> None:
        """Evicts all graphs and frees their memory; sizes are captured again on their next use."""
        with self._lock:
            self._refused = None
            self._drop_all()

    def refusal(self) -> str | None:
        """Returns the reason if the model runs without graphs in its current state; None if none was found so far."""
        refused, state = self._refused, self._state
        # New settings allow another attempt.
        if refused is not None and refused[1] is current_settings():
            return refused[0]
        return state.refusal if state is not None and state.refusal is not None and state.holds() else None

    def _accepted_state(self, module: PreTrainedModel, kwargs: dict[str, Any]) -> PackedState | None:
        """Returns the state of a packed batch that may run as a graph; None for any other batch."""
        ids, mask, cu_seqlens = kwargs.get("input_ids"), kwargs.get("attention_mask"), kwargs.get("cu_seq_lens_q")
        if ids is None or cu_seqlens is None or cu_seqlens is not kwargs.get("cu_seq_lens_k") or not ids.is_cuda:
            return None
        state, shape = attached_state(cu_seqlens), (ids.shape[0], ids.shape[1])
        # Only batches packed by `unpad`, which computes the pooler output from padded rows.
        if state is None or state.packing is None or not (mask is None or is_mask_of_ones(mask)):
            return None
        if shape[0] != 1 or not state.is_of(None, kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], (shape, shape)):
            return None
        is_accepted = (
            self.takes(module, ids.device, len(state.layout().query.lengths), ids.shape[1])
            and not torch.is_autocast_enabled("cuda")
            and not torch.cuda.is_current_stream_capturing()
            and not is_asked_for("output_hidden_states", module, kwargs)
            and not is_asked_for("output_attentions", module, kwargs)
            and torch._C._len_torch_dispatch_stack() == 0
            and torch._C._get_tracing_state() is None
            and current_settings().backend != "torch"
            and unavailable_reason(ids.device) is None
            and all(
                value is None or isinstance(value, (bool, int, str))
                for name, value in kwargs.items()
                if name not in _KNOWN
            )
        )
        return state if is_accepted else None

    def _replay(self, module: PreTrainedModel, packed: PackedState, kwargs: dict[str, Any]) -> ModelOutput | None:
        device = kwargs["input_ids"].device
        lengths = packed.layout().query.lengths
        tokens = packed.layout().query.total_tokens
        names = tuple(name for name in _INPUTS if kwargs.get(name) is not None)
        extras = tuple(sorted((name, value) for name, value in kwargs.items() if name not in _KNOWN))
        key = (token_bucket(tokens), row_bucket(len(lengths)), names, extras, current_settings(), numerics())
        if torch.cuda.current_device() != device.index:
            # Plans and replays use the current device.
            with torch.cuda.device(device):
                return self._replay(module, packed, kwargs)
        state: ModelState | None = packed.model_state
        if state is None or state is not self._state:
            state = self._state
            if state is not None and not state.holds():
                state = None
        memory = self._memory
        if state is None or (memory is not None and memory.device != device):
            self._drop_all()
            state = self._state = ModelState(module)
            memory = None
        if state.refusal is not None:
            log_once(f"no CUDA graphs of {type(module).__name__}: {state.refusal}")
            return None
        captured = self._graphs.get(key)
        if captured is None and (failure := self._failures.get(key)) is not None and failure.wait > 0:
            failure.wait -= 1
            return None
        if memory is None:
            memory = self._memory = _Memory(device)
        stream = torch.cuda.current_stream(device)
        if memory.last_stream is not None and memory.last_stream != stream.cuda_stream:
            stream.wait_event(memory.done)
        try:
            # One launch if all dtypes are equal.
            torch._foreach_copy_(
                [self._input(memory, name, kwargs[name])[:, :tokens] for name in names],
                [kwargs[name] for name in names],
                non_blocking=True,
            )
            if captured is None:
                # Inference tensors could not be written to outside of inference mode.
                with torch.inference_mode(False), torch.no_grad():
                    captured = self._capture(module, memory, key, lengths, kwargs)
                if captured is None:
                    return None
            plan_graph(captured.layout, lengths)
            captured.graph.replay()
            assert memory.output is not None
            hidden = memory.output[:, :tokens].clone()
        finally:
            # Also on errors: inputs and plans were written on this stream.
            memory.done.record(stream)
            memory.last_stream = stream.cuda_stream
        statistics = self.statistics
        statistics.replayed += 1
        memory.replayed += 1
        statistics.tokens += tokens
        statistics.slots += captured.tokens
        if is_tracing():
            for call in captured.calls:
                record_call(call)
        # A placeholder: `spread` computes the pooler output from padded rows.
        pooled = {"pooler_output": hidden[:, 0]} if captured.has_pooler else {}
        return captured.output_class(last_hidden_state=hidden, **pooled)

    def _input(self, memory: _Memory, name: str, value: torch.Tensor) -> torch.Tensor:
        if name not in memory.inputs:
            # Filler must be valid ids: zeros, later the ids of earlier batches.
            with torch.inference_mode(False):
                memory.inputs[name] = torch.zeros(
                    1, token_bucket(self.options.max_tokens), dtype=value.dtype, device=memory.device
                )
        return memory.inputs[name]

    def _capture(
        self,
        module: PreTrainedModel,
        memory: _Memory,
        key: tuple[Any, ...],
        lengths: Sequence[int],
        kwargs: dict[str, Any],
    ) -> _Graph | None:
        tokens, rows, names, *_ = key
        layout = RaggedLayout.for_graph(lengths, rows, tokens, memory.workspace)
        cu_seqlens = cu_seqlens_of(layout)
        inputs = {**kwargs, **{name: memory.inputs[name][:, :tokens] for name in names}}
        inputs.update(cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=tokens, max_length_k=tokens)
        if kwargs.get("attention_mask") is not None:
            inputs["attention_mask"] = mask_of_ones(1, tokens, memory.device)

        forward = type(module).forward
        if self.options.compile:
            leave_sizes_open((inputs.get(name) for name in (*names, "attention_mask")), cu_seqlens)
            forward = torch.compile(forward)

        def run() -> ModelOutput:
            outputs: ModelOutput = forward(module, **inputs)
            hidden = outputs["last_hidden_state"]
            if memory.output is None:
                widest = token_bucket(self.options.max_tokens)
                memory.output = hidden.new_zeros(1, widest, *hidden.shape[2:])
            memory.output[:, :tokens].copy_(hidden)
            return outputs

        current = torch.cuda.current_stream(memory.device)
        memory.stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(memory.stream):
                # Warm-up: compiles kernels, makes plans, and raises if the model is unsupported.
                start = time.perf_counter()
                run()
                memory.stream.synchronize()
                if self.options.compile:
                    self.statistics.compile_seconds += time.perf_counter() - start
                with _capture_lock, trace() as recorded, _no_collection():
                    graph.capture_begin(pool=memory.pool, capture_error_mode="thread_local")
                    try:
                        outputs = run()
                    except BaseException:
                        with suppress(RuntimeError):
                            graph.capture_end()
                        raise
                    graph.capture_end()
        except KernelPendingError:
            # The kernel is still compiling; retry the capture later.
            memory.stream.synchronize()
            return None
        except RuntimeError as error:
            # Unsupported attention, an operation that cannot be captured, or out of memory. If the model itself raises,
            # it does so again in the forward without a graph.
            torch.cuda.synchronize(memory.device)
            reason = first_line(error)
            if isinstance(error, UnsupportedAttentionError) and not self._graphs:
                self._refused = reason, current_settings()
                log_once(f"no CUDA graphs of {type(module).__name__}: {reason}")
            else:
                self._back_off(module, key, reason)
            return None
        finally:
            current.wait_stream(memory.stream)
        taken, most = memory.pool_bytes(), self.options.max_memory_gib
        if taken > most * 2**30 and self._graphs:
            # Graphs share one pool, so evicting some of them would free nothing.
            graph.reset()
            reason = f"graphs take {taken / 2**30:.2f} GiB with it, more than max_memory_gib={most}"
            if memory.replayed < _REPLAYS_OF_A_POOL:
                self._back_off(module, key, reason)
            else:
                log_once(f"CUDA graphs of {type(module).__name__} are captured anew: {reason}")
                self._drop_graphs()
                memory.pool, memory.replayed = torch.cuda.graph_pool_handle(), 0
            return None
        has_pooler = outputs.get("pooler_output") is not None
        captured = _Graph(graph, layout, tokens, type(outputs), has_pooler, tuple(recorded.calls), inputs)
        self._graphs[key] = captured
        self._failures.pop(key, None)
        self.statistics.captured += 1
        self.statistics.memory_bytes = taken
        return captured

    def _back_off(self, module: PreTrainedModel, key: tuple[Any, ...], reason: str) -> None:
        failure = self._failures.setdefault(key, _Failure())
        failure.wait = min(_FIRST_WAIT << failure.attempts, _LONGEST_WAIT)
        failure.attempts += 1
        tokens, rows = key[:2]
        log_once(
            f"no CUDA graph of {type(module).__name__} for {tokens} tokens in {rows} rows: {reason}; the next "
            f"{failure.wait} forwards of this size run without"
        )

    def _drop_graphs(self) -> None:
        # Resetting a graph frees memory that a running replay reads.
        if self._memory is not None:
            self._memory.done.synchronize()
        for dropped in self._graphs.values():
            dropped.graph.reset()
        self.statistics.dropped += len(self._graphs)
        self.statistics.memory_bytes = 0
        self._graphs.clear()
        self._failures.clear()

    def _drop_all(self) -> None:
        self._drop_graphs()
        self._memory, self._state = None, None


def is_copied_with(module: torch.nn.Module) -> bool:
    """Whether this module's graphs belong to another module, as in shallow copies and replicas."""
    graphs = graphs_of(module)
    return graphs is not None and graphs.module is not module


def graphs_of(module: torch.nn.Module) -> GraphedForward | None:
    """Returns a module's graphs, also beneath a wrapper of accelerate; None if it has none."""
    forwards = (vars(module).get(name) for name in ("forward", "_old_forward"))
    return next((forward for forward in forwards if isinstance(forward, GraphedForward)), None)


def install_graphs(module: PreTrainedModel, options: GraphOptions) -> None:
    """Replaces a backbone's forward by a `GraphedForward`."""
    # Accelerate saves the forward that it wraps as `_old_forward`.
    name = "_old_forward" if "_old_forward" in vars(module) else "forward"
    setattr(module, name, GraphedForward(module, options))


def uninstall_graphs(module: torch.nn.Module) -> None:
    """Undoes `install_graphs`; has no effect on other modules."""
    for name in ("forward", "_old_forward"):
        if not isinstance(graphs := vars(module).get(name), GraphedForward):
            continue
        if graphs.module is module:
            graphs.reset()
        if name == "forward":
            del module.forward
        else:
            setattr(module, name, types.MethodType(type(module).forward, module))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disables garbage collection, which may free GPU memory; that is an error during capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
