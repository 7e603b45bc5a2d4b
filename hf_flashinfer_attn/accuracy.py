"""How far a kernel is from float64, beside torch's sdpa in the same dtype on the same input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .backends import flashinfer, reference
from .layout import RaggedLayout

__all__ = ["KernelError", "measure_kernel_error"]


@dataclass(frozen=True, slots=True)
class KernelError:
    """Relative errors against float64, `norm(output - exact) / norm(exact)` over all valid positions.

    `error` is that of the kernel, `sdpa_error` that of padded sdpa with a mask.
    """

    kernel: str
    head_dim: int
    value_head_dim: int
    padded_head_dim: int
    num_heads: int
    num_kv_heads: int
    dtype: str
    causal: bool
    total_tokens: int
    error: float
    sdpa_error: float

    @property
    def ratio(self) -> float:
        return self.error / self.sdpa_error


def measure_kernel_error(
    kernel: flashinfer.Kernel | None,
    head_dim: int,
    *,
    dtype: torch.dtype,
    causal: bool,
    device: torch.device,
    value_head_dim: int | None = None,
    num_heads: int = 4,
    num_kv_heads: int = 4,
    batch_size: int = 6,
    max_length: int = 200,
    seed: int | None = None,
) -> KernelError:
    """Runs one kernel on a random padded batch whose padding is NaN.

    Args:
        kernel: Of FlashInfer's; None for the torch backend.
        head_dim: Of query and key.
        dtype: Of the input.
        causal: Whether attention is causal.
        device: Where to run.
        value_head_dim: Of value; `head_dim` by default.
        num_heads: Query heads.
        num_kv_heads: Key heads.
        batch_size: Rows, of lengths uniform in [1, max_length]; one of them is padding only.
        max_length: The longest row.
        seed: Of the input; a fresh one by default.

    Returns:
        The errors; `error` is NaN or infinite if anything invalid reached a valid position.
    """
    generator = torch.Generator().manual_seed(torch.seed() % 2**31 if seed is None else seed)
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    lengths = torch.randint(1, max_length + 1, (batch_size,), generator=generator)
    lengths[0], lengths[-1] = max_length, 0
    valid = (torch.arange(max_length) < lengths[:, None]).to(device)

    def random(heads: int, dim: int) -> torch.Tensor:
        tensor = torch.randn(batch_size, max_length, heads, dim, generator=generator).to(device, dtype)
        return tensor.masked_fill(~valid[:, :, None, None], float("nan"))

    query, key = random(num_heads, head_dim), random(num_kv_heads, head_dim)
    value = random(num_kv_heads, value_head_dim)
    layout = RaggedLayout.from_padding_mask(valid)
    q, k, v = (layout.query.gather(tensor) for tensor in (query, key, value))
    sm_scale: float = head_dim**-0.5
    if kernel is None:
        output, padded_head_dim = reference.attend(q, k, v, layout, causal=causal, sm_scale=sm_scale), head_dim
    else:
        output = flashinfer.attend(q, k, v, layout, causal=causal, sm_scale=sm_scale, kernel=kernel)
        padded_head_dim = flashinfer.padded_head_dim(max(head_dim, value_head_dim), kernel)
    exact = reference.attend(q.double(), k.double(), v.double(), layout, causal=causal, sm_scale=sm_scale)

    mask = valid[:, None, None, :].expand(-1, 1, max_length, -1)
    if causal:
        mask = mask & torch.ones(max_length, max_length, dtype=torch.bool, device=device).tril()
    groups = num_heads // num_kv_heads
    # sdpa cannot be asked to ignore NaN: it gets zeros in the padding.
    sdpa_q, sdpa_k, sdpa_v = (
        tensor.masked_fill(~valid[:, :, None, None], 0).repeat_interleave(repeats, 2).transpose(1, 2)
        for tensor, repeats in ((query, 1), (key, groups), (value, groups))
    )
    sdpa = F.scaled_dot_product_attention(sdpa_q, sdpa_k, sdpa_v, attn_mask=mask, scale=sm_scale).transpose(1, 2)

    def relative(result: torch.Tensor) -> float:
        return float((result.double() - exact).norm() / exact.norm())

    padded_output = layout.query.scatter(output)
    if padded_output[~valid].abs().sum() != 0:
        raise AssertionError("padded rows of the output are not zero")
    return KernelError(
        kernel="torch" if kernel is None else kernel,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        padded_head_dim=padded_head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dtype=str(dtype).removeprefix("torch."),
        causal=causal,
        total_tokens=layout.query.total_tokens,
        error=relative(layout.query.gather(padded_output)),
        sdpa_error=relative(sdpa[valid]),
    )
