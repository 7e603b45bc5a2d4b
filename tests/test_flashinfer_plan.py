"""Plans of FlashInfer's kernels: all but the kernels themselves, which a reference replaces on the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from hf_flashinfer_attn.attention.plan import FlashInferPlan, make_plan, plan_flashinfer
from hf_flashinfer_attn.attention.select import Backend, Choice
from hf_flashinfer_attn.attention.spec import AttentionInputs
from hf_flashinfer_attn.integration.functions import attention_mask
from hf_flashinfer_attn.kernels import flashinfer, pad_head_dim, torch_ragged
from hf_flashinfer_attn.kernels.wrapper_pool import PlanKey
from hf_flashinfer_attn.ragged.band import FULL, Band, Pattern
from hf_flashinfer_attn.ragged.forward_state import ForwardState
from hf_flashinfer_attn.ragged.layout import RaggedLayout
from hf_flashinfer_attn.ragged.lazy_mask import RaggedMask
from hf_flashinfer_attn.settings import Settings

VALID = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 1, 0, 0, 0]]).bool()
MASKS = {
    "full": bidirectional_mask_function, "causal": causal_mask_function,
    "behind": sliding_window_causal_mask_function(3), "around": sliding_window_bidirectional_mask_function(2),
}  # fmt: skip


class Reference:
    """A planned wrapper, and what makes its kernels' numbers."""

    def __init__(self, layout: RaggedLayout, key: PlanKey) -> None:
        self.layout, self.key, self.prefill = layout, key, self

    def run(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
        assert query.shape[2] == key.shape[2] == value.shape[2] == self.key.head_dim
        assert out.is_contiguous()
        plan = self.key
        left = None if plan.window_left < 0 else plan.window_left
        tokens = [side.clone() for side in (query, key, value)]
        # Like the kernels, which read no padding and keep what belongs to no row.
        count = self.layout.query.total_tokens
        out[:count] = torch_ragged.attend(
            *(side[: self.layout.key.total_tokens] if place else side[:count] for place, side in enumerate(tokens)),
            self.layout, left=left, right=0 if plan.causal else None, sm_scale=plan.sm_scale,
            softcap=plan.softcap or None,
        )  # fmt: skip


@pytest.fixture(autouse=True, params=["torch", "triton"])
def _kernels_on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces what needs a GPU: the kernels, their compilation, and the current device."""
    is_triton = request.param == "triton"
    if is_triton:
        pytest.importorskip("triton")
    monkeypatch.setattr(flashinfer, "planned", Reference)
    monkeypatch.setattr(flashinfer.jit, "require", lambda module: None)
    monkeypatch.setattr(pad_head_dim, "use_triton", lambda tensor: is_triton)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def sides(queries: int, keys: int, heads: tuple[int, int], dims: tuple[int, int], rows: int = 4) -> list[torch.Tensor]:
    shapes = (heads[0], queries, dims[0]), (heads[1], keys, dims[0]), (heads[1], keys, dims[1])
    return [torch.randn(rows, length, count, dim).transpose(1, 2) for count, length, dim in shapes]


def plans_of(
    tensors: list[torch.Tensor], mask: RaggedMask | None, pattern: Pattern = FULL, state: ForwardState | None = None,
    padded_queries: str | None = None,
) -> tuple[FlashInferPlan, Any]:  # fmt: skip
    """Returns a plan of FlashInfer's kernels, and one of torch attention of the same call."""
    pattern = pattern if mask is None else mask.spec.pattern
    inputs = AttentionInputs(
        *tensors, pattern, 0.3, "", object(), mask, padded_queries=padded_queries, state=state, softcap=5.0
    )
    spec, settings = inputs.spec(), Settings()
    layout = inputs.find_state().layout(keep_padded_queries=spec.keeps_padded_queries)
    plan = plan_flashinfer(spec, layout, "fa2", settings, state=inputs.find_state())
    assert isinstance(plan, FlashInferPlan)
    return plan, make_plan(spec, Choice(Backend.TORCH), inputs.find_state(), settings)


@pytest.mark.parametrize("dims", [(24, 24), (64, 64), (72, 40)], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("valid", [VALID[:3], None, VALID], ids=["padded", "full", "holes"])
@pytest.mark.parametrize("pattern", MASKS)
def test_a_plan_is_torch_attention(pattern: str, valid: Any, heads: tuple[int, int], dims: tuple[int, int]) -> None:
    rows = 4 if valid is None else len(valid)
    mask = attention_mask(rows, 7, 7, mask_function=MASKS[pattern], attention_mask=valid)
    tensors = sides(7, 7, heads, dims, rows)
    plan, expected = plans_of(tensors, mask)
    outputs = []
    # The second call is the quick one, in the same scratch memory.
    for _ in range(2):
        tensors = sides(7, 7, heads, dims, rows)
        outputs.append((plan(*tensors), expected(*tensors)))
    for output, right in outputs:
        assert output.is_contiguous()
        torch.testing.assert_close(output, right, rtol=0, atol=1e-5)
        if valid is not None:
            assert not output[~valid].any()


@pytest.mark.parametrize("queries", [1, 3, 7])
@pytest.mark.parametrize("pattern", [*MASKS, "kept"])
def test_queries_after_cached_keys(pattern: str, queries: int) -> None:
    function = MASKS.get(pattern, bidirectional_mask_function)
    mask = attention_mask(4, queries, 7, 7 - queries, mask_function=function, attention_mask=VALID)
    tensors = sides(queries, 7, (4, 2), (24, 24))
    plan, expected = plans_of(tensors, mask, padded_queries="why" if pattern == "kept" else None)
    torch.testing.assert_close(plan(*tensors), expected(*tensors), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "band", [Band(), Band(right=0), Band(2, 0), Band(2, 3), Band(None, 2), Band(3, None), Band(9, 9)]
)
def test_packed_sequences(band: Band) -> None:
    for lengths in (([5, 1, 4], None), ([2, 0, 3], [4, 6, 3]), ([0, 0], [1, 2]), ([1, 2], [0, 0])):
        state = ForwardState(RaggedLayout.from_lengths(*lengths))
        queries, keys = sum(lengths[0]), sum(lengths[1] or lengths[0])
        tensors = sides(queries, keys, (2, 2), (64, 64), 1)
        plan, expected = plans_of(tensors, None, band, state)
        torch.testing.assert_close(plan(*tensors), expected(*tensors), rtol=0, atol=1e-5)


def test_tokens_of_no_row_get_zeros_in_a_graph() -> None:
    state = ForwardState(RaggedLayout.for_graph([3, 2], rows=4, tokens=9, workspace=object()))
    tensors = sides(9, 9, (2, 2), (24, 24), 1)
    plan, _ = plans_of(tensors, None, state=state)
    plan(*tensors)
    if (buffer := plan.gather.output_buffer) is not None:
        buffer.fill_(torch.nan)
    output = plan(*tensors)
    assert output[:, :5].any()
    assert not output[:, 5:].any()
