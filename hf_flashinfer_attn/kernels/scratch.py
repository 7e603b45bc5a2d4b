"""Scratch memory for packed tensors, leased by a forward from a pool per device and stream.

A lease ends when the state of the forward dies. The next lease on the stream is ordered after the kernels of the last
one. Two threads have two forwards, hence two leases.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from contextlib import suppress

import torch

from ..ragged.forward_state import ForwardState

__all__ = ["scratch_of"]

# Larger tensors are allocated for each call: the GPU hides the host's time there, and memory is freed at once.
_MOST_BYTES = 64 << 20
_MOST_FREE, _MOST_STREAMS = 4, 16
_Stream = tuple[torch.device, int]
# Least recently used first; bounded, since servers may make a stream per request.
_pools: OrderedDict[_Stream, deque[torch.Tensor]] = OrderedDict()
_lock = threading.Lock()


def scratch_of(state: ForwardState, device: torch.device, stream: int, num_bytes: int) -> torch.Tensor | None:
    """Returns at least `num_bytes` of scratch memory, uint8; None if the forward must allocate for each call.

    All plans of a forward on one stream and thread share it, since their kernels run one after another.

    Args:
        state: State of the forward, which keeps the lease.
        device: A CUDA device.
        stream: Handle of the current stream on it.
        num_bytes: Number of bytes.
    """
    if state.is_shared or num_bytes > _MOST_BYTES:
        return None
    key = device, stream, threading.get_ident()
    held: torch.Tensor | None = state.scratch.get(key)
    if held is None or held.numel() < num_bytes:
        held = state.scratch[key] = _lease(state, (device, stream), num_bytes)
    return held


def _lease(state: ForwardState, stream: _Stream, num_bytes: int) -> torch.Tensor:
    with _lock:
        pool = _pools.setdefault(stream, deque())
        _pools.move_to_end(stream)
        while len(_pools) > _MOST_STREAMS:
            _pools.popitem(last=False)
    memory: torch.Tensor | None = None
    # Finalizers return memory at any time, so the pool is used without a lock.
    for _ in range(len(pool)):
        try:
            found = pool.popleft()
        except IndexError:
            break
        if found.numel() >= num_bytes:
            memory = found
            break
        pool.append(found)
    if memory is None:
        # Powers of two, so that batches of other sizes find it large enough.
        size = max(1 << 20, 1 << (num_bytes - 1).bit_length())
        with torch.inference_mode(False):
            memory = torch.empty(size, dtype=torch.uint8, device=stream[0])
    weakref.finalize(state, _give_back, pool, memory).atexit = False
    return memory


def _give_back(pool: deque[torch.Tensor], memory: torch.Tensor) -> None:
    pool.append(memory)
    if len(pool) > _MOST_FREE:
        with suppress(IndexError):
            pool.popleft()
