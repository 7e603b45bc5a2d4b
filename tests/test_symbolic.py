"""Mask functions are read the same by calling them with symbols, in a graph or not, as by opening their closures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
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

from hf_flashinfer_attn.ragged.band import PatternKind, band, recognise
from hf_flashinfer_attn.ragged.mask_functions import interpret

SEQUENCES = torch.tensor([[0, 0, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 0, 1, 2]])


def packed(mask_function: Callable, sequences: torch.Tensor, positions: torch.Tensor) -> Callable:
    """As this version of transformers packs."""
    make = getattr(masking_utils, "packed_sequence_compatibility_function", None)
    if make is not None:
        return make(mask_function, positions, sequences)
    return and_masks(mask_function, packed_sequence_mask_function(sequences))


KNOWN = {
    "full": lambda sequences, positions: bidirectional_mask_function,
    "causal": lambda sequences, positions: causal_mask_function,
    "causal-window": lambda sequences, positions: sliding_window_causal_mask_function(3),
    "two-sided-window": lambda sequences, positions: sliding_window_bidirectional_mask_function(3),
    "packed": lambda sequences, positions: packed(causal_mask_function, sequences, positions),
    "packed-window": lambda sequences, positions: packed(sliding_window_causal_mask_function(2), sequences, positions),
}
UNKNOWN = {
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
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in KNOWN.items()])
def test_symbols_agree_with_closures(make: Callable, traced: bool) -> None:
    def bounds(sequences: torch.Tensor, positions: torch.Tensor) -> tuple:
        visible = interpret(make(sequences, positions))
        return visible.left, visible.right, None if visible.packed is None else visible.packed.clone()

    torch.compiler.reset()
    left, right, found = (torch.compile(bounds, backend="eager", fullgraph=True) if traced else bounds)(
        SEQUENCES, POSITIONS
    )
    pattern, sequences, _ = recognise(make(SEQUENCES, POSITIONS))
    assert band(left, right) == pattern
    assert (found is None) == (sequences is None)
    assert found is None or torch.equal(found, sequences)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in UNKNOWN.items()])
def test_what_is_no_band_is_not_known(make: Callable, traced: bool) -> None:
    def is_known(sequences: torch.Tensor, positions: torch.Tensor) -> bool:
        return interpret(make(sequences, positions)) is not None

    torch.compiler.reset()
    assert not (torch.compile(is_known, backend="eager") if traced else is_known)(SEQUENCES, POSITIONS)
    assert recognise(make(SEQUENCES, POSITIONS))[0].kind is PatternKind.DENSE


@pytest.mark.skipif(not hasattr(masking_utils, "blockwise_overlay"), reason="newer transformers have it")
def test_blocks_of_images_are_not_known() -> None:
    assert interpret(or_masks(causal_mask_function, masking_utils.blockwise_overlay(SEQUENCES))) is None


def test_positions_that_restart_without_sequences_are_not_known() -> None:
    remapped = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
    if remapped is not None:
        assert interpret(remapped(causal_mask_function, POSITIONS)) is None
    assert interpret(lambda b, h, q, k: POSITIONS[b, k] <= POSITIONS[b, q]) is None
