"""Errors of a kernel against float64, beside those of torch's sdpa in the same dtype on the same input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels import flashinfer
from ..kernels import torch_ragged as reference
from ..ragged.layout import RaggedLayout

__all__ = ["KernelError", "measure_kernel_error"]

_ROWS = 6


@dataclass(frozen=True, slots=True)
class KernelError:
    """Relative errors against float64, `norm(output - exact) / norm(exact)` over all valid positions.

    `error` is that of the kernel, `sdpa_error` that of padded sdpa with a mask. At head_dims that are no multiple of 8
    sdpa has no fused kernel and takes an unfused one, which never rounds the softmax to half precision and is more
    exact than any fused kernel: `fused_sdpa_error` is sdpa's with heads padded to the next multiple of 8.
    """

    kernel: str
    head_dim: int
    value_head_dim: int
    padded_head_dim: int
    num_heads: int
    num_kv_heads: int
    dtype: str
    left: int | None
    right: int | None
    softcap: float | None
    total_tokens: int
    error: float
    sdpa_error: float
    fused_sdpa_error: float
    biased: bool = False

    @property
    def ratio(self) -> float:
        """The error over that of sdpa's fused kernel."""
        return self.error / self.fused_sdpa_error


def measure_kernel_error(
    kernel: flashinfer.Kernel | None,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    left: int | None = None,
    right: int | None = None,
    softcap: float | None = None,
    biased: bool = False,
    value_head_dim: int | None = None,
    num_heads: int = 4,
    num_kv_heads: int = 4,
    max_length: int = 200,
) -> KernelError:
    """Runs one kernel, or with None the torch backend, on a random padded batch whose padding is NaN.

    Rows have lengths uniform in [1, max_length], the last is padding only. A bias is random and the same for all rows.
    With a softcap, sdpa's error is that of attention without it. The kernel's error is NaN or infinite if anything
    invalid reached a valid position.
    """
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    normal = partial(torch.randn, generator=generator, device="cpu")
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    lengths = torch.randint(1, max_length + 1, (_ROWS,), generator=generator, device="cpu")
    lengths[0], lengths[-1] = max_length, 0
    valid = (torch.arange(max_length, device="cpu") < lengths[:, None]).to(device)
    padding = ~valid[:, :, None, None]

    def random(heads: int, dim: int) -> torch.Tensor:
        return normal(_ROWS, max_length, heads, dim).to(device, dtype).masked_fill(padding, float("nan"))

    padded = random(num_heads, head_dim), random(num_kv_heads, head_dim), random(num_kv_heads, value_head_dim)
    layout = RaggedLayout.from_padding_mask(valid)
    q, k, v = (layout.query.gather(tensor) for tensor in padded)
    bias = None
    if biased:
        values = normal(1, num_heads, max_length, max_length).to(device, dtype)
        bias = values.expand(_ROWS, -1, -1, -1)
    sm_scale = head_dim**-0.5
    asked: dict[str, Any] = {"left": left, "right": right, "sm_scale": sm_scale, "softcap": softcap, "bias": bias}
    if kernel is None:
        output, padded_head_dim = reference.attend(q, k, v, layout, **asked), head_dim
    else:
        output = flashinfer.attend(q, k, v, layout, **asked, kernel=kernel)
        padded_head_dim = flashinfer.padded_head_dim(max(head_dim, value_head_dim))
    exactly = partial(reference.attend, q.double(), k.double(), v.double(), layout)
    exact = exactly(**asked)
    plain = exact if softcap is None else exactly(**{**asked, "softcap": None})

    band = torch.ones(max_length, max_length, dtype=torch.bool, device=device)
    band = band.triu(-(max_length if left is None else left)).tril(max_length if right is None else right)
    mask = valid[:, None, None, :] & band
    if bias is not None:
        # Not infinite: a row of padding only would be NaN.
        mask = bias.masked_fill(~mask, torch.finfo(dtype).min)
    # sdpa cannot be asked to ignore NaN: it gets zeros in the padding.
    sides = [
        tensor.masked_fill(padding, 0).repeat_interleave(num_heads // tensor.shape[2], 2).transpose(1, 2)
        for tensor in padded
    ]

    def sdpa_error(multiple: int) -> float:
        q, k, v = (F.pad(side, (0, -side.shape[-1] % multiple)) for side in sides)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=sm_scale)
        return _relative(output.transpose(1, 2)[valid][..., :value_head_dim], plain)

    padded_output = layout.query.scatter(output)
    if padded_output[~valid].abs().sum() != 0:
        raise AssertionError("padded rows of the output are not zero")
    return KernelError(
        kernel="torch" if kernel is None else kernel, head_dim=head_dim, value_head_dim=value_head_dim,
        padded_head_dim=padded_head_dim, num_heads=num_heads, num_kv_heads=num_kv_heads,
        dtype=str(dtype).removeprefix("torch."), left=left, right=right, softcap=softcap,
        total_tokens=layout.query.total_tokens, error=_relative(layout.query.gather(padded_output), exact),
        sdpa_error=sdpa_error(1), fused_sdpa_error=sdpa_error(8), biased=biased,
    )  # fmt: skip


def _relative(result: torch.Tensor, truth: torch.Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm())
