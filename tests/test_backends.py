from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import hf_flashinfer_attn
from hf_flashinfer_attn.attention.spec import AttentionInputs
from hf_flashinfer_attn.integration.flash_api import flash_attn_func, flash_attn_varlen_func
from hf_flashinfer_attn.integration.functions import attention_forward
from hf_flashinfer_attn.kernels import dense, flashinfer
from hf_flashinfer_attn.kernels import torch_ragged as reference
from hf_flashinfer_attn.kernels import wrapper_pool as wrappers
from hf_flashinfer_attn.ragged.band import FULL
from hf_flashinfer_attn.ragged.layout import RaggedLayout, RaggedSide
from hf_flashinfer_attn.tools.accuracy import measure_kernel_error

HEAD_DIMS = (8, 16, 24, 26, 32, 48, 64, 72, 80, 96, 112, 120, 128, 192, 256)
BOUND = st.one_of(st.none(), st.integers(0, 4))
LENGTHS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=1, max_size=6)


def naive(
    query, key, value, *, left: int | None, right: int | None, softcap: float | None, bias=None, sinks=None
) -> torch.Tensor:
    """Attention of one row, written out: `(tokens, heads, dim)`."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = torch.einsum("qhd,khd->hqk", query, key) * 0.7
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    for q in range(len(query)):
        for k in range(len(key)):
            distance = k - (q + len(key) - len(query))
            if (left is not None and distance < -left) or (right is not None and distance > right):
                logits[:, q, k] = float("-inf")
    weights = logits.softmax(-1)
    if sinks is not None:
        weights = torch.cat([logits, sinks[:, None, None].expand(-1, len(query), 1)], -1).softmax(-1)[..., :-1]
    return torch.einsum("hqk,khd->qhd", weights.nan_to_num(0.0), value)


@given(
    LENGTHS,
    st.tuples(BOUND, BOUND),
    st.sampled_from([None, 0.5]),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.sampled_from([(4, 4), (6, 3)]),
)
def test_the_reference_is_attention(lengths, band, softcap, heads: tuple[int, int], dims: tuple[int, int]) -> None:
    options = {"left": band[0], "right": band[1], "softcap": softcap}
    query_lengths, key_lengths = zip(*lengths)
    layout = RaggedLayout.from_lengths(query_lengths, key_lengths)
    query = torch.randn(sum(query_lengths), heads[0], dims[0], dtype=torch.float64)
    key = torch.randn(sum(key_lengths), heads[1], dims[0], dtype=torch.float64)
    value = torch.randn(sum(key_lengths), heads[1], dims[1], dtype=torch.float64)
    output = reference.attend(query, key, value, layout, sm_scale=0.7, **options)
    rows = zip(query.split(query_lengths), key.split(key_lengths), value.split(key_lengths))
    expected = torch.cat([naive(*row, **options) for row in rows])
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


@given(
    st.integers(1, 4).flatmap(
        lambda rows: st.tuples(*(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=rows, max_size=rows)
                                 for n in (5, 6)))
    ),
    st.sampled_from([(1, 1), (1, 2), (None, 1), (None, 2)]),
    st.sampled_from([(None, None), (None, 0), (2, 1)]),
    st.booleans(),
    st.sampled_from([None, 0.5]),
)  # fmt: skip
def test_a_bias_is_found_by_slot_and_sinks_take_their_share(valid, shared, band, with_sinks: bool, softcap) -> None:
    # Padding of any shape on both sides, holes and rows without any token included.
    query_valid, key_valid = (torch.tensor(side) for side in valid)
    rows = len(query_valid)
    query_side, key_side = (
        RaggedSide(side.sum(1).tolist(), (rows, side.shape[1]), side) for side in (query_valid, key_valid)
    )
    query = torch.randn(rows, 5, 2, 3, dtype=torch.float64)
    key, value = torch.randn(2, rows, 6, 2, 3, dtype=torch.float64)
    bias = torch.randn(shared[0] or rows, shared[1], 5, 6, dtype=torch.float64).expand(rows, 2, 5, 6)
    options = {
        "left": band[0], "right": band[1], "softcap": softcap,
        "sinks": torch.randn(2, dtype=torch.float64) if with_sinks else None,
    }  # fmt: skip
    output = reference.attend(
        query_side.gather(query), key_side.gather(key), key_side.gather(value), RaggedLayout(query_side, key_side),
        sm_scale=0.7, bias=bias, **options,
    )  # fmt: skip
    expected = [
        naive(query[row, q], key[row, k], value[row, k], bias=bias[row][:, q][:, :, k], **options)
        for row, (q, k) in enumerate(zip(query_valid, key_valid))
    ]
    torch.testing.assert_close(output, torch.cat(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((2, 2, 5, 7), False), ((3, 2, 5, 6), False), ((2, 5, 6), False), ((1, 4, 1, 6), False), ((1, 2, 1, 6), True),
     ((2, 1, 5, 1), True)],
)  # fmt: skip
def test_a_bias_of_another_shape_does_not_fit(shape: tuple[int, ...], fits: bool) -> None:
    query, key = torch.zeros(2, 2, 5, 4), torch.zeros(2, 2, 6, 4)
    inputs = AttentionInputs(query, key, key, FULL, 1.0, "", object(), position_bias=torch.zeros(shape))
    bias = inputs.bias()
    assert (None if bias is None else bias.shape) == ((2, 2, 5, 6) if fits else None)
    assert (inputs.spec().whole_mask is None) == fits


def test_the_reference_is_differentiable() -> None:
    layout = RaggedLayout.from_lengths([3, 0, 2], [4, 2, 2])
    inputs = [torch.randn(n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (5, 8, 8)]
    sinks, bias = torch.randn(2, dtype=torch.float64), torch.randn(1, 1, 2, 3, dtype=torch.float64)
    extras = [sinks.requires_grad_(), bias.requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda *tensors: reference.attend(*tensors, layout, left=1, right=0, sm_scale=0.5), inputs
    )
    even = RaggedLayout(RaggedSide([2, 1], (2, 2), torch.tensor([[True, True], [False, True]])),
                        RaggedSide([2, 3], (2, 3), torch.tensor([[True, False, True], [True] * 3])))  # fmt: skip

    def biased(query, key, value, sinks, bias) -> torch.Tensor:
        bias = bias.expand(2, 2, 2, 3)
        return reference.attend(query[:3], key[:5], value[:5], even, sm_scale=0.5, sinks=sinks, bias=bias)

    assert torch.autograd.gradcheck(biased, [*inputs, *extras])


@pytest.mark.parametrize("band", [(None, None), (None, 0), (5, 0), (3, 3)])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_torch_backend_is_as_exact_as_sdpa(head_dim: int, band: tuple[int | None, int | None]) -> None:
    error = measure_kernel_error(
        None, head_dim, dtype=torch.bfloat16, device=torch.device("cpu"), left=band[0], right=band[1],
        num_kv_heads=2, max_length=40,
    )  # fmt: skip
    assert error.ratio <= 1.25


@pytest.mark.parametrize("options", [{"softcap": 0.8}, {"sinks": True}, {"return_weights": True}, {}])
def test_the_dense_path_adds_every_extra(options: dict[str, object]) -> None:
    query, key, value = (torch.randn(2, heads, 5, 4, dtype=torch.float64) for heads in (4, 2, 2))
    mask = torch.rand(2, 1, 5, 5) < 0.7
    mask[..., 0] = True
    sinks = torch.randn(4, dtype=torch.float64) if options.pop("sinks", False) else None
    output, weights = dense.attend(query, key, value, mask, sm_scale=0.9, sinks=sinks, **options)
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(2, 1)) * 0.9
    if (cap := options.get("softcap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits.masked_fill(~mask, float("-inf"))
    top = logits.exp()
    total = top.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp().view(1, 4, 1, 1))
    expected_weights = top / total
    expected = torch.einsum("bhqk,bhkd->bqhd", expected_weights, value.repeat_interleave(2, 1))
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(output, expected, **tolerance)
    assert (weights is not None) == options.get("return_weights", False)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, **tolerance)
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    torch.testing.assert_close(
        dense.attend(query, key, value, additive, sm_scale=0.9, sinks=sinks, **options)[0], output
    )


@given(st.integers(1, 256))
def test_padded_sizes_are_the_smallest_that_the_kernels_have(head_dim: int) -> None:
    assert flashinfer.padded_head_dim(head_dim) == min(dim for dim in flashinfer.KERNEL_HEAD_DIMS if dim >= head_dim)


def test_head_dims_above_256_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head_dim=257.*at most 256.*backend='torch'"):
        flashinfer.padded_head_dim(257)


@pytest.mark.parametrize("masked", ["float", "bool"])
def test_queries_that_see_no_key_average_in_half_precision_too(masked: str) -> None:
    query, key, value = torch.randn(3, 2, 4, 5, 8).bfloat16()
    seen = torch.rand(2, 1, 5, 5) < 0.6
    seen[0, 0, 2:4] = False
    additive = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    output, _ = dense.attend(query, key, value, additive if masked == "float" else seen, sm_scale=1.0)
    logits = (query @ key.transpose(2, 3)) + additive
    expected = (logits.softmax(-1, dtype=torch.float32) @ value.float()).transpose(1, 2)
    torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_functions(causal: bool) -> None:
    query, key, value = (torch.randn(2, 3, heads, 8) for heads in (4, 2, 2))
    heads_first = (query.transpose(1, 2), *(side.repeat_interleave(2, 2).transpose(1, 2) for side in (key, value)))
    expected = F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)
    torch.testing.assert_close(flash_attn_func(query, key, value, causal=causal), expected)
    offsets = torch.tensor([0, 3, 6], dtype=torch.int32)
    packed = flash_attn_varlen_func(
        query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), offsets, offsets, 3, 3, causal=causal
    )
    torch.testing.assert_close(packed, expected.flatten(0, 1))


class _Layer(torch.nn.Module):
    is_causal = False

    def forward(self, hidden_states, attention_mask): ...


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("output_attentions", [False, True])
def test_a_bias_of_packed_sequences_is_by_place_or_by_slot(rows: int, output_attentions: bool) -> None:
    lengths, longest, total = (3, 5, 0, 2), 5, 10
    query, key, value = torch.randn(3, 1, 2, total, 8, dtype=torch.float64)
    by_place = torch.randn(rows, 2, longest, longest, dtype=torch.float64, requires_grad=True)
    offsets = RaggedLayout.from_lengths(lengths).query.cu_seqlens_host
    by_slot, expected = torch.zeros(1, 2, total, total, dtype=torch.float64), []
    for row, (start, length) in enumerate(zip(offsets.tolist(), lengths)):
        some, bias = slice(start, start + length), by_place.expand(4, -1, -1, -1)[row, :, :length, :length]
        by_slot[0, :, some, some] = bias.detach()
        sides = (side[0, :, some].transpose(0, 1) for side in (query, key, value))
        expected.append(naive(*sides, left=None, right=None, softcap=None, bias=bias))
    options = {"scaling": 0.7, "output_attentions": output_attentions, "cu_seq_lens_q": offsets}
    gradients = []
    for bias in (by_place, by_slot):
        with hf_flashinfer_attn.trace() as trace:
            output, weights = attention_forward(
                _Layer(), query, key, value, None, position_bias=bias, cu_seq_lens_k=offsets, **options
            )
        assert trace.kernels == (("torch",) if bias is by_place and not output_attentions else ("dense",))
        assert (weights is not None) == output_attentions
        torch.testing.assert_close(output[0], torch.cat(expected), rtol=1e-6, atol=1e-6)
        if bias.requires_grad:
            gradients = [torch.autograd.grad(out.square().sum(), bias)[0] for out in (output, torch.cat(expected))]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["bool", "additive", "2d"])
def test_masks_of_the_user(kind: str) -> None:
    query, key, value = (torch.randn(2, 2, 5, 8) for _ in range(3))
    valid = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
    allowed = valid[:, None, None, :].expand(2, 1, 5, 5)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed).transpose(1, 2)
    mask = {
        "bool": allowed,
        "additive": torch.zeros(2, 1, 5, 5).masked_fill(~allowed, torch.finfo(torch.float32).min),
        "2d": valid.long(),
    }[kind]
    output, weights = attention_forward(_Layer(), query, key, value, mask)
    assert weights is None
    torch.testing.assert_close(output[valid], expected[valid])
    if kind == "2d":
        assert output[~valid].abs().sum() == 0


def test_learned_queries_that_come_once_for_all_rows() -> None:
    query = torch.randn(1, 2, 3, 8)
    key, value = torch.randn(4, 2, 5, 8), torch.randn(4, 2, 5, 8)
    expected = F.scaled_dot_product_attention(query.expand(4, -1, -1, -1), key, value).transpose(1, 2)
    torch.testing.assert_close(attention_forward(_Layer(), query, key, value, None)[0], expected)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"window_size": (4, 0)}, r"window_size=\(4, 0\).*expected \(-1, -1\)"),
        ({"window_size": 7}, "window_size=7.*transformers' masks"),
        ({"softcap": 30.0}, "softcap=30.0.*expected 0"),
        ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes of shape \(2,\).*expected None"),
    ],
    ids=lambda options: "-".join(options) if isinstance(options, dict) else "",
)
def test_a_direct_call_names_the_value_that_it_refuses(options, named: str) -> None:
    tensors = torch.randn(3, 1, 5, 2, 8)
    with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match=named):
        flash_attn_func(*tensors, **options)
    offsets = torch.tensor([0, 2, 5])
    with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match=named):
        flash_attn_varlen_func(*tensors[:, 0], offsets, offsets, **options)


def test_a_capture_without_a_plan_says_on_which_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device, stream = torch.device("cuda", 1), 0x7F00
    key = wrappers.PlanKey("fa2", 2, 2, 64, torch.float16, False, -1, 0.125, 0.0, device, stream, False, False)
    layout = RaggedLayout.from_lengths([3, 4])
    with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match="stream 0x7f00 of cuda:1, nor on another"):
        wrappers.planned(layout, key)
    others = {"stream": 0}, {"stream": 0x10}, {"stream": 0x20, "head_dim": 128}
    layout.plans = {dataclasses.replace(key, **changes): None for changes in others}
    with pytest.raises(
        hf_flashinfer_attn.UnsupportedAttentionError, match=r"0x7f00 of cuda:1, only on 0x0, 0x10\. Run"
    ):
        wrappers.planned(layout, key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0, 50.0])
@pytest.mark.parametrize(("left", "right", "biased"), [(None, None, False), (4, 0, False), (None, None, True)])
def test_the_reference_is_as_exact_as_sdpa(
    left: int | None, right: int | None, biased: bool, softcap: float | None, dtype: torch.dtype
) -> None:
    result = measure_kernel_error(
        None, 32, dtype=dtype, device=torch.device("cpu"), left=left, right=right, softcap=softcap, biased=biased
    )
    assert result.ratio <= 1.25
