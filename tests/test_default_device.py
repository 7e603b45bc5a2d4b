"""A default device of the user's own (`torch.set_default_device`) moves no tensor of this package."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, MPNetConfig, MPNetModel

import hf_flashinfer_attn
from hf_flashinfer_attn.ragged.forward_state import cu_seqlens_of
from hf_flashinfer_attn.ragged.layout import RaggedLayout
from hf_flashinfer_attn.ragged.token_map import TokenMap
from hf_flashinfer_attn.tools.bench.workload import synthetic_batches

PACKAGE = Path(hf_flashinfer_attn.__file__).parent
CPU = torch.device("cpu")
# Functions of torch that make a tensor on the default device unless they are told where.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
MODELS: dict[str, Any] = {
    "bert": (BertModel, BertConfig(**SMALL)),
    "llama": (LlamaModel, LlamaConfig(**SMALL, use_cache=False)),
    "mpnet": (MPNetModel, MPNetConfig(**SMALL)),
}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_new_tensor_names_its_device(file: Path) -> None:
    calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
    nameless = [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call in calls
        if ast.unparse(call.func).partition("torch.")[::2] in {("", name) for name in FACTORIES}
        and not any(keyword.arg in ("device", None) for keyword in call.keywords)
    ]
    assert not nameless


def test_host_tensors_stay_on_the_host() -> None:
    with torch.device("meta"):
        side = RaggedLayout.from_lengths([1, 2]).query
        assert side.cu_seqlens_host.device == side.lengths_host.device == side.cu_seqlens(CPU).device == CPU
        assert cu_seqlens_of(RaggedLayout.from_lengths([1, 2])).tolist() == [0, 1, 3]
        assert TokenMap.of(torch.tensor([[True, False], [True, True]], device="cpu"), 3).positions.tolist() == [0, 2, 3]
        assert synthetic_batches([3, 1], 2, BertConfig(**SMALL), CPU)[0].inputs["attention_mask"].sum().item() == 4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["plain", "no-mask", "unpad"])
def test_a_forward_is_the_same_under_another_default_device(name: str, way: str) -> None:
    model_class, config = MODELS[name]
    ids = torch.randint(3, 50, (3, 7))
    eager = model_class._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    try:
        with torch.no_grad(), torch.device("meta"):
            eager(ids)
    except NotImplementedError:
        pytest.skip(f"{model_class.__name__} itself makes tensors on the default device in this transformers")
    model = model_class._from_config(copy.deepcopy(config), attn_implementation="flashinfer").eval()
    if way == "unpad":
        hf_flashinfer_attn.unpad(model)
    mask = torch.arange(7) < torch.tensor([[7], [3], [5]])
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if way == "no-mask":
        del inputs["attention_mask"]
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        with torch.device("meta"):
            actual = model(**inputs).last_hidden_state
    assert torch.equal(actual, expected)
