"""Scratch memory for packed tensors, leased by a forward from a pool per device and stream.

A lease ends when the state of the forward is freed. The next lease is on the same stream, so its kernels run after
those of the last lease. Forwards of two threads have two leases.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from contextlib import suppress

import torch

from ..ragged.forward_state import ForwardState

__all__ = ["scratch_of"]

# Larger tensors are allocated in each call: their kernels hide the host's time, and their memory is freed at once.
_MOST_BYTES = 64 << 20
# At most 1 GiB of free memory in the process.
_MOST_FREE, _MOST_STREAMS = 2, 8
_Stream = tuple[torch.device, int]
# Least recently used first; bounded, since servers may make a stream per request.
_pools: OrderedDict[_Stream, deque[torch.Tensor]] = OrderedDict()
_lock = threading.Lock()


def scratch_of(state: ForwardState, device: torch.device, stream: int, num_bytes: int) -> torch.Tensor | None:
    """Returns at least `num_bytes` of scratch memory, uint8; None if the forward must allocate in each call.

    All plans of a forward on one stream and thread share it, since their kernels run one after another. The state
    keeps the lease.
    """
    if state.is_shared or num_bytes > _MOST_BYTES:
        return None
    key = device, stream, threading.get_ident()
    memory: torch.Tensor | None = state.scratch.get(key)
    if memory is None or memory.numel() < num_bytes:
        memory = state.scratch[key] = _lease(state, (device, stream), num_bytes)
    return memory


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
            free = pool.popleft()
        except IndexError:
            break
        if free.numel() >= num_bytes:
            memory = free
            break
        pool.append(free)
    if memory is None:
        # A power of two, so that other batches can reuse it.
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
