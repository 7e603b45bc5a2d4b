"""The least time that a machine can need: operations over its matrix rate, bytes over its copy rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from .workload import PaddedBatch

__all__ = ["MachineRates", "Work", "count_work", "measure_rates", "synchronise"]


@dataclass(frozen=True, slots=True)
class MachineRates:
    """What the machine reaches: operations per second of a large matrix product, bytes per second of a large copy."""

    matrix_flops_per_second: float
    copy_bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Work:
    """What one pass over all batches must compute and move, padding left out."""

    flops: int
    bytes: int

    def floor_seconds(self, rates: MachineRates) -> float:
        """The time below which the machine cannot go."""
        return max(self.flops / rates.matrix_flops_per_second, self.bytes / rates.copy_bytes_per_second)


def synchronise(device: torch.device) -> None:
    """Waits for the work given to a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_rates(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> MachineRates:
    """Measures the two rates with random numbers, for about `seconds` each; the best of many samples."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    # As a layer of a model does it: on a CPU, torch.mm may take another and far slower kernel.
    tokens, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    matrix = _best_seconds(lambda: F.linear(tokens, weight), device, seconds)
    source = torch.randint(256, (2**30 if on_gpu else 2**26,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source), device, seconds)
    return MachineRates(2 * size**3 / matrix, 2 * source.numel() / copy)


def _best_seconds(step: Callable[[], object], device: torch.device, seconds: float) -> float:
    step()
    synchronise(device)
    # Several per sample, so that launching and waiting do not count.
    calls = 8 if device.type == "cuda" else 1
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == float("inf"):
        start = time.perf_counter()
        for _ in range(calls):
            step()
        synchronise(device)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def count_work(model: PreTrainedModel, batches: Sequence[PaddedBatch]) -> Work | None:
    """Counts the operations and bytes that no implementation can do without.

    Operations: two per token and weight outside of embeddings and pooler, and four per layer, element of all heads and
    pair of a query and a key it sees. Bytes: those weights once per batch, and the embeddings of the tokens.

    Returns:
        None for a model whose configuration does not tell, or in which a token does not meet every weight.
    """
    config = model.config.get_text_config()
    layers, hidden, heads = (
        getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    if not (layers and hidden and heads) or any(getattr(config, name, None) for name in experts):
        return None
    width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    left_out = {
        id(parameter)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) or name.endswith("pooler")
        for parameter in module.parameters()
    }
    weights = [parameter for parameter in model.parameters() if id(parameter) not in left_out]
    lengths = [length for batch in batches for length in batch.lengths]
    tokens = sum(lengths)
    causal = any(getattr(module, "is_causal", False) for module in model.modules())
    bands = _bands(config, layers, causal)
    pairs = {band: sum(_pairs(length, *band) for length in lengths) for band in set(bands)}
    flops = 2 * sum(weight.numel() for weight in weights) * tokens + 4 * width * sum(pairs[band] for band in bands)
    weight_bytes = sum(weight.nbytes for weight in weights)
    return Work(flops, weight_bytes * len(batches) + tokens * hidden * model.dtype.itemsize)


def _bands(config: PreTrainedConfig, layers: int, causal: bool) -> list[tuple[int | None, int | None]]:
    """How many keys before and after its own position a query of each layer sees; None for all."""
    whole = (None, 0 if causal else None)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if not window or types is None:
        return [whole] * layers
    # Causal windows count the query's own key, two-sided ones do not.
    local = (window - 1, 0) if causal else (window, window)
    return [local if kind == "sliding_attention" else whole for kind in types]


def _pairs(length: int, left: int | None, right: int | None) -> int:
    return length + sum(_reach(length, side) for side in (left, right))


def _reach(length: int, limit: int | None) -> int:
    """The sum of min(i, limit) for i from 0 to length - 1: keys on one side of all queries."""
    reach = length - 1 if limit is None else min(limit, length - 1)
    return reach * (reach + 1) // 2 + (length - 1 - reach) * reach
