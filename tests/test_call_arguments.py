"""Arguments that contradict each other, or that nobody knows: refused with their names and shapes, or logged once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, ModernBertConfig, ModernBertModel

import hf_flashinfer_attn
from hf_flashinfer_attn import UnsupportedAttentionError
from hf_flashinfer_attn.integration import attention_forward

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "bert": (BertModel, BertConfig, {}),
    "llama": (LlamaModel, LlamaConfig, {"num_key_value_heads": 1, "use_cache": False}),
    "modernbert": (ModernBertModel, ModernBertConfig, {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}),
}


def build(name: str, **changes: Any) -> torch.nn.Module:
    model_class, config_class, extra = MODELS[name]
    config = config_class(**SMALL | extra | changes)
    return model_class._from_config(config, attn_implementation="flashinfer").eval()


WAYS = [(name, way) for name in MODELS for way in ("plain", "unpad", "padded")] + [("bert", "compile")]


@pytest.mark.parametrize(("name", "way"), WAYS)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_mask_of_other_rows_than_the_batch_is_refused(name: str, rows: int, way: str) -> None:
    model = build(name)
    if way == "unpad":
        hf_flashinfer_attn.unpad(model)
    if way == "compile":
        torch._dynamo.reset()
        model = torch.compile(model, backend="eager", fullgraph=True)
    mask = torch.ones(rows, 6, dtype=torch.long)
    if way == "padded":
        mask[:, 4:] = 0
    with torch.no_grad(), pytest.raises(UnsupportedAttentionError, match=rf"shape \({rows}, 6\) for a batch of 4 rows"):
        model(torch.randint(3, 50, (4, 6)), attention_mask=mask)


@pytest.mark.parametrize("arguments", [{}, {"output_attentions": True}], ids=["ragged", "dense"])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_2d_mask_of_other_rows_given_to_attention_is_refused(rows: int, arguments: dict[str, Any]) -> None:
    side, module = torch.randn(4, 2, 6, 8), torch.nn.Module()
    with pytest.raises(UnsupportedAttentionError, match=rf"shape \({rows}, 6\) for 6 queries, expected \(4, 6\)"):
        attention_forward(module, side, side, side, torch.ones(rows, 6), **arguments)
