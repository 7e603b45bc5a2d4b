"""Errors of a kernel against float64, beside those of torch's sdpa in the same dtype on the same input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..kernels import flashinfer
from ..kernels import torch_ragged as reference
from ..ragged.layout import RaggedLayout

__all__ = ["KernelError", "measure_kernel_error"]


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
    batch_size: int = 6,
    max_length: int = 200,
    seed: int | None = None,
) -> KernelError:
    """Runs one kernel on a random padded batch whose padding is NaN.

    Args:
        kernel: Of FlashInfer's; None for the torch backend.
        head_dim: Of query and key.
        dtype: Of the input.
        device: Where to run.
        left: How many keys before its own position a query sees; None for all.
        right: How many keys after its own position a query sees; None for all, 0 for causal attention.
        softcap: Caps logits to `softcap * tanh(logits / softcap)`; sdpa's error is then that of attention without it.
        biased: Whether a random bias is added to the logits, the same for all rows.
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
    lengths = torch.randint(1, max_length + 1, (batch_size,), generator=generator, device="cpu")
    lengths[0], lengths[-1] = max_length, 0
    valid = (torch.arange(max_length, device="cpu") < lengths[:, None]).to(device)

    def random(heads: int, dim: int) -> torch.Tensor:
        tensor = torch.randn(batch_size, max_length, heads, dim, generator=generator, device="cpu").to(device, dtype)
        return tensor.masked_fill(~valid[:, :, None, None], float("nan"))

    query, key = random(num_heads, head_dim), random(num_kv_heads, head_dim)
    value = random(num_kv_heads, value_head_dim)
    layout = RaggedLayout.from_padding_mask(valid)
    q, k, v = (layout.query.gather(tensor) for tensor in (query, key, value))
    sm_scale: float = head_dim**-0.5
    bias = None
    if biased:
        values = torch.randn(1, num_heads, max_length, max_length, generator=generator, device="cpu")
        values = values.to(device, dtype)
        bias = values.expand(batch_size, -1, -1, -1)
    if kernel is None:
        output = reference.attend(
            q, k, v, layout, left=left, right=right, sm_scale=sm_scale, softcap=softcap, bias=bias
        )
        padded_head_dim = head_dim
    else:
        output = flashinfer.attend(
            q, k, v, layout, left=left, right=right, sm_scale=sm_scale, softcap=softcap, bias=bias, kernel=kernel
        )
        padded_head_dim = flashinfer.padded_head_dim(max(head_dim, value_head_dim))
    exact = reference.attend(
        q.double(), k.double(), v.double(), layout, left=left, right=right, sm_scale=sm_scale, softcap=softcap,
        bias=bias,
    )  # fmt: skip

    positions = torch.arange(max_length, device=device)
    distance = positions - positions[:, None]
    band = (distance >= -(max_length if left is None else left)) & (
        distance <= (max_length if right is None else right)
    )
    mask = valid[:, None, None, :] & band
    if bias is not None:
        # Not infinite: a row of padding only would be NaN.
        mask = bias.masked_fill(~mask, torch.finfo(dtype).min)
    groups = num_heads // num_kv_heads
    # sdpa cannot be asked to ignore NaN: it gets zeros in the padding.
    sdpa_q, sdpa_k, sdpa_v = (
        tensor.masked_fill(~valid[:, :, None, None], 0).repeat_interleave(repeats, 2).transpose(1, 2)
        for tensor, repeats in ((query, 1), (key, groups), (value, groups))
    )

    def sdpa(multiple: int) -> torch.Tensor:
        q, k, v = (F.pad(side, (0, -side.shape[-1] % multiple)) for side in (sdpa_q, sdpa_k, sdpa_v))
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=sm_scale)
        return output.transpose(1, 2)[valid][..., :value_head_dim]

    plain = exact
    if softcap is not None:
        plain = reference.attend(
            q.double(), k.double(), v.double(), layout, left=left, right=right, sm_scale=sm_scale, bias=bias
        )

    def relative(result: torch.Tensor, truth: torch.Tensor) -> float:
        return float((result.double() - truth).norm() / truth.norm())

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
        left=left,
        right=right,
        softcap=softcap,
        total_tokens=layout.query.total_tokens,
        error=relative(layout.query.gather(padded_output), exact),
        sdpa_error=relative(sdpa(1), plain),
        fused_sdpa_error=relative(sdpa(8), plain),
        biased=biased,
    )
