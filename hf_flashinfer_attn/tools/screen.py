"""Display of results: blocks of text, and HTML tables in notebooks."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ..tables import html_table

__all__ = ["Block", "Screen"]


class Block(NamedTuple):
    """A title and a table; either may be empty. A first cell that starts with "! " marks a problem."""

    title: str
    rows: Sequence[Sequence[str]]
    header: Sequence[str] = ()


class Screen:
    """Base class of results that are shown as blocks."""

    __slots__ = ()

    def _blocks(self) -> Iterable[Block]:
        """Returns the blocks."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(line for block in self._blocks() for line in _lines(block))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        shown = [block for block in self._blocks() if block.title or block.rows]
        return "".join(html_table(block.header, block.rows, title=block.title.strip()) for block in shown)


def _lines(block: Block) -> Iterator[str]:
    """Yields the title and the rows; long last cells are wrapped."""
    yield from [block.title] * bool(block.title)
    rows = [row for row in (block.header, *block.rows) if row]
    rows = [(first if first.startswith("! ") else f"  {first}", *others) for first, *others in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for *cells, last in rows:
        head = "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths))
        for line in last.splitlines() or [""]:
            # Paths are not broken, so that they can be copied.
            yield from textwrap.wrap(
                line, 100, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False,
                break_on_hyphens=False,
            ) or [head.rstrip()]  # fmt: skip
            head = " " * len(head)
