"""Which mask functions are recognised as bands, in a graph of torch.compile or not, and that nothing else is."""

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
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    padding_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from hf_flashinfer_attn.ragged.band import CAUSAL, FULL, Band, MaskFunction, Opaque, Pattern, recognise
from hf_flashinfer_attn.ragged.lazy_mask import lazy_mask
from hf_flashinfer_attn.ragged.mask_functions import interpret

_WINDOW = 3
_IDS = torch.arange(9)
_COUNTED = torch.tensor([[0, 1, 2, 0, 1, 2]])


def pattern_of(function: MaskFunction) -> Pattern:
    return recognise(function)[0]


def is_opaque(function: MaskFunction) -> bool:
    return isinstance(pattern_of(function), Opaque)


def visible(band: Band, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Which pairs a band lets see each other, bool, the shape of `keys - queries`."""
    seen = torch.ones_like(keys - queries, dtype=torch.bool)
    if band.left is not None:
        seen &= queries - keys <= band.left
    if band.right is not None:
        seen &= keys - queries <= band.right
    return seen


@pytest.mark.parametrize("size", [3, 128, 2043, 262_144, 2**31 - 1])
def test_windows_of_any_size(size: int) -> None:
    assert pattern_of(sliding_window_causal_mask_function(size)) == Band(size - 1, 0)
    assert pattern_of(sliding_window_bidirectional_mask_function(size)) == Band(size, size)


@pytest.mark.parametrize(
    ("band", "name", "is_window", "is_causal"),
    [(FULL, "full", False, False), (CAUSAL, "causal", False, True), (Opaque("chunks"), "chunks", False, False),
     (Band(3, 0), "window (3 before, 0 after)", True, True), (Band(2), "window (2 before, all after)", True, False),
     (Band(None, 2), "window (all before, 2 after)", True, False)],
)  # fmt: skip
def test_names_of_bands(band: Pattern, name: str, is_window: bool, is_causal: bool) -> None:
    assert (band.name, band.is_window, band.is_causal) == (name, is_window, is_causal)


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

    assert pattern_of(one_closure) == Band(left, right + offset - 1)
    assert pattern_of(and_masks(ahead, behind)) == Band(left + right + 3, right)


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
    assert is_opaque(function)
    assert is_opaque(and_masks(bidirectional_mask_function, function))


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
    found = pattern_of(function)
    if isinstance(found, Opaque):
        return
    far = 6 * max(sizes)
    queries = torch.tensor([random.randrange(far) for _ in range(200)])[:, None]
    edges = [bound for bound in (found.left, found.right, *sizes, sum(sizes)) if bound is not None]
    near = [sign * bound + step for bound in edges for sign in (-1, 1) for step in (-1, 0, 1)]
    distances = torch.tensor([*near, *(random.randrange(-far, far) for _ in range(400)), *range(-60, 60)])
    keys = queries + distances
    zero = torch.tensor(0)
    answers = function(zero, zero, queries, keys).broadcast_to(keys.shape)
    wrong = (answers != visible(found, queries, keys)) & (keys >= 0)
    assert not wrong.any(), (found, wrong.nonzero()[0], sizes)


def test_numbers_that_overflow_are_dense() -> None:
    assert is_opaque(sliding_window_causal_mask_function(2**62))


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
        assert pattern_of(function) == Band(3, 3)


def test_a_number_of_a_module_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def window(row, head, query, key):
        return abs(query - key) <= _WINDOW

    window.__module__ = "transformers.models.mine.modeling_mine"
    assert pattern_of(window) == Band(3, 3)
    monkeypatch.setitem(globals(), "_WINDOW", 5)
    assert pattern_of(window) == Band(5, 5)


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
    assert is_opaque(function)


# EmbeddingGemma's masks: a union with a constant, and with a window that is wider to the right.
UNIONS: list[tuple[MaskFunction, Band]] = [
    (or_masks(causal_mask_function, lambda *args: torch.tensor(True, dtype=torch.bool)), FULL),
    (or_masks(causal_mask_function, lambda *args: torch.tensor(False)), CAUSAL),
    (or_masks(sliding_window_causal_mask_function(4), lambda row, head, query, key: abs(query - key) < 4), Band(3, 3)),
    (and_masks(causal_mask_function, lambda *args: torch.tensor(True)), CAUSAL),
]


@pytest.mark.parametrize(("function", "band"), UNIONS)
def test_unions_of_bands(function: MaskFunction, band: Band) -> None:
    assert pattern_of(function) == band


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
    assert (isinstance(mask.spec.pattern, Opaque) or mask.state.has_holes) == is_dense
    if not is_dense:
        assert mask.state.layout().query.lengths == (2, 2)


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
KNOWN_MAKERS = {
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
    if isinstance(found, Opaque):
        assert name not in KNOWN_MAKERS or joins is or_masks or packs
        return
    queries, keys = torch.arange(8)[:, None], torch.arange(8)[None]
    zero = torch.tensor(0)
    expected = visible(found, queries, keys)
    if packed is not None:
        expected &= packed[0][queries] == packed[0][keys]
    assert torch.equal(function(zero, zero, queries, keys).broadcast_to(8, 8), expected)
    assert positions is None or packed is not None


SEQUENCES = torch.tensor([[0, 0, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 0, 1, 2]])


def packed(mask_function: Callable, sequences: torch.Tensor, positions: torch.Tensor) -> Callable:
    """As this version of transformers packs."""
    make = getattr(masking_utils, "packed_sequence_compatibility_function", None)
    if make is not None:
        return make(mask_function, positions, sequences)
    return and_masks(mask_function, packed_sequence_mask_function(sequences))


PACKED_BANDS = {
    "full": lambda sequences, positions: bidirectional_mask_function,
    "causal": lambda sequences, positions: causal_mask_function,
    "causal-window": lambda sequences, positions: sliding_window_causal_mask_function(3),
    "two-sided-window": lambda sequences, positions: sliding_window_bidirectional_mask_function(3),
    "packed": lambda sequences, positions: packed(causal_mask_function, sequences, positions),
    "packed-window": lambda sequences, positions: packed(sliding_window_causal_mask_function(2), sequences, positions),
}
NO_PACKED_BANDS = {
    "chunks": lambda sequences, positions: chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)),
    "union": lambda sequences, positions: or_masks(causal_mask_function, packed_sequence_mask_function(sequences)),
    "padding": lambda sequences, positions: padding_mask_function(sequences > 0),
    "blocks": lambda sequences, positions: lambda b, h, q, k: sequences[b, k] <= sequences[b, q],
    "two-packings": lambda sequences, positions: and_masks(
        packed_sequence_mask_function(sequences), packed_sequence_mask_function(positions)
    ),
    "shifted-lookup": lambda sequences, positions: lambda b, h, q, k: sequences[b, q - 1] == sequences[b, k],
    "prefix": lambda sequences, positions: lambda b, h, q, k: (k <= q) | (k < 3),
    "torch-function": lambda sequences, positions: lambda b, h, q, k: torch.where(q > 2, k > 1, k < 1),
    "tensor-first": lambda sequences, positions: lambda b, h, q, k: torch.add(sequences, q) > k,
    "branch": lambda sequences, positions: lambda b, h, q, k: k <= q if q > 2 else k < 1,
    "no-symbol": lambda sequences, positions: lambda b, h, q, k: torch.ones((), dtype=torch.bool),
}


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in PACKED_BANDS.items()])
def test_a_graph_reads_what_eager_code_reads(make: Callable, traced: bool) -> None:
    def bounds(sequences: torch.Tensor, positions: torch.Tensor) -> tuple:
        found = interpret(make(sequences, positions))
        return found.left, found.right, None if found.packed is None else found.packed.clone()

    torch.compiler.reset()
    left, right, found = (torch.compile(bounds, backend="eager", fullgraph=True) if traced else bounds)(
        SEQUENCES, POSITIONS
    )
    pattern, sequences, _ = recognise(make(SEQUENCES, POSITIONS))
    assert Band(left, right) == pattern
    assert (found is None) == (sequences is None)
    assert found is None or torch.equal(found, sequences)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in NO_PACKED_BANDS.items()])
def test_what_is_no_band_of_packed_sequences_is_not_known(make: Callable, traced: bool) -> None:
    def is_known(sequences: torch.Tensor, positions: torch.Tensor) -> bool:
        return interpret(make(sequences, positions)) is not None

    torch.compiler.reset()
    assert not (torch.compile(is_known, backend="eager") if traced else is_known)(SEQUENCES, POSITIONS)
    assert is_opaque(make(SEQUENCES, POSITIONS))


@pytest.mark.skipif(not hasattr(masking_utils, "blockwise_overlay"), reason="newer transformers have it")
def test_blocks_of_images_are_not_known() -> None:
    assert interpret(or_masks(causal_mask_function, masking_utils.blockwise_overlay(SEQUENCES))) is None


def test_positions_that_restart_without_sequences_are_not_known() -> None:
    remapped = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
    if remapped is not None:
        assert interpret(remapped(causal_mask_function, POSITIONS)) is None
    assert interpret(lambda b, h, q, k: POSITIONS[b, k] <= POSITIONS[b, q]) is None
