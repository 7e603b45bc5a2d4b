"""Whether a contender's outputs may be timed: its error against a wider reference, beside sdpa's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .contenders import BASELINE, pool_padded, run_padded, twin
from .workload import PaddedBatch

__all__ = ["Reference", "Verdict", "judge", "make_reference"]

# Our error may be this many times sdpa's, in the same dtype on the same input.
BUDGET = 1.25
# Errors of float32 are so small that another order of a sum multiplies them.
FLOAT32_ERROR = 1e-6
# At any one request, the distance from sdpa may be this many times sdpa's own worst error in the sample.
WORST_REQUEST = 10.0
SAMPLE_REQUESTS = 32
# Of a classifier: with few numbers per request, errors of one sample would differ by chance.
SAMPLE_CLASSIFIED = 256
SAMPLE_SLOTS = 65_536
GOLDEN = 0.618034


@dataclass(frozen=True, slots=True)
class Reference:
    """Mean-pooled outputs of a sample of requests, each computed alone.

    Args:
        summary: What computed it.
        requests: Their indices, evenly spread over all batches.
        exact: Float64 on the host, shape `(sample, hidden_size)`.
        yardstick: sdpa's on the same requests, in the dtype that is measured, each alone.
    """

    summary: str
    requests: torch.Tensor
    exact: torch.Tensor
    yardstick: torch.Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the check of one contender found.

    Args:
        error: `norm(output - exact) / norm(exact)` over the sample.
        sdpa_error: The same of sdpa.
        difference: `norm(output - sdpa) / norm(sdpa)` over all requests; None where sdpa has no output.
        reason: Why the outputs are wrong; None if they are right.
    """

    error: float
    sdpa_error: float
    difference: float | None
    reason: str | None


def _sample(batches: Sequence[PaddedBatch], most: int) -> list[tuple[int, PaddedBatch]]:
    rows = [(batch, row) for batch in batches for row in range(len(batch.lengths))]
    count = min(len(rows), max(4, min(most, len(rows) // 8)))
    chosen: list[tuple[int, PaddedBatch]] = []
    slots = 0
    # One from each stretch, at a place that shifts, so that no period of the lengths is met at one phase alone.
    stretch = len(rows) / count
    for request in sorted({int((at + at * GOLDEN % 1) * stretch) for at in range(count)}):
        batch, row = rows[request]
        alone = batch.row(row)
        slots += alone.slots
        if chosen and slots > SAMPLE_SLOTS:
            break
        chosen.append((request, alone))
    return chosen


def make_reference(
    model: PreTrainedModel, batches: Sequence[PaddedBatch], on_request: Callable[[str], None] = lambda detail: None
) -> Reference:
    """Computes the sample in float32 with eager attention, or a float32 model's in float64 with sdpa.

    Args:
        model: With sdpa, in the dtype that is measured.
        batches: Of the whole request set.
        on_request: Called with the progress, before each request.
    """
    sample = _sample(batches, SAMPLE_REQUESTS if model.base_model is model else SAMPLE_CLASSIFIED)

    def outputs(runner: PreTrainedModel) -> torch.Tensor:
        pooled = []
        with torch.inference_mode():
            for at, (_, row) in enumerate(sample, start=1):
                on_request(f"request {at} of {len(sample)}")
                pooled.append(pool_padded(run_padded(runner, row), row).double().cpu())
        return torch.cat(pooled)

    dtype = torch.float32 if model.dtype.itemsize == 2 else torch.float64
    # Not eager in float64: its additive mask overflows to -inf, and rows without any key become NaN.
    implementation = "eager" if dtype == torch.float32 else BASELINE
    exact = None
    try:
        exact = outputs(twin(model, implementation, dtype))
    except torch.OutOfMemoryError:
        if implementation == BASELINE:
            raise
    if exact is None:
        implementation = BASELINE
        exact = outputs(twin(model, implementation, dtype))
    name = str(dtype).removeprefix("torch.")
    return Reference(
        f"{implementation} in {name}, {len(sample)} requests one by one",
        torch.tensor([request for request, _ in sample], device="cpu"),
        exact,
        outputs(model),
    )


def _relative(output: torch.Tensor, truth: torch.Tensor) -> float:
    return float((output.double() - truth.double()).norm() / truth.double().norm())


def _distances(output: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Returns how far each request is from the truth, relative to its norm, or to that of most where its own is less.

    A classifier's logits may happen to be next to zero, where a relative error says nothing.
    """
    norms = truth.norm(dim=1)
    distances: torch.Tensor = (output - truth).norm(dim=1) / norms.clamp(min=float(norms.square().mean().sqrt()))
    return distances


def judge(output: torch.Tensor, sdpa: torch.Tensor | None, reference: Reference, dtype: torch.dtype) -> Verdict:
    """Compares a contender's pooled outputs with the reference and with sdpa's.

    Args:
        output: Of all requests, shape `(requests, hidden_size)`, on the host.
        sdpa: sdpa's, the same; None if it has none, and then only the sample is checked.
        reference: Of the sample.
        dtype: The one measured.

    Returns:
        With a reason if any of these holds: a value is not finite; the error over the sample is above `BUDGET` times
        sdpa's; the difference from sdpa over all requests is above the sum of both allowed errors; the difference at
        one request is above `WORST_REQUEST` times sdpa's worst error of the sample, both as [`_distances`] has them.
    """
    smallest = 0.0 if dtype.itemsize == 2 else FLOAT32_ERROR
    sample = reference.requests
    yardstick = reference.yardstick if sdpa is None else sdpa[sample]
    error, sdpa_error = _relative(output[sample], reference.exact), _relative(yardstick, reference.exact)
    allowed = max(BUDGET * sdpa_error, smallest)
    difference = None if sdpa is None else _relative(output, sdpa)
    reason = None
    if not bool(output.isfinite().all()):
        reason = "an output is not finite"
    elif not error <= allowed:
        reason = f"error {error:.1e}, expected at most {allowed:.1e} where sdpa has {sdpa_error:.1e}"
    elif difference is not None and not difference <= allowed + max(sdpa_error, smallest):
        reason = f"{difference:.1e} from sdpa over all requests, where sdpa's own error is {sdpa_error:.1e}"
    elif sdpa is not None:
        distance = _distances(output.double(), sdpa.double())
        worst = float(_distances(yardstick.double(), reference.exact).max())
        limit = WORST_REQUEST * max(worst, smallest)
        at = int(distance.argmax())
        if not float(distance[at]) <= limit:
            reason = f"request {at} is {float(distance[at]):.1e} from sdpa, expected at most {limit:.1e}"
    return Verdict(error, sdpa_error, difference, reason)
