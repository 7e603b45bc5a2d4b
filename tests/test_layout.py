from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_flashinfer_attn
from hf_flashinfer_attn.layout import RaggedLayout, RaggedSide, uniform_layout

MASKS = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=6)
)


@given(MASKS)
def test_scatter_undoes_gather_and_ignores_padding(rows: list[list[bool]]) -> None:
    valid = torch.tensor(rows)
    side = RaggedLayout.from_padding_mask(valid).query
    padded = torch.randn(*valid.shape, 2, 3).masked_fill(~valid[..., None, None], float("nan"))
    ragged = side.gather(padded)
    assert torch.equal(ragged, padded[valid])
    assert torch.equal(side.scatter(ragged), padded.nan_to_num(0.0))
    assert side.cu_seqlens_host.tolist() == [0, *valid.sum(1).cumsum(0).tolist()]
    assert side.cu_seqlens_host.dtype == torch.int32


def test_gather_and_scatter_are_differentiable() -> None:
    valid = torch.tensor([[1, 0, 1], [0, 0, 0]]).bool()
    side = RaggedLayout.from_padding_mask(valid).query
    padded = torch.randn(2, 3, 1, 2, requires_grad=True)
    side.scatter(side.gather(padded)).sum().backward()
    assert padded.grad is not None
    assert torch.equal(padded.grad, valid[..., None, None].expand(2, 3, 1, 2).float())


def test_without_padding_the_views_are_used_directly() -> None:
    side = uniform_layout(2, 3, 3).query
    padded = torch.randn(2, 3, 1, 2)
    assert side.gather(padded).data_ptr() == padded.data_ptr()
    assert side.scatter(side.gather(padded)).data_ptr() == padded.data_ptr()


def test_uniform_layouts_are_shared_and_hold_no_tensor() -> None:
    assert uniform_layout(2, 3, 3) is uniform_layout(2, 3, 3)
    assert uniform_layout(2, 3, 3).is_self_attention
    assert not uniform_layout(2, 3, 5).is_self_attention


def test_a_padded_side_needs_its_mask() -> None:
    with pytest.raises(ValueError, match=r"3 tokens in \(2, 2\) slots.*Pass valid=.*padded_shape=\(1, 3\)"):
        RaggedSide([1, 2], (2, 2), None)
    assert RaggedSide([1, 2], (1, 3), None).is_full


def test_layouts_are_counted() -> None:
    with hf_flashinfer_attn.trace() as trace:
        RaggedLayout.from_padding_mask(torch.ones(2, 3))
    assert (trace.layouts, trace.host_copies) == (1, 0)
