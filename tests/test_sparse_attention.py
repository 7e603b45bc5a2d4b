"""Layers of sparse attention choose keys for each query, and hand a flash kernel their choice in place of a mask."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from paired_models import TRANSFORMERS_VERSION, VOCAB_SIZE, assert_near, build_model, left_padded, right_padded
from torch import Tensor, nn

import hf_flashinfer_attn
from hf_flashinfer_attn.integration.functions import attention_forward
from model_families import find_class

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
# Per family its version of transformers, its settings, how many it chooses, and what chooses all that there are.
FAMILIES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "glm_moe_dsa.GlmMoeDsa": ("5.5", LATENT, "index_topk", 64),
    "deepseek_v32.DeepseekV32": ("5.17", LATENT, "index_topk", 64),
    "minimax_m3_vl.MiniMaxM3VLText": ("5.17", BLOCKS, "index_topk_blocks", 8),
}
each_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def build(name: str) -> Callable[..., Any]:
    since, settings, count, all_of_them = FAMILIES[name]
    if Version(since) > TRANSFORMERS_VERSION:
        pytest.skip(f"{name} is not in transformers {TRANSFORMERS_VERSION}")
    model_class = find_class(f"{name}Model")

    def build(implementation: str, *, chooses_all: bool = False) -> Any:
        config = find_class(f"{name}Config")(**TINY, **settings, **{count: all_of_them if chooses_all else 3})
        return build_model(model_class, config, implementation)

    return build


@torch.no_grad()
def hidden_of(model: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
    hidden: Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden if mask is None else hidden[mask.bool()]


@each_family
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_only_chosen_keys_are_seen(build: Callable[..., Any], padding: str) -> None:
    tokens, mask = (left_padded if padding == "left" else right_padded)(LENGTHS)
    given = None if padding == "none" else mask
    expected = hidden_of(build("eager"), tokens, given)
    with hf_flashinfer_attn.trace() as trace:
        actual = hidden_of(build("flashinfer"), tokens, given)
    assert len(trace.calls) == 2
    assert_near(actual, expected)
    without_choice = hidden_of(build("eager", chooses_all=True), tokens, given)
    assert (without_choice - expected).abs().max() > 1e-2


@each_family
def test_only_chosen_keys_are_seen_in_a_compiled_model(build: Callable[..., Any]) -> None:
    """There the mask is one of a graph, of which a choice of keys needs the values."""
    inputs = right_padded(LENGTHS)
    expected = hidden_of(build("eager"), *inputs)
    torch.compiler.reset()
    assert_near(hidden_of(torch.compile(build("flashinfer"), backend="eager"), *inputs), expected)


def test_all_keys_chosen_leave_attention_ragged() -> None:
    side, indices = torch.randn(2, 2, 5, 8), torch.arange(5).expand(2, 5, 5)
    with hf_flashinfer_attn.trace() as trace:
        attention_forward(nn.Module(), side, side, side, None, indices=indices)
        attention_forward(nn.Module(), side, side, side, None, indices=indices[..., :4])
    assert [call.kernel for call in trace.calls] == ["torch", "dense"]


def test_keys_that_causality_hides_stay_hidden() -> None:
    """Of fewer keys than are to be chosen, later ones are chosen as well."""
    query, key, value = torch.randn(3, 1, 2, 6, 8, dtype=torch.float64)
    indices = torch.arange(4).expand(1, 6, 4)
    output, _ = attention_forward(nn.Module(), query, key, value, None, is_causal=True, indices=indices)
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    visible[:, 4:] = False
    expected = nn.functional.scaled_dot_product_attention(query, key, value, visible).transpose(1, 2)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        # Blocks that a layer cannot tell, and sinks of each query.
        ({"block_indices": torch.zeros(1, 1, 3, 1)}, r"chosen by Module, .*build_block_mask"),
        ({"sinks": torch.zeros(1, 2, 3, 1)}, r"sinks of shape \(1, 2, 3, 1\)"),
    ],
    ids=["blocks", "sinks"],
)
def test_what_no_layer_can_serve_is_refused(given: dict[str, Tensor], says: str) -> None:
    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match=says):
        attention_forward(nn.Module(), query, query, query, None, **given)


# What models spell out in calls of the attention function that changes nothing in what we compute.
HARMLESS = {"max_length_q", "max_length_k", "deterministic"}


def spelled_out() -> dict[str, set[str]]:
    """The keyword arguments that models of the installed transformers name in calls of attention functions."""
    found: dict[str, set[str]] = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if "attention_interface(" not in (text := path.read_text()):
            continue
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "attention_interface":
                for name in filter(None, (keyword.arg for keyword in call.keywords)):
                    found.setdefault(name, set()).add(path.parent.name)
    return found


def test_no_argument_is_swallowed() -> None:
    """`**kwargs` takes what models pass along; what one of them spells out may be part of its attention."""
    known = set(inspect.signature(attention_forward).parameters) | HARMLESS
    found = spelled_out()
    assert {"scaling", "dropout", "indices"} <= set(found)
    assert {name: models for name, models in found.items() if name not in known} == {}
