from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PixtralVisionConfig, PixtralVisionModel
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_overlay,
)

import hf_flashinfer_attn
from hf_flashinfer_attn import UnsupportedAttentionError
from hf_flashinfer_attn.attention.plan_cache import _kept_of_packed
from hf_flashinfer_attn.integration.functions import attention_forward, attention_mask
from hf_flashinfer_attn.ragged.layout import PackedCarrier, RaggedLayout, RaggedSide, offsets_of, uniform_layout
from hf_flashinfer_attn.ragged.lazy_mask import RaggedMask, _LazyLayout
from hf_flashinfer_attn.settings import NAME

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


def test_equal_offsets_make_self_attention_be_they_one_tensor_or_two() -> None:
    offsets, others = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 5])
    shape = (1, 5)
    for keys in (offsets, offsets.clone()):
        layout = RaggedLayout.from_offsets(offsets, keys, shape, shape)
        assert layout.is_self_attention
        assert layout.query.lengths == (2, 3)
    layout = RaggedLayout.from_offsets(offsets, others, shape, shape)
    assert not layout.is_self_attention
    assert (layout.query.lengths, layout.key.lengths) == ((2, 3), (4, 1))
    with pytest.raises(ValueError, match="do not describe 6 packed tokens"):
        RaggedLayout.from_offsets(offsets, offsets.clone(), shape, (1, 6))


def masks_of(*functions: Callable[..., Any], length: int = 5) -> list[RaggedMask]:
    return [attention_mask(1, length, length, mask_function=function) for function in functions]


def attend(mask: RaggedMask | None, offsets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    side = torch.arange(20.0).reshape(1, 2, 5, 2).sin()
    output, _ = attention_forward(
        torch.nn.Module(), side, side, side, mask, cu_seq_lens_q=offsets[0], cu_seq_lens_k=offsets[1]
    )
    return output


BANDS = (bidirectional_mask_function, and_masks(sliding_window_overlay(2), causal_mask_function))


def test_masks_of_a_forward_share_a_layout_in_inference_mode() -> None:
    with torch.inference_mode():
        first, second = torch.tensor([0, 2, 5]), torch.tensor([0, 2, 5])
        masks = masks_of(*BANDS)
        with hf_flashinfer_attn.trace() as trace:
            for mask in masks * 3:
                attend(mask, (first, second))
        assert trace.layouts == 1


def test_the_next_forward_reads_offsets_again() -> None:
    """Also when they were written to, which nothing counts here, and when masks of the last forward are still there."""
    with torch.inference_mode():
        offsets = torch.tensor([0, 2, 5]), torch.tensor([0, 2, 5])
        masks = masks_of(*BANDS)
        before = [attend(mask, offsets) for mask in masks]
        for side in offsets:
            side[1] = 4
        with hf_flashinfer_attn.trace() as trace:
            after = [attend(mask, offsets) for mask in masks_of(*BANDS)]
        fresh = torch.tensor([0, 4, 5])
        expected = [attend(mask, (fresh, fresh)) for mask in masks_of(*BANDS)]
    assert trace.layouts == 1
    for index, right in enumerate(expected):
        assert torch.equal(after[index], right)
        assert not torch.equal(before[index], right)


def test_carriers_do_not_outlive_their_masks() -> None:
    carrier = PackedCarrier.of_forward()
    assert PackedCarrier.of_forward() is carrier
    assert masks_of(bidirectional_mask_function)[0].carrier is carrier
    watched = weakref.ref(carrier)
    del carrier
    gc.collect()
    assert watched() is None


def test_offsets_are_read_and_not_the_sequences_that_positions_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = torch.tensor([[0, 0, 1, 1, 1]])
    packed = and_masks(packed_sequence_mask_function(sequences), causal_mask_function)
    offsets = torch.tensor([0, 2, 5])
    expected = attend(masks_of(causal_mask_function)[0], (offsets, offsets))
    monkeypatch.setattr(_LazyLayout, "_packed_runs", property(lambda layout: pytest.fail("read sequences, too")))
    (mask,) = masks_of(packed)
    assert torch.equal(attend(mask, (offsets, offsets)), expected)
    # And so layers after the first have nothing to look at.
    query = torch.zeros(1, 2, 5, 2)
    assert _kept_of_packed(query, query, mask, None, (offsets, offsets)) is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tensor: pickle.loads(pickle.dumps(tensor))])
def test_offsets_can_be_copied_after_a_forward(copied: Callable[[torch.Tensor], torch.Tensor]) -> None:
    offsets = torch.tensor([0, 2, 5])
    query = torch.randn(1, 2, 5, 4)
    layer = torch.nn.Identity()
    expected, _ = attention_forward(layer, query, query, query, None, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)
    other = copied(offsets)
    assert torch.equal(other, offsets)
    with hf_flashinfer_attn.trace() as trace:
        actual, _ = attention_forward(layer, query, query, query, None, cu_seq_lens_q=other, cu_seq_lens_k=other)
    assert torch.equal(actual, expected)
    assert trace.layouts == 1


def test_a_graph_is_planned_for_rows_as_long_as_all_of_its_tokens() -> None:
    """Else a window that no row reaches at the capture would be missing where a row of a replay reaches it."""
    layout = RaggedLayout.for_graph([2, 3], rows=8, tokens=64, workspace=object())
    assert layout.query.lengths == (2, 3, 0, 0, 0, 0, 0, 0)
    assert (layout.query.max_length, layout.query.padded_shape) == (64, (1, 64))


@pytest.mark.parametrize("options", [{}, {"output_attentions": True}, {"position_bias": torch.zeros(1, 2, 5, 5)}])
def test_attention_that_would_repeat_the_lengths_of_a_capture_is_refused(options: dict[str, Any]) -> None:
    offsets = offsets_of(RaggedLayout.for_graph([2, 3], rows=8, tokens=5, workspace=object()))
    query = torch.randn(1, 2, 5, 4)
    with pytest.raises(UnsupportedAttentionError, match="in a captured graph"):
        attention_forward(
            torch.nn.Identity(), query, query, query, None, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, **options
        )


def test_layers_of_a_vision_tower_share_the_layout_of_its_images() -> None:
    config = PixtralVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        attn_implementation=NAME,
    )  # fmt: skip
    tower = PixtralVisionModel(config).eval()
    images, sizes = torch.randn(2, 3, 32, 32), torch.tensor([(32, 32), (24, 16)])
    with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
        tower(images, image_sizes=sizes)
    assert (len(trace.calls), trace.layouts) == (3, 1)


@pytest.mark.gpu
def test_another_stream_gets_tensors_of_its_own() -> None:
    device, lengths = torch.device("cuda", 0), (3, 1, 0, 2)
    valid = torch.arange(3) < torch.tensor(lengths)[:, None]
    side = RaggedSide(lengths, (4, 3), valid)
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()

    def made() -> list[torch.Tensor]:
        found = side.token_map(device)
        assert found is not None
        return [side.cu_seqlens(device), found.slots, found.tokens, torch.as_tensor(side.slots(device))]

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
