"""Tables as plain text, and as HTML for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["html_table", "text_table"]

# Inline, since notebooks drop style sheets; without colours, so that light and dark themes work.
_STYLE = "text-align:left;padding:2px 10px 2px 0;vertical-align:top"


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, width: int | None = None) -> str:
    """Returns a table as text; the longest columns wrap to fit `width`. An empty header is omitted.

    Examples:
        >>> from hf_flashinfer_attn.tables import text_table
        >>> print(text_table(("layer", "kernel"), [("0", "a long name of a kernel")], width=20))
        layer  kernel
        0      a long name
               of a kernel
    """
    # A slow import, needed only for printing.
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, show_header=bool(header), pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    console = Console(
        width=width or 100_000, color_system=None, force_jupyter=False, markup=False, emoji=False, highlight=False
    )
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", note: str = "") -> str:
    """Returns a table as HTML, with a title above and notes below. An empty header is omitted.

    Examples:
        >>> from hf_flashinfer_attn.tables import html_table
        >>> "a &lt; b" in html_table(["what"], [["a < b"]])
        True
    """
    above = f"<div><b>{escape(title)}</b></div>" if title else ""
    head = f"<thead>{_row('th', header)}</thead>" if header else ""
    body = "".join(_row("td", row) for row in rows)
    below = f"<div>{'<br>'.join(map(escape, note.splitlines()))}</div>" if note else ""
    table = f'<table style="border-collapse:collapse">{head}<tbody>{body}</tbody></table>'
    return f"<div>{above}{table}{below}</div>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<{tag} style="{_STYLE}">{escape(cell)}</{tag}>' for cell in cells) + "</tr>"
