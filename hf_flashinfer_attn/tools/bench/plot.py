"""Bar chart of reports: tokens per second and speed-up over sdpa."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .contenders import BASELINE
from .workload import BenchError, shown_name

__all__ = ["draw_chart", "require_matplotlib"]

_INK, _MUTED = "#1f2933", "#697586"
_OURS = ("#0b7a75", "#35a79c", "#8fd1b5", "#e0912f", "#f3c47d")
_RIVALS = {
    BASELINE: "#b8c0cc", "eager": "#dfe3e8", "flex_attention": "#d9b38c", "varlen": "#8fa3bf", "compile": "#c9a7c7",
}  # fmt: skip
_BAR_INCHES, _GAP_BARS = 0.24, 0.9


def require_matplotlib() -> None:
    """Raises `BenchError` if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise BenchError(
            "a chart needs matplotlib, which is not installed. Install it: pip install matplotlib"
        ) from error


def draw_chart(reports: Sequence[dict[str, Any]], file: Path, *, description: str = "") -> None:
    """Draws reports of one machine and dtype as a PNG, with `description` in its metadata.

    One panel per model, one group of bars per request set, one bar per contender.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels: dict[str, list[dict[str, Any]]] = {}
    colours: dict[str, str] = {}
    for cell in (cell for report in reports for cell in report["cells"]):
        panels.setdefault(cell["shape"], []).append(cell)
        for outcome in cell["contenders"]:
            ours = _OURS[sum(name not in _RIVALS for name in colours) % len(_OURS)]
            colours.setdefault(outcome["name"], _RIVALS.get(outcome["name"], ours))
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    bars = max(sum(len(cell["contenders"]) + _GAP_BARS for cell in panel) for panel in panels.values())
    size = (max(4.3 * columns + 0.4, 7.0), rows * (bars * _BAR_INCHES + 0.55) + 1.3)
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    environment = reports[0]["environment"]
    versions = f"torch {environment['torch']}, transformers {environment['transformers']}"
    caption = f"{environment['gpu'] or environment['cpu']}, {reports[0]['dtype']}, {versions}"
    figure.supxlabel(caption, x=0.02, ha="left", size=7.5, color=_MUTED)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=8.5, alignment="left",
        title=f"Tokens per second, and times that of {BASELINE}", title_fontproperties={"size": 13, "weight": "bold"},
    )  # fmt: skip
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (shape, panel) in zip(grid, panels.items()):
        _draw_panel(axes, panel, colours)
        axes.set_title(shown_name(shape), loc="left", size=10, weight="bold", color=_INK)
        # The same bar height in all panels.
        axes.set_ylim(bars - _GAP_BARS - 0.2, -0.8)
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.savefig(file, format="png", metadata={"Description": description})


def _draw_panel(axes: Any, cells: Sequence[dict[str, Any]], colours: dict[str, str]) -> None:
    ticks, names, place = [], [], 0.0
    for cell in cells:
        outcomes = cell["contenders"]
        places = [place + at for at in range(len(outcomes))]
        speeds = [outcome["tokens_per_second"] or 0 for outcome in outcomes]
        bars = axes.barh(places, speeds, height=0.86, color=[colours[outcome["name"]] for outcome in outcomes])
        for outcome, label in zip(outcomes, axes.bar_label(bars, map(_label, outcomes), padding=3, size=7.5)):
            label.set(color=_INK, weight="bold") if outcome["ours"] else label.set(color=_MUTED)
        ticks.append((places[0] + places[-1]) / 2)
        names.append(f"{cell['lengths']}\n{cell['padded_fraction']:.0%} padding")
        place = places[-1] + 1 + _GAP_BARS
    axes.set_yticks(ticks, names, size=8, color=_INK)
    axes.set_xticks([])
    axes.tick_params(length=0)
    # Space for the labels.
    axes.set_xlim(0, axes.dataLim.xmax * 1.28 or 1)
    axes.set_frame_on(False)


def _label(outcome: dict[str, Any]) -> str:
    speed, ratio = outcome["tokens_per_second"], outcome["speedup_over_sdpa"]
    if speed is None:
        return str(outcome["status"])
    unit, letter = (1e6, "M") if speed >= 1e6 else (1e3, "k") if speed >= 1e3 else (1, "")
    times = "" if ratio is None or outcome["name"] == BASELINE else f"  {ratio:.2f}\u00d7"
    return f"{speed / unit:.3g}{letter}{times}"
