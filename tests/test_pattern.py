"""Which mask functions are recognised as bands, and that nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    or_masks,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from hf_flashinfer_attn import pattern
from hf_flashinfer_attn.pattern import PatternKind, recognise

MaskFunction = Callable[..., torch.Tensor]
# Around these, every distance is probed; beyond, few.
SIZES = [3, 128, 2043, 2044, 2045, 4096, 262_144, 1_000_000, 2**31 - 1]


def of_transformers(function: MaskFunction) -> MaskFunction:
    """Only closures of transformers' own modules are looked into."""
    function.__module__ = "transformers.masking_utils"
    return function


@pytest.mark.parametrize("size", SIZES)
def test_windows_of_any_size(size: int) -> None:
    causal, _ = recognise(sliding_window_causal_mask_function(size))
    assert (causal.kind, causal.left, causal.right) == (PatternKind.BAND, size - 1, 0)
    both, _ = recognise(sliding_window_bidirectional_mask_function(size))
    assert (both.kind, both.left, both.right) == (PatternKind.BAND, size, size)


BANDS = st.tuples(st.integers(1, 2_000_000), st.integers(1, 2_000_000))


@given(BANDS, st.integers(0, 60))
def test_bounds_may_be_sums_of_numbers(bounds: tuple[int, int], offset: int) -> None:
    left, right = bounds

    def one_closure(row, head, query, key):
        return (key >= query - left) & (key - query < right + offset)

    def ahead(row, head, query, key):
        return key <= query + right

    def behind(row, head, query, key):
        return query - key <= left + right + 3

    found, _ = recognise(of_transformers(one_closure))
    assert (found.kind, found.left, found.right) == (PatternKind.BAND, left, right + offset - 1)
    found, _ = recognise(and_masks(of_transformers(ahead), of_transformers(behind)))
    assert (found.kind, found.left, found.right) == (PatternKind.BAND, left + right + 3, right)


NO_BANDS: dict[str, Callable[[int], MaskFunction]] = {
    "chunks": lambda size: lambda row, head, query, key: key // size == query // size,
    "causal chunks": lambda size: lambda row, head, query, key: (key // size == query // size) & (key <= query),
    "chunks of another size": lambda size: lambda row, head, query, key: key // (size - 1) == query // (size - 1),
    "a prefix that all see": lambda size: lambda row, head, query, key: (key < size) | (key <= query),
    "a prefix that sees all": lambda size: lambda row, head, query, key: (query < size) | (key <= query),
    "sinks": lambda size: lambda row, head, query, key: (key < 4) | ((query - key).abs() < size),
    "dilated": lambda size: lambda row, head, query, key: (query - key) % size == 0,
    "dilated by a literal": lambda size: lambda row, head, query, key: ((query - key) % 48 == 0) & (query < key + size),
    "dilated by a large literal": lambda size: lambda row, head, query, key: (query - key) % 7919 < size % 7,
    "all but itself": lambda size: lambda row, head, query, key: (key != query) & (query - key < size),
    "all but one": lambda size: lambda row, head, query, key: query - key != size,
    "far ones only": lambda size: lambda row, head, query, key: (query - key).abs() >= size,
    "two bands": lambda size: (
        lambda row, head, query, key: ((query - key).abs() < size) | ((query - key - 2 * size).abs() < 2)
    ),
    "an edge between probes": lambda size: lambda row, head, query, key: 3 * (query - key) < size,
    "wider for later queries": lambda size: lambda row, head, query, key: query - key < size + query // size,
    "nothing": lambda size: lambda row, head, query, key: key > query + size,
}


@pytest.mark.parametrize("size", [700, 262_144, 1_000_000])
@pytest.mark.parametrize("name", NO_BANDS)
def test_what_is_no_band_is_dense(name: str, size: int) -> None:
    function = of_transformers(NO_BANDS[name](size))
    found, _ = recognise(function)
    if name == "an edge between probes" and size == 700:
        # Every distance is probed.
        assert (found.kind, found.left, found.right) == (PatternKind.BAND, 233, None)
    else:
        assert found.kind is PatternKind.DENSE
    assert recognise(and_masks(bidirectional_mask_function, function))[0].kind is found.kind


PARTS: dict[str, Callable[[int], MaskFunction]] = {
    **NO_BANDS,
    "causal": lambda size: causal_mask_function,
    "left": lambda size: lambda row, head, query, key: query - key < size,
    "right": lambda size: lambda row, head, query, key: key - query <= size,
    "both": lambda size: sliding_window_bidirectional_mask_function(size),
}
PART = st.tuples(st.sampled_from(list(PARTS)), st.sampled_from([5, 48, 2000, 5003, 262_144, 1_000_000]))


@settings(max_examples=300, derandomize=True)
@given(PART, PART, st.sampled_from([or_masks, and_masks]), st.randoms(use_true_random=False))
def test_a_band_is_a_band_wherever_one_looks(one, other, combine, random) -> None:
    sizes = one[1], other[1]
    function = combine(*(of_transformers(PARTS[name](size)) for name, size in (one, other)))
    found, _ = recognise(function)
    if found.kind is PatternKind.DENSE:
        return
    far = 6 * max(sizes)
    queries = torch.tensor([random.randrange(far) for _ in range(200)])[:, None]
    edges = [bound for bound in (found.left, found.right, *sizes, sum(sizes)) if bound is not None]
    near = [sign * bound + step for bound in edges for sign in (-1, 1) for step in (-1, 0, 1)]
    distances = torch.tensor([*near, *(random.randrange(-far, far) for _ in range(400)), *range(-60, 60)])
    keys = queries + distances
    zero = torch.tensor(0)
    answers = function(zero, zero, queries, keys).broadcast_to(keys.shape)
    expected = torch.ones_like(answers)
    if found.left is not None:
        expected &= distances >= -found.left
    if found.right is not None:
        expected &= distances <= found.right
    wrong = (answers != expected) & (keys >= 0)
    assert not wrong.any(), (found, wrong.nonzero()[0], sizes)


def test_numbers_that_overflow_are_dense() -> None:
    assert recognise(sliding_window_causal_mask_function(2**62))[0].kind is PatternKind.DENSE


def test_defaults_are_unknown() -> None:
    window = 3

    def positional(row, head, query, key, width=window):
        return (query - key).abs() <= width

    def keyword(row, head, query, key, *, width=window):
        return (query - key).abs() <= width

    def closed_over(row, head, query, key):
        return (query - key).abs() <= window

    kinds = [recognise(of_transformers(function))[0].kind for function in (positional, keyword, closed_over)]
    assert kinds == [PatternKind.DENSE, PatternKind.DENSE, PatternKind.BAND]


PROBED: list[int] = []


@pytest.mark.parametrize("size", SIZES)
def test_a_window_is_probed_at_few_positions(size: int) -> None:
    def window(row, head, query, key):
        PROBED.append(key.numel())
        return key > query - size

    PROBED.clear()
    pattern._probe.cache_clear()
    for _ in range(2):
        assert recognise(of_transformers(window))[0].left == size - 1
    assert len(PROBED) == 1
    assert PROBED[0] < (400_000 if size < 2045 else 50_000)
