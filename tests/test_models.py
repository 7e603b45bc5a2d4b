"""Counters and head dims on whole models, on any machine."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoformerConfig, AutoformerModel, BertConfig, BertModel, Qwen3Config, Qwen3Model

import hf_flashinfer_attn

HEAD_DIMS = (8, 16, 24, 26, 32, 48, 64, 72, 80, 96, 112, 120, 128, 192, 256, 320)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 0, 1]])


def bert(head_dim: int, layers: int = 2) -> tuple[type[BertModel], BertConfig]:
    return BertModel, BertConfig(
        hidden_size=2 * head_dim, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )


def qwen3(head_dim: int) -> tuple[type[Qwen3Model], Qwen3Config]:
    return Qwen3Model, Qwen3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim,
        intermediate_size=32, vocab_size=50, layer_types=["full_attention"] * 2,
    )  # fmt: skip


@pytest.mark.parametrize("family", [bert, qwen3])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(head_dim: int, family) -> None:
    model_class, config = family(head_dim)
    ids = torch.randint(0, 50, MASK.shape)
    outputs = {}
    for implementation in ("eager", "sdpa", "flashinfer"):
        torch.manual_seed(0)
        model = model_class._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("query.weight", "key.weight", "q_proj.weight", "k_proj.weight")):
                parameter.data.mul_(8)
        with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
            outputs[implementation] = model(ids, attention_mask=MASK).last_hidden_state[MASK.bool()]
        assert len(trace.calls) == (2 if implementation == "flashinfer" else 0)
    torch.testing.assert_close(outputs["flashinfer"], outputs["eager"], rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs["flashinfer"], outputs["sdpa"], rtol=0, atol=1e-5)


def test_one_layout_per_forward() -> None:
    model_class, config = bert(16, layers=12)
    model = model_class._from_config(config, attn_implementation="flashinfer").eval()
    with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
        model(torch.ones_like(MASK), attention_mask=MASK)
    assert len(trace.calls) == 12
    assert (trace.layouts, trace.plans) == (1, 0)
    assert {call.head_dim for call in trace.calls} == {16}
    assert "BertSelfAttention[11]" in str(trace)


def test_padding_may_hold_anything() -> None:
    model_class, config = bert(16)
    model = model_class._from_config(config, attn_implementation="flashinfer").eval()
    embeddings = torch.randn(*MASK.shape, 32)
    poisoned = embeddings.masked_fill(MASK[..., None] == 0, float("nan"))
    with torch.no_grad():
        expected = model(inputs_embeds=embeddings, attention_mask=MASK).last_hidden_state
        result = model(inputs_embeds=poisoned, attention_mask=MASK).last_hidden_state
    assert torch.equal(result[MASK.bool()], expected[MASK.bool()])


def test_gradients_equal_those_of_sdpa() -> None:
    gradients = []
    for implementation in ("sdpa", "flashinfer"):
        torch.manual_seed(0)
        model_class, config = bert(16)
        model = model_class._from_config(config, attn_implementation=implementation).eval()
        ids = torch.arange(24).reshape(4, 6)
        model(ids, attention_mask=MASK).last_hidden_state[MASK.bool()].square().sum().backward()
        gradients.append([parameter.grad for parameter in model.encoder.parameters()])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_model_that_fails_on_any_mask_gets_none() -> None:
    config = AutoformerConfig(
        prediction_length=4, context_length=6, label_length=3, lags_sequence=[1, 2], d_model=16, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        moving_average=3, num_time_features=1,
    )  # fmt: skip
    past, future = torch.randn(2, 8), torch.randn(2, 4)
    inputs = {
        "past_values": past, "past_time_features": past[..., None], "past_observed_mask": torch.ones(2, 8),
        "future_values": future, "future_time_features": future[..., None],
    }  # fmt: skip
    outputs = []
    for implementation in ("eager", "flashinfer"):
        torch.manual_seed(0)
        model = AutoformerModel._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
        with torch.no_grad():
            outputs.append(model(**inputs).last_hidden_state)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
