"""A bar chart of reports: tokens per second, and how many times sdpa's that is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .contenders import BASELINE
from .errors import BenchError
from .subjects import shown_name

__all__ = ["draw_chart", "require_matplotlib"]

_INK, _MUTED, _RULE = "#1f2933", "#697586", "#e4e7eb"
_OURS = ("#0b7a75", "#35a79c", "#8fd1b5", "#e0912f", "#f3c47d")
_RIVALS = {
    BASELINE: "#b8c0cc",
    "eager": "#dfe3e8",
    "flex_attention": "#d9b38c",
    "varlen": "#8fa3bf",
    "compile": "#c9a7c7",
}
_OTHER = "#cfd6de"
_BAR_INCHES = 0.24


def require_matplotlib() -> None:
    """Checks that a chart can be drawn, before anything is measured.

    Raises:
        BenchError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise BenchError(
            "a chart needs matplotlib, which is not installed. Install it: pip install matplotlib"
        ) from error


def draw_chart(reports: Sequence[dict[str, Any]], file: Path, *, description: str = "") -> None:
    """Draws one panel per model, one group of bars per request set, one bar per contender.

    Args:
        reports: From `report_figures` or `load_reports`, of one machine and dtype.
        file: A PNG.
        description: Kept in the file's metadata.

    Raises:
        BenchError: If matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = [cell for report in reports for cell in report["cells"]]
    shapes = list(dict.fromkeys(cell["shape"] for cell in cells))
    contenders = {outcome["name"]: outcome["ours"] for cell in cells for outcome in cell["contenders"]}
    colours = _colours(contenders)
    panels = [[cell for cell in cells if cell["shape"] == shape] for shape in shapes]
    bars = [sum(len(cell["contenders"]) + 0.9 for cell in panel) for panel in panels]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    row_bars = [max(bars[row * columns : (row + 1) * columns]) for row in range(rows)]
    row_heights = [most * _BAR_INCHES + 0.55 for most in row_bars]
    header, footer = 0.95, 0.35
    size = (4.3 * columns + 0.4 if columns > 1 else 7.0, sum(row_heights) + header + footer)
    figure = Figure(figsize=size, dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(
        0.25 / size[0],
        1 - 0.3 / size[1],
        f"Tokens per second, and times that of {BASELINE}",
        size=13,
        weight="bold",
        color=_INK,
    )
    environment = reports[0]["environment"]
    where = environment["gpu"] or environment["cpu"]
    caption = (
        f"{where}, {reports[0]['dtype']}, torch {environment['torch']}, transformers {environment['transformers']}"
    )
    figure.text(0.25 / size[0], 0.12 / size[1], caption, size=7.5, color=_MUTED)
    _legend(figure, colours, size)
    grid = figure.add_gridspec(
        rows,
        columns,
        height_ratios=row_heights,
        left=(1.0 if columns > 1 else 1.1) / size[0],
        right=1 - 0.25 / size[0],
        top=1 - header / size[1],
        bottom=footer / size[1],
        wspace=0.42,
        # Of the mean height of a row.
        hspace=0.35 * rows / sum(row_heights),
    )
    for at, (shape, panel) in enumerate(zip(shapes, panels)):
        axes = figure.add_subplot(grid[at // columns, at % columns])
        _panel(axes, shape, panel, colours, row_bars[at // columns])
    figure.savefig(file, format="png", metadata={"Description": description})


def _colours(contenders: dict[str, bool]) -> dict[str, str]:
    shades = iter(_OURS * len(contenders))
    return {name: next(shades) if ours else _RIVALS.get(name, _OTHER) for name, ours in contenders.items()}


def _legend(figure: Any, colours: dict[str, str], size: tuple[float, float]) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in colours.items()],
        loc="upper left",
        bbox_to_anchor=(0.17 / size[0], 1 - 0.36 / size[1]),
        ncols=len(colours),
        frameon=False,
        fontsize=8.5,
        labelcolor=_INK,
        handlelength=1.0,
        handleheight=0.9,
        columnspacing=1.4,
    )


def _panel(axes: Any, shape: str, cells: Sequence[dict[str, Any]], colours: dict[str, str], bars: float) -> None:
    best = max((outcome["tokens_per_second"] or 0 for cell in cells for outcome in cell["contenders"]), default=0) or 1
    place = 0.0
    ticks, names = [], []
    for cell in cells:
        first = place
        for outcome in cell["contenders"]:
            speed = outcome["tokens_per_second"]
            if speed is None:
                axes.text(best * 0.012, place, outcome["status"], va="center", size=7, color=_MUTED, style="italic")
            else:
                axes.barh(place, speed, height=0.86, color=colours[outcome["name"]])
                ratio = outcome["speedup_over_sdpa"]
                ours = outcome["ours"]
                label = _short(speed)
                if ratio is not None and outcome["name"] != BASELINE:
                    label += f"  {ratio:.2f}\u00d7"
                axes.text(
                    speed + best * 0.015,
                    place,
                    label,
                    va="center",
                    size=7.5,
                    color=_INK if ours else _MUTED,
                    weight="bold" if ours else "normal",
                )
            place += 1
        ticks.append((first + place - 1) / 2)
        names.append(f"{cell['lengths']}\n{cell['padded_fraction']:.0%} padding")
        place += 0.9
    axes.set_yticks(ticks, names, size=8, color=_INK)
    # Bars are as high in all panels of a row.
    axes.set_ylim(bars - 0.9 - 0.2, -0.8)
    # Room for the labels.
    axes.set_xlim(0, best * 1.28)
    axes.set_title(shown_name(shape), loc="left", size=10, weight="bold", color=_INK, pad=4)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(_RULE)


def _short(number: float) -> str:
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}"
