"""Progress: one updated line on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from ..notebook import NotebookBar, in_notebook

__all__ = ["Progress"]

SECONDS_BETWEEN_UPDATES = 0.5
SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Tells what a benchmark is at. Text for stdout goes through `print`, so that it never meets the bar.

    Args:
        bar: Whether to update a single line of stderr; by default if stderr is a terminal.

    Examples:
        >>> from hf_flashinfer_attn.tools.bench import Progress
        >>> with Progress() as progress:
        ...     progress.print("0.5 s")
        0.5 s
    """

    def __init__(self, bar: bool | None = None) -> None:
        self._start = time.perf_counter()
        self._line = NotebookBar("starting") if bar is None and in_notebook() else None
        self._bar: tqdm[Any] | None = None
        if bar or (bar is None and self._line is None and sys.stderr.isatty()):
            self._bar = tqdm(bar_format="{elapsed}  {desc}", leave=False, file=sys.stderr, dynamic_ncols=True)
        self._text, self._shown = "", self._start

    def step(self, text: str, detail: str = "") -> None:
        """Shows a step and its progress; updates within a step are rate-limited."""
        now = time.perf_counter()
        redrawn = self._line is not None or self._bar is not None
        if text == self._text and now - self._shown < (SECONDS_BETWEEN_UPDATES if redrawn else SECONDS_BETWEEN_LINES):
            return
        self._text, self._shown = text, now
        shown = f"{text}, {detail}" if detail else text
        if self._line is not None:
            self._line.update(description=shown)
        elif self._bar is not None:
            self._bar.set_description_str(shown)
        else:
            print(f"[{now - self._start:6.1f} s] {shown}", file=sys.stderr, flush=True)

    def print(self, text: str) -> None:
        """Prints a result to stdout."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)

    def close(self) -> None:
        """Removes the bar; in a notebook the time that it all took stays."""
        if self._line is not None:
            self._line.close("time taken")
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
