"""States of forwards: who shares one, and when row lengths are read again."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
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
from hf_flashinfer_attn.attention.plan_cache import find_plan
from hf_flashinfer_attn.attention.spec import LayerArguments
from hf_flashinfer_attn.integration.functions import attention_forward, attention_mask
from hf_flashinfer_attn.ragged.forward_state import (
    PackedState,
    attach_state,
    attached_state,
    cu_seqlens_of,
    image_state,
    packed_state,
    uniform_state,
)
from hf_flashinfer_attn.ragged.host_copy import HostCopy
from hf_flashinfer_attn.ragged.layout import RaggedLayout, uniform_layout
from hf_flashinfer_attn.ragged.lazy_mask import RaggedMask
from hf_flashinfer_attn.settings import NAME

SHAPES = (1, 5), (1, 5)
BANDS = (bidirectional_mask_function, and_masks(sliding_window_overlay(2), causal_mask_function))
MODES = [torch.no_grad, torch.inference_mode]


class Layer(torch.nn.Module):
    """A layer of a model, which has its `config`; of no model without one."""

    def __init__(self, config: object = None) -> None:
        super().__init__()
        if config is not None:
            self.config = config


def mask_of(function: Callable[..., Any], **options: Any) -> RaggedMask:
    return attention_mask(1, 5, 5, mask_function=function, **options)


def attend(mask: RaggedMask | None, queries: torch.Tensor, keys: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    side = torch.arange(20.0).reshape(1, 2, 5, 2).sin()
    output, _ = attention_forward(layer, side, side, side, mask, cu_seq_lens_q=queries, cu_seq_lens_k=keys)
    return output


def test_a_batch_without_padding_has_one_state_for_all_forwards() -> None:
    state = uniform_state(2, 3, 5)
    assert state is uniform_state(2, 3, 5)
    assert state is not uniform_state(2, 3, 3)
    assert state.is_shared
    assert not state.has_padding
    assert state.layout() is state.layout(keep_padded_queries=True) is uniform_layout(2, 3, 5)


@pytest.mark.parametrize("two", [False, True], ids=["one-tensor", "two-tensors"])
def test_versions_tell_whether_lengths_are_read_again(two: bool) -> None:
    queries = torch.tensor([0, 2, 5])
    keys = queries.clone() if two else queries

    def found() -> PackedState:
        return packed_state(object(), queries, keys, SHAPES)

    state = found()
    assert attached_state(queries) is state
    # Whatever layer asks, and however often.
    layer = Layer(object())
    assert all(packed_state(layer, queries, keys, SHAPES) is state for _ in range(2))
    for written in {id(side): side for side in (queries, keys)}.values():
        written[1] = 4
        assert found() is not state
        state = found()
        assert found() is state
    assert state.layout().query.lengths == state.layout().key.lengths == (4, 1)
    # Keys of another tensor, if of the same values, and tensors of other shapes.
    assert packed_state(object(), queries, queries.clone(), SHAPES) is not state
    state = found()
    assert packed_state(object(), queries, keys, ((5, 1), (5, 1))) is not state
    assert found() is not state


@torch.inference_mode()
def test_without_versions_a_forward_ends_where_a_layer_comes_again() -> None:
    queries = torch.tensor([0, 2, 5])
    config = object()
    layers = [Layer(config) for _ in range(3)]
    first = [packed_state(layer, queries, queries, SHAPES) for layer in layers]
    assert len(set(map(id, first))) == 1
    queries[1] = 4
    second = [packed_state(layer, queries, queries, SHAPES) for layer in layers]
    assert len({id(state) for state in (*first, *second)}) == 2
    assert second[0].layout().query.lengths == (4, 1)


@torch.inference_mode()
def test_without_versions_a_layer_of_another_model_is_of_another_forward() -> None:
    queries = torch.tensor([0, 2, 5])
    # Equal is not the same. Without a configuration a layer is alone.
    layers = [Layer({"a": 1}), Layer({"a": 1}), Layer(), Layer(), object(), object()]
    states = [packed_state(layer, queries, queries, SHAPES) for layer in layers]
    assert len(set(map(id, states))) == len(layers)


@pytest.mark.parametrize("mode", MODES)
def test_cu_seqlens_of_this_package_are_read_by_nobody(mode: Any) -> None:
    layout = RaggedLayout.from_lengths([2, 3])
    with mode(), hf_flashinfer_attn.trace() as trace:
        cu_seqlens = cu_seqlens_of(layout)
        assert cu_seqlens.tolist() == [0, 2, 5]
        other = torch.tensor([0, 2, 5])
        assert attach_state(other, layout) is attached_state(other)
        layer = Layer(object())
        for owner in (cu_seqlens, other):
            # As often as a layer may come, with or without a version, or a mask.
            states = [packed_state(one, owner, owner, SHAPES) for one in (layer, layer, object())]
            states.append(packed_state(object(), owner, owner, SHAPES, mask_of(bidirectional_mask_function)))
            assert {id(state) for state in states} == {id(attached_state(owner))}
            assert states[0].layout() is layout
    assert trace.layouts == 0


def test_a_mask_keeps_the_state_of_its_forward_where_nothing_else_can() -> None:
    with torch.inference_mode():
        one, same = torch.tensor([0, 2, 5]), torch.tensor([0, 2, 5])
        mask, other = (mask_of(bidirectional_mask_function) for _ in range(2))
        # Other tensors of the same values, other shapes and another mask are of another forward.
        for sides, shapes, some in (
            ((same, same), SHAPES, mask), ((one, same), SHAPES, mask), ((one, one), ((5, 1), (5, 1)), mask),
            ((one, one), SHAPES, other),
        ):  # fmt: skip
            state = packed_state(object(), one, one, SHAPES, mask)
            assert packed_state(object(), one, one, SHAPES, mask) is state is attached_state(mask)
            assert packed_state(object(), *sides, shapes, some) is not state
        assert attached_state(one) is None
    # Versions know better.
    counted = torch.tensor([0, 2, 5])
    state = packed_state(object(), counted, counted, SHAPES, mask)
    assert attached_state(counted) is state is not attached_state(mask)


def test_a_state_dies_with_its_cu_seqlens() -> None:
    gc.disable()
    try:
        for make in (lambda: torch.tensor([0, 2, 5]), lambda: cu_seqlens_of(RaggedLayout.from_lengths([2, 3]))):
            cu_seqlens = make()
            attend(None, cu_seqlens, cu_seqlens, Layer())
            watched = weakref.ref(attached_state(cu_seqlens))
            del cu_seqlens
            assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", MODES)
def test_layers_of_a_forward_share_a_layout(mode: Any) -> None:
    """Also those of other masks, and with cu_seqlens in two tensors."""
    with mode():
        sides = torch.tensor([0, 2, 5]), torch.tensor([0, 2, 5])
        masks, config = [mask_of(band) for band in BANDS], object()
        layers = [Layer(config) for _ in range(6)]
        with hf_flashinfer_attn.trace() as trace:
            for mask, layer in zip(masks * 3, layers):
                attend(mask, *sides, layer)
        assert trace.layouts == 1


@pytest.mark.parametrize("mode", MODES)
def test_the_next_forward_reads_what_was_written_since(mode: Any) -> None:
    """Also where no version counts it, and while masks of the last forward are still there."""
    layers = [Layer(config) for config in [object()] * 2]

    def forward(masks: list[RaggedMask], *sides: torch.Tensor) -> list[torch.Tensor]:
        return [attend(mask, *sides, layer) for mask, layer in zip(masks, layers)]

    with mode():
        sides = torch.tensor([0, 2, 5]), torch.tensor([0, 2, 5])
        masks = [mask_of(band) for band in BANDS]
        before = forward(masks, *sides)
        for side in sides:
            side[1] = 4
        with hf_flashinfer_attn.trace() as trace:
            again = forward(masks, *sides)
            after = forward([mask_of(band) for band in BANDS], *sides)
        fresh = torch.tensor([0, 4, 5])
        expected = forward([mask_of(band) for band in BANDS], fresh, fresh)
    assert trace.layouts == (1 if mode is torch.no_grad else 2)
    for index, right in enumerate(expected):
        assert torch.equal(again[index], right)
        assert torch.equal(after[index], right)
        assert not torch.equal(before[index], right)


def test_cu_seqlens_are_read_and_not_the_sequences_that_positions_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = torch.tensor([[0, 0, 1, 1, 1]])
    packed = and_masks(packed_sequence_mask_function(sequences), causal_mask_function)
    cu_seqlens = torch.tensor([0, 2, 5])
    expected = attend(mask_of(causal_mask_function), cu_seqlens.clone(), cu_seqlens.clone(), Layer())
    reads: list[HostCopy] = []
    values = HostCopy.values.func
    monkeypatch.setattr(HostCopy, "values", property(lambda copied: reads.append(copied) or values(copied)))
    mask, layer = mask_of(packed), Layer()
    for _ in range(2):
        assert torch.equal(attend(mask, cu_seqlens, cu_seqlens, layer), expected)
        assert len(reads) == 1
    # And so later layers have nothing to look at.
    query, nothing = torch.zeros(1, 2, 5, 2), [None] * 7
    given = LayerArguments(0.0, *nothing, cu_seqlens, cu_seqlens, None)
    found = find_plan(layer, query, query, query, mask, given)
    assert found is not None
    assert found.plan is not None
    assert len(reads) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tensor: pickle.loads(pickle.dumps(tensor))])
def test_cu_seqlens_can_be_copied_after_a_forward(copied: Callable[[torch.Tensor], torch.Tensor]) -> None:
    cu_seqlens = torch.tensor([0, 2, 5])
    expected = attend(None, cu_seqlens, cu_seqlens, Layer())
    other = copied(cu_seqlens)
    assert torch.equal(other, cu_seqlens)
    assert attached_state(other) is None
    with hf_flashinfer_attn.trace() as trace:
        actual = attend(None, other, other, Layer())
    assert torch.equal(actual, expected)
    assert trace.layouts == 1


@pytest.mark.parametrize("options", [{}, {"output_attentions": True}, {"position_bias": torch.zeros(1, 2, 5, 5)}])
def test_attention_that_would_repeat_the_lengths_of_a_capture_is_refused(options: dict[str, Any]) -> None:
    cu_seqlens = cu_seqlens_of(RaggedLayout.for_graph([2, 3], rows=8, tokens=5, workspace=object()))
    query = torch.randn(1, 2, 5, 4)
    with pytest.raises(UnsupportedAttentionError, match="in a captured graph"):
        attention_forward(
            Layer(), query, query, query, None, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, **options
        )


@pytest.mark.parametrize("mode", MODES)
def test_cu_seqlens_of_a_gpu_are_not_read_in_a_capture(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    with mode(), pytest.raises(UnsupportedAttentionError, match="packed sequences while a CUDA graph is captured"):
        packed_state(object(), on_gpu, on_gpu, SHAPES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("positions", [[[0, 1, 0, 1, 2]], [[0, 0], [0, 1], [0, 0], [0, 1], [1, 0]]], ids=["1d", "2d"])
def test_images_start_where_positions_do(positions: list[list[int]], mode: Any) -> None:
    with mode():
        ids, config = torch.tensor(positions), object()
        layers = [Layer(config) for _ in range(2)]
        states = [image_state(layer, ids, SHAPES) for layer in layers]
        assert states[0] is states[1]
        assert states[0].layout().query.lengths == (2, 3)


@pytest.mark.parametrize("positions", [[[0, 1, 0, 1]], [[1, 2, 0, 1, 2]], [[0, 1, 2, 0, 1, 2]]])
def test_positions_of_other_images_are_an_error(positions: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="do not describe 5 packed tokens"):
        image_state(Layer(), torch.tensor(positions), SHAPES)


def test_the_packing_of_a_state_is_not_lost() -> None:
    cu_seqlens = cu_seqlens_of(RaggedLayout.from_lengths([2, 3]))
    state = attached_state(cu_seqlens)
    assert state is not None
    state.packing = object()
    # In another shape the lengths are read again.
    other = packed_state(Layer(), cu_seqlens, cu_seqlens, ((5, 1), (5, 1)))
    assert other is not state
    assert attached_state(cu_seqlens) is state


def test_layers_of_a_vision_tower_share_the_layout_of_its_images() -> None:
    config = PixtralVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        attn_implementation=NAME,
    )  # fmt: skip
    tower = PixtralVisionModel(config).eval()
    images, sizes = torch.randn(2, 3, 32, 32), torch.tensor([(32, 32), (24, 16)])
    for mode in MODES:
        with mode(), hf_flashinfer_attn.trace() as trace:
            tower(images, image_sizes=sizes)
        assert (len(trace.calls), trace.layouts) == (3, 1)
