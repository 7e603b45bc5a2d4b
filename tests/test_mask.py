from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from accelerate.utils import send_to_device
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)

import hf_flashinfer_attn
from hf_flashinfer_attn.integration.functions import attention_forward, attention_mask
from hf_flashinfer_attn.ragged import mask_state
from hf_flashinfer_attn.ragged.band import Opaque
from hf_flashinfer_attn.ragged.lazy_mask import RaggedMask
from hf_flashinfer_attn.ragged.mask_state import MaskState, copy_of, is_mask_of_ones, mask_of_ones

VALID = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]]).bool()


def make(mask_function=bidirectional_mask_function, valid=VALID, q_length=4, **kwargs) -> RaggedMask:
    return attention_mask(
        batch_size=3, q_length=q_length, kv_length=4, mask_function=mask_function, attention_mask=valid, **kwargs
    )


def reference(mask_function=bidirectional_mask_function, valid=VALID, q_length=4, **kwargs) -> torch.Tensor:
    return eager_mask(
        batch_size=3, q_length=q_length, kv_length=4, mask_function=mask_function, attention_mask=valid, **kwargs
    )


@pytest.mark.parametrize("mask_function", [bidirectional_mask_function, causal_mask_function])
def test_it_looks_like_the_eager_mask_without_being_made(mask_function) -> None:
    mask, expected = make(mask_function), reference(mask_function)
    assert isinstance(mask, torch.Tensor)
    assert (mask.shape, mask.dtype, mask.device) == (expected.shape, expected.dtype, expected.device)
    assert (mask.size(-1), mask.dim(), mask.ndim, mask.numel(), mask.is_floating_point()) == (4, 4, 4, 48, True)
    assert "RaggedMask(shape=(3, 1, 4, 4)" in repr(mask)
    assert mask._dense is None


@pytest.mark.parametrize(
    "operation",
    [
        lambda mask: mask + 1,
        lambda mask: torch.ones(3, 2, 4, 4) + mask,
        lambda mask: mask[:, :, :, :2],
        lambda mask: mask[0],
        lambda mask: mask == 0,
        lambda mask: torch.cat([mask, mask], dim=-1),
        lambda mask: mask.to(torch.bool),
        lambda mask: mask.masked_fill(mask < 0, -1.0),
        lambda mask: torch.where(mask < 0, 0.0, 1.0),
        lambda mask: mask.expand(3, 5, 4, 4),
        lambda mask: mask.clone(),
        lambda mask: mask.data,
        lambda mask: mask.transpose(2, 3),
        lambda mask: torch.nn.functional.pad(mask, (1, 0)),
        lambda mask: torch.nn.functional.scaled_dot_product_attention(*[torch.ones(3, 2, 4, 8)] * 3, attn_mask=mask),
        lambda mask: copy.deepcopy(mask),
    ],
)
@pytest.mark.parametrize("mask_function", [bidirectional_mask_function, sliding_window_causal_mask_function(2)])
def test_arithmetic_gives_the_eager_values(operation, mask_function) -> None:
    result, expected = operation(make(mask_function)), operation(reference(mask_function))
    assert torch.equal(result.dense() if isinstance(result, RaggedMask) else result, expected)


@pytest.mark.parametrize(
    "operation",
    [
        lambda mask: mask[:, :, :, :4],
        lambda mask: mask[..., :10],
        lambda mask: mask[:],
        lambda mask: mask.to("cpu"),
        lambda mask: mask.to(torch.float16),
        lambda mask: mask.to(dtype=torch.float64, device="cpu"),
        lambda mask: mask.half(),
        lambda mask: mask.contiguous(),
        lambda mask: mask.detach(),
        lambda mask: mask.data,
        lambda mask: mask.expand(3, -1, 4, 4),
        lambda mask: mask.type_as(torch.ones(1, dtype=torch.bfloat16)),
        lambda mask: send_to_device({"attention_mask": mask}, "cpu")["attention_mask"],
    ],
)
def test_what_changes_nothing_stays_lazy(operation) -> None:
    mask = make()
    result, expected = operation(mask), operation(reference())
    assert isinstance(result, RaggedMask)
    assert (result.dtype, result.device, result.shape) == (expected.dtype, expected.device, expected.shape)
    assert result.state is mask.state
    assert result.state.layout() is mask.state.layout()
    assert mask._dense is None


def test_moving_to_another_device_keeps_the_layout() -> None:
    mask = make()
    moved = mask.to("meta")
    assert isinstance(moved, RaggedMask)
    assert moved.device.type == "meta"
    assert moved.state is mask.state


CHANGES = [
    lambda mask: mask.add_(1.0),
    lambda mask: mask.masked_fill_(torch.ones(3, 1, 4, 4, dtype=torch.bool), -1.0),
    lambda mask: mask.__setitem__((slice(None), slice(None), 0), 7.0),
    lambda mask: mask[:, :, 1].fill_(3.0),
    lambda mask: torch.clamp_(mask, min=-5.0),
    lambda mask: mask.data.fill_(2.0),
    lambda mask: mask.data[:, :, 1].fill_(3.0),
    lambda mask: mask.detach().data.mul_(0.5),
    lambda mask: mask.numpy().fill(4.0),
    lambda mask: torch.from_dlpack(mask).fill_(4.0),
]


@pytest.mark.parametrize("change", CHANGES)
def test_an_in_place_change_is_kept(change) -> None:
    mask, expected = make(), reference().contiguous()
    change(mask)
    change(expected)
    assert mask.was_modified
    assert torch.equal(mask + 0, expected)
    assert torch.equal(mask.to("cpu") + 0, expected)
    assert torch.equal(mask[:] + 0, expected)


@pytest.mark.parametrize("change", CHANGES)
def test_an_in_place_change_stays_with_the_copy_that_was_written_to(change) -> None:
    mask = make()
    before, other = mask.half(), mask.half()
    assert torch.equal(before + 0, reference(dtype=torch.float16))
    change(other)
    after, expected = mask.half(), reference(dtype=torch.float16).contiguous()
    assert [copied.was_modified for copied in (before, other, after)] == [False, True, False]
    for copied in (before, after):
        assert torch.equal(copied + 0, expected)
    change(before)
    assert torch.equal(mask.half() + 0, expected)
    change(expected)
    assert torch.equal(other + 0, expected)
    assert torch.equal(before + 0, expected)
    assert not mask.was_modified


@pytest.mark.parametrize("order", [("cpu", "meta"), ("meta", "cpu"), ("meta", "meta"), ("cpu", "cpu")], ids="-".join)
def test_dense_values_are_made_once_where_the_mask_function_has_its_tensors(order) -> None:
    asked: list[tuple[torch.dtype, torch.device]] = []
    blocks = torch.tensor([[0, 0, 1, 1]]).expand(3, -1)

    def same_block(row, head, query, key):
        return blocks[row, query] == blocks[row, key]

    mask = make(same_block)
    densify = mask.spec.densify

    def counted(dtype, device):
        asked.append((dtype, device))
        return densify(dtype, device)

    spec = dataclasses.replace(mask.spec, densify=counted)
    cpu = torch.device("cpu")
    mask = RaggedMask(MaskState(spec, cpu), torch.float32, cpu)
    for device in order:
        copied = mask.to(torch.float16).to(device)
        dense = copied.dense()
        assert (dense.dtype, dense.device.type) == (torch.float16, device)
        if device == "cpu":
            assert torch.equal(dense, reference(same_block, dtype=torch.float16))
    assert asked == [(torch.float16, cpu)]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen_in_inference_mode(change) -> None:
    with torch.inference_mode():
        mask, expected = make(valid=VALID.clone()), reference().contiguous()
        assert torch.equal(mask + 0, expected)
        assert not mask.was_modified
        change(mask)
        change(expected)
        assert mask.was_modified
        assert torch.equal(mask + 0, expected)


def test_reading_is_no_change() -> None:
    mask = make()
    _ = mask + 1, mask.data + 1, mask.data.shape
    assert not mask.was_modified


def test_other_data_is_refused() -> None:
    mask = make()
    with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match=r"data of a lazy mask.*mask\.copy_"):
        mask.data = torch.zeros(3, 1, 4, 4)
    mask.copy_(torch.zeros(3, 1, 4, 4))
    assert mask.was_modified
    assert torch.equal(mask + 0, torch.zeros(3, 1, 4, 4))


@pytest.mark.parametrize(
    ("options", "keep", "queries", "keys"),
    [({}, False, (3, 3, 3), (3, 3, 3)), ({}, True, (4, 4, 4), (3, 3, 3)),
     ({"valid": None}, False, (4, 4, 4), (4, 4, 4)), ({"valid": torch.ones_like(VALID)}, True, (4, 4, 4), (4, 4, 4)),
     # Of another sequence, every query stays.
     ({"q_length": 2}, False, (2, 2, 2), (3, 3, 3)),
     # Two new tokens after two cached ones: causal queries are of the sequence of the keys.
     ({"mask_function": causal_mask_function, "q_length": 2, "q_offset": 2}, True, (1, 2, 2), (3, 3, 3))],
)  # fmt: skip
def test_lengths(options, keep: bool, queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
    layout = make(**options).state.layout(keep_padded_queries=keep)
    assert (layout.query.lengths, layout.key.lengths) == (queries, keys)
    assert (layout.key is layout.query) == (queries == keys)
    assert layout.query.is_full == (queries in ((4, 4, 4), (2, 2, 2)))


def test_static_cache_hides_what_is_not_written_yet() -> None:
    for valid in (VALID[:, :2], None):
        mask = make(causal_mask_function, valid=valid, q_length=2)
        layout = mask.state.layout()
        lengths = (2, 1, 1) if valid is not None else (2, 2, 2)
        assert (layout.query.lengths, layout.key.lengths) == (lengths, lengths)
        keys = torch.arange(12.0).reshape(3, 4, 1, 1)
        assert layout.key.gather(keys).flatten().tolist() == ([0, 1, 5, 8] if valid is not None else [0, 1, 4, 5, 8, 9])


def test_windows_know_of_holes() -> None:
    window = sliding_window_causal_mask_function(2)
    assert make(window).state.has_holes
    assert not make(window, valid=VALID[:2].repeat(2, 1)[:3]).state.has_holes
    assert not make(window, valid=None).state.has_holes
    assert not make(causal_mask_function).state.has_holes


PACKED = [[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 0, 0], [5, 4, 3, 2, 1, 0]]


@pytest.mark.parametrize("pieces", [False, True])
def test_packed_sequences_in_pieces_are_joined_as_transformers_does(pieces: bool) -> None:
    ids = torch.tensor(PACKED)
    if pieces:
        ids[1] = torch.tensor([0, 0, 1, 1, 0, 0])
    function = and_masks(causal_mask_function, packed_sequence_mask_function(ids))
    mask = attention_mask(batch_size=3, q_length=6, kv_length=6, mask_function=function)
    assert mask.state.has_holes == pieces
    query, key, value = torch.randn(3, 3, 2, 6, 8)
    with hf_flashinfer_attn.trace() as trace:
        output, _ = attention_forward(torch.nn.Module(), query, key, value, mask)
    (call,) = trace.calls
    assert call.kernel == ("dense" if pieces else "torch")
    assert (call.reason == "a window over padding with holes, packed sequences in pieces") == pieces
    allowed = (ids[:, None, :, None] == ids[:, None, None, :]) & torch.ones(6, 6, dtype=torch.bool).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    if not pieces:
        layout = mask.state.layout()
        assert layout.query.lengths == (2, 3, 1, 4, 2, 1, 1, 1, 1, 1, 1)


def test_padding_of_a_mask_that_is_not_recognised() -> None:
    valid = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    for rows in (valid, valid[1:]):
        mask = attention_mask(len(rows), 3, 3, mask_function=lambda b, h, q, k: (q + k) % 2 == 0, attention_mask=rows)
        assert isinstance(mask.spec.pattern, Opaque)
        assert mask.state.has_padding is (not rows.all())


def test_unknown_patterns_are_opaque() -> None:
    assert isinstance(make(lambda b, h, q, k: k % 2 <= q).spec.pattern, Opaque)


def test_a_read_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = make()
    with monkeypatch.context() as patched:
        patched.setattr(mask_state, "HostCopy", lambda counts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mask.state.layout()
    assert mask.state.layout().key.lengths == (3, 3, 3)


def test_a_mask_of_integers_means_the_same() -> None:
    mask = make(valid=VALID.long())
    assert mask.spec.padding_mask is not None
    assert torch.equal(mask.spec.padding_mask, VALID)
    assert torch.equal(mask + 0, reference())


@pytest.mark.parametrize("read", ["layout", "values"])
def test_a_padding_mask_that_is_written_to_before_it_is_read_is_refused(read: str) -> None:
    padding_mask = torch.ones(2, 4, dtype=torch.bool)
    unread, known = (attention_mask(2, 4, 4, attention_mask=padding_mask) for _ in range(2))
    before = known.state.layout().query.lengths
    padding_mask[1, 2:] = False
    with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match="written to between"):
        unread.state.layout() if read == "layout" else unread.dense()
    # What was read before the write is what eager attention would have computed with.
    assert known.state.layout().query.lengths == before == (4, 4)
    assert attention_mask(2, 4, 4, attention_mask=padding_mask).state.layout().query.lengths == (4, 2)


def test_a_padding_mask_of_integers_is_copied_when_a_mask_is_made() -> None:
    padding_mask = torch.ones(2, 4, dtype=torch.long)
    mask = attention_mask(2, 4, 4, attention_mask=padding_mask)
    padding_mask[1, 2:] = 0
    assert mask.state.layout().query.lengths == (4, 4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_of_ones_is_known_until_it_is_written_to(mode) -> None:
    with mode():
        ones, plain = mask_of_ones(2, 4, torch.device("cpu")), torch.ones(2, 4, dtype=torch.bool)
        copies = [copy_of(ones), copy_of(plain)]
        assert [is_mask_of_ones(mask) for mask in (ones, plain, *copies)] == [True, False, True, False]
        assert attention_mask(2, 4, 4, attention_mask=ones).spec.padding_mask is None
        for mask in (ones, *copies):
            mask[1, 2:] = False
            assert not is_mask_of_ones(mask)
            assert attention_mask(2, 4, 4, attention_mask=mask).state.layout().key.lengths == (4, 2)
        assert plain.all()
        assert not is_mask_of_ones(copy_of(ones))
