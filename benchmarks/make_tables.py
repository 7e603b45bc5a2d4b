"""Writes README's benchmark table, between its markers, and its charts from results/bench_*.json.

    python benchmarks/make_tables.py

Those files are written by `python -m hf_flashinfer_attn bench --json` alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_flashinfer_attn.tools.bench import draw_chart, load_reports
from hf_flashinfer_attn.tools.bench.workload import REQUEST_SETS, SHAPES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
# What a contender's name ends in whose inputs stay on the CPU.
HOST = "_host"
# Left to the chart: the table has as much in a cell as can be read.
NOT_IN_TABLE = ("compiled_graphs",)
BLOCK = re.compile(r"(?<=<!-- bench -->\n).*?(?=<!-- /bench -->)", re.DOTALL)


def machines(folder: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """Returns the reports by machine and dtype, oldest first; of a cell measured twice, the later one stays."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for report in sorted(load_reports(sorted(folder.glob("bench_*.json"))), key=lambda r: r["environment"]["date_utc"]):
        where = report["environment"]["gpu"] or report["environment"]["cpu"]
        group = grouped.setdefault(f"{where}, {report['dtype']}", [])
        measured = {_key(cell) for cell in report["cells"]}
        for earlier in group:
            earlier["cells"] = [cell for cell in earlier["cells"] if _key(cell) not in measured]
        group.append(report)
    return grouped


def _key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return cell["shape"], cell["lengths"], cell["batch_size"], cell["layers"]


def chart_file(machine: str, folder: Path = RESULTS) -> Path:
    """Returns where the chart of a machine lies."""
    return folder / f"bench_{re.sub(r'[^a-z0-9]+', '_', machine.lower()).strip('_')}.png"


def in_chart(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what one chart shows of reports: cells in order, of shapes that all of ours ran, inputs on the GPU."""
    cells = [
        {**cell, "contenders": [one for one in cell["contenders"] if not one["name"].endswith(HOST)]}
        for report in reports
        for cell in report["cells"]
    ]
    ways = len(_ways(reports))
    whole = {cell["shape"] for cell in cells if sum(one["ours"] for one in cell["contenders"]) == ways}
    shapes, lengths = (_in_order({cell[name]: None for cell in cells}, known)
                       for name, known in (("shape", SHAPES), ("lengths", REQUEST_SETS)))  # fmt: skip
    kept = [cell for cell in cells if cell["shape"] in whole]
    kept.sort(key=lambda cell: (shapes.index(cell["shape"]), lengths.index(cell["lengths"])))
    return [{**reports[-1], "cells": kept}]


def digest(reports: list[dict[str, Any]]) -> str:
    """Returns what tells, in a chart's metadata, which results it shows."""
    return hashlib.sha256(json.dumps(reports, sort_keys=True).encode()).hexdigest()


def block(grouped: dict[str, list[dict[str, Any]]]) -> str:
    """Returns what belongs between the markers."""
    if not grouped:
        return "No results yet.\n"
    parts = []
    for machine, reports in grouped.items():
        environment = reports[-1]["environment"]
        picture = chart_file(machine).relative_to(ROOT)
        parts.append(
            f"{machine}, torch {environment['torch']}, transformers {environment['transformers']}: seconds for all "
            f"requests with sdpa, and how many times faster {_list(_columns(reports))} was; in brackets: with inputs "
            f"on the CPU; {_passes(reports)}.\n\n"
            f"{_table(reports)}\n\n![Tokens per second]({picture})\n"
        )
    return "\n".join(parts)


def _passes(reports: list[dict[str, Any]]) -> str:
    timed = [
        outcome["passes_seconds"] for report in reports for cell in report["cells"] for outcome in cell["contenders"]
    ]
    counts = sorted({len(passes) for passes in timed if passes})
    if not counts:
        return "nothing was timed"
    return f"best of {counts[0]} to {counts[-1]} passes" if len(counts) > 1 else f"best of {counts[0]} passes"


def _ours(reports: list[dict[str, Any]]) -> list[str]:
    outcomes = (outcome for report in reports for cell in report["cells"] for outcome in cell["contenders"])
    return list(dict.fromkeys(outcome["name"] for outcome in outcomes if outcome["ours"]))


def _ways(reports: list[dict[str, Any]]) -> list[str]:
    return [name for name in _ours(reports) if not name.endswith(HOST)]


def _columns(reports: list[dict[str, Any]]) -> list[str]:
    return [name for name in _ways(reports) if name not in NOT_IN_TABLE]


def _list(names: list[str]) -> str:
    *first, last = (f"`{name}`" for name in names)
    return f"{', '.join(first)} or {last}" if first else last


def _in_order(names: dict[str, Any], known: Iterable[str]) -> list[str]:
    order = {name: at for at, name in enumerate(known)}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def _table(reports: list[dict[str, Any]]) -> str:
    cells = [cell for report in reports for cell in report["cells"]]
    shapes = _in_order(dict.fromkeys(cell["shape"] for cell in cells), SHAPES)
    ways = _columns(reports)
    rows: dict[str, dict[str, dict[str, str]]] = {}
    for cell in cells:
        outcomes = {outcome["name"]: outcome for outcome in cell["contenders"]}
        batches = f"{cell['requests']:,} in batches of {cell['batch_size']}"
        title = f"{cell['lengths']}: {batches}, {cell['padded_fraction']:.0%} padding"
        ratios = [_ratio(outcomes, name) for name in ways]
        while ratios and not ratios[-1]:
            ratios.pop()
        figures = ", ".join([_best(outcomes["sdpa"]), *(ratio or "-" for ratio in ratios)])
        rows.setdefault(cell["lengths"], {}).setdefault(title, {})[cell["shape"]] = figures
    lines = [f"| requests | {' | '.join(shapes)} |", "|---" * (len(shapes) + 1) + "|"]
    for lengths in _in_order(rows, REQUEST_SETS):
        for title, columns in rows[lengths].items():
            lines.append(f"| {title} | {' | '.join(columns.get(shape, '') for shape in shapes)} |")
    return "\n".join(lines)


def _ratio(outcomes: dict[str, dict[str, Any]], name: str) -> str:
    if name not in outcomes:
        return ""
    host = outcomes.get(name + HOST)
    bracket = "" if host is None or host["speedup_over_sdpa"] is None else f" ({host['speedup_over_sdpa']:.2f}x)"
    ratio = outcomes[name]["speedup_over_sdpa"]
    return (outcomes[name]["status"] if ratio is None else f"{ratio:.2f}x") + bracket


def _best(outcome: dict[str, Any]) -> str:
    seconds = outcome["best_seconds"]
    return outcome["status"] if seconds is None else f"{seconds:.3g} s"


def main() -> int:
    # Without options; but --help must not write.
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    grouped = machines()
    for machine, reports in grouped.items():
        draw_chart(in_chart(reports), chart_file(machine), description=digest(reports))
    text, found = BLOCK.subn(lambda _: block(grouped), README.read_text(encoding="utf-8"))
    if found != 1:
        print("error: README.md has no block between <!-- bench --> and <!-- /bench -->", file=sys.stderr)
        return 1
    README.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
