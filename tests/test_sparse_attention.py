"""Layers of sparse attention choose keys for each query, and hand a flash kernel their choice in place of a mask."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from paired_models import VOCAB_SIZE, build_model, left_padded, right_padded
from torch import Tensor, nn

import hf_flashinfer_attn
from hf_flashinfer_attn.integration.functions import attention_forward

TOLERANCE = 1e-5
LENGTHS = (24, 17, 9)
TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0,
    "max_position_embeddings": 64, "mlp_layer_types": ["dense", "dense"],
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_attention_heads": 2, "num_key_value_heads": 2, "moe_intermediate_size": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "index_head_dim": 16, "index_n_heads": 2,
}  # fmt: skip
BLOCKS: dict[str, Any] = {
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8, "dense_intermediate_size": 32,
    "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 3, "index_local_blocks": 1,
    "layer_types": ["full_attention", "minimax_m3_sparse"],
}  # fmt: skip
# The model, its settings, how many it chooses, what chooses all that there are, and who has it.
FAMILIES = [
    pytest.param("GlmMoeDsa", LATENT, "index_topk", 64, "5.5", id="glm-moe-dsa"),
    pytest.param("DeepseekV32", LATENT, "index_topk", 64, "5.17", id="deepseek-v3.2"),
    pytest.param("MiniMaxM3VLText", BLOCKS, "index_topk_blocks", 8, "5.17", id="minimax-m3"),
]


def build(name: str, settings: dict[str, Any], implementation: str, **chosen: int) -> Any:
    file = {"GlmMoeDsa": "glm_moe_dsa", "DeepseekV32": "deepseek_v32", "MiniMaxM3VLText": "minimax_m3_vl"}[name]
    modeling = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    configuration = importlib.import_module(f"transformers.models.{file}.configuration_{file}")
    config = getattr(configuration, f"{name}Config")(**TINY, **settings, **chosen)
    return build_model(getattr(modeling, f"{name}Model"), config, implementation)


@torch.no_grad()
def hidden_of(model: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
    hidden: Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden if mask is None else hidden[mask.bool()]


@pytest.mark.parametrize(("name", "settings", "count", "all_of_them", "since"), FAMILIES)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_only_chosen_keys_are_seen(
    name: str, settings: dict[str, Any], count: str, all_of_them: int, since: str, padding: str
) -> None:
    if Version(transformers.__version__) < Version(since):
        pytest.skip(f"{name} is not in transformers {transformers.__version__}")
    tokens, mask = (left_padded if padding == "left" else right_padded)(LENGTHS)
    given = None if padding == "none" else mask
    expected = hidden_of(build(name, settings, "eager", **{count: 3}), tokens, given)
    with hf_flashinfer_attn.trace() as trace:
        actual = hidden_of(build(name, settings, "flashinfer", **{count: 3}), tokens, given)
    assert len(trace.calls) == 2
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * max(1.0, expected.abs().max().item()))
    without_choice = hidden_of(build(name, settings, "eager", **{count: all_of_them}), tokens, given)
    assert (without_choice - expected).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "settings", "count", "all_of_them", "since"), FAMILIES)
def test_only_chosen_keys_are_seen_in_a_compiled_model(
    name: str, settings: dict[str, Any], count: str, all_of_them: int, since: str
) -> None:
    """There the mask is one of a graph, of which a choice of keys needs the values."""
    if Version(transformers.__version__) < Version(since):
        pytest.skip(f"{name} is not in transformers {transformers.__version__}")
    tokens, mask = right_padded(LENGTHS)
    expected = hidden_of(build(name, settings, "eager", **{count: 3}), tokens, mask)
    torch.compiler.reset()
    model = torch.compile(build(name, settings, "flashinfer", **{count: 3}), backend="eager")
    actual = hidden_of(model, tokens, mask)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * max(1.0, expected.abs().max().item()))


def test_all_keys_chosen_leave_attention_ragged() -> None:
    module = nn.Module()
    query = key = value = torch.randn(2, 2, 5, 8)
    indices = torch.arange(5).expand(2, 5, 5)
    with hf_flashinfer_attn.trace() as trace:
        attention_forward(module, query, key, value, None, indices=indices)
        attention_forward(module, query, key, value, None, indices=indices[..., :4])
    assert [call.kernel for call in trace.calls] == ["torch", "dense"]


def test_keys_that_causality_hides_stay_hidden() -> None:
    """Of fewer keys than are to be chosen, later ones are chosen as well."""
    module = nn.Module()
    query, key, value = torch.randn(3, 1, 2, 6, 8, dtype=torch.float64)
    indices = torch.arange(4).expand(1, 6, 4)
    output, _ = attention_forward(module, query, key, value, None, is_causal=True, indices=indices)
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    visible[:, 4:] = False
    expected = nn.functional.scaled_dot_product_attention(query, key, value, visible).transpose(1, 2)
    torch.testing.assert_close(output, expected)


def test_blocks_that_a_layer_cannot_tell_are_refused() -> None:
    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match=r"chosen by Module, .*build_block_mask"):
        attention_forward(nn.Module(), query, query, query, None, block_indices=torch.zeros(1, 1, 3, 1))


def test_sinks_of_each_query_are_refused() -> None:
    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match=r"sinks of shape \(1, 2, 3, 1\)"):
        attention_forward(nn.Module(), query, query, query, None, sinks=torch.zeros(1, 2, 3, 1))


# What models spell out in calls of the attention function that changes nothing in what we compute.
HARMLESS = {"max_length_q", "max_length_k", "deterministic"}


def spelled_out() -> dict[str, set[str]]:
    """The keyword arguments that models of the installed transformers name in calls of attention functions."""
    found: dict[str, set[str]] = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text = path.read_text()
        if "attention_interface(" not in text:
            continue
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "attention_interface":
                for keyword in call.keywords:
                    if keyword.arg is not None:
                        found.setdefault(keyword.arg, set()).add(path.parent.name)
    return found


def test_no_argument_is_swallowed() -> None:
    """`**kwargs` takes what models pass along; what one of them spells out may be part of its attention."""
    known = set(inspect.signature(attention_forward).parameters) | HARMLESS
    found = spelled_out()
    assert {"scaling", "dropout", "indices"} <= set(found)
    assert {name: models for name, models in found.items() if name not in known} == {}
