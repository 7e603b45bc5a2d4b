"""Small HTML tables for notebooks; every value is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["html_table"]

# Inline, as notebooks drop style sheets; colours are the notebook's own, light or dark.
_CELL = "text-align:left;padding:2px 10px 2px 0;vertical-align:top"


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", note: str = "") -> str:
    """Returns a table.

    Args:
        header: Names of the columns; none for a table without a head.
        rows: Cells, as many in each row as there are columns.
        title: A line above it.
        note: Lines below it.

    Examples:
        >>> from hf_flashinfer_attn.html_table import html_table
        >>> "a &lt; b" in html_table(["what"], [["a < b"]])
        True
    """
    parts = ["<div>"]
    if title:
        parts.append(f"<div><b>{escape(title)}</b></div>")
    parts.append('<table style="border-collapse:collapse">')
    if header:
        parts.append(f"<thead>{_row('th', header)}</thead>")
    parts += ["<tbody>", *(_row("td", row) for row in rows), "</tbody></table>"]
    if note:
        parts.append(f"<div>{'<br>'.join(map(escape, note.splitlines()))}</div>")
    return "".join([*parts, "</div>"])


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<{tag} style="{_CELL}">{escape(cell)}</{tag}>' for cell in cells) + "</tr>"
