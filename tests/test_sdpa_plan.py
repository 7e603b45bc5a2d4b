"""Plans of torch's fused kernels: what the kernels, which no CPU has, are called with, and when they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import bidirectional_mask_function

import hf_flashinfer_attn
from hf_flashinfer_attn.attention.plan import SdpaPlan, make_plan
from hf_flashinfer_attn.attention.select import Backend, Choice
from hf_flashinfer_attn.attention.spec import AttentionInputs
from hf_flashinfer_attn.integration.functions import attention_mask
from hf_flashinfer_attn.ragged.band import CAUSAL, FULL, Pattern
from hf_flashinfer_attn.settings import Settings

SCALE = 0.3
aten = torch.ops.aten
NAMED = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


class Kernels(TorchDispatchMode):
    """Stands in for the kernels called by name, by the names of their arguments in torch's own schema."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in NAMED:
            return func(*args, **(kwargs or {}))
        given = {**dict(zip((one.name for one in func._schema.arguments), args)), **(kwargs or {})}
        self.called.append(func._schema.name.removeprefix("aten::_scaled_dot_product_"))
        assert given.get("dropout_p", 0.0) == 0.0
        assert not given.get("return_debug_mask", False)
        assert not given.get("compute_log_sumexp", False)
        query, key, value, bias = given["query"], given["key"], given["value"], given.get("attn_bias")
        if bias is not None:
            assert bias.shape == (*query.shape[:3], key.shape[2])
            # What the kernel asks of rows, but for those that are repeated.
            assert bias.stride(-1) == 1
            assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
        logits = query.double() @ key.double().transpose(-1, -2) * given["scale"]
        if bias is not None:
            logits = logits + bias.double()
        if given.get("is_causal", False):
            logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        output = (logits.softmax(-1) @ value.double()).to(query.dtype)
        others = (output.new_empty(0) if str(one.type) == "Tensor" else 0 for one in func._schema.returns[1:])
        return (output, *others)


def sides(rows: int, queries: int, keys: int, *, heads: int = 2, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """As layers make them: views of `(batch, length, heads, head_dim)`."""
    return [torch.randn(rows, length, heads, 32, dtype=dtype).transpose(1, 2) for length in (queries, keys, keys)]


def plan_of(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern = FULL, valid: Tensor | None = None
) -> SdpaPlan:
    """Plans attention of full rows, or with a mask of valid keys, `(rows, keys)`, whose lengths nobody reads."""
    mask, choice = None, Choice(Backend.FLASHINFER)
    if valid is not None:
        rows, length = query.shape[0], query.shape[2]
        mask = attention_mask(
            rows, length, key.shape[2], mask_function=bidirectional_mask_function, attention_mask=valid
        )
        choice = Choice(Backend.SDPA)
    inputs = AttentionInputs(query, key, value, pattern, SCALE, "", object(), mask)
    with hf_flashinfer_attn.trace() as trace:
        plan = make_plan(inputs.spec(), choice, inputs.find_state(), Settings())
    assert isinstance(plan, SdpaPlan)
    assert valid is None or trace.layouts == 0
    return plan


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("pattern", "queries", "keys"), [(FULL, 5, 5), (FULL, 3, 7), (CAUSAL, 5, 5)], ids=["full", "across", "causal"]
)
def test_flash_by_name_is_sdpa(pattern: Pattern, queries: int, keys: int, dtype: torch.dtype) -> None:
    query, key, value = sides(2, queries, keys, dtype=dtype)
    with Kernels() as kernels:
        output = plan_of(query, key, value, pattern)(query, key, value)
    assert kernels.called == ["flash_attention"]
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=pattern == CAUSAL, scale=SCALE)
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=0.02, atol=0.02)


def test_what_torch_refuses_is_not_called_by_name() -> None:
    for rows, length in ((0, 5), (2, 0)):
        query, key, value = sides(rows, length, length)
        with Kernels() as kernels:
            output = plan_of(query, key, value)(query, key, value)
        assert output.shape == (rows, length, 2, 32)
        assert kernels.called == []
    query, _, _ = sides(2, 5, 5, heads=4)
    _, key, value = sides(2, 5, 5)
    assert not plan_of(query, key, value).calls_directly


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_torchs_switches_count_when_a_layer_runs(padded: bool) -> None:
    query, key, value = sides(2, 5, 5)
    valid = torch.arange(5) < torch.tensor([[5], [3]]) if padded else None
    own = SDPBackend.EFFICIENT_ATTENTION if padded else SDPBackend.FLASH_ATTENTION
    for allowed in ([], [SDPBackend.CUDNN_ATTENTION], [own]):
        # Planned without the switches and with them: the decision is not kept.
        plan = plan_of(query, key, value, valid=valid)
        with Kernels() as kernels, sdpa_kernel([SDPBackend.MATH, *allowed]):
            switched = plan(query, key, value)
            plan = plan_of(query, key, value, valid=valid)
        assert kernels.called == []
        with kernels:
            output = plan(query, key, value)
        assert len(kernels.called) == 1
        torch.testing.assert_close(output, switched, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 13), (16, 16)])
def test_memory_efficient_by_name_is_sdpa(queries: int, keys: int, dtype: torch.dtype) -> None:
    query, key, value = sides(3, queries, keys, dtype=dtype)
    valid = torch.arange(keys) < torch.tensor([[keys], [keys - 3], [1]])
    with Kernels() as kernels:
        output = plan_of(query, key, value, valid=valid)(query, key, value)
    assert kernels.called == ["efficient_attention"]
    expected = F.scaled_dot_product_attention(query, key, value, valid[:, None, None], scale=SCALE)
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=0.02, atol=0.02)
