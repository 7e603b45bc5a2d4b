"""Lower bounds of time: operations / matmul rate, bytes / copy rate of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from .workload import PaddedBatch

__all__ = ["MachineRates", "bands_of", "count_pairs", "count_work", "measure_rates", "synchronise"]

Band = tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class MachineRates:
    """Measured rates of a large matrix product and of a large copy."""

    matrix_flops_per_second: float
    copy_bytes_per_second: float

    def floor_seconds(self, flops: int, bytes: int) -> float:
        """Returns the lower bound of time for this work."""
        return max(flops / self.matrix_flops_per_second, bytes / self.copy_bytes_per_second)


def synchronise(device: torch.device) -> None:
    """Waits until all work on a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_rates(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> MachineRates:
    """Measures both rates with random numbers, for about `seconds` each; returns the best sample."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    # F.linear, like a layer: on a CPU, torch.mm may use a much slower kernel.
    tokens, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    matrix = _best_seconds(lambda: F.linear(tokens, weight), device, seconds)
    source = torch.randint(256, (2**30 if on_gpu else 2**26,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source), device, seconds)
    return MachineRates(2 * size**3 / matrix, 2 * source.numel() / copy)


def _best_seconds(step: Callable[[], object], device: torch.device, seconds: float) -> float:
    step()
    synchronise(device)
    # Several calls per sample, so that launch and synchronisation are negligible.
    calls = 8 if device.type == "cuda" else 1
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == float("inf"):
        start = time.perf_counter()
        for _ in range(calls):
            step()
        synchronise(device)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def count_work(model: PreTrainedModel, batches: Sequence[PaddedBatch]) -> tuple[int, int] | None:
    """Counts the minimum operations and bytes of a pass over all batches.

    Operations: 2 * tokens * weights (without embeddings and pooler) + 4 * layers * width of all heads * visible pairs
    of query and key. Bytes: these weights once per batch, and the embeddings of the tokens. Returns None if the config
    lacks the numbers, and for mixtures of experts.
    """
    config = model.config.get_text_config()
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")
    layers, hidden, heads, head_dim = (getattr(config, name, None) for name in names)
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    if not (layers and hidden and heads) or any(getattr(config, name, None) for name in experts):
        return None
    left_out = {
        id(parameter)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) or name.endswith("pooler")
        for parameter in module.parameters()
    }
    weights = [parameter for parameter in model.parameters() if id(parameter) not in left_out]
    lengths = [length for batch in batches for length in batch.lengths]
    bands = bands_of(config, layers, causal=any(getattr(module, "is_causal", False) for module in model.modules()))
    pairs = {band: sum(count_pairs(length, *band) for length in lengths) for band in set(bands)}
    width = heads * (head_dim or hidden // heads)
    flops = 2 * sum(w.numel() for w in weights) * sum(lengths) + 4 * width * sum(pairs[band] for band in bands)
    moved = sum(w.nbytes for w in weights) * len(batches) + sum(lengths) * hidden * model.dtype.itemsize
    return flops, moved


def bands_of(config: PreTrainedConfig, layers: int, causal: bool) -> list[Band]:
    """Returns the number of visible keys before and after a query, per layer; None for all."""
    whole = (None, 0 if causal else None)
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not window or kinds is None:
        return [whole] * layers
    # Causal windows count the query's own key, two-sided ones do not.
    local = (window - 1, 0) if causal else (window, window)
    return [local if kind == "sliding_attention" else whole for kind in kinds]


def count_pairs(length: int, left: int | None, right: int | None) -> int:
    """Counts visible pairs of query and key: one on the diagonal, and on each side the sum of min(i, limit)."""
    reaches = [length - 1 if limit is None else min(limit, length - 1) for limit in (left, right)]
    return length + sum(reach * (reach + 1) // 2 + (length - 1 - reach) * reach for reach in reaches)
