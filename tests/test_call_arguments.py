"""Arguments that contradict each other, or that nobody knows: refused with their names and shapes, or logged once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import BertModel, DynamicCache, LlamaModel, ModernBertModel

import hf_flashinfer_attn
from hf_flashinfer_attn import UnsupportedAttentionError
from hf_flashinfer_attn.integration.functions import attention_forward

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "bert": (BertModel, {}),
    "llama": (LlamaModel, {"num_key_value_heads": 1, "use_cache": False}),
    "modernbert": (ModernBertModel, {"cls_token_id": 1, "sep_token_id": 2, "num_hidden_layers": 4}),
}
WAYS = [(name, way) for name in MODELS for way in ("plain", "unpad", "padded")] + [("bert", "compile")]


def build(name: str, **changes: Any) -> torch.nn.Module:
    model_class, settings = MODELS[name]
    config = model_class.config_class(**SMALL | settings | changes)
    return model_class._from_config(config, attn_implementation="flashinfer").eval()


def compile_whole(model: torch.nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", fullgraph=True)


def attend(mask: torch.Tensor | None = None, rows: int = 2, **arguments: Any) -> torch.Tensor:
    side = torch.randn(rows, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    return attention_forward(torch.nn.Module(), side, side, side, mask, **arguments)[0]


@pytest.mark.parametrize(("name", "way"), WAYS)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_mask_of_other_rows_than_the_batch_is_refused(name: str, rows: int, way: str) -> None:
    model = build(name)
    if way == "unpad":
        hf_flashinfer_attn.unpad(model)
    if way == "compile":
        model = compile_whole(model)
    mask = torch.ones(rows, 6, dtype=torch.long)
    if way == "padded":
        mask[:, 4:] = 0
    with torch.no_grad(), pytest.raises(UnsupportedAttentionError, match=rf"shape \({rows}, 6\) for a batch of 4 rows"):
        model(torch.randint(3, 50, (4, 6)), attention_mask=mask)


@pytest.mark.parametrize("arguments", [{}, {"output_attentions": True}], ids=["ragged", "dense"])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_2d_mask_of_other_rows_given_to_attention_is_refused(rows: int, arguments: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedAttentionError, match=rf"shape \({rows}, 6\) for 6 queries, expected \(4, 6\)"):
        attend(torch.ones(rows, 6), rows=4, **arguments)


@pytest.mark.parametrize("name", ["attn_bias", "alibi_slopes", "head_mask", "block_table", "window_size"])
def test_an_argument_that_would_change_the_result_is_refused(name: str) -> None:
    attend(**{name: None})
    for value in (torch.ones(2), (3, 3)):
        with pytest.raises(UnsupportedAttentionError, match=f"the argument {name} of the attention function"):
            attend(**{name: value})


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_an_unknown_tensor_is_ignored_and_named_once(compiled: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, ids, extra = build("llama", num_hidden_layers=2), torch.randint(3, 50, (2, 6)), torch.ones(2, 6)
    expected = model(ids).last_hidden_state
    if compiled:
        model = compile_whole(model)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "hf_flashinfer_attn"):
        model(ids[:1], surprise=extra[:1], use_cache=False)
        for _ in range(2):
            actual = model(ids, surprise=extra, token_type_ids=extra, use_cache=False).last_hidden_state
    torch.testing.assert_close(actual, expected)
    (line,) = [record.message for record in caplog.records if "argument" in record.message]
    assert f"surprise of the attention function, an unknown tensor of {'2 dim' if compiled else 'shape (1, 6)'}" in line
    assert "token_type_ids" not in caplog.text


def test_an_unknown_tensor_is_an_error_with_strict() -> None:
    hf_flashinfer_attn.configure(backend="torch", strict=True)
    ids = torch.randint(3, 50, (2, 6))
    build("llama")(ids)
    with pytest.raises(UnsupportedAttentionError, match=r"surprise .* tensor of shape \(2, 6\), and strict=True"):
        build("llama")(ids, surprise=torch.ones(2, 6))


def test_a_cache_of_the_layer_is_no_paged_one() -> None:
    assert torch.equal(attend(cache=DynamicCache()), attend())
    with pytest.raises(UnsupportedAttentionError, match="continuous batching"):
        attend(cache=object())
