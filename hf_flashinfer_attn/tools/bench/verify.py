"""Verification before timing: errors of a contender and of sdpa against a reference in a wider dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .contenders import BASELINE, pool_padded, run_model, twin
from .workload import PaddedBatch

__all__ = ["Reference", "Verdict", "judge", "make_reference"]

# Allowed error as a multiple of sdpa's, in the same dtype on the same input.
BUDGET = 1.25
# Minimum allowed error in float32, where the order of a sum matters more than the kernel.
FLOAT32_ERROR = 1e-6
# Allowed difference of one request from sdpa, as a multiple of sdpa's worst error in the sample.
WORST_REQUEST = 10.0
SAMPLE_REQUESTS = 32
# Sample size for a classifier, whose requests have only a few numbers each.
SAMPLE_CLASSIFIED = 256
SAMPLE_POSITIONS = 65_536
GOLDEN = 0.618034


@dataclass(frozen=True, slots=True)
class Reference:
    """Pooled reference outputs of a sample of requests, computed one by one."""

    summary: str  # description of the reference
    requests: torch.Tensor  # indices of the sample, spread over all batches
    exact: torch.Tensor  # float64 on the CPU, shape `(sample, hidden_size)`
    yardstick: torch.Tensor  # sdpa's outputs in the measured dtype


@dataclass(frozen=True, slots=True)
class Verdict:
    """Relative errors of one contender, and the reason if its outputs are wrong."""

    error: float  # over the sample
    sdpa_error: float
    difference: float | None  # from sdpa, over all requests
    reason: str | None


def _sample(batches: Sequence[PaddedBatch], most: int) -> list[tuple[int, PaddedBatch]]:
    rows = [(batch, row) for batch in batches for row in range(len(batch.lengths))]
    count = min(len(rows), max(4, min(most, len(rows) // 8)))
    chosen: list[tuple[int, PaddedBatch]] = []
    positions = 0
    # One request per stretch, at a shifting position, so that a period of the lengths cannot bias the sample.
    stretch = len(rows) / count
    for request in sorted({int((at + at * GOLDEN % 1) * stretch) for at in range(count)}):
        batch, row = rows[request]
        alone = batch.row(row)
        positions += alone.slots
        if chosen and positions > SAMPLE_POSITIONS:
            break
        chosen.append((request, alone))
    return chosen


def make_reference(
    model: PreTrainedModel, batches: Sequence[PaddedBatch], on_request: Callable[[str], None] = lambda detail: None
) -> Reference:
    """Computes a sample in float32 with eager attention, or in float64 with sdpa for a float32 model."""
    sample = _sample(batches, SAMPLE_REQUESTS if model.base_model is model else SAMPLE_CLASSIFIED)

    def outputs(runner: PreTrainedModel) -> torch.Tensor:
        pooled = []
        with torch.inference_mode():
            for at, (_, row) in enumerate(sample, start=1):
                on_request(f"request {at} of {len(sample)}")
                pooled.append(pool_padded(run_model(runner, row), row).double().cpu())
        return torch.cat(pooled)

    dtype = torch.float32 if model.dtype.itemsize == 2 else torch.float64
    # Not eager in float64: its additive mask overflows to -inf, and rows without keys become NaN.
    implementations = ["eager", BASELINE] if dtype == torch.float32 else [BASELINE]
    for implementation in implementations:
        try:
            exact = outputs(twin(model, implementation, dtype))
            break
        except torch.OutOfMemoryError:
            if implementation == BASELINE:
                raise
    summary = f"{implementation} in {str(dtype).removeprefix('torch.')}, {len(sample)} requests one by one"
    requests = torch.tensor([request for request, _ in sample], device="cpu")
    return Reference(summary, requests, exact, outputs(model))


def _relative(output: torch.Tensor, truth: torch.Tensor) -> float:
    return float((output.double() - truth.double()).norm() / truth.double().norm())


def _distances(output: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Returns each request's error, relative to its norm or, if larger, to the root mean square of all norms.

    The latter is for a classifier's logits close to zero, where a relative error is meaningless.
    """
    norms = truth.norm(dim=1)
    distances: torch.Tensor = (output - truth).norm(dim=1) / norms.clamp(min=float(norms.square().mean().sqrt()))
    return distances


def judge(output: torch.Tensor, sdpa: torch.Tensor | None, reference: Reference, dtype: torch.dtype) -> Verdict:
    """Compares pooled outputs of all requests, shape `(requests, hidden_size)`, with the reference and with sdpa.

    Outputs are wrong if a value is not finite, if the error over the sample is above `BUDGET` times sdpa's, if the
    difference from sdpa over all requests is above the sum of both allowed errors, or if one request differs from sdpa
    by more than `WORST_REQUEST` times sdpa's worst error in the sample. Without sdpa's outputs, only the sample is
    checked.
    """
    smallest = 0.0 if dtype.itemsize == 2 else FLOAT32_ERROR
    sample = reference.requests
    yardstick = reference.yardstick if sdpa is None else sdpa[sample]
    error, sdpa_error = _relative(output[sample], reference.exact), _relative(yardstick, reference.exact)
    allowed = max(BUDGET * sdpa_error, smallest)
    difference = None if sdpa is None else _relative(output, sdpa)
    reason = None
    # "not <=", so that NaN fails too.
    if not bool(output.isfinite().all()):
        reason = "an output is not finite"
    elif not error <= allowed:
        reason = f"error {error:.1e}, expected at most {allowed:.1e} where sdpa has {sdpa_error:.1e}"
    elif difference is not None and not difference <= allowed + max(sdpa_error, smallest):
        reason = f"{difference:.1e} from sdpa over all requests, where sdpa's own error is {sdpa_error:.1e}"
    elif sdpa is not None:
        distances = _distances(output.double(), sdpa.double())
        limit = WORST_REQUEST * max(float(_distances(yardstick.double(), reference.exact).max()), smallest)
        at = int(distances.argmax())
        if not float(distances[at]) <= limit:
            reason = f"request {at} is {float(distances[at]):.1e} from sdpa, expected at most {limit:.1e}"
    return Verdict(error, sdpa_error, difference, reason)
