"""Gather and scatter: Triton's kernels, interpreted where there is no GPU, against torch's indexing."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashinfer_attn.kernels.pad_head_dim import Packer, Unpacker, aligned
from hf_flashinfer_attn.ragged.token_map import TokenMap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from hf_flashinfer_attn.kernels import triton_pad as kernels

    return kernels


def sides(rows: int, shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Views `(rows, heads, slots, head_dim)` with gaps of NaN between heads, as a fused projection leaves them."""
    made = []
    for heads, slots, head_dim in shapes:
        whole = torch.full((rows, slots, heads, head_dim + 8), float("nan"), dtype=dtype, device=DEVICE)
        whole[..., :head_dim] = torch.randn(rows, slots, heads, head_dim)
        made.append(whole[..., :head_dim].transpose(1, 2))
    return made


def plain_pack(side: torch.Tensor, valid: torch.Tensor, size: int) -> torch.Tensor:
    tokens = side.transpose(1, 2)[valid]
    return torch.cat([tokens, tokens.new_zeros(*tokens.shape[:2], size - tokens.shape[2])], dim=2)


def check_packed(packed, sides: tuple[torch.Tensor, ...], valid: tuple[torch.Tensor, ...], size: int) -> None:
    """Queries and keys have zeros beyond head_dim; values anything finite that is inside their memory."""
    for name, side, tokens, where in zip(("query", "key", "value"), sides, packed, valid):
        expected = plain_pack(side, where, size)
        assert tokens.shape == expected.shape
        kept = side.shape[-1] if name == "value" else size
        assert torch.equal(tokens[..., :kept], expected[..., :kept])
        assert tokens.isfinite().all()
        assert tokens.data_ptr() % 16 == 0
        assert all(stride * tokens.element_size() % 16 == 0 for stride in tokens.stride()[:-1])


VALID = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda sizes: st.tuples(
        *(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=sizes[0], max_size=sizes[0])
          for n in sizes[1:])
    )
)  # fmt: skip


@pytest.mark.parametrize("through", ["torch", "triton"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_in_one_head_stays_there(kernels: ModuleType, through: str, value: float) -> None:
    query, key, values = sides(2, [(3, 5, 32)] * 3, torch.float16)
    key[0, 1, 2] = values[0, 1, 2] = value
    packer = (Packer if through == "torch" else kernels.Packer)(None, None, 64)
    packed_query, packed_key, packed_value = packer(query, key, values)
    logits = torch.einsum("qhd,khd->hqk", packed_query.float(), packed_key.float())
    sees_it = torch.zeros_like(logits, dtype=torch.bool)
    sees_it[1, :, 2] = True
    assert logits[~sees_it].isfinite().all()
    assert not logits[sees_it].isfinite().any()
    output = torch.einsum("hqk,khd->hqd", torch.ones_like(logits), packed_value.float())[..., :32]
    assert output[[0, 2]].isfinite().all()
    assert not output[1].isfinite().any()


@pytest.mark.parametrize("through", ["torch", "triton"])
@settings(max_examples=20)
@given(
    VALID,
    st.sampled_from([(3, 3), (6, 2), (12, 12), (1, 1)]),
    st.sampled_from([(32, 32, 64), (26, 40, 64), (64, 64, 64), (72, 8, 128)]),
)
def test_tokens_go_where_indexing_puts_them_and_back(through: str, kernels, valid, heads, dims) -> None:
    query_valid, key_valid = (torch.tensor(side, device=DEVICE) for side in valid)
    rows, size = len(query_valid), dims[2]
    query, key, value = sides(
        rows,
        [(heads[0], query_valid.shape[1], dims[0]), (heads[1], key_valid.shape[1], dims[0]),
         (heads[1], key_valid.shape[1], dims[1])],
        torch.float16,
    )  # fmt: skip
    maps = [TokenMap.of(side, int(side.sum())) for side in (query_valid, key_valid)]
    for side, found in zip((query_valid, key_valid), maps):
        assert torch.equal(found.slots, side.flatten().nonzero()[:, 0])
        assert torch.equal(found.tokens >= 0, side.flatten())
        if through == "triton":
            ranks = side.flatten().cumsum(0, dtype=torch.int32)
            from hf_flashinfer_attn.ragged.triton_tokens import number_tokens

            slots, tokens = number_tokens(side.flatten(), ranks, int(side.sum()))
            assert torch.equal(slots, found.slots)
            assert torch.equal(tokens, found.tokens)
            slots, tokens = number_tokens(side.flatten(), ranks, None)
            assert torch.equal(tokens, found.tokens)
        else:
            slots = TokenMap.of(side, None).slots
        # With room for all, and nothing beyond the last token that could not be read.
        assert torch.equal(slots[: len(found.slots)], found.slots)
        assert slots.shape == found.tokens.shape
        assert not slots[len(found.slots) :].any()
    pack = (Packer if through == "torch" else kernels.Packer)(maps[0].slots, maps[1].slots, size)
    pack(torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value))  # the second call is the quick one
    packed = pack(query, key, value)
    check_packed(packed, (query, key, value), (query_valid, key_valid, key_valid), size)
    output = torch.randn(len(maps[0].slots), heads[0], size, dtype=torch.float16, device=DEVICE)
    unpack = (Unpacker if through == "torch" else kernels.Unpacker)(maps[0].tokens, tuple(query_valid.shape), dims[1])
    unpack(torch.zeros_like(output))
    padded = unpack(output)
    assert padded.is_contiguous()
    assert torch.equal(padded[query_valid], output[..., : dims[1]])
    assert not padded[~query_valid].any()


@pytest.mark.parametrize("through", ["torch", "triton"])
@pytest.mark.parametrize("dims", [(24, 24, 64), (64, 64, 64), (80, 72, 128)])
def test_without_padding_only_head_dim_changes(through: str, kernels, dims: tuple[int, int, int]) -> None:
    query, key, value = sides(3, [(4, 5, dims[0]), (2, 7, dims[0]), (2, 7, dims[1])], torch.bfloat16)
    everything = torch.ones(3, 7, dtype=torch.bool, device=DEVICE)
    packed = (Packer if through == "torch" else kernels.Packer)(None, None, dims[2])(query, key, value)
    check_packed(packed, (query, key, value), (everything[:, :5], everything, everything), dims[2])
    output = torch.randn(15, 4, dims[2], dtype=torch.bfloat16, device=DEVICE)
    padded = (Unpacker if through == "torch" else kernels.Unpacker)(None, (3, 5), dims[1])(output)
    assert torch.equal(padded.flatten(0, 1), output[..., : dims[1]])


def test_what_fits_is_not_copied() -> None:
    whole = torch.randn(3, 5, 3 * 4, 64)
    query, key, value = whole.transpose(1, 2).chunk(3, dim=1)  # out of one fused projection
    packed = Packer(None, None, 64)(query, key, value)
    for side, tokens in zip((query, key, value), packed):
        assert tokens.data_ptr() == side.data_ptr()
        assert torch.equal(tokens, side.transpose(1, 2).flatten(0, 1))
    output = torch.randn(15, 4, 64)
    assert Unpacker(None, (3, 5), 64)(output).data_ptr() == output.data_ptr()
    # Rows that are further apart than their slots are long are no single run.
    some = whole[:, :4].transpose(1, 2).chunk(3, dim=1)
    for side, tokens in zip(some, Packer(None, None, 64)(*some)):
        assert torch.equal(tokens, side.transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("start", [0, 1, 8])
@pytest.mark.parametrize("is_contiguous", [True, False], ids=["contiguous", "transposed"])
def test_what_kernels_cannot_read_is_copied_to_where_they_can(start: int, is_contiguous: bool) -> None:
    flat = torch.randn(start + 48, dtype=torch.float16)[start:]
    side = flat.view(1, 2, 3, 8) if is_contiguous else flat.view(1, 3, 2, 8).transpose(1, 2)
    found = aligned(side)
    assert torch.equal(found, side)
    assert found.data_ptr() % 16 == 0
    assert (found is side) == (start % 8 == 0)
