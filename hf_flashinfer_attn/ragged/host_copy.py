"""Copies between host and device. `HostCopy.values` is where the host waits for the GPU."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from ..errors import UnsupportedAttentionError
from ..tracing import record_host_copy

__all__ = ["HostCopy", "to_device_async"]


class HostCopy:
    """Asynchronous device-to-host copy of a few numbers (integers or bools); the first use of `values` waits for it.

    The copy to pinned memory overlaps with the launches of the first projections, so the wait is short. The host also
    waits when `lazy_mask` reads the position of a static cache, and when a FlashInfer wrapper plans again before its
    last plan was copied from pinned memory.

    Raises:
        UnsupportedAttentionError: If a CUDA graph is being captured.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._on_cpu = numbers.device.type == "cpu"
        if numbers.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise UnsupportedAttentionError(
                    "reading row lengths of a padding mask while a CUDA graph is captured",
                    "Capture without an attention_mask (every row full), or run this forward outside the graph.",
                )
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))
        else:
            self._host = numbers.to("cpu")

    @functools.cached_property
    def values(self) -> Any:
        """The numbers as (nested) lists."""
        if self._event is not None:
            self._event.synchronize()
        if not self._on_cpu:
            record_host_copy()
        return self._host.tolist()


def to_device_async(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor to a device without waiting for earlier work of the device; differentiable."""
    if device.type != "cuda":
        # Blocking: torch would not wait for a non-blocking copy before the host reads it.
        return value.to(device)
    if value.device.type == "cpu":
        # The driver may wait for the GPU to copy unpinned memory. A pinned tensor of the caller could be written to
        # before the copy has finished.
        pinned = torch.empty_like(value, pin_memory=True)
        if value.is_floating_point() or value.is_complex():
            value = pinned.copy_(value)
        else:
            # torch's copy uses all threads, which takes milliseconds on a busy host.
            np.copyto(pinned.numpy(), value.numpy())
            value = pinned
    return value.to(device, non_blocking=True)
