"""Gather and scatter: Triton's kernels, interpreted where there is no GPU, against torch's indexing."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_flashinfer_attn.kernels import pad_head_dim
from hf_flashinfer_attn.kernels.pad_head_dim import GatherQkv, ScatterOutput, aligned, scratch_bytes
from hf_flashinfer_attn.ragged import token_map
from hf_flashinfer_attn.ragged.token_map import TokenMap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def through(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Moves data with torch, or with Triton's kernels, which a CPU interprets; else the device decides."""
    is_triton = request.param == "triton"
    if is_triton:
        pytest.importorskip("triton")
    for module in (pad_head_dim, token_map):
        monkeypatch.setattr(module, "use_triton", lambda tensor: is_triton)
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
    return str(request.param)


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


@pytest.mark.usefixtures("through")
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_in_one_head_stays_there(value: float) -> None:
    query, key, values = sides(2, [(3, 5, 32)] * 3, torch.float16)
    key[0, 1, 2] = values[0, 1, 2] = value
    packed_query, packed_key, packed_value = GatherQkv(None, None, 64)(query, key, values)
    logits = torch.einsum("qhd,khd->hqk", packed_query.float(), packed_key.float())
    sees_it = torch.zeros_like(logits, dtype=torch.bool)
    sees_it[1, :, 2] = True
    assert logits[~sees_it].isfinite().all()
    assert not logits[sees_it].isfinite().any()
    output = torch.einsum("hqk,khd->hqd", torch.ones_like(logits), packed_value.float())[..., :32]
    assert output[[0, 2]].isfinite().all()
    assert not output[1].isfinite().any()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    VALID,
    st.sampled_from([(3, 3), (6, 2), (12, 12), (1, 1)]),
    st.sampled_from([(32, 32, 64), (26, 40, 64), (64, 64, 64), (72, 8, 128)]),
    st.booleans(),
)
def test_tokens_go_where_indexing_puts_them_and_back(through: str, valid, heads, dims, leases: bool) -> None:
    query_valid, key_valid = (torch.tensor(side, device=DEVICE) for side in valid)
    rows, size = len(query_valid), dims[2]
    shapes = [(heads[0], query_valid.shape[1], dims[0]), *((heads[1], key_valid.shape[1], dim) for dim in dims[:2])]
    query, key, value = sides(rows, shapes, torch.float16)
    maps = [TokenMap.of(side, int(side.sum())) for side in (query_valid, key_valid)]
    for side, found in zip((query_valid, key_valid), maps):
        assert torch.equal(found.positions, side.flatten().nonzero()[:, 0])
        assert torch.equal(found.tokens[side.flatten()], torch.arange(len(found.positions), device=DEVICE))
        assert (found.tokens[~side.flatten()] == -1).all()
        # With room for all, and nothing beyond the last token that could not be read.
        unread = TokenMap.of(side, None)
        assert torch.equal(unread.tokens, found.tokens)
        assert torch.equal(unread.positions[: len(found.positions)], found.positions)
        assert unread.positions.shape == found.tokens.shape
        assert not unread.positions[len(found.positions) :].any()
    num_queries, num_keys = (len(found.positions) for found in maps)
    scratch = None
    if leases:
        num_bytes = scratch_bytes(num_queries, num_keys, *heads, size, dims[1], 2)
        scratch = torch.full((num_bytes,), 0xFF, dtype=torch.uint8, device=DEVICE)
    gather = GatherQkv(maps[0].positions, maps[1].positions, size, scratch)
    gather(torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value))  # the second call is the quick one
    packed = gather(query, key, value)
    check_packed(packed, (query, key, value), (query_valid, key_valid, key_valid), size)
    output = torch.randn(num_queries, heads[0], size, dtype=torch.float16, device=DEVICE)
    if (buffer := gather.output_buffer) is not None:
        output = buffer.copy_(output)
        check_packed(packed, (query, key, value), (query_valid, key_valid, key_valid), size)
    assert (buffer is not None) == (leases and through == "triton")
    scatter = ScatterOutput(maps[0].tokens, tuple(query_valid.shape), dims[1])
    scatter(torch.zeros_like(output))
    padded = scatter(output)
    assert padded.is_contiguous()
    assert torch.equal(padded[query_valid], output[..., : dims[1]])
    assert not padded[~query_valid].any()


@pytest.mark.usefixtures("through")
@pytest.mark.parametrize("dims", [(24, 24, 64), (64, 64, 64), (80, 72, 128)])
def test_without_padding_only_head_dim_changes(dims: tuple[int, int, int]) -> None:
    query, key, value = sides(3, [(4, 5, dims[0]), (2, 7, dims[0]), (2, 7, dims[1])], torch.bfloat16)
    everything = torch.ones(3, 7, dtype=torch.bool, device=DEVICE)
    packed = GatherQkv(None, None, dims[2])(query, key, value)
    check_packed(packed, (query, key, value), (everything[:, :5], everything, everything), dims[2])
    output = torch.randn(15, 4, dims[2], dtype=torch.bfloat16, device=DEVICE)
    padded = ScatterOutput(None, (3, 5), dims[1])(output)
    assert torch.equal(padded.flatten(0, 1), output[..., : dims[1]])


def test_what_fits_is_not_copied() -> None:
    whole = torch.randn(3, 5, 3 * 4, 64)
    query, key, value = whole.transpose(1, 2).chunk(3, dim=1)  # out of one fused projection
    packed = GatherQkv(None, None, 64)(query, key, value)
    for side, tokens in zip((query, key, value), packed):
        assert tokens.data_ptr() == side.data_ptr()
        assert torch.equal(tokens, side.transpose(1, 2).flatten(0, 1))
    output = torch.randn(15, 4, 64)
    assert ScatterOutput(None, (3, 5), 64)(output).data_ptr() == output.data_ptr()
    # Rows that are further apart than their slots are long are no single run.
    some = whole[:, :4].transpose(1, 2).chunk(3, dim=1)
    for side, tokens in zip(some, GatherQkv(None, None, 64)(*some)):
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
