"""Properties that hold whatever the lengths, sides, holes, heads, head dims and patterns."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils as masks

from hf_flashinfer_attn.integration.functions import attention_forward, attention_mask
from hf_flashinfer_attn.ragged.lazy_mask import RaggedMask

PATTERNS = {
    "full": masks.bidirectional_mask_function,
    "causal": masks.causal_mask_function,
    "window": masks.sliding_window_causal_mask_function(3),
    "two-sided window": masks.sliding_window_bidirectional_mask_function(2),
}
WIDTH = 9


class SelfAttention(torch.nn.Module):
    def forward(self, hidden_states, attention_mask): ...


def rows_of(side: str) -> st.SearchStrategy[list[bool]]:
    if side == "holes":
        return st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH)
    valid = st.integers(0, WIDTH).map(lambda length: [True] * length + [False] * (WIDTH - length))
    return valid if side == "right" else valid.map(lambda row: row[::-1])


BATCHES = st.sampled_from(["right", "left", "holes"]).flatmap(
    lambda side: st.lists(rows_of(side), min_size=1, max_size=4)
)
EACH_PATTERN = st.sampled_from(list(PATTERNS))
HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)])
DIMS = st.sampled_from([(8, 8), (26, 26), (12, 5)])


def draw(valid: torch.Tensor, heads=(4, 2), dims=(8, 8)) -> tuple[torch.Tensor, ...]:
    rows, width = valid.shape
    shapes = ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]))
    return tuple(torch.randn(rows, count, width, dim, dtype=torch.float64) for count, dim in shapes)


def mask_of(valid: torch.Tensor, pattern: str) -> RaggedMask:
    rows, width = valid.shape
    return attention_mask(
        rows, width, width, mask_function=PATTERNS[pattern], attention_mask=valid, dtype=torch.float64
    )


def attend(tensors: tuple[torch.Tensor, ...], mask: torch.Tensor | None, **options: object) -> torch.Tensor:
    return attention_forward(SelfAttention(), *tensors, mask, **options)[0]


def naive(tensors: tuple[torch.Tensor, ...], valid: torch.Tensor, pattern: str) -> torch.Tensor:
    query, key, value = tensors
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * query.shape[-1] ** -0.5
    positions = torch.arange(valid.shape[1])
    allowed = PATTERNS[pattern](torch.tensor(0), torch.tensor(0), positions[:, None], positions) & valid[:, None, :]
    weights = logits.masked_fill(~allowed[:, None], float("-inf")).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)


@settings(max_examples=60)
@given(BATCHES, EACH_PATTERN, HEADS, DIMS)
def test_attention_is_attention_and_padding_is_zero(rows, pattern, heads, dims) -> None:
    valid = torch.tensor(rows)
    tensors = draw(valid, heads, dims)
    poisoned = tuple(tensor.masked_fill(~valid[:, None, :, None], float("nan")) for tensor in tensors)
    mask = mask_of(valid, pattern)
    output = attend(tensors if mask.state.has_holes else poisoned, mask)
    torch.testing.assert_close(output[valid], naive(tensors, valid, pattern)[valid])
    if not mask.state.has_holes:
        assert output[~valid].abs().sum() == 0


@settings(max_examples=40)
@given(BATCHES, EACH_PATTERN, st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_output(rows, pattern, random) -> None:
    valid = torch.tensor(rows)
    tensors = draw(valid)
    order = list(range(len(rows)))
    random.shuffle(order)
    output = attend(tensors, mask_of(valid, pattern))
    permuted = attend(tuple(tensor[order] for tensor in tensors), mask_of(valid[order], pattern))
    torch.testing.assert_close(permuted[valid[order]], output[order][valid[order]])


@settings(max_examples=40)
@given(BATCHES, EACH_PATTERN, st.integers(1, 4), st.booleans())
def test_more_padding_changes_nothing(rows, pattern, extra: int, on_the_left: bool) -> None:
    valid = torch.tensor(rows)
    tensors = draw(valid)
    sides = (extra, 0) if on_the_left else (0, extra)
    padded = tuple(torch.nn.functional.pad(tensor, (0, 0, *sides), value=5.0) for tensor in tensors)
    wider = torch.nn.functional.pad(valid, sides)
    output = attend(tensors, mask_of(valid, pattern))
    torch.testing.assert_close(attend(padded, mask_of(wider, pattern))[wider], output[valid])


@settings(max_examples=40)
@given(st.lists(st.integers(1, WIDTH), min_size=1, max_size=5), EACH_PATTERN)
def test_packed_equals_padded(lengths: list[int], pattern: str) -> None:
    valid = torch.arange(WIDTH) < torch.tensor(lengths)[:, None]
    tensors = draw(valid)
    packed = tuple(tensor.transpose(1, 2)[valid].transpose(0, 1)[None] for tensor in tensors)
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    everywhere = torch.ones(1, sum(lengths), dtype=torch.bool)
    output = attend(packed, mask_of(everywhere, pattern), cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)
    torch.testing.assert_close(output[0], attend(tensors, mask_of(valid, pattern))[valid])
