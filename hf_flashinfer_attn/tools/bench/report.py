"""Benchmark results: text, HTML, and plain values for JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ...tables import html_table
from .floors import MachineRates
from .workload import BenchError, shown_name

__all__ = [
    "COLUMNS_EXPLAINED", "BenchReport", "Cell", "Outcome", "format_cell", "format_html", "load_reports",
    "report_figures",
]  # fmt: skip

FORMAT = "hf_flashinfer_attn.bench/1"
_WIDTH = 100
_COLUMNS = ("", "best", "median", "spread", "tokens/s", "vs sdpa", "of floor", "memory", "error")
COLUMNS_EXPLAINED = """\
best, median  time of one pass over all batches
spread        (slowest - fastest pass) / median
tokens/s      tokens per second in the best pass, without padding
vs sdpa       sdpa's best time / this best time; above 1 is faster than sdpa
of floor      lower bound from this machine's matmul and copy rates / best time
memory        peak GPU memory of torch's allocator (on a GPU only)
error         relative error of sampled outputs against a wider dtype"""


@dataclass(slots=True)
class Outcome:
    """Result of one contender in one cell. Times are None unless the status is "measured"."""

    name: str
    ours: bool
    status: str = "measured"  # or "wrong", "out of memory", "failed", "unsupported"
    reason: str | None = None  # reason if not measured
    verified: bool | None = None  # whether outputs were accurate; None if there were none
    error: float | None = None  # norm(output - exact) / norm(exact) of pooled outputs, over the reference's sample
    difference_from_sdpa: float | None = None  # relative difference over all requests
    passes_seconds: tuple[float, ...] = ()
    best_seconds: float | None = None
    median_seconds: float | None = None
    spread: float | None = None  # (slowest - fastest pass) / median
    tokens_per_second: float | None = None  # in the best pass, without padding
    speedup_over_sdpa: float | None = None  # sdpa's best time / this best time; above 1 is faster than sdpa
    floor_fraction: float | None = None  # the cell's floor / best time
    peak_memory_bytes: int | None = None  # of torch's CUDA allocator, weights and batches included; None on a CPU
    kernels: tuple[str, ...] = ()  # attention kernels, for contenders of this package
    fallbacks: tuple[str, ...] = ()  # reasons of fallbacks


@dataclass(frozen=True, slots=True)
class Cell:
    """One model on one request set."""

    shape: str  # name of the shape; path or id of a user's model
    lengths: str  # name of the request set; "texts" for the user's
    layers: int | None
    batch_size: int
    requests: int
    batches: int
    tokens: int
    padded_fraction: float
    flops: int | None  # minimum work; see `count_work`
    bytes: int | None
    floor_seconds: float | None  # None without a count, or if a pass was faster than it
    reference: str  # description of the reference for errors
    sdpa_error: float | None
    contenders: tuple[Outcome, ...]  # sdpa first

    @property
    def passed(self) -> bool:
        """Whether no contender was wrong or failed."""
        return all(outcome.status in ("measured", "out of memory", "unsupported") for outcome in self.contenders)

    def _repr_html_(self) -> str:
        return format_html(self)


@dataclass(slots=True)
class BenchReport:
    """Report of a benchmark; cells are appended as they finish."""

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
        printer.text("\n\n".join([*map(format_cell, self.cells), COLUMNS_EXPLAINED]))

    def _repr_html_(self) -> str:
        where = self.environment["gpu"] or self.environment["cpu"]
        head = f"<p>{escape(str(where))}, {escape(self.dtype)}, best of {self.repeats}</p>"
        return head + "".join(map(format_html, self.cells))


def report_figures(report: BenchReport) -> dict[str, Any]:
    """Returns a report as plain values, ready for `json.dumps`."""
    return {"format": FORMAT, "passed": report.passed, **asdict(report)}


def load_reports(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Reads reports written by `bench --json`."""
    reports = []
    for file in files:
        figures = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(figures, dict) or figures.get("format") != FORMAT:
            raise BenchError(f"{file} is no report of {FORMAT}; expected a file that bench --json wrote.")
        reports.append(figures)
    return reports


def format_cell(cell: Cell) -> str:
    """Returns one cell as a text table of at most 100 columns."""
    table = _table(cell)
    widths = [max(map(len, column)) for column in zip(*(row for row in table if len(row) == len(table[0])))]
    widths[0] = max(len(row[0]) for row in table)
    lines = [textwrap.fill(_title(cell), _WIDTH)]
    for name, *values in table:
        label = f"  {name:{widths[0]}}  "
        text = values[0] if len(values) == 1 else "  ".join(map(str.rjust, values, widths[1:]))
        lines.append(textwrap.fill(text, _WIDTH, initial_indent=label, subsequent_indent=" " * len(label)))
    lines += [textwrap.fill(note, _WIDTH, initial_indent="  ", subsequent_indent="    ") for note in _fallbacks(cell)]
    return "\n".join(lines)


def format_html(cell: Cell) -> str:
    """Returns one cell as an HTML table."""
    header, *rows = _table(cell)
    filled = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    notes = [*_fallbacks(cell), f"error: against {cell.reference}"]
    return html_table(header, filled, title=_title(cell), note="\n".join(notes))


def _table(cell: Cell) -> list[list[str]]:
    """Returns a header and a row per contender, without empty columns; an unmeasured row is a name and a reason."""
    rows = [_row(outcome) for outcome in cell.contenders]
    measured = [row for row in rows if len(row) == len(_COLUMNS)]
    columns = [at for at in range(len(_COLUMNS)) if at == 0 or any(row[at] != "-" for row in measured)]
    return [[row[at] for at in columns] if len(row) == len(_COLUMNS) else [*row] for row in (_COLUMNS, *rows)]


def _row(outcome: Outcome) -> tuple[str, ...]:
    if outcome.best_seconds is None or outcome.median_seconds is None:
        return outcome.name, f"{outcome.status}: {outcome.reason}"
    return (
        outcome.name,
        _seconds(outcome.best_seconds),
        _seconds(outcome.median_seconds),
        f"{outcome.spread:.0%}",
        f"{outcome.tokens_per_second:,.0f}",
        "-" if outcome.speedup_over_sdpa is None else f"{outcome.speedup_over_sdpa:.2f}x",
        "-" if outcome.floor_fraction is None else f"{outcome.floor_fraction:.1%}",
        "-" if outcome.peak_memory_bytes is None else f"{outcome.peak_memory_bytes / 2**30:.3g} GiB",
        f"{outcome.error:.1e}",
    )


def _fallbacks(cell: Cell) -> list[str]:
    return [f"{outcome.name} fell back: {reason}" for outcome in cell.contenders for reason in outcome.fallbacks]


def _title(cell: Cell) -> str:
    title = (
        f"{shown_name(cell.shape)}, {cell.lengths}: {cell.requests:,} requests in batches of {cell.batch_size}, "
        f"{cell.tokens:,} tokens, {cell.padded_fraction:.0%} padding"
    )
    if cell.floor_seconds is not None:
        return f"{title}, floor {_seconds(cell.floor_seconds)}"
    return title if cell.flops is None else f"{title}, no floor: a pass was faster than the measured rates allow"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"
