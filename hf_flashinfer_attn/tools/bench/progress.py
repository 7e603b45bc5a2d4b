"""Progress on stderr: one updated line on a terminal or in a notebook, otherwise plain lines."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from typing import Any

from tqdm.auto import tqdm

__all__ = ["Progress"]

SECONDS_BETWEEN_UPDATES, SECONDS_BETWEEN_LINES = 0.5, 10.0


class Progress(AbstractContextManager["Progress"]):
    """Shows the current step on stderr, by default as a bar on terminals and in notebooks; prints results to stdout.

    Examples:
        >>> from hf_flashinfer_attn.tools.bench import Progress
        >>> with Progress() as progress:
        ...     progress.print("0.5 s")
        0.5 s
    """

    def __init__(self, bar: bool | None = None) -> None:
        self._start = self._shown = time.perf_counter()
        self._text = ""
        self._redrawn = (sys.stderr.isatty() or "ipykernel" in sys.modules) if bar is None else bar
        options: dict[str, Any] = {"leave": False, "dynamic_ncols": True, "disable": not self._redrawn}
        self._bar = tqdm(bar_format="{elapsed}  {desc}", **options)

    def step(self, text: str, detail: str = "") -> None:
        """Shows a step and its progress; updates within a step are rate-limited."""
        now = time.perf_counter()
        wait = SECONDS_BETWEEN_UPDATES if self._redrawn else SECONDS_BETWEEN_LINES
        if text == self._text and now - self._shown < wait:
            return
        self._text, self._shown = text, now
        shown = f"{text}, {detail}" if detail else text
        if self._redrawn:
            self._bar.set_description_str(shown)
        else:
            print(f"[{now - self._start:6.1f} s] {shown}", file=sys.stderr, flush=True)

    def print(self, text: str) -> None:
        """Prints a result to stdout; the next step draws the bar again."""
        self._bar.clear()
        print(text, flush=True)

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()

    def __exit__(self, *error: object) -> None:
        self.close()
