"""Progress: a bar of tqdm's on a terminal that has it, a line of HTML in a notebook, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from ..notebook import NotebookBar, in_notebook

__all__ = ["Progress"]


class Progress:
    """Tells what a benchmark is at. Text for stdout goes through `print`, so that it never meets the bar.

    Args:
        bar: Whether to draw a bar; by default where stderr is a terminal and tqdm is installed.

    Examples:
        >>> from hf_flashinfer_attn.bench import Progress
        >>> with Progress() as progress:
        ...     progress.print("0.5 s")
        0.5 s
    """

    def __init__(self, bar: bool | None = None) -> None:
        self._start = time.perf_counter()
        self._line = NotebookBar("starting") if bar is None and in_notebook() else None
        self._bar = _make_bar() if bar or (bar is None and sys.stderr.isatty()) else None

    def step(self, text: str) -> None:
        """Shows what comes next."""
        if self._line is not None:
            self._line.update(description=text)
        elif self._bar is None:
            print(f"[{time.perf_counter() - self._start:6.1f} s] {text}", file=sys.stderr, flush=True)
        else:
            self._bar.set_description(text)
            self._bar.update()

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


def _make_bar() -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return None
    # Passes are of very different lengths: time spent says more than a share of them.
    return tqdm(bar_format="{elapsed}  {desc}", leave=False, file=sys.stderr)
