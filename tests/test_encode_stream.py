"""`encode_iter`, errors in the middle of a stream, and threads."""

from __future__ import annotations

import copy
import functools
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import tqdm
from encode_models import TEXTS, WIDTH, assert_same, both, encoder, of_kind, tiny

from hf_flashinfer_attn import encode, encode_iter

KINDS = ("unpadded", "sdpa")
# Some thousand texts may be read before the first vector is returned.
MOST_AHEAD = 10_000


@functools.cache
def many_texts() -> tuple[list[str], Any]:
    texts = [" ".join(["word"] * (index * 7 % 13)) + f" {index}" for index in range(1200)]
    return texts, tiny("sdpa").encode(texts)


class Stream:
    """Yields a text for each index below `count`, and counts how many were read."""

    def __init__(self, count: int, text: str = "text {}") -> None:
        self.count, self.text, self.read = count, text, 0

    def __iter__(self) -> Iterator[str]:
        for index in range(self.count):
            self.read += 1
            yield self.text.format(index)


def threads() -> set[threading.Thread]:
    """All threads but the one that a progress bar starts for all others, say of a model that is loaded."""
    return {thread for thread in threading.enumerate() if not isinstance(thread, tqdm.TMonitor)}


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    before = threads()
    yield
    assert threads() <= before


def all_of(model: Any, texts: Any) -> Any:
    return list(encode_iter(model, texts))


FUNCTIONS = (encode, all_of)


# Vectors.


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_come_in_order(kind: str) -> None:
    texts, expected = many_texts()
    model = of_kind(kind, tiny)
    assert_same(np.stack(list(encode_iter(model, iter(texts)))), expected)
    vectors = list(encode_iter(model, texts, batch_size=50, convert_to_tensor=True))
    assert_same(torch.stack(vectors), torch.from_numpy(expected))
    assert list(encode_iter(model, [])) == []


def test_streams_of_one_model_side_by_side() -> None:
    texts, expected = many_texts()
    model = of_kind("unpadded", tiny)

    def stream() -> Iterator[str]:
        for text in texts:
            if len(text) % 7 == 0:
                encode(model, [text, "another"])
            yield text

    both = list(zip(encode_iter(model, stream(), batch_size=50), encode_iter(model, texts[::-1], batch_size=30)))
    assert_same(np.stack([vector for vector, _ in both]), expected)
    assert_same(np.stack([vector for _, vector in both]), expected[::-1].copy())


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_encode_iter(kind: str) -> None:
    model, reference = both(kind)
    for options in (
        {"prompt": "a few words: "}, {"normalize_embeddings": True}, {"truncate_dim": 7},
        {"truncate_dim": 7, "normalize_embeddings": True},
        {"processing_kwargs": {"text": {"max_length": 9, "truncation": True}}},
    ):  # fmt: skip
        vectors = list(encode_iter(model, iter(TEXTS), **options))
        assert all(vector.shape == (options.get("truncate_dim", WIDTH),) for vector in vectors)
        assert_same(np.stack(vectors), reference.encode(TEXTS, **options))
    vectors = list(encode_iter(model, TEXTS, task="query"))
    assert_same(np.stack(vectors), reference.encode_query(TEXTS))


@pytest.mark.parametrize("kind", ["unpadded", "sdpa"])
@pytest.mark.parametrize("text", ["a", "some words of a longer text, " * 7])
def test_input_is_read_as_vectors_are_taken(text: str, kind: str) -> None:
    stream = Stream(25_000, text)
    with closing(encode_iter(of_kind(kind, tiny), stream)) as vectors:
        assert stream.read == 0
        for taken in range(2_000):
            next(vectors)
            assert stream.read - taken <= MOST_AHEAD


def test_a_small_batch_is_read_ahead_by_little() -> None:
    stream = Stream(5_000)
    with closing(encode_iter(of_kind("unpadded", tiny), stream, batch_size=8)) as vectors:
        for taken in range(1_000):
            next(vectors)
            assert stream.read - taken <= 100


def test_memory_does_not_grow() -> None:
    count, size = 40_000, 3_000
    model = encoder("bert", "flashinfer")
    model.max_seq_length = 4
    process, used = psutil.Process(), []
    # The tokenizer drops these characters first of all.
    texts = (f"{index}" + "\0" * size for index in range(count))
    for index, vector in enumerate(encode_iter(model, texts, batch_size=64)):
        assert vector.shape == (WIDTH,)
        if index % 100 == 0:
            used.append(process.memory_info().rss)
    third = len(used) // 3
    growth = np.median(used[-third:]) - np.median(used[:third])
    # Less than what the vectors of that many texts take, not to speak of the texts.
    assert growth < count * 2 / 3 * WIDTH * 4 / 2


def test_kept_vectors_do_not_keep_others() -> None:
    vector = next(iter(encode_iter(of_kind("unpadded", tiny), many_texts()[0])))
    owner = vector if vector.base is None else vector.base
    assert owner.nbytes == vector.nbytes


# Errors.


BAD_TEXTS: list[Any] = [None, 5, b"bytes", {"text": "a"}, ("a", "b"), [{"role": "user", "content": "a"}], np.zeros(3)]


@pytest.mark.parametrize("bad", BAD_TEXTS, ids=lambda bad: type(bad).__name__)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_text_that_is_no_string(function: Callable[..., Any], bad: Any) -> None:
    for kind in KINDS:
        for place in (0, 2):
            with pytest.raises(TypeError, match=rf"text {place} is a {type(bad).__name__}"):
                function(of_kind(kind, tiny), [*["a", "b"][:place], bad, "c"])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_bad_text_after_thousands(function: Callable[..., Any]) -> None:
    model = of_kind("unpadded", tiny)

    many = ["a"] * 3_000
    with pytest.raises(TypeError, match="text 3000 is a NoneType; expected a string"):
        function(model, iter([*many, None, *many[:100]]))
    with pytest.raises(ValueError, match=r"text 3000 cannot be tokenised.*surrogates not allowed"):
        function(model, iter([*many, "lone \ud800", *many[:100]]))


@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogates(kind: str) -> None:
    texts, model = list(Stream(2_500)), of_kind(kind, tiny)
    for place in (0, 300, 2_499):
        with pytest.raises(ValueError, match=rf"text {place} cannot be tokenised"):
            encode(model, [*texts[:place], "a\udfff", *texts[place + 1 :]])
    for inputs in (["\ud800"], "\ud800"):
        with pytest.raises(ValueError, match="text 0 cannot be tokenised"):
            encode(model, inputs)


@pytest.mark.parametrize("bad", [b"bytes", bytearray(b"bytes"), {"text": "a"}, [{"role": "user", "content": "a"}]])
def test_other_inputs_are_refused(bad: Any) -> None:
    for function in (encode, encode_iter):
        with pytest.raises(TypeError, match=r"bytes|dict|is a int"):
            list(function(tiny("sdpa"), bad))
    with pytest.raises(TypeError, match="inputs is a string"):
        encode_iter(tiny("sdpa"), "a text")


class OwnError(Exception):
    """Of a user's generator."""


@pytest.mark.parametrize("error", [OwnError("mine"), ValueError("mine"), TypeError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("count", [0, 1, 300, 4_000])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_error_of_the_generator_is_the_callers(function: Callable[..., Any], count: int, error: Any) -> None:
    def stream() -> Iterator[str]:
        yield from Stream(count)
        raise error

    with pytest.raises(type(error)) as raised:
        function(of_kind("unpadded", tiny), stream())
    assert raised.value is error
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OwnError("mine")])
def test_an_error_in_the_model_stops_the_threads(error: Any, kind: str) -> None:
    model, forwards = of_kind(kind, functools.partial(encoder, "bert")), 0

    def interrupt(*args: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 3:
            raise error

    model[1].register_forward_hook(interrupt)
    before = threads()
    for function in FUNCTIONS:
        forwards, stream = 0, Stream(100_000)
        with pytest.raises(type(error)) as raised:
            function(model, stream)
        assert raised.value is error
        assert threads() <= before
        assert stream.read < 100_000


@pytest.mark.parametrize("taken", [0, 1, 500])
@pytest.mark.parametrize("how", ["close", "collected"])
def test_a_stream_that_is_left_closes_everything(how: str, taken: int) -> None:
    vectors = encode_iter(of_kind("unpadded", tiny), Stream(100_000))
    before = threads()
    for _ in range(taken):
        next(vectors)
    if how == "close":
        vectors.close()
        with pytest.raises(StopIteration):
            next(vectors)
    else:
        del vectors
        gc.collect()
    assert threads() <= before


# Threads.


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """Runs functions at the same time, and raises what one of them raises."""
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


@pytest.mark.parametrize("kind", ["unpadded", "flashinfer", "sdpa"])
@pytest.mark.parametrize("is_one_model", [True, False])
def test_two_threads_at_once(is_one_model: bool, kind: str) -> None:
    texts, expected = many_texts()
    texts, expected = texts[:200], expected[:200]
    make = functools.partial(encoder, "bert")
    model = of_kind(kind, make)
    other = model if is_one_model else of_kind(kind, make)
    for _ in range(2):
        ours, reversed_ones = in_threads(
            lambda: encode(model, texts, batch_size=30), lambda: encode(other, texts[::-1], prompt="", batch_size=30)
        )
        assert_same(ours, expected)
        assert_same(reversed_ones[::-1].copy(), expected)


def test_the_tokenizer_is_used_in_another_thread() -> None:
    texts, expected = many_texts()
    model, is_done = of_kind("unpadded", functools.partial(encoder, "bert")), threading.Event()

    # Tells whether texts can be tokenised without the model's own method, which changes the tokenizer.
    encode(model, texts[:2])

    def tokenise() -> int:
        count = 0
        while not is_done.is_set():
            count += 1
            length = 3 + count % 5
            batch = model.tokenizer(texts[:9], truncation=True, max_length=length, padding="max_length")
            assert all(len(ids) == length for ids in batch["input_ids"])
        return count

    def embed() -> list[Any]:
        try:
            return [encode(model, texts), encode(model, texts[:1]), encode(model, texts[0])]
        finally:
            is_done.set()

    count, (many, one, single) = in_threads(tokenise, embed)
    assert count > 1
    assert_same(many, expected)
    assert_same(one, expected[:1])
    assert_same(single, expected[0])


@pytest.fixture
def _switches_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_switches_often")
def test_first_calls_at_once_unpad_once() -> None:
    fresh, expected = encoder("bert", "flashinfer"), tiny("sdpa").encode(TEXTS[:2])
    for _ in range(20):
        model = copy.deepcopy(fresh)
        for vectors in in_threads(*[functools.partial(encode, model, TEXTS[:2])] * 4):
            assert_same(vectors, expected)
        assert {len(module._forward_pre_hooks) for module in model.modules()} == {0, 1}
