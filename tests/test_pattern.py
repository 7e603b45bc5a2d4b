"""Which mask functions are recognised as bands, and that nothing else is."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    or_masks,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from hf_flashinfer_attn.ragged.band import PatternKind, recognise
from hf_flashinfer_attn.ragged.lazy_mask import lazy_mask

MaskFunction = Callable[..., torch.Tensor]
SIZES = [3, 128, 2043, 262_144, 2**31 - 1]
_WINDOW = 3
_IDS = torch.arange(9)
_COUNTED = torch.tensor([[0, 1, 2, 0, 1, 2]])


@pytest.mark.parametrize("size", SIZES)
def test_windows_of_any_size(size: int) -> None:
    causal, *_ = recognise(sliding_window_causal_mask_function(size))
    assert (causal.kind, causal.left, causal.right) == (PatternKind.BAND, size - 1, 0)
    both, *_ = recognise(sliding_window_bidirectional_mask_function(size))
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

    found, *_ = recognise(one_closure)
    assert (found.kind, found.left, found.right) == (PatternKind.BAND, left, right + offset - 1)
    found, *_ = recognise(and_masks(ahead, behind))
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
    "a multiple of a distance": lambda size: lambda row, head, query, key: 3 * (query - key) < size,
    "wider for later queries": lambda size: lambda row, head, query, key: query - key < size + query // size,
    "nothing": lambda size: lambda row, head, query, key: key > query + size,
}


@pytest.mark.parametrize("size", [700, 262_144, 1_000_000])
@pytest.mark.parametrize("name", NO_BANDS)
def test_what_is_no_band_is_dense(name: str, size: int) -> None:
    function = NO_BANDS[name](size)
    assert recognise(function)[0].kind is PatternKind.DENSE
    assert recognise(and_masks(bidirectional_mask_function, function))[0].kind is PatternKind.DENSE


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
    function = combine(*(PARTS[name](size) for name, size in (one, other)))
    found, *_ = recognise(function)
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


def test_numbers_may_come_from_anywhere() -> None:
    window = 3

    def positional(row, head, query, key, width=window):
        return (query - key).abs() <= width

    def keyword(row, head, query, key, *, width=window):
        return abs(query - key) <= width

    def closed_over(row, head, query, key):
        return abs(key - query) < window + 1

    def of_module(row, head, query, key):
        return (query - key <= _WINDOW) & (query - key >= -_WINDOW) & (-(query - key) < _WINDOW + 1)

    for function in (positional, keyword, closed_over, of_module):
        found, *_ = recognise(function)
        assert (found.kind, found.left, found.right) == (PatternKind.BAND, 3, 3)


def test_a_number_of_a_module_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def window(row, head, query, key):
        return abs(query - key) <= _WINDOW

    window.__module__ = "transformers.models.mine.modeling_mine"
    assert recognise(window)[0].left == 3
    monkeypatch.setitem(globals(), "_WINDOW", 5)
    assert recognise(window)[0].left == 5


def looks_for_a_tensor(row, head, query, key):
    return query % 2 == 0 if isinstance(query, torch.Tensor) else key <= query


def looks_for_an_attribute(row, head, query, key):
    return query % 2 == 0 if hasattr(query, "shape") else key <= query


UNKNOWN: list[MaskFunction] = [
    looks_for_a_tensor,
    looks_for_an_attribute,
    lambda row, head, query, key: _IDS[query] == _IDS[key],
    lambda row, head, query, key: _IDS.numpy()[query] <= 3,
    lambda row, head, query, key: [True, False][query],
    lambda row, head, query, key: {0: True}[query],
    lambda row, head, query, key: torch.where(abs(query - key) <= _WINDOW, True, False),
    lambda row, head, query, key: (key <= query) & (_IDS[1:4] > 0),
    lambda row, head, query, key: (key <= query) | (key >= query + 3),
    lambda row, head, query, key: key < query,
    # Empty only where both distances are counted alike.
    lambda row, head, query, key: (
        ((_COUNTED[row, query] - _COUNTED[row, key] <= -1) & (key < query)) | (query - key <= _WINDOW)
    ),
    # A distance of 200 wraps around.
    lambda row, head, query, key: abs((query - key).to(torch.int8)) <= _WINDOW,
    lambda row, head, query, key: key.to(torch.bool) <= query.to(dtype=torch.bool),
]


@pytest.mark.parametrize("function", UNKNOWN)
def test_what_a_symbol_cannot_answer_is_dense(function: MaskFunction) -> None:
    assert recognise(function)[0].kind is PatternKind.DENSE


# EmbeddingGemma's masks: a union with a constant, and with a window that is wider to the right.
UNIONS: list[tuple[MaskFunction, int | None, int | None]] = [
    (or_masks(causal_mask_function, lambda *args: torch.tensor(True, dtype=torch.bool)), None, None),
    (or_masks(causal_mask_function, lambda *args: torch.tensor(False)), None, 0),
    (
        or_masks(sliding_window_causal_mask_function(4), lambda row, head, query, key: abs(query - key) < 4),
        3,
        3,
    ),
    (and_masks(causal_mask_function, lambda *args: torch.tensor(True)), None, 0),
]


@pytest.mark.parametrize(("function", "left", "right"), UNIONS)
def test_unions_of_bands(function: MaskFunction, left: int | None, right: int | None) -> None:
    found, *_ = recognise(function)
    assert (found.kind, found.left, found.right) == (PatternKind.BAND, left, right)


def sees(sequences: torch.Tensor, positions: torch.Tensor) -> MaskFunction:
    """A mask function of the user's, with tables of the user's."""

    def function(row, head, query, key):
        return (positions[row, key] <= positions[row, query]) & (sequences[row, query] == sequences[row, key])

    return function


@pytest.mark.parametrize(
    ("sequences", "positions", "is_dense"),
    [
        ([[0, 0, 1, 1]], [[0, 1, 0, 1]], False),
        ([[0, 0, 1, 1]], [[0, 1, 5, 6]], False),
        ([[0, 0, 1, 1]], [[0, 1, 1, 0]], True),
        ([[0, 0, 1, 1]], [[0, 0, 0, 1]], True),
        ([[0, 1, 0, 1]], [[0, 1, 2, 3]], True),
        ([[0, 0, 1, 1, 1]], [[0, 1, 0, 1, 2]], True),
    ],
)
def test_packed_sequences_count_by_one(sequences: list, positions: list, is_dense: bool) -> None:
    function = sees(torch.tensor(sequences), torch.tensor(positions))
    mask = lazy_mask(1, 4, 4, 0, 0, function, None, torch.float32, "cpu", use_vmap=True)
    assert (mask.spec.pattern.kind is PatternKind.DENSE or mask.has_holes) == is_dense
    if not is_dense:
        assert mask.layout_of_forward(keep_padded_queries=False).query.lengths == (2, 2)


BLOCKS = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2]])
ARGUMENTS = {
    "sliding_window": 3, "chunk_size": 4, "left_padding": torch.zeros(1, dtype=torch.long),
    "block_sequence_ids": BLOCKS, "padding_mask": BLOCKS > 0, "packed_sequence_mask": BLOCKS,
    "q_offset": 0, "kv_offset": 0,
    "mask_function": sliding_window_causal_mask_function(3), "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3, 0, 1]]),
}  # fmt: skip
MAKERS = [
    name
    for name, maker in vars(masking_utils).items()
    if name.endswith(("_overlay", "_mask_function", "_packed_sequence"))
    and set(inspect.signature(maker).parameters) <= ARGUMENTS.keys()
]
KNOWN = {
    "sliding_window_overlay", "sliding_window_causal_mask_function", "sliding_window_bidirectional_overlay",
    "sliding_window_bidirectional_mask_function", "packed_sequence_mask_function",
    "add_offsets_to_mask_function",
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("joins", [None, and_masks, or_masks])
def test_makers_of_transformers(name: str, packs: bool, joins: Callable | None) -> None:
    make = getattr(masking_utils, name)
    made = make(*[ARGUMENTS[parameter] for parameter in inspect.signature(make).parameters])
    function = made if joins is None else joins(causal_mask_function, made)
    if packs:
        function = and_masks(function, masking_utils.packed_sequence_mask_function(BLOCKS))
    found, packed, positions = recognise(function)
    if found.kind is PatternKind.DENSE:
        assert name not in KNOWN or joins is or_masks or packs
        return
    queries, keys = torch.arange(8)[:, None], torch.arange(8)[None]
    zero = torch.tensor(0)
    expected = torch.ones(8, 8, dtype=torch.bool)
    if found.left is not None:
        expected &= queries - keys <= found.left
    if found.right is not None:
        expected &= keys - queries <= found.right
    if packed is not None:
        expected &= packed[0][queries] == packed[0][keys]
    assert torch.equal(function(zero, zero, queries, keys).broadcast_to(8, 8), expected)
    assert positions is None or packed is not None
