"""Tokens of a padded batch on one device, and copies to a device without a wait of the host."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["TokenMap", "sent", "use_triton"]


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether Triton can compile and run kernels on a GPU: it needs a C compiler to launch them."""
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < (7, 5):
        return False
    return any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc"))))


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels can run on a tensor's device."""
    return tensor.is_cuda and _has_triton(tensor.device)


@dataclass(frozen=True, slots=True)
class TokenMap:
    """Where the tokens of a padded batch are, on one device.

    Args:
        slots: The slot of each token, int32, shape `(total_tokens,)`.
        tokens: The token of each slot, int32, shape `(num_slots,)`; -1 for padding.
    """

    slots: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of(cls, valid: torch.Tensor, total_tokens: int | None) -> TokenMap:
        """Numbers the tokens row by row, without a wait for the device.

        Args:
            valid: Which slots hold a token, bool, shape `(batch, slots)`.
            total_tokens: How many do; None where the host does not know yet, for `slots` as long as `tokens`, with
                zeros after the last token.
        """
        flat = valid.reshape(-1)
        ranks = flat.cumsum(0, dtype=torch.int32)
        if use_triton(valid):
            from . import triton_tokens

            with torch.cuda.device(valid.device):
                return cls(*triton_tokens.number_tokens(flat.contiguous(), ranks, total_tokens))
        tokens = torch.where(flat, ranks - 1, -1)
        return cls(_inverse(tokens, tokens.numel() if total_tokens is None else total_tokens), tokens)


def _inverse(tokens: torch.Tensor, size: int) -> torch.Tensor:
    # Not `nonzero`, which would wait for the GPU to learn the size: padding slots all land in one extra place.
    destination = torch.where(tokens >= 0, tokens, size).long()
    slots = torch.arange(tokens.numel(), dtype=torch.int32, device=tokens.device)
    return slots.new_zeros(size + 1).scatter_(0, destination, slots)[:size]


def sent(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor to a device without a wait of the host for what is under way there; differentiable."""
    if device.type != "cuda":
        # The host reads what it is sent at once, and torch would not wait until it is there.
        return value.to(device)
    if value.device.type == "cpu":
        # Unless memory is pinned the driver may wait for the GPU; and what is the caller's, pinned or not, may be
        # written to before the copy is over.
        pinned = torch.empty_like(value, pin_memory=True)
        if value.is_floating_point() or value.is_complex():
            value = pinned.copy_(value)
        else:
            # Not torch's copy, which for much data wakes all threads: on a busy host that takes milliseconds.
            np.copyto(pinned.numpy(), value.numpy())
            value = pinned
    return value.to(device, non_blocking=True)
