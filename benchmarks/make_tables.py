"""Writes README's benchmark table, between its markers, and its charts from results/bench_*.json.

    python benchmarks/make_tables.py

Those files are written by `python -m hf_flashinfer_attn bench --json` alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from hf_flashinfer_attn.bench import draw_chart, load_reports

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
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
            f"requests with sdpa, and how many times faster {_list(_ours(reports))} was; {_passes(reports)}.\n\n"
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


def _list(names: list[str]) -> str:
    *first, last = (f"`{name}`" for name in names)
    return f"{', '.join(first)} or {last}" if first else last


def _table(reports: list[dict[str, Any]]) -> str:
    cells = [cell for report in reports for cell in report["cells"]]
    shapes = list(dict.fromkeys(cell["shape"] for cell in cells))
    ours = _ours(reports)
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        outcomes = {outcome["name"]: outcome for outcome in cell["contenders"]}
        batches = f"{cell['requests']:,} in batches of {cell['batch_size']}"
        title = f"{cell['lengths']}: {batches}, {cell['padded_fraction']:.0%} padding"
        figures = [_best(outcomes["sdpa"]), *(_ratio(outcomes.get(name)) for name in ours)]
        rows.setdefault(title, {})[cell["shape"]] = ", ".join(figures)
    lines = [f"| requests | {' | '.join(shapes)} |", "|---" * (len(shapes) + 1) + "|"]
    for title, columns in rows.items():
        lines.append(f"| {title} | {' | '.join(columns.get(shape, '') for shape in shapes)} |")
    return "\n".join(lines)


def _ratio(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return "-"
    ratio = outcome["speedup_over_sdpa"]
    return outcome["status"] if outcome["best_seconds"] is None else "-" if ratio is None else f"{ratio:.2f}x"


def _best(outcome: dict[str, Any]) -> str:
    seconds = outcome["best_seconds"]
    return outcome["status"] if seconds is None else f"{seconds:.3g} s"


def main() -> int:
    grouped = machines()
    for machine, reports in grouped.items():
        draw_chart(reports, chart_file(machine), description=digest(reports))
    text, found = BLOCK.subn(lambda _: block(grouped), README.read_text(encoding="utf-8"))
    if found != 1:
        print("error: README.md has no block between <!-- bench --> and <!-- /bench -->", file=sys.stderr)
        return 1
    README.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
