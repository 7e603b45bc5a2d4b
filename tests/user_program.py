"""A program as a user would write it: it runs, and `mypy --strict` has nothing to say but what is ignored by name."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel
from typing_extensions import assert_type

import hf_flashinfer_attn as hfa


def build() -> BertModel:
    config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config._attn_implementation = "flashinfer"
    model: BertModel = BertModel(config)
    model.eval()
    return model


def main() -> None:
    options = hfa.GraphOptions(max_tokens=16_384, max_memory_gib=2.0)
    model = hfa.unpad(build(), cuda_graphs=options)
    assert_type(model, BertModel)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad(), hfa.trace() as trace:
        hidden = model(torch.ones(2, 4, dtype=torch.long), attention_mask=mask).last_hidden_state
    assert hidden.shape == (2, 4, 64)
    assert_type(trace, hfa.Trace)
    assert_type(trace.kernels, tuple[str, ...])
    call = trace.calls[0]
    assert_type(call, hfa.AttentionCall)
    assert_type(call.reason, str | None)
    assert_type(hfa.graph_statistics(model).waste, float)
    assert_type(hfa.repad(model), BertModel)
    assert_type(hfa.configure(strict=False), hfa.Settings)
    assert_type(hfa.current_settings().backend, hfa.settings.BackendName)
    try:
        hfa.capture_graphs(model, [(8, 400)])
    except ValueError as error:
        print(error)
    try:
        hfa.unpad(torch.nn.Linear(1, 1))
    except hfa.UnsupportedAttentionError as refused:
        assert_type(refused.way_out, str)
    try:
        hfa.configure(backend="cuda")  # type: ignore[arg-type]
        hfa.unpad(model, graphs=True)  # type: ignore[call-arg]
        trace.kernels.append("mine")  # type: ignore[attr-defined]
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    main()
