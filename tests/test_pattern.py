"""Which mask functions are recognised as bands, and that nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_flashinfer_attn.pattern import PatternKind, recognise

MaskFunction = Callable[..., torch.Tensor]


def of_transformers(function: Any) -> MaskFunction:
    """Only closures of transformers' own modules are looked into."""
    function.__module__ = "transformers.masking_utils"
    return function


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
