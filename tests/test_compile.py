"""torch.compile: packed input in one graph, padded input with a break at each mask and each attention call."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import BertConfig, BertModel, CodeGenConfig, CodeGenModel, Qwen3Config, Qwen3Model

import hf_flashinfer_attn

BERT = (
    BertModel,
    BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50),
)
QWEN = Qwen3Model, Qwen3Config(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=64, vocab_size=50, use_cache=False,
)  # fmt: skip
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def build(family, implementation: str = "flashinfer") -> torch.nn.Module:
    torch.manual_seed(0)
    return family[0]._from_config(copy.deepcopy(family[1]), attn_implementation=implementation).eval()


def packed(lengths: list[int]) -> dict[str, torch.Tensor]:
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {
        "input_ids": torch.randint(0, 50, (1, sum(lengths))),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
    }


@torch.no_grad()
def test_packed_input_is_one_graph() -> None:
    model = build(BERT)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for lengths in ([4, 5], [2, 1, 9]):
        inputs = packed(lengths)
        expected = model(**inputs).last_hidden_state
        torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_input_without_padding_is_one_graph() -> None:
    model = build(BERT)
    ids = torch.randint(0, 50, (3, 7))
    result = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).last_hidden_state
    torch.testing.assert_close(result, model(ids).last_hidden_state, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", [BERT, QWEN])
@torch.no_grad()
def test_padded_input_compiles_with_breaks(family) -> None:
    ids = torch.randint(0, 50, MASK.shape)
    expected = build(family, "eager")(ids, attention_mask=MASK).last_hidden_state[MASK.bool()]
    model = build(family)
    compiled = torch.compile(model, backend="aot_eager")
    with hf_flashinfer_attn.trace() as trace:
        result = compiled(ids, attention_mask=MASK).last_hidden_state[MASK.bool()]
    assert [call.kernel for call in trace.calls] == ["torch", "torch"]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_gradients_flow_through_a_compiled_model() -> None:
    gradients = []
    for implementation in ("eager", "flashinfer"):
        model = build(BERT, implementation)
        ids = torch.arange(10).reshape(MASK.shape)
        compiled = torch.compile(model, backend="aot_eager")
        compiled(ids, attention_mask=MASK).last_hidden_state[MASK.bool()].square().sum().backward()
        gradients.append(model.embeddings.word_embeddings.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_the_op_is_a_good_citizen() -> None:
    query, key, value = (torch.randn(6, heads, 8) for heads in (4, 2, 2))
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    op = torch.ops.hf_flashinfer_attn.ragged_attention.default
    for arguments in (
        (query, key, value, offsets, offsets, 1, True, 0.3, None),
        (query, key, value, None, None, 2, False, 0.3, 0.5),
    ):
        checks = torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(checks.values()) == {"SUCCESS"}


@torch.no_grad()
def test_a_causal_model_off_the_interface_stays_causal() -> None:
    config = CodeGenConfig(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    ids = torch.randint(0, 50, (2, 7))
    expected = build((CodeGenModel, config), "eager")(ids).last_hidden_state
    result = torch.compile(build((CodeGenModel, config)), backend="eager")(ids).last_hidden_state
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
