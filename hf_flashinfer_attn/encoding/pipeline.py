"""Pipeline: background threads tokenise while the model runs, in bounded memory; results keep their order."""

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

# One thread unpacks token ids while another runs the tokenizers library, which has threads of its own.
THREADS = 3
_WINDOWS_AHEAD = 5
# Texts of the first window, whose lengths are unknown; maximum of a later one.
_FIRST_TEXTS, _MAX_TEXTS = 256, 2_048
# Windows are planned for this share of the token budget, since some have more tokens than expected.
_FILL = 0.9
# Batches launched before the host waits for the first one.
_BATCHES_AHEAD = 2


def run_all(
    engine: Engine, inputs: Iterable[Any], budget: Budget, *, to_host: bool, bar: bool | None
) -> Generator[Output | Array, None, None]:
    """Yields outputs of several texts at a time, in the order of the texts, which are read lazily.

    Args:
        engine: The model.
        inputs: Strings or pairs of strings; a `TypeError` or `ValueError` has the index of one that is neither.
        budget: Size of a batch.
        to_host: Whether to return tensors as arrays, bfloat16 as float32.
        bar: Whether to show a progress bar. Default: as sentence-transformers decides.
    """
    if bar is None:
        bar = logging.getLogger("sentence_transformers").getEffectiveLevel() in (logging.INFO, logging.DEBUG)
    sizes = _WindowSize(budget, engine.batches_per_window)
    under_way: deque[tuple[list[_Copy], Numbers]] = deque()
    # A window of several batches keeps the model busy for longer.
    ahead = _WINDOWS_AHEAD if engine.batches_per_window == 1 else 2
    # The model's own preprocessing may not be made for several threads.
    threads = 1 if engine.fast_tokenizer is None else THREADS
    chunks = _chunks(engine, inputs, sizes)
    windows = _in_background(lambda chunk: prepare(engine, *chunk, budget), chunks, ahead, threads)
    with closing(windows), tqdm(total=count_of(inputs), unit=" texts", disable=not bar) as progress:
        # None: the end.
        for window in chain(windows, (None,)):
            if window is not None:
                sizes.update(window)
                # The caller may have trained the model since the last vectors.
                engine.enter_eval()
                copies = [_Copy(engine.run(batch), to_host=to_host) for batch in window.batches]
                under_way.append((copies, window.order))
            while under_way and (
                window is None or (len(under_way) > 1 and sum(len(copies) for copies, _ in under_way) > _BATCHES_AHEAD)
            ):
                output = _in_order(*under_way.popleft())
                yield output
                progress.update(len(output))


class _WindowSize:
    """Number of texts expected to fill several batches."""

    def __init__(self, budget: Budget, batches: int) -> None:
        self._tokens, self._rows = _FILL * budget.tokens * batches, min(budget.rows * batches, _MAX_TEXTS)
        self.texts = min(_FIRST_TEXTS, self._rows)
        self._per_text: float | None = None

    def update(self, window: Window) -> None:
        """Updates the estimate with the texts of a window."""
        per_text = max(window.tokens / len(window.order), 1)
        # Smoothed, since each new batch size captures a CUDA graph.
        self._per_text = per_text if self._per_text is None else 0.8 * self._per_text + 0.2 * per_text
        self.texts = max(min(int(self._tokens / self._per_text), self._rows), 1)


def count_of(inputs: object) -> int | None:
    """Returns the number of inputs, if it is known."""
    return len(inputs) if isinstance(inputs, Sized) else None


def _chunks(engine: Engine, inputs: Iterable[Any], size: _WindowSize) -> Iterator[tuple[int, list[Text]]]:
    """Yields consecutive texts, with the index of the first one."""
    stream, start = iter(inputs), 0
    while chunk := list(islice(stream, size.texts)):
        yield start, engine.check(chunk, start)
        start += len(chunk)


def prepare(engine: Engine, start: int, texts: list[Text], budget: Budget) -> Window:
    """Prepares a window, in any thread; errors have the index of the text, from `start`."""
    try:
        return engine.prepare(texts, budget)
    except (TypeError, ValueError) as error:
        kind = "pair" if engine.takes_pairs else "text"
        for place, text in enumerate(texts, start):
            try:
                engine.prepare([text], budget)
            except (TypeError, ValueError) as own:
                reason = _reason_of_unicode(text) or str(own)
                raise ValueError(f"{kind} {place} cannot be tokenised: {reason}") from error
        raise


def _reason_of_unicode(text: Text) -> str | None:
    for part in strings_of(text):
        try:
            part.encode()
        except UnicodeEncodeError as error:
            return str(error)
    return None


class _Copy:
    """An output and, for the host (tensors only), its asynchronous copy."""

    def __init__(self, output: Any, *, to_host: bool) -> None:
        self._to_host = to_host and isinstance(output, torch.Tensor)
        if self._to_host and output.dtype is torch.bfloat16:
            # numpy has none.
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
        """Returns the output; the host waits for its copy, the current stream for the output itself."""
        output = self._output
        if self._event is not None and self._to_host:
            self._event.synchronize()
        elif self._event is not None and (current := torch.cuda.current_stream(self._stream.device)) != self._stream:
            current.wait_event(self._event)
            for tensor in [output] if isinstance(output, torch.Tensor) else output:
                tensor.record_stream(current)
        found: Output | Array = output.numpy() if self._to_host else output
        return found


def _in_order(copies: list[_Copy], order: Numbers) -> Output | Array:
    """Returns the rows of a window in the order of its texts."""
    parts, places = [copy.wait() for copy in copies], np.argsort(order)
    if all(isinstance(part, np.ndarray) for part in parts):
        # Not in torch, whose threads would take cores from the tokenizer.
        array: Array = np.concatenate(parts)[places]
        return array
    if all(isinstance(part, torch.Tensor) for part in parts):
        whole = torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
        return whole[torch.from_numpy(places).to(whole.device)]
    rows: list[torch.Tensor] = [row for part in parts for row in part]
    return [rows[place] for place in places.tolist()]


def _in_background(
    function: Callable[[Item], Result], items: Iterator[Item], ahead: int, count: int
) -> Generator[Result, None, None]:
    """Maps a function over items in threads, in order, `ahead` items ahead. A single item runs in this thread."""
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
