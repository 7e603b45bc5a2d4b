"""Tokenising in background threads while the model runs, in bounded memory, with results in order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from .engines import Engine, Features, Output
from .tokens import Text, Tokens

__all__ = ["Array", "Budget", "run_all"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Item = TypeVar("Item")
Result = TypeVar("Result")

# One thread unpacks token ids while the other is in the tokenizers library, which has threads of its own.
THREADS = 2
_CHUNKS_AHEAD = 4
_FIRST_TEXTS, _MAX_TEXTS = 256, 1_024
# Batches launched before the host waits for the first of them.
_BATCHES_AHEAD = 2
# Batches over which padded texts are sorted by length.
_BATCHES_IN_WINDOW = 8
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Budget:
    """Size of a batch.

    Args:
        tokens: Most tokens; a text that has more is a batch of its own.
        rows: Most texts.
    """

    tokens: int
    rows: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch of some texts of a window, which are in order again when the window is complete.

    Args:
        inputs: What the engine runs.
        order: Of a window's last batch: places in the window of all its texts, as they were run; None for the others.
    """

    inputs: Tokens | Features
    order: Array | None


def run_all(engine: Engine, inputs: Iterable[Any], budget: Budget, *, to_host: bool) -> Iterator[Output | Array]:
    """Runs texts through an engine.

    Args:
        engine: The model.
        inputs: Strings or pairs of strings; consumed as outputs are.
        budget: Size of a batch.
        to_host: Whether to return outputs of one tensor as arrays; float32 for bfloat16.

    Yields:
        Outputs of some texts at a time, in the order of the texts.

    Raises:
        TypeError: If an input is neither a string nor, for a model that takes them, a pair of strings.
        ValueError: If a text cannot be tokenised.
    """
    batches = (
        _token_batches(engine, inputs, budget) if engine.makes_tokens else _feature_batches(engine, inputs, budget)
    )
    window: list[Output | Array] = []
    with closing(batches):
        for output, order in _run(engine, batches, to_host=to_host):
            window.append(output)
            if order is not None:
                yield _in_order(window, order)
                window = []


def _run(engine: Engine, batches: Iterable[_Batch], *, to_host: bool) -> Iterator[tuple[Output | Array, Array | None]]:
    """Runs batches, some of which are under way on the GPU at any time."""
    under_way: deque[tuple[_Copy, Array | None]] = deque()
    for batch in batches:
        under_way.append((_Copy(engine.run(batch.inputs), to_host=to_host), batch.order))
        if len(under_way) > _BATCHES_AHEAD:
            copy, order = under_way.popleft()
            yield copy.wait(), order
    for copy, order in under_way:
        yield copy.wait(), order


class _Copy:
    """An output, and its copy to the host, which may be under way.

    Args:
        output: What to copy.
        to_host: Whether to copy it at all.
    """

    def __init__(self, output: Output, *, to_host: bool) -> None:
        self._output, self._to_host = output, to_host
        self._event: torch.cuda.Event | None = None
        if not to_host or not isinstance(output, torch.Tensor):
            return
        # There are no arrays of bfloat16.
        self._output = output = output.float() if output.dtype is torch.bfloat16 else output
        if output.is_cuda:
            self._output = torch.empty_like(output, device="cpu", pin_memory=True)
            self._output.copy_(output, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(output.device))

    def wait(self) -> Output | Array:
        """Waits until the output is where it is to be, and returns it."""
        if self._event is not None:
            self._event.synchronize()
        return self._output.numpy() if self._to_host and isinstance(self._output, torch.Tensor) else self._output


def _in_order(window: list[Output | Array], order: Array) -> Output | Array:
    places = np.argsort(order)
    if all(isinstance(part, np.ndarray) for part in window):
        # Not in torch, whose threads would wake up and take the processors from the tokenizer's.
        array: Array = np.concatenate(window)[places]
        return array
    if all(isinstance(part, torch.Tensor) for part in window):
        whole = torch.cat([part for part in window if isinstance(part, torch.Tensor)])
        return whole[torch.from_numpy(places).to(whole.device, non_blocking=True)]
    rows: list[torch.Tensor] = [row for part in window for row in part]
    return [rows[place] for place in places.tolist()]


def _token_batches(engine: Engine, inputs: Iterable[Any], budget: Budget) -> Generator[_Batch, None, None]:
    """Cuts texts into batches of tokens, longest first within a batch, or within several if they are to be padded."""
    batches_in_window = 1 if engine.packs else _BATCHES_IN_WINDOW
    window_tokens, window_rows = budget.tokens * batches_in_window, budget.rows * batches_in_window

    def prepare(chunk: _Chunk) -> Tokens:
        tokens = _prepare(engine, chunk.texts, lambda place: chunk.start + place)
        assert isinstance(tokens, Tokens)
        return tokens

    left: list[Tokens] = []
    with closing(_in_background(prepare, _chunks(engine, inputs))) as chunks:
        for tokens in chunks:
            left.append(tokens)
            if sum(len(part.ids) for part in left) < window_tokens and sum(map(len, left)) < window_rows:
                continue
            windows, rest = Tokens.join(left).split(window_tokens, window_rows)
            left = [] if rest is None else [rest]
            for window in windows:
                yield from _batches_of(engine, window, budget)
        if left:
            yield from _batches_of(engine, Tokens.join(left), budget)


def _batches_of(engine: Engine, window: Tokens, budget: Budget) -> Iterator[_Batch]:
    order = np.argsort(-window.lengths, kind="stable")
    window = window.take(order)
    batches, rest = window.split(budget.tokens, budget.rows)
    batches += [] if rest is None else [rest]
    for batch in batches:
        yield _Batch(batch, order if batch is batches[-1] else None)


def _feature_batches(engine: Engine, inputs: Iterable[Any], budget: Budget) -> Generator[_Batch, None, None]:
    """Has the model prepare batches itself, of texts sorted by their characters within a window."""

    def groups() -> Iterator[tuple[_Chunk, Array, int, int]]:
        for window in _chunks(engine, inputs):
            sizes = np.array([_characters(text) for text in window.texts])
            order = np.argsort(-sizes, kind="stable")
            start = 0
            while start < len(order):
                tokens = max(int(sizes[order[start]]) // _CHARACTERS_PER_TOKEN, 1)
                stop = min(start + max(1, min(budget.rows, budget.tokens // tokens)), len(order))
                yield _Chunk(window.start, [window.texts[place] for place in order[start:stop]]), order, start, stop
                start = stop

    def prepare(group: tuple[_Chunk, Array, int, int]) -> _Batch:
        chunk, order, start, stop = group
        features = _prepare(engine, chunk.texts, lambda place: chunk.start + int(order[start + place]))
        return _Batch(features, order if stop == len(order) else None)

    with closing(_in_background(prepare, groups())) as batches:
        yield from batches


def _prepare(engine: Engine, texts: list[Text], index_of: Callable[[int], int]) -> Tokens | Features:
    """Tokenises texts in a background thread; an error names the text by its index."""
    try:
        return engine.prepare(texts)
    except (TypeError, ValueError) as error:
        for place, text in enumerate(texts):
            try:
                engine.prepare([text])
            except (TypeError, ValueError) as own:
                raise ValueError(f"text {index_of(place)} cannot be tokenised: {_reason(text, own)}") from error
        raise


def _reason(text: Text, error: Exception) -> str:
    try:
        "".join(text).encode()
    except UnicodeEncodeError as unicode_error:
        return str(unicode_error)
    return str(error)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Texts that follow each other.

    Args:
        start: Index of the first text, or of the first text of its window.
        texts: The texts.
    """

    start: int
    texts: list[Text]


def _chunks(engine: Engine, inputs: Iterable[Any]) -> Iterator[_Chunk]:
    """Cuts texts into chunks, small at first, so that the model starts early."""
    stream = iter(inputs)
    start, size = 0, _FIRST_TEXTS
    while chunk := list(itertools.islice(stream, size)):
        yield _Chunk(start, engine.check(chunk, start))
        start += len(chunk)
        size = min(2 * size, _MAX_TEXTS)


def _characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text))


def _in_background(function: Callable[[Item], Result], items: Iterator[Item]) -> Generator[Result, None, None]:
    """Maps a function over items, in order and in threads; a single item stays in this thread."""
    first = list(itertools.islice(items, 2))
    if len(first) < 2:
        yield from map(function, first)
        return
    remaining = itertools.chain(first, items)
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="hf_flashinfer_attn-tokenise")
    try:
        pending = deque(threads.submit(function, item) for item in itertools.islice(remaining, _CHUNKS_AHEAD))
        while pending:
            result = pending.popleft().result()
            pending.extend(threads.submit(function, item) for item in itertools.islice(remaining, 1))
            yield result
    finally:
        threads.shutdown(cancel_futures=True)
