"""Pipeline: background threads tokenise while the model runs. Memory is bounded; results keep their order."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm

from .engines import Engine, Output, Window
from .tokens import Budget, Numbers, Text, strings_of

__all__ = ["THREADS", "Array", "count_of", "prepare", "run_all"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Item = TypeVar("Item")
Result = TypeVar("Result")

# One thread reads token ids while another runs the tokenizers library, which has its own thread pool.
THREADS = 3
_WINDOWS_AHEAD = 5
# Number of texts in the first window, when lengths are unknown, and maximum for later windows.
_FIRST_TEXTS, _MAX_TEXTS = 256, 2_048
# Target fill of the token budget; a margin for windows with more tokens than expected.
_FILL = 0.9
# Number of batches launched before the host waits for the first one.
_BATCHES_AHEAD = 2


def run_all(
    engine: Engine, inputs: Iterable[Any], budget: Budget, *, to_host: bool, bar: bool | None
) -> Generator[Output | Array, None, None]:
    """Yields the outputs of one window after the other, in the order of the texts; reads inputs lazily.

    `to_host`: whether to yield arrays instead of tensors, bfloat16 as float32. `bar`: whether to show a progress bar;
    None: if the logger of sentence-transformers shows INFO.
    """
    if bar is None:
        bar = logging.getLogger("sentence_transformers").getEffectiveLevel() in (logging.INFO, logging.DEBUG)
    sizes = _WindowSize(budget, engine.batches_per_window)
    running: deque[tuple[list[_Copy], Numbers]] = deque()
    # Windows of several batches take longer to run, so fewer are needed ahead.
    ahead = _WINDOWS_AHEAD if engine.batches_per_window == 1 else 2
    # The model's own preprocessing may not be thread-safe.
    threads = 1 if engine.fast_tokenizer is None else THREADS
    chunks = _chunks(engine, inputs, sizes)
    windows = _in_background(lambda chunk: prepare(engine, *chunk, budget), chunks, ahead, threads)
    with closing(windows), tqdm(total=count_of(inputs), unit=" texts", disable=not bar) as progress:
        # None marks the end.
        for window in chain(windows, (None,)):
            if window is not None:
                sizes.update(window)
                # The caller may have trained the model since the last window.
                engine.enter_eval()
                copies = [_Copy(engine.run(batch), to_host=to_host) for batch in window.batches]
                running.append((copies, window.order))
            while running and (
                window is None or (len(running) > 1 and sum(len(copies) for copies, _ in running) > _BATCHES_AHEAD)
            ):
                output = _in_order(*running.popleft())
                yield output
                progress.update(len(output))


class _WindowSize:
    """Estimate of the number of texts that fill a window."""

    def __init__(self, budget: Budget, batches: int) -> None:
        self._tokens, self._rows = _FILL * budget.tokens * batches, min(budget.rows * batches, _MAX_TEXTS)
        self.texts = min(_FIRST_TEXTS, self._rows)
        self._per_text: float | None = None

    def update(self, window: Window) -> None:
        """Updates the estimate from a tokenised window."""
        per_text = max(window.tokens / len(window.order), 1)
        # Smoothed, since each new batch size captures a CUDA graph.
        self._per_text = per_text if self._per_text is None else 0.8 * self._per_text + 0.2 * per_text
        self.texts = max(min(int(self._tokens / self._per_text), self._rows), 1)


def count_of(inputs: object) -> int | None:
    """Returns the number of inputs; None for a stream."""
    return len(inputs) if isinstance(inputs, Sized) else None


def _chunks(engine: Engine, inputs: Iterable[Any], size: _WindowSize) -> Iterator[tuple[int, list[Text]]]:
    """Yields lists of consecutive texts, with the index of the first text."""
    stream, start = iter(inputs), 0
    while chunk := list(islice(stream, size.texts)):
        yield start, engine.check(chunk, start)
        start += len(chunk)


def prepare(engine: Engine, start: int, texts: list[Text], budget: Budget) -> Window:
    """Prepares a window; thread-safe. The index in an error counts from `start`."""
    try:
        return engine.prepare(texts, budget)
    except (TypeError, ValueError) as error:
        kind = "pair" if engine.takes_pairs else "text"
        for index, text in enumerate(texts, start):
            try:
                engine.prepare([text], budget)
            except (TypeError, ValueError) as own:
                reason = _reason_of_unicode(text) or str(own)
                raise ValueError(f"{kind} {index} cannot be tokenised: {reason}") from error
        raise


def _reason_of_unicode(text: Text) -> str | None:
    for part in strings_of(text):
        try:
            part.encode()
        except UnicodeEncodeError as error:
            return str(error)
    return None


class _Copy:
    """An output, or its asynchronous copy to the host (tensors only)."""

    def __init__(self, output: Any, *, to_host: bool) -> None:
        self._to_host = to_host and isinstance(output, torch.Tensor)
        if self._to_host and output.dtype is torch.bfloat16:
            # numpy has no bfloat16.
            output = output.float()
        self._output, self._event = output, None
        first = output if isinstance(output, torch.Tensor) else next(iter(output), None)
        if first is None or not first.is_cuda:
            return
        if self._to_host:
            self._output = torch.empty_like(output, device="cpu", pin_memory=True).copy_(output, non_blocking=True)
        self._stream = torch.cuda.current_stream(first.device)
        self._event = self._stream.record_event()

    def wait(self) -> Output | Array:
        """Returns the output: the host waits for a copy, the current stream for a tensor."""
        output = self._output
        if self._event is not None and self._to_host:
            self._event.synchronize()
        elif self._event is not None and (current := torch.cuda.current_stream(self._stream.device)) != self._stream:
            current.wait_event(self._event)
            for tensor in [output] if isinstance(output, torch.Tensor) else output:
                tensor.record_stream(current)
        result: Output | Array = output.numpy() if self._to_host else output
        return result


def _in_order(copies: list[_Copy], order: Numbers) -> Output | Array:
    """Returns the rows of a window in the order of its texts."""
    parts, positions = [copy.wait() for copy in copies], np.argsort(order)
    if all(isinstance(part, np.ndarray) for part in parts):
        # Not in torch, whose threads would compete with the tokenizer.
        array: Array = np.concatenate(parts)[positions]
        return array
    if all(isinstance(part, torch.Tensor) for part in parts):
        whole = torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
        return whole[torch.from_numpy(positions).to(whole.device)]
    rows: list[torch.Tensor] = [row for part in parts for row in part]
    return [rows[position] for position in positions.tolist()]


def _in_background(
    function: Callable[[Item], Result], items: Iterator[Item], ahead: int, count: int
) -> Generator[Result, None, None]:
    """Maps a function over items in background threads, `ahead` items ahead, in order; a single item runs inline."""
    first = list(islice(items, 2))
    if len(first) < 2:
        yield from map(function, first)
        return
    remaining = chain(first, items)
    threads = ThreadPoolExecutor(count, thread_name_prefix="hf_flashinfer_attn-tokenise")
    try:
        pending = deque(threads.submit(function, item) for item in islice(remaining, min(count, ahead)))
        while pending:
            result = pending.popleft().result()
            pending.extend(threads.submit(function, item) for item in islice(remaining, ahead - len(pending)))
            yield result
    finally:
        threads.shutdown(cancel_futures=True)
