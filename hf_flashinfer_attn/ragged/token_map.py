"""Token map: the padded position of each token, and the inverse, on one device."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from dataclasses import dataclass

import torch

__all__ = ["TokenMap", "use_triton"]


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether Triton can run kernels on a GPU; Triton compiles its launchers with a C compiler."""
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < (7, 5):
        return False
    return any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc"))))


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels can run on a tensor's device."""
    return tensor.is_cuda and _has_triton(tensor.device)


@dataclass(frozen=True, slots=True)
class TokenMap:
    """Map between tokens and padded positions, both counted through all rows.

    Args:
        positions: Padded position of each token, int32, shape `(total_tokens,)`.
        tokens: Token at each padded position, int32, shape `(rows * padded_length,)`; -1 for padding.
    """

    positions: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of(cls, valid: torch.Tensor, total_tokens: int | None) -> TokenMap:
        """Numbers the tokens row by row; the host does not wait.

        Args:
            valid: True where a padded position holds a token, shape `(rows, padded_length)`.
            total_tokens: Number of tokens; None if it is still on the device. `positions` is then as long as `tokens`,
                with zeros after the last token.
        """
        flat = valid.reshape(-1)
        ranks = flat.cumsum(0, dtype=torch.int32)
        if use_triton(valid):
            from . import triton_tokens

            with torch.cuda.device(valid.device):
                return cls(*triton_tokens.number_tokens(flat.contiguous(), ranks, total_tokens))
        tokens = torch.where(flat, ranks - 1, -1)
        size = tokens.numel() if total_tokens is None else total_tokens
        # Not `nonzero`, which makes the host wait for the size. All padding is scattered to one extra element.
        destination = torch.where(tokens >= 0, tokens, size).long()
        positions = torch.arange(tokens.numel(), dtype=torch.int32, device=tokens.device)
        return cls(positions.new_zeros(size + 1).scatter_(0, destination, positions)[:size], tokens)
