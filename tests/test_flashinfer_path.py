"""Whole models through FlashInfer's path, on a simulated GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from simulated_gpu import Wrapper, simulated_gpu  # noqa: F401
from transformers import BertConfig, BertModel, MistralConfig, MistralModel, ModernBertConfig, ModernBertModel

import hf_flashinfer_attn

SIZES: dict[str, Any] = {
    "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50, "pad_token_id": 0,
}  # fmt: skip


def build(family: str, head_dim: int, implementation: str, dtype: torch.dtype) -> Any:
    sizes = {**SIZES, "hidden_size": 2 * head_dim}
    config: Any = {
        "bert": lambda: BertConfig(**sizes),
        "modernbert": lambda: ModernBertConfig(**sizes, local_attention=6, global_attn_every_n_layers=2),
        "mistral": lambda: MistralConfig(**sizes, num_key_value_heads=1, sliding_window=4, use_cache=False),
    }[family]()
    kind: Any = {"bert": BertModel, "modernbert": ModernBertModel, "mistral": MistralModel}[family]
    torch.manual_seed(0)
    return kind._from_config(copy.deepcopy(config), attn_implementation=implementation, dtype=dtype).eval()


def batch_of(lengths: tuple[int, ...], on_left: bool = False) -> dict[str, torch.Tensor]:
    slots = torch.arange(max(lengths))
    counts = torch.tensor(lengths)[:, None]
    mask = ((slots >= max(lengths) - counts) if on_left else (slots < counts)).long()
    return {"input_ids": torch.randint(1, 50, mask.shape) * mask, "attention_mask": mask}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("on_left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("family", ["bert", "modernbert", "mistral"])
@pytest.mark.parametrize("is_unpadded", [False, True], ids=["padded", "unpadded"])
def test_equals_eager(
    simulated_gpu: type[Wrapper],  # noqa: F811
    family: str, head_dim: int, on_left: bool, dtype: torch.dtype, is_unpadded: bool,
) -> None:  # fmt: skip
    hf_flashinfer_attn.configure(backend="flashinfer")
    exact, half = (build(family, head_dim, "eager", kind) for kind in (torch.float32, dtype))
    half.load_state_dict(exact.state_dict())
    ours = build(family, head_dim, "flashinfer", dtype)
    ours.load_state_dict(exact.state_dict())
    if is_unpadded:
        hf_flashinfer_attn.unpad(ours)
    for lengths in ((9, 3, 1), (2, 7), (5, 5)):
        batch = batch_of(lengths, on_left)
        valid = batch["attention_mask"].bool()
        with torch.inference_mode(), hf_flashinfer_attn.trace() as trace:
            output = ours(**batch).last_hidden_state[valid].double()
            expected, rounded = (model(**batch).last_hidden_state[valid].double() for model in (exact, half))
        assert [call.kernel for call in trace.calls] == ["flashinfer-fa2"] * 4
        error, own = ((one - expected).norm() / expected.norm() for one in (output, rounded))
        assert error <= 1.3 * own + 1e-4
    # One plan for all layers, two where some layers have a window.
    assert trace.plans <= (1 if family == "bert" else 4)
    assert trace.layouts <= 2


def test_layers_share_one_plan_and_forwards_share_recorded_calls(simulated_gpu: type[Wrapper]) -> None:  # noqa: F811
    model = build("bert", 16, "flashinfer", torch.float16)
    hf_flashinfer_attn.configure(backend="flashinfer")
    for lengths in ((9, 3, 1), (2, 7), (4, 4, 4, 3)):
        with torch.inference_mode(), hf_flashinfer_attn.trace() as trace:
            model(**batch_of(lengths))
        assert (trace.layouts, trace.plans) == (1, 1)
    # The public `plan` and `run` are for the first forward alone, and to learn the planner's arguments.
    assert simulated_gpu.counts == {"plan": 6, "run": 1}
