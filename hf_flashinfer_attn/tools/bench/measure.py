"""Measurement: verifies the contenders' outputs, then times them in turn, pass by pass."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import UnsupportedAttentionError, first_line
from ...tracing import trace
from ..environment import describe_environment
from .contenders import Contender
from .floors import MachineRates, count_work, measure_rates, synchronise
from .plan import OnStep, Plan, Subject, Workload
from .report import BenchReport, Cell, Outcome
from .verify import judge, make_reference
from .workload import BenchError, PaddedBatch, shown_name

__all__ = ["run_bench"]

OnBatch = Callable[[str], None]


def run_bench(
    plan: Plan,
    *,
    on_step: OnStep = lambda step, detail: None,
    on_cell: Callable[[BenchReport], None] = lambda report: None,
) -> BenchReport:
    """Measures everything in a plan; calls `on_cell` with the report so far after each cell.

    `on_step` must be fast: it is called while passes are timed.
    """
    plan.check()
    device, dtype = plan.place()
    contenders = plan.contenders(device, dtype)
    on_step("measuring this machine's rates", "")
    name = str(dtype).removeprefix("torch.")
    report = BenchReport(describe_environment(), device.type, name, plan.repeats, measure_rates(device, dtype))
    for subject in plan.subjects(device, dtype, on_step):
        for workload in plan.workloads(subject, device, report.skipped):
            report.cells.append(_measure(plan, contenders, subject, workload, report.rates, on_step))
            on_cell(report)
        # Free memory before the next model is loaded.
        subject.prepared.clear()
        _free(device)
    if not report.cells:
        raise BenchError(f"nothing was measured: {'; '.join(report.skipped)}.")
    return report


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(slots=True)
class _Entry:
    """A contender in one cell."""

    contender: Contender
    outcome: Outcome
    device: torch.device
    model: Any = None
    batches: list[Any] = field(default_factory=list)
    output: torch.Tensor | None = None

    def attempt(self, step: Callable[..., None], *arguments: Any) -> None:
        """Runs a step; a failure becomes the contender's result, and other contenders go on."""
        outcome = self.outcome
        if outcome.reason is not None:
            return
        try:
            step(*arguments)
        except torch.OutOfMemoryError:
            outcome.status, outcome.reason = "out of memory", "the device has too little memory"
        except (BenchError, UnsupportedAttentionError) as error:
            outcome.status, outcome.reason = "unsupported", str(error)
        except (RuntimeError, ValueError) as error:
            outcome.status, outcome.reason = "failed", f"{type(error).__name__}: {first_line(error)}"
        # After `except`, since the error references tensors in its frames.
        if outcome.reason is not None:
            self.batches, outcome.passes_seconds, outcome.peak_memory_bytes = [], (), None
            _free(self.device)

    def warm_up(self, subject: Subject, batches: Sequence[PaddedBatch], on_batch: OnBatch) -> None:
        """Prepares the model and the batches, and stores the outputs of a first pass."""
        contender, outcome = self.contender, self.outcome
        if (reason := contender.refuse(self.device, subject.model.dtype)) is not None:
            raise BenchError(reason)
        if contender.name not in subject.prepared:
            subject.prepared[contender.name] = contender.prepare_model(subject.model)
        self.model = subject.prepared[contender.name]
        self.batches = [contender.prepare_batch(batch, subject.model) for batch in batches]
        with trace() if contender.ours else nullcontext() as recorded:
            self.output = self.run(on_batch)
        if recorded is not None:
            outcome.kernels, outcome.fallbacks = recorded.kernels, recorded.fallbacks

    def run(self, on_batch: OnBatch) -> torch.Tensor:
        """Runs all batches; returns the pooled outputs on the CPU."""
        pooled = []
        with torch.inference_mode():
            for at, batch in enumerate(self.batches, start=1):
                on_batch(f"batch {at} of {len(self.batches)}")
                pooled.append(self.contender.pool(self.contender.run(self.model, batch), batch))
            return torch.cat(pooled).cpu()

    def time_pass(self, on_batch: OnBatch) -> None:
        """Times one pass."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        synchronise(self.device)
        start = time.perf_counter()
        self.run(on_batch)
        synchronise(self.device)
        self.outcome.passes_seconds += (time.perf_counter() - start,)
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(self.device)
            self.outcome.peak_memory_bytes = max(self.outcome.peak_memory_bytes or 0, peak)


def _measure(
    plan: Plan, contenders: list[Contender], subject: Subject, workload: Workload, rates: MachineRates, on_step: OnStep
) -> Cell:
    """Verifies and times all contenders on one workload."""
    model, batches = subject.model, workload.batches
    device = batches[0].padding.device

    def details(step: str, prefix: str = "") -> OnBatch:
        return lambda detail: on_step(f"{shown_name(subject.name)}, {workload.name}: {step}", prefix + detail)

    reference = make_reference(model, batches, details("reference"))
    _free(device)
    start = time.perf_counter()
    entries = [_Entry(one, Outcome(one.name, one.ours), device) for one in contenders]
    for entry in entries:
        entry.attempt(entry.warm_up, subject, batches, details(f"{entry.contender.name}, warm-up and check"))
    sdpa_error = None
    for entry in entries:
        if entry.output is not None:
            outcome, verdict = entry.outcome, judge(entry.output, entries[0].output, reference, model.dtype)
            outcome.error, outcome.difference_from_sdpa = verdict.error, verdict.difference
            outcome.verified, sdpa_error = verdict.reason is None, verdict.sdpa_error
            if verdict.reason is not None:
                outcome.status, outcome.reason = "wrong", verdict.reason
    for done in range(plan.repeats):
        if done and plan.seconds is not None and time.perf_counter() - start > plan.seconds:
            break
        for entry in entries:
            which = f"{entry.contender.name}, pass {done + 1} of {plan.repeats}, "
            entry.attempt(entry.time_pass, details("timing", which))
    tokens = sum(sum(batch.lengths) for batch in batches)
    outcomes = tuple(entry.outcome for entry in entries)
    work = count_work(model, batches)
    floor = None if work is None else rates.floor_seconds(*work)
    if floor is not None and any(seconds < floor for outcome in outcomes for seconds in outcome.passes_seconds):
        # A pass was faster than the measured rates allow, so the floor is wrong.
        floor = None
    for outcome in outcomes:
        _summarise(outcome, min(outcomes[0].passes_seconds, default=None), tokens, floor)
    return Cell(
        shape=subject.name,
        lengths=workload.name,
        layers=getattr(model.config.get_text_config(), "num_hidden_layers", None),
        batch_size=workload.batch_size,
        requests=sum(len(batch.lengths) for batch in batches),
        batches=len(batches),
        tokens=tokens,
        padded_fraction=1 - tokens / sum(batch.slots for batch in batches),
        flops=work and work[0],
        bytes=work and work[1],
        floor_seconds=floor,
        reference=reference.summary,
        sdpa_error=sdpa_error,
        contenders=outcomes,
    )


def _summarise(outcome: Outcome, sdpa_seconds: float | None, tokens: int, floor: float | None) -> None:
    if outcome.reason is not None:
        return
    passes = outcome.passes_seconds
    outcome.best_seconds = best = min(passes)
    outcome.median_seconds = median = statistics.median(passes)
    outcome.spread = (max(passes) - best) / median
    outcome.tokens_per_second = tokens / best
    outcome.speedup_over_sdpa = None if sdpa_seconds is None else sdpa_seconds / best
    outcome.floor_fraction = None if floor is None else floor / best
