from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_flashinfer_attn
from hf_flashinfer_attn.ragged.layout import RaggedLayout, RaggedSide, uniform_layout

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


def test_uniform_layouts_are_shared() -> None:
    assert uniform_layout(2, 3, 3) is uniform_layout(2, 3, 3)
    layout = uniform_layout(2, 3, 3)
    assert layout.key is layout.query
    layout = uniform_layout(2, 3, 5)
    assert layout.key is not layout.query


def test_a_padded_side_needs_its_mask() -> None:
    with pytest.raises(ValueError, match=r"3 tokens in \(2, 2\) slots.*Pass valid=.*padded_shape=\(1, 3\)"):
        RaggedSide([1, 2], (2, 2), None)
    assert RaggedSide([1, 2], (1, 3), None).is_full


def test_layouts_are_counted() -> None:
    with hf_flashinfer_attn.trace() as trace:
        RaggedLayout.from_padding_mask(torch.ones(2, 3))
    assert (trace.layouts, trace.host_copies) == (1, 0)


def test_equal_cu_seqlens_make_self_attention_be_they_one_tensor_or_two() -> None:
    queries, shape = torch.tensor([0, 2, 5]), (1, 5)
    for keys, lengths in ((queries, (2, 3)), (queries.clone(), (2, 3)), (torch.tensor([0, 4, 5]), (4, 1))):
        layout = RaggedLayout.from_cu_seqlens(queries, keys, shape, shape)
        assert (layout.query.lengths, layout.key.lengths) == ((2, 3), lengths)
        assert (layout.key is layout.query) == (lengths == (2, 3))


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize(
    ("values", "tokens"), [([0, 2, 5], (5, 6)), ([0, 2, 5], (6, 5)), ([1, 5], (5, 5)), ([0, 4, 3, 5], (5, 5))]
)
def test_cu_seqlens_that_do_not_fit_are_an_error(values: list[int], tokens: tuple[int, int], one: bool) -> None:
    queries = torch.tensor(values)
    keys, shapes = queries if one else queries.clone(), [(1, count) for count in tokens]
    with pytest.raises(ValueError, match=rf"from {values[0]} to 5 do not describe {max(tokens)} packed tokens"):
        RaggedLayout.from_cu_seqlens(queries, keys, *shapes)


def test_a_graph_is_planned_for_rows_as_long_as_all_of_its_tokens() -> None:
    """Else a window that no row reaches at the capture would be missing where a row of a replay reaches it."""
    layout = RaggedLayout.for_graph([2, 3], rows=8, tokens=64, workspace=object())
    assert layout.query.lengths == (2, 3, 0, 0, 0, 0, 0, 0)
    assert (layout.query.max_length, layout.query.padded_shape) == (64, (1, 64))


@pytest.mark.gpu
def test_another_stream_gets_tensors_of_its_own() -> None:
    device, lengths = torch.device("cuda", 0), (3, 1, 0, 2)
    valid = torch.arange(3) < torch.tensor(lengths)[:, None]
    side = RaggedSide(lengths, (4, 3), valid)
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()

    def made() -> list[torch.Tensor]:
        found = side.token_map(device)
        assert found is not None
        return [side.cu_seqlens(device), found.positions, found.tokens, torch.as_tensor(side.positions_in_row(device))]

    with torch.cuda.stream(torch.cuda.Stream()):
        # What is launched for the first time may wait for all streams.
        expected = [tensor.tolist() for tensor in made()]
    assert expected[0] == [0, 3, 4, 4, 6]
    with torch.cuda.stream(busy):
        torch.cuda._sleep(2_000_000_000)
        late = made()
    with torch.cuda.stream(other):
        assert [tensor.tolist() for tensor in made()] == expected
        assert not busy.query()
    torch.cuda.synchronize()
    assert [tensor.tolist() for tensor in late] == expected
