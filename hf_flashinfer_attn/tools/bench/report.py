"""Reports as text and as plain values for JSON, and loading them from files."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...html_table import html_table
from .errors import BenchError
from .measure import BenchReport, Cell, Outcome
from .subjects import shown_name

__all__ = ["COLUMNS_EXPLAINED", "FORMAT", "format_cell", "format_html", "load_reports", "report_figures"]

FORMAT = "hf_flashinfer_attn.bench/1"


def report_figures(report: BenchReport) -> dict[str, Any]:
    """Returns a report as plain values, ready for `json.dumps`; fields are those of the classes in `measure`."""
    return {
        "format": FORMAT,
        "environment": report.environment,
        "device": report.device,
        "dtype": report.dtype,
        "repeats": report.repeats,
        "rates": asdict(report.rates),
        "passed": report.passed,
        "cells": [asdict(cell) for cell in report.cells],
        "skipped": report.skipped,
    }


def load_reports(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Reads reports that `--json` wrote.

    Raises:
        BenchError: If a file is no such report.
    """
    reports = []
    for file in files:
        figures = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(figures, dict) or figures.get("format") != FORMAT:
            raise BenchError(f"{file} is no report of {FORMAT}; expected a file that bench --json wrote.")
        reports.append(figures)
    return reports


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


def format_cell(cell: Cell) -> str:
    """Returns one cell as a table, at most 100 columns wide; columns without values are left out."""
    rows = _table(cell)
    table = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(map(len, column)) for column in zip(*table)]
    widths[0] = max(len(row[0]) for row in rows)
    lines = textwrap.wrap(_title(cell), _WIDTH)
    for name, *values in rows:
        label = f"  {name.ljust(widths[0])}  "
        if len(values) == 1:
            lines += textwrap.wrap(values[0], _WIDTH, initial_indent=label, subsequent_indent=" " * len(label))
        else:
            lines.append((label + "  ".join(map(str.rjust, values, widths[1:]))).rstrip())
    for note in _fallbacks(cell):
        lines += textwrap.wrap(note, _WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def format_html(cell: Cell) -> str:
    """Returns one cell as a table for notebooks; columns without values are left out.

    Examples:
        >>> from hf_flashinfer_attn.tools.bench import Plan, format_html, parse_request_set, run_bench
        >>> plan = Plan(("gte-small",), request_sets=(parse_request_set("4+9"),), requests=8, layers=1, device="cpu")
        >>> "<td" in format_html(run_bench(plan).cells[0])
        True
    """
    header, *rows = _table(cell)
    filled = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    notes = [*_fallbacks(cell), f"error: against {cell.reference}"]
    return html_table(header, filled, title=_title(cell), note="\n".join(notes))


def _table(cell: Cell) -> list[list[str]]:
    """Returns the header and a row per contender; for an unmeasured one its name and the reason."""
    rows = [_row(outcome) for outcome in cell.contenders]
    measured = [row for row in rows if len(row) == len(_COLUMNS)]
    columns = [at for at in range(len(_COLUMNS)) if at == 0 or any(row[at] != "-" for row in measured)]
    return [[row[at] for at in columns] if len(row) == len(_COLUMNS) else [*row] for row in (_COLUMNS, *rows)]


def _fallbacks(cell: Cell) -> list[str]:
    return [f"{outcome.name} fell back: {reason}" for outcome in cell.contenders for reason in outcome.fallbacks]


def _title(cell: Cell) -> str:
    title = (
        f"{shown_name(cell.shape)}, {cell.lengths}: {cell.requests:,} requests in batches of {cell.batch_size}, "
        f"{cell.tokens:,} tokens, {cell.padded_fraction:.0%} padding"
    )
    if cell.floor_seconds is not None:
        title += f", floor {_seconds(cell.floor_seconds)}"
    elif cell.flops is not None:
        title += ", no floor: a pass was faster than the measured rates allow"
    return title


def _row(outcome: Outcome) -> tuple[str, ...]:
    if outcome.best_seconds is None or outcome.median_seconds is None or outcome.tokens_per_second is None:
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


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"
