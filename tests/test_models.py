"""Counters and head dims on whole models, on any machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paired_models import VOCAB_SIZE, assert_near, build_model, decoder_config
from transformers import AutoformerConfig, AutoformerModel, BertConfig, BertModel, Qwen3Config, Qwen3Model

import hf_flashinfer_attn

HEAD_DIMS = (8, 16, 24, 26, 32, 48, 64, 72, 80, 96, 112, 120, 128, 192, 256, 320)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 0, 1]])


def bert(implementation: str, head_dim: int = 16, layers: int = 2) -> Any:
    sizes = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(**sizes, num_hidden_layers=layers, vocab_size=VOCAB_SIZE)
    return build_model(BertModel, config, implementation)


def qwen3(implementation: str, head_dim: int) -> Any:
    return build_model(Qwen3Model, decoder_config(Qwen3Config, head_dim=head_dim), implementation)


@pytest.mark.parametrize("make", [bert, qwen3])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(head_dim: int, make: Any) -> None:
    ids = torch.randint(0, VOCAB_SIZE, MASK.shape)
    outputs = {}
    for implementation in ("eager", "sdpa", "flashinfer"):
        with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
            hidden = make(implementation, head_dim)(ids, attention_mask=MASK).last_hidden_state
        outputs[implementation] = hidden[MASK.bool()]
        assert len(trace.calls) == (2 if implementation == "flashinfer" else 0)
    assert_near(outputs["flashinfer"], outputs["eager"])
    assert_near(outputs["flashinfer"], outputs["sdpa"])


def test_one_layout_per_forward() -> None:
    model = bert("flashinfer", layers=12)
    with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
        model(torch.ones_like(MASK), attention_mask=MASK)
    assert len(trace.calls) == 12
    assert (trace.layouts, trace.plans) == (1, 0)
    assert {call.head_dim for call in trace.calls} == {16}
    assert "BertSelfAttention[11]" in str(trace)


def test_padding_may_hold_anything() -> None:
    model, embeddings = bert("flashinfer"), torch.randn(*MASK.shape, 32)
    poisoned = embeddings.masked_fill(MASK[..., None] == 0, float("nan"))
    with torch.no_grad():
        expected, result = (
            model(inputs_embeds=given, attention_mask=MASK).last_hidden_state[MASK.bool()]
            for given in (embeddings, poisoned)
        )
    assert torch.equal(result, expected)


def test_gradients_equal_those_of_sdpa() -> None:
    gradients = []
    for implementation in ("sdpa", "flashinfer"):
        model, ids = bert(implementation), torch.arange(24).reshape(4, 6)
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
    with torch.no_grad():
        ours, expected = (
            build_model(AutoformerModel, config, implementation)(**inputs).last_hidden_state
            for implementation in ("flashinfer", "eager")
        )
    assert_near(ours, expected)
