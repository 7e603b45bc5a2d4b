"""configure(padded_queries="keep"): every position holds what eager attention gives, padding included."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

import hf_flashinfer_attn
from hf_flashinfer_attn.integration.functions import attention_forward

ROWS, SLOTS = 5, 11
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 50,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODER = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "bert": (BertModel, BertConfig(**SMALL)),
    "modernbert": (ModernBertModel, ModernBertConfig(**SMALL, local_attention=6, cls_token_id=1, sep_token_id=2)),
    "t5": (T5EncoderModel, T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=50)),
    "llama": (LlamaModel, LlamaConfig(**DECODER)),
    "mistral": (MistralModel, MistralConfig(**DECODER, sliding_window=4)),
    "gemma2": (Gemma2Model, Gemma2Config(**DECODER, sliding_window=4, attn_logit_softcapping=2.0)),
}
PADDINGS = ("right", "left", "holes", "one-row-empty")


def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Returns a family with eager attention and with ours, of the same weights."""
    model_class, config = FAMILIES[name]
    models = []
    for implementation in ("eager", "flashinfer"):
        torch.manual_seed(0)
        models.append(model_class._from_config(copy.deepcopy(config), attn_implementation=implementation).eval())
    for parameter, other in zip(models[0].parameters(), models[1].parameters()):
        if parameter.ndim == 2:
            # Initial weights are so small that attention hardly shows.
            other.data.copy_(parameter.data.mul_(4))
    return models[0], models[1]


def mask_of(padding: str) -> torch.Tensor:
    lengths = torch.randint(1, SLOTS + 1, (ROWS, 1))
    lengths[:2, 0] = torch.tensor([SLOTS, 1])
    mask = torch.arange(SLOTS) < lengths
    if padding == "left":
        mask = mask.flip(1)
    if padding == "holes":
        mask = (torch.rand(ROWS, SLOTS) < 0.6) & mask | (torch.arange(SLOTS) == 0)
    if padding == "one-row-empty":
        mask[2] = False
    return mask.long()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_all_positions_are_those_of_eager(name: str, padding: str) -> None:
    reference, ours = pair(name)
    inputs = {"input_ids": torch.randint(3, 50, (ROWS, SLOTS)), "attention_mask": mask_of(padding)}
    with torch.no_grad():
        expected = reference(**inputs).last_hidden_state
        dropped = ours(**inputs).last_hidden_state
        hf_flashinfer_attn.configure(padded_queries="keep")
        kept = ours(**inputs).last_hidden_state
    torch.testing.assert_close(kept, expected, rtol=0, atol=2e-5)
    if name in ("modernbert", "llama") and padding in ("right", "left"):
        # Not by chance. Others keep padded queries anyway, or take a whole mask.
        assert (dropped - expected)[inputs["attention_mask"] == 0].abs().max() > 1e-3


@pytest.mark.parametrize("padding", ["right", "one-row-empty"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "llama"])
def test_in_a_compiled_graph(name: str, padding: str) -> None:
    reference, ours = pair(name)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    inputs = {"input_ids": torch.randint(3, 50, (ROWS, SLOTS)), "attention_mask": mask_of(padding)}
    if name == "llama":
        inputs["use_cache"] = False
    with torch.no_grad():
        expected = reference(**inputs).last_hidden_state
        # The setting is read when the graph runs, not when it is traced.
        compiled(**inputs)
        hf_flashinfer_attn.configure(padded_queries="keep")
        with torch._dynamo.config.patch(error_on_recompile=True):
            kept = compiled(**inputs).last_hidden_state
    torch.testing.assert_close(kept, expected, rtol=0, atol=2e-5)


def test_only_what_differs_takes_a_whole_mask() -> None:
    hf_flashinfer_attn.configure(padded_queries="keep")
    mask = torch.arange(SLOTS) < torch.tensor([[SLOTS], [3]])
    ids = torch.randint(3, 50, (2, SLOTS))
    kernels = {}
    for name in ("bert", "llama"):
        model = pair(name)[1]
        with torch.no_grad(), hf_flashinfer_attn.trace() as padded:
            cache = model(ids, attention_mask=mask.long().flip(1)).get("past_key_values")
        with torch.no_grad(), hf_flashinfer_attn.trace() as full:
            model(ids)
        kernels[name] = padded.kernels, full.kernels
    assert kernels == {"bert": (("torch",), ("torch",)), "llama": (("dense",), ("torch",))}
    # A new token is no padding, whatever the cache holds.
    whole = torch.cat([mask.long().flip(1), torch.ones(2, 1, dtype=torch.long)], 1)
    with torch.no_grad(), hf_flashinfer_attn.trace() as step:
        model(ids[:, :1], attention_mask=whole, past_key_values=cache)
    assert step.kernels == ("torch",)


@pytest.mark.parametrize("length", [30, 12])
def test_a_loss_over_all_positions_is_that_of_eager(length: int) -> None:
    losses = {}
    inputs = {
        "input_ids": torch.randint(3, 50, (4, 30)),
        "attention_mask": (torch.arange(30) < torch.tensor([[length], [12], [5], [9]])).long(),
        "start_positions": torch.tensor([1, 2, 0, 3]), "end_positions": torch.tensor([4, 5, 3, 6]),
    }  # fmt: skip
    for implementation in ("eager", "flashinfer"):
        torch.manual_seed(0)
        config = BertConfig(**SMALL, initializer_range=0.3)
        model = BertForQuestionAnswering._from_config(config, attn_implementation=implementation).eval()
        hf_flashinfer_attn.configure(padded_queries="keep")
        loss = model(**inputs).loss
        loss.backward()
        losses[implementation] = loss, model.bert.embeddings.word_embeddings.weight.grad
    torch.testing.assert_close(losses["flashinfer"], losses["eager"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_a_2d_mask_given_to_attention_keeps_its_queries(causal: bool) -> None:
    query, key, value = (torch.randn(2, 2, 6, 8) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    hf_flashinfer_attn.configure(padded_queries="keep")
    module = torch.nn.Module()
    output, _ = attention_forward(module, query, key, value, mask, is_causal=causal)
    seen = mask.bool()[:, None, None] & (torch.ones(6, 6).bool().tril() if causal else torch.ones(6, 6).bool())
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen)
    torch.testing.assert_close(output, expected.transpose(1, 2))
