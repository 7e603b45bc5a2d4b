"""Error of a kernel and of torch's sdpa, both against float64, in the same dtype on the same input."""

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

    `error` is the kernel's, `sdpa_error` that of padded sdpa with a mask. For a head_dim that is not a multiple of 8,
    sdpa uses an unfused kernel, which keeps the softmax in float32 and is more accurate than fused ones.
    `fused_sdpa_error` is sdpa's with heads padded to a multiple of 8.
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
        """`error / fused_sdpa_error`."""
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
    """Runs one kernel (None: the torch backend) on a random padded batch with NaN in padding.

    Row lengths are uniform in [1, max_length]; the last row is empty. All rows share one random bias. sdpa is measured
    without the softcap, which it does not support. The kernel's error is NaN or infinite if padding reached a valid
    position.
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
    spec: dict[str, Any] = {"left": left, "right": right, "sm_scale": sm_scale, "softcap": softcap, "bias": bias}
    if kernel is None:
        output, padded_head_dim = reference.attend(q, k, v, layout, **spec), head_dim
    else:
        output = flashinfer.attend(q, k, v, layout, **spec, kernel=kernel)
        padded_head_dim = flashinfer.padded_head_dim(max(head_dim, value_head_dim))
    exactly = partial(reference.attend, q.double(), k.double(), v.double(), layout)
    exact = exactly(**spec)
    plain = exact if softcap is None else exactly(**{**spec, "softcap": None})

    band = torch.ones(max_length, max_length, dtype=torch.bool, device=device)
    band = band.triu(-(max_length if left is None else left)).tril(max_length if right is None else right)
    mask = valid[:, None, None, :] & band
    if bias is not None:
        # Finite, since an empty row would be NaN.
        mask = bias.masked_fill(~mask, torch.finfo(dtype).min)
    # Zeros in padding, since sdpa multiplies masked values by zero.
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
