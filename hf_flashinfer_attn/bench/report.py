"""A report as text for people, as JSON for programs, and back from files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..html_table import html_table
from .errors import BenchError
from .measure import BenchReport, Cell, Outcome

__all__ = ["FORMAT", "format_cell", "format_html", "format_summary", "load_reports", "report_figures"]

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


def format_summary(report: BenchReport) -> str:
    """Returns the gist of a report as one line of JSON."""
    cells = [
        {
            "shape": cell.shape,
            "lengths": cell.lengths,
            "best_seconds": {outcome.name: _rounded(outcome.best_seconds, outcome) for outcome in cell.contenders},
            "speedup_over_sdpa": {
                outcome.name: _rounded(outcome.speedup_over_sdpa, outcome) for outcome in cell.contenders[1:]
            },
        }
        for cell in report.cells
    ]
    return json.dumps({"format": FORMAT, "passed": report.passed, "device": report.device, "cells": cells})


def _rounded(value: float | None, outcome: Outcome) -> float | str | None:
    return float(f"{value:.4g}") if value is not None else None if outcome.reason is None else outcome.status


_COLUMNS = ("", "best", "median", "spread", "tokens/s", "vs sdpa", "of floor", "peak memory", "error")


def format_cell(cell: Cell) -> str:
    """Returns one cell as a table, at most 110 columns wide but for reasons.

    Times are of a pass over all batches. "of floor" is the floor over the best time: 100% cannot be beaten.
    """
    title = _title(cell)
    rows = [_COLUMNS, *(_row(outcome) for outcome in cell.contenders)]
    measured = [row for row in rows if len(row) == len(_COLUMNS)]
    widths = [max(len(row[column]) for row in measured) for column in range(len(_COLUMNS))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = [title]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(value.rjust(width) for value, width in zip(row[1:], widths[1:]))]
        if len(row) < len(_COLUMNS):
            cells = [cells[0], *row[1:]]
        lines.append("  " + "  ".join(cells).rstrip())
    lines += [f"  {outcome.name} fell back: {reason}" for outcome in cell.contenders for reason in outcome.fallbacks]
    return "\n".join(lines)


def format_html(cell: Cell) -> str:
    """Returns one cell as a table for notebooks; columns without values are left out.

    Examples:
        >>> from hf_flashinfer_attn.bench import Plan, format_html, parse_request_set, run_bench
        >>> plan = Plan(("gte-small",), request_sets=(parse_request_set("4+9"),), requests=8, layers=1, device="cpu")
        >>> "<td" in format_html(run_bench(plan).cells[0])
        True
    """
    rows = [_row(outcome) for outcome in cell.contenders]
    measured = [row for row in rows if len(row) == len(_COLUMNS)]
    columns = [at for at in range(len(_COLUMNS)) if at == 0 or any(row[at] != "-" for row in measured)]
    cells = [
        [row[at] for at in columns] if len(row) == len(_COLUMNS) else [*row, *[""] * (len(columns) - 2)] for row in rows
    ]
    notes = [f"{outcome.name} fell back: {reason}" for outcome in cell.contenders for reason in outcome.fallbacks]
    notes.append(f"error: against {cell.reference}")
    return html_table([_COLUMNS[at] for at in columns], cells, title=_title(cell), note="\n".join(notes))


def _title(cell: Cell) -> str:
    # A folder's name says enough; an id of a hub stays whole.
    name = Path(cell.shape).name if Path(cell.shape).is_absolute() else cell.shape
    title = (
        f"{name}, {cell.lengths}: {cell.requests:,} requests in batches of {cell.batch_size}, "
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
        "-" if outcome.peak_memory_bytes is None else f"{outcome.peak_memory_bytes / 2**30:.2f} GiB",
        f"{outcome.error:.1e}",
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"
