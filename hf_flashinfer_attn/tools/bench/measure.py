"""Runs contenders in turn, pass by pass, after checking their outputs."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import torch
from transformers import AutoTokenizer

from ...errors import UnsupportedAttentionError, first_line
from ...tracing import Trace, trace
from ..environment import describe_environment
from .contenders import BASELINE, CONTENDERS, Contender
from .errors import BenchError
from .floors import MachineRates, count_work, measure_rates, synchronise
from .subjects import OnStep, Subject, load_subjects, shown_name
from .verify import Verdict, judge, make_reference
from .workload import SHAPES, PaddedBatch, RequestSet, synthetic_batches, text_batches

__all__ = ["BenchReport", "Cell", "Outcome", "Plan", "run_bench"]

TEXTS_BATCH_SIZE = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Args:
        shapes: Names of `SHAPES`, with random weights.
        model: A folder or an id of the user's model; with `texts`, or with request sets of random tokens.
        texts: What to embed with it.
        request_sets: What to run through the shapes, or through the model.
        against: Names of rivals in `CONTENDERS`; sdpa always takes part.
        ours: Names of contenders of this package; all of them by default.
        batch_size: Instead of that of the request sets.
        requests: At most so many of each.
        layers: Instead of the shapes' own number.
        sort: Whether texts are sorted, the longest first.
        max_length: Where texts are cut, in tokens; what the model takes by default.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32", "float16" or "bfloat16"; auto is float16 on a GPU and float32 elsewhere.
        repeats: Timed passes of each contender.
        seconds: Per request set and model, a soft limit: after it no further round of passes starts. The check of the
            outputs and one timed pass each take place however long they take.
    """

    shapes: tuple[str, ...] = ()
    model: str | None = None
    texts: tuple[str, ...] | None = None
    request_sets: tuple[RequestSet, ...] = ()
    against: tuple[str, ...] = (BASELINE,)
    ours: tuple[str, ...] | None = None
    batch_size: int | None = None
    requests: int | None = None
    layers: int | None = None
    sort: bool = False
    max_length: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    repeats: int = 3
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one contender did in one cell. Times are None unless its status is "measured".

    Args:
        name: Of the contender.
        ours: Whether it is of this package.
        status: "measured", "wrong", "out of memory", "failed", or "unsupported" where the contender refuses the model.
        reason: Why it was not measured.
        verified: Whether its outputs were checked and right; None if there were none to check.
        error: `norm(output - exact) / norm(exact)` of mean-pooled outputs over the sample of the reference.
        difference_from_sdpa: The same against sdpa over all requests.
        passes_seconds: Each timed pass.
        best_seconds: The shortest of them.
        median_seconds: Their median.
        spread: Longest minus shortest, over the median.
        tokens_per_second: Valid tokens, in the best pass.
        speedup_over_sdpa: sdpa's best time over this one's; above 1 is faster than sdpa.
        floor_fraction: The floor over the best time.
        peak_memory_bytes: Of torch's CUDA allocator, weights and batches included; None on a CPU.
        kernels: What computed attention, where it was ours.
        fallbacks: Why something else than the backend in force did.
    """

    name: str
    ours: bool
    status: str
    reason: str | None = None
    verified: bool | None = None
    error: float | None = None
    difference_from_sdpa: float | None = None
    passes_seconds: tuple[float, ...] = ()
    best_seconds: float | None = None
    median_seconds: float | None = None
    spread: float | None = None
    tokens_per_second: float | None = None
    speedup_over_sdpa: float | None = None
    floor_fraction: float | None = None
    peak_memory_bytes: int | None = None
    kernels: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """One model on one request set.

    Args:
        shape: Name of the shape, or the model as the user gave it.
        lengths: Name of the request set; "texts" for the user's.
        layers: Of the model; None if its configuration does not tell.
        batch_size: Rows per forward, but for the last.
        requests: How many.
        batches: How many.
        tokens: Valid ones.
        padded_fraction: Of all slots.
        flops: Operations that no implementation can do without; see `count_work`.
        bytes: The same of memory traffic.
        floor_seconds: The least time on this machine; None without a count, or where a pass beat it, so that the
            measured rates cannot be the machine's best.
        reference: What the errors are measured against.
        sdpa_error: sdpa's, on the sample.
        contenders: sdpa first.
    """

    shape: str
    lengths: str
    layers: int | None
    batch_size: int
    requests: int
    batches: int
    tokens: int
    padded_fraction: float
    flops: int | None
    bytes: int | None
    floor_seconds: float | None
    reference: str
    sdpa_error: float | None
    contenders: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """Whether no contender was wrong or failed."""
        return all(outcome.status in ("measured", "out of memory", "unsupported") for outcome in self.contenders)

    def _repr_html_(self) -> str:
        from .report import format_html  # which imports this module

        return format_html(self)


@dataclass(slots=True)
class BenchReport:
    """Everything that was measured, cell by cell as they finish."""

    environment: dict[str, object]
    device: str
    dtype: str
    repeats: int
    rates: MachineRates
    cells: list[Cell] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no contender was wrong or failed anywhere."""
        return all(cell.passed for cell in self.cells)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        from .report import COLUMNS_EXPLAINED, format_cell

        printer.text("\n\n".join([*map(format_cell, self.cells), COLUMNS_EXPLAINED]))

    def _repr_html_(self) -> str:
        where = self.environment["gpu"] or self.environment["cpu"]
        head = f"<p>{escape(str(where))}, {escape(self.dtype)}, best of {self.repeats}</p>"
        return head + "".join(cell._repr_html_() for cell in self.cells)


@dataclass(slots=True)
class _Entry:
    """A contender on its way through a cell."""

    contender: Contender
    model: Any = None
    batches: list[Any] = field(default_factory=list)
    output: torch.Tensor | None = None
    trace: Trace | None = None
    verdict: Verdict | None = None
    failure: tuple[str, str] | None = None
    passes: list[float] = field(default_factory=list)
    peak: int | None = None


def run_bench(
    plan: Plan,
    *,
    on_step: OnStep = lambda step, detail: None,
    on_cell: Callable[[BenchReport], None] = lambda report: None,
) -> BenchReport:
    """Measures everything in a plan.

    Args:
        plan: What to measure.
        on_step: Called with each step and its progress, such as "batch 3 of 40". It must be quick: it is called
            while passes are timed.
        on_cell: Given the report so far, after each cell.

    Raises:
        BenchError: If something in the plan cannot be measured here.

    Examples:
        >>> from hf_flashinfer_attn.tools.bench import Plan, run_bench
        >>> from hf_flashinfer_attn.tools.bench.workload import parse_request_set
        >>> plan = Plan(("gte-small",), request_sets=(parse_request_set("4+9"),), requests=8, layers=1, device="cpu")
        >>> report = run_bench(plan)
        >>> report.passed, [outcome.name for outcome in report.cells[0].contenders]
        (True, ['sdpa', 'flashinfer', 'unpad'])
    """
    device = _choose_device(plan.device)
    dtype = _choose_dtype(plan.dtype, device)
    contenders = _choose_contenders(plan, device, dtype)
    _check(plan)
    on_step("measuring this machine's rates", "")
    name = str(dtype).removeprefix("torch.")
    report = BenchReport(describe_environment(), device.type, name, plan.repeats, measure_rates(device, dtype))
    for subject in load_subjects(plan.model, plan.shapes, plan.layers, device, dtype, on_step):
        for lengths, batch_size, batches in _request_batches(plan, subject, device, report.skipped):
            cell = _measure_cell(subject, lengths, batch_size, batches, contenders, report.rates, plan, on_step)
            report.cells.append(cell)
            on_cell(report)
        # Before the next model is loaded.
        subject.prepared.clear()
        _free(device)
    if not report.cells:
        raise BenchError(f"nothing was measured: {'; '.join(report.skipped)}.")
    return report


def _choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise BenchError("device='cuda' was asked for, but torch finds no CUDA GPU. Use --device cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def _choose_contenders(plan: Plan, device: torch.device, dtype: torch.dtype) -> list[Contender]:
    ours = plan.ours
    if ours is None:
        # Default variants that cannot run here are left out. Contenders given by name get a row with the reason.
        everything = (contender for contender in CONTENDERS.values() if contender.ours)
        ours = tuple(contender.name for contender in everything if contender.refuse(device, dtype) is None)
    chosen = []
    for name in dict.fromkeys((BASELINE, *plan.against, *ours)):
        if name not in CONTENDERS:
            raise BenchError(f"{name!r} is no contender; expected some of {list(CONTENDERS)}.")
        chosen.append(CONTENDERS[name])
    return chosen


def _check(plan: Plan) -> None:
    for shape in plan.shapes:
        if shape not in SHAPES:
            raise BenchError(f"{shape!r} is no shape; expected some of {list(SHAPES)}.")
    if (plan.model is None) == (not plan.shapes):
        raise BenchError("expected either a model of yours (--model) or named shapes (--shape).")
    if plan.texts is not None and (plan.model is None or plan.request_sets):
        raise BenchError("texts go with a model of yours, and instead of request sets (--model and --texts).")
    if plan.texts is None and not plan.request_sets:
        raise BenchError("expected request sets (--lengths) or texts (--texts).")
    if plan.texts is not None and not plan.texts:
        raise BenchError("there are no texts; expected one a line.")
    if plan.texts is None and (plan.sort or plan.max_length is not None):
        raise BenchError("sorting and cutting are for texts (--sort and --max-length with --texts).")
    if plan.model is not None and plan.layers is not None:
        raise BenchError("layers are for named shapes; a model of yours has its own (--layers with --shape).")


def _request_batches(
    plan: Plan, subject: Subject, device: torch.device, skipped: list[str]
) -> Iterator[tuple[str, int, list[PaddedBatch]]]:
    if plan.texts is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(subject.name)
        except (OSError, ValueError) as error:
            raise BenchError(f"the tokenizer of {subject.name!r} cannot be loaded: {first_line(error)}") from error
        limits = [plan.max_length, subject.longest, tokenizer.model_max_length]
        batch_size = plan.batch_size or TEXTS_BATCH_SIZE
        yield (
            "texts",
            batch_size,
            text_batches(
                plan.texts[: plan.requests],
                tokenizer,
                batch_size,
                min(limit for limit in limits if limit is not None),
                device,
                sort=plan.sort,
            ),
        )
    for requests in plan.request_sets:
        if subject.longest is not None and requests.longest > subject.longest:
            skipped.append(
                f"{requests.name} has requests of {requests.longest} tokens, {subject.name} takes {subject.longest}"
            )
            continue
        batch_size = plan.batch_size or requests.batch_size
        lengths = requests.lengths(plan.requests)
        yield requests.name, batch_size, synthetic_batches(lengths, batch_size, subject.model.config, device)


def _measure_cell(
    subject: Subject,
    lengths: str,
    batch_size: int,
    batches: list[PaddedBatch],
    contenders: Sequence[Contender],
    rates: MachineRates,
    plan: Plan,
    on_step: OnStep,
) -> Cell:
    device, dtype = batches[0].padding.device, subject.model.dtype
    label = f"{shown_name(subject.name)}, {lengths}"
    reference = make_reference(subject.model, batches, _details(on_step, f"{label}: reference"))
    _free(device)
    start = time.perf_counter()
    entries = [_Entry(contender) for contender in contenders]
    for entry in entries:
        if (reason := entry.contender.refuse(device, dtype)) is not None:
            entry.failure = "unsupported", reason
            continue
        on_batch = _details(on_step, f"{label}: {entry.contender.name}, warm-up and check")
        _attempt(entry, device, functools.partial(_warm_up, entry, subject, batches, on_batch))
    sdpa_output = entries[0].output
    for entry in entries:
        if entry.output is not None:
            entry.verdict = judge(entry.output, sdpa_output, reference, dtype)
            if entry.verdict.reason is not None:
                entry.failure = "wrong", entry.verdict.reason
    for done in range(plan.repeats):
        if done and plan.seconds is not None and time.perf_counter() - start > plan.seconds:
            break
        for entry in entries:
            if entry.failure is None:
                which = f"{entry.contender.name}, pass {done + 1} of {plan.repeats}, "
                on_batch = _details(on_step, f"{label}: timing", which)
                _attempt(entry, device, functools.partial(_timed_pass, entry, device, on_batch))
    tokens = sum(sum(batch.lengths) for batch in batches)
    work = count_work(subject.model, batches)
    floor = None if work is None else work.floor_seconds(rates)
    if floor is not None and floor > min((time for entry in entries for time in entry.passes), default=floor):
        # The rates were no ceilings, and a fraction of such a floor would say nothing.
        floor = None
    return Cell(
        shape=subject.name,
        lengths=lengths,
        layers=getattr(subject.model.config.get_text_config(), "num_hidden_layers", None),
        batch_size=batch_size,
        requests=sum(len(batch.lengths) for batch in batches),
        batches=len(batches),
        tokens=tokens,
        padded_fraction=1 - tokens / sum(batch.slots for batch in batches),
        flops=None if work is None else work.flops,
        bytes=None if work is None else work.bytes,
        floor_seconds=floor,
        reference=reference.summary,
        sdpa_error=next((entry.verdict.sdpa_error for entry in entries if entry.verdict is not None), None),
        contenders=tuple(_outcome(entry, entries[0], tokens, floor) for entry in entries),
    )


def _details(on_step: OnStep, step: str, prefix: str = "") -> Callable[[str], None]:
    return lambda detail: on_step(step, prefix + detail)


def _attempt(entry: _Entry, device: torch.device, step: Callable[[], None]) -> None:
    """Runs a step of a contender; its failure is a result like any other, and must not cost those of the others."""
    try:
        step()
    except torch.OutOfMemoryError:
        entry.failure = "out of memory", "the device has too little memory"
    except (BenchError, UnsupportedAttentionError) as error:
        entry.failure = "unsupported", str(error)
    except (RuntimeError, ValueError) as error:
        message = str(error).strip() or "no message"
        entry.failure = "failed", f"{type(error).__name__}: {message.splitlines()[0]}"
    # Not inside `except`, where the error still holds on to the tensors of its frames.
    if entry.failure is not None:
        entry.batches = []
        _free(device)


def _warm_up(entry: _Entry, subject: Subject, batches: Sequence[PaddedBatch], on_batch: Callable[[str], None]) -> None:
    contender = entry.contender
    if contender.name not in subject.prepared:
        subject.prepared[contender.name] = contender.prepare_model(subject.model)
    entry.model = subject.prepared[contender.name]
    entry.batches = [contender.prepare_batch(batch, subject.model) for batch in batches]
    with trace() if contender.ours else nullcontext() as recorded:
        entry.output = _run_pass(entry, on_batch)
    entry.trace = recorded


def _run_pass(entry: _Entry, on_batch: Callable[[str], None]) -> torch.Tensor:
    """Runs all batches; the mean-pooled outputs, on the host, end the pass."""
    contender, model = entry.contender, entry.model
    pooled = []
    with torch.inference_mode():
        for at, batch in enumerate(entry.batches, start=1):
            on_batch(f"batch {at} of {len(entry.batches)}")
            pooled.append(contender.pool(contender.run(model, batch), batch))
        return torch.cat(pooled).cpu()


def _timed_pass(entry: _Entry, device: torch.device, on_batch: Callable[[str], None]) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronise(device)
    start = time.perf_counter()
    _run_pass(entry, on_batch)
    synchronise(device)
    entry.passes.append(time.perf_counter() - start)
    if device.type == "cuda":
        entry.peak = max(entry.peak or 0, torch.cuda.max_memory_allocated(device))


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _outcome(entry: _Entry, baseline: _Entry, tokens: int, floor: float | None) -> Outcome:
    verdict, recorded = entry.verdict, entry.trace
    checked = Outcome(
        name=entry.contender.name,
        ours=entry.contender.ours,
        status="measured" if entry.failure is None else entry.failure[0],
        reason=None if entry.failure is None else entry.failure[1],
        verified=None if verdict is None else verdict.reason is None,
        error=None if verdict is None else verdict.error,
        difference_from_sdpa=None if verdict is None else verdict.difference,
        kernels=() if recorded is None else recorded.kernels,
        fallbacks=() if recorded is None else recorded.fallbacks,
    )
    if entry.failure is not None:
        return checked
    best, median = min(entry.passes), statistics.median(entry.passes)
    return replace(
        checked,
        passes_seconds=tuple(entry.passes),
        best_seconds=best,
        median_seconds=median,
        spread=(max(entry.passes) - best) / median,
        tokens_per_second=tokens / best,
        speedup_over_sdpa=min(baseline.passes) / best if baseline.failure is None else None,
        floor_fraction=None if floor is None else floor / best,
        peak_memory_bytes=entry.peak,
    )
