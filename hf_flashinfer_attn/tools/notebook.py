"""Progress in a notebook: one line of HTML, written over as work goes on.

It needs no widgets, so that nothing warns where ipywidgets is missing, and what stays in a saved notebook is text.
"""

from __future__ import annotations

import html
import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

__all__ = ["NotebookBar", "in_notebook", "track"]

_Item = TypeVar("_Item")
# A frontend redraws for every message, and hundreds a second make it stumble.
SECONDS_BETWEEN_UPDATES = 0.1
_BAR = '<progress max="{total}" value="{done}" style="width: 16em; vertical-align: middle"></progress>'


def in_notebook() -> bool:
    """Tells whether this code runs in a Jupyter kernel, where outputs are HTML.

    Examples:
        >>> from hf_flashinfer_attn.tools.notebook import in_notebook
        >>> in_notebook()
        False
    """
    # A kernel has imported IPython long before; a program that has not is no notebook.
    ipython = sys.modules.get("IPython")
    shell = getattr(ipython, "get_ipython", lambda: None)()
    # A terminal's IPython has a shell too, without a kernel behind it.
    return hasattr(shell, "kernel")


class NotebookBar:
    """A progress bar in the output of a notebook's cell.

    Args:
        description: What is being done.
        total: Steps there will be; None where nobody knows, and then there is text without a bar.
    """

    def __init__(self, description: str, total: int | None = None) -> None:
        self._description = description
        self._total = total
        self._done = 0
        self._start = self._shown = time.perf_counter()
        self._display: Any = importlib.import_module("IPython.display").display
        self._handle: Any = self._display(self._bundle(), raw=True, display_id=True)

    def update(self, steps: int = 1, description: str | None = None) -> None:
        """Counts steps that were done, and says what comes next."""
        self._done += steps
        now = time.perf_counter()
        if description is not None:
            self._description = description
        if description is not None or now - self._shown >= SECONDS_BETWEEN_UPDATES:
            self._shown = now
            self._handle.update(self._bundle(), raw=True)

    def close(self, text: str | None = None) -> None:
        """Leaves a line of text where the bar was.

        Args:
            text: Instead of the description, before the time that it took.
        """
        line = f"{self._description if text is None else text}: {time.perf_counter() - self._start:.1f} s"
        self._handle.update({"text/plain": line, "text/html": f"<small>{html.escape(line)}</small>"}, raw=True)

    def _bundle(self) -> dict[str, str]:
        counted = "" if self._total is None else f", {self._done} of {self._total}"
        line = f"{self._description}{counted}, {time.perf_counter() - self._start:.1f} s"
        bar = "" if self._total is None else _BAR.format(total=self._total, done=self._done) + " "
        return {"text/plain": line, "text/html": f"{bar}<small>{html.escape(line)}</small>"}


def track(items: Sequence[_Item], description: str) -> Iterator[_Item]:
    """Yields items under a [`NotebookBar`]."""
    bar = NotebookBar(description, len(items))
    for item in items:
        yield item
        bar.update()
    bar.close(f"{description}, {len(items)} of {len(items)}")
