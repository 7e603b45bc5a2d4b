"""Scratch memory: leases of forwards from a pool per device and stream, here on the CPU."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_flashinfer_attn.kernels import scratch
from hf_flashinfer_attn.kernels.scratch import scratch_of
from hf_flashinfer_attn.ragged.forward_state import ForwardState, uniform_state
from hf_flashinfer_attn.ragged.layout import RaggedLayout

CPU, MIB = torch.device("cpu"), 1 << 20


@pytest.fixture(autouse=True)
def pools(monkeypatch: pytest.MonkeyPatch) -> Iterator[OrderedDict[Any, Any]]:
    """Pools without leases of other tests, whose states may die at any time; leases here end at once."""
    pools: OrderedDict[Any, Any] = OrderedDict()
    monkeypatch.setattr(scratch, "_pools", pools)
    gc.disable()
    yield pools
    gc.enable()


def state() -> ForwardState:
    return ForwardState(RaggedLayout.from_lengths([1]))


def lease(owner: ForwardState, num_bytes: int = MIB, stream: int = 0) -> torch.Tensor:
    memory = scratch_of(owner, CPU, stream, num_bytes)
    assert memory is not None
    assert (memory.dtype, memory.ndim, memory.numel() >= num_bytes) == (torch.uint8, 1, True)
    return memory


def in_a_thread(owner: ForwardState) -> torch.Tensor:
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(lease(owner)))
    thread.start()
    thread.join()
    return found[0]


def test_a_forward_has_one_lease_on_each_stream_and_in_each_thread() -> None:
    one, other = state(), state()
    memory = lease(one)
    assert lease(one) is lease(one, 5) is memory
    others = [lease(other), lease(one, stream=1), in_a_thread(one)]
    assert len({id(some) for some in (memory, *others)}) == 4
    assert lease(one) is memory


def test_a_lease_ends_with_its_forward_and_stays_on_its_stream() -> None:
    one = state()
    pointer = lease(one).data_ptr()
    assert lease(state(), stream=1).data_ptr() != pointer
    del one
    other = state()
    assert lease(other, stream=1).data_ptr() != pointer
    assert lease(other).data_ptr() == pointer


def test_what_is_larger_is_another_lease_of_a_power_of_two() -> None:
    one = state()
    small, large = lease(one, 1), lease(one, 3 * MIB)
    assert (small.numel(), large.numel()) == (MIB, 4 * MIB)
    assert lease(one, 1) is lease(one, 4 * MIB) is large
    small, large = small.data_ptr(), large.data_ptr()
    del one
    # Both go back; the first that is large enough is taken.
    two, three = state(), state()
    assert lease(two, 2 * MIB).data_ptr() == large
    assert lease(three, 1).data_ptr() == small


def test_forwards_that_share_a_state_and_large_tensors_lease_nothing() -> None:
    assert scratch_of(uniform_state(2, 3, 3), CPU, 0, MIB) is None
    one = state()
    assert scratch_of(one, CPU, 0, 64 * MIB) is not None
    assert scratch_of(one, CPU, 0, 64 * MIB + 1) is None


def test_the_first_of_too_many_free_leases_is_dropped(pools: OrderedDict[Any, Any]) -> None:
    states = {MIB << index: state() for index in range(6)}
    assert [lease(owner, size).numel() for size, owner in states.items()] == list(states)
    for size in list(states):
        del states[size]
    (pool,) = pools.values()
    assert [memory.numel() // MIB for memory in pool] == [16, 32]


def test_pools_are_bounded(pools: OrderedDict[Any, Any]) -> None:
    kept = state()
    memory = lease(kept, stream=0)
    for stream in range(1, 40):
        lease(state(), stream=stream)
    assert [stream for _, stream in pools] == list(range(32, 40))
    # Memory in use is not taken away.
    assert lease(kept, stream=0) is memory


def test_memory_can_be_written_to_in_and_outside_of_inference_mode() -> None:
    one = state()
    with torch.inference_mode():
        memory = lease(one)
        memory.fill_(1)
    memory.fill_(2)
    assert not memory.is_inference()
