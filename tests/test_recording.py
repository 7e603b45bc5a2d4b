"""What records a forward, to repeat it elsewhere, is refused: it would keep the lengths that the host read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.version import Version
from paired_models import TRANSFORMERS_VERSION, VOCAB_SIZE, build_model, right_padded
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel, PreTrainedModel, ViTConfig, ViTModel

from hf_flashinfer_attn import UnsupportedAttentionError, unpad

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64,
}  # fmt: skip
REFUSAL = "attention recorded by {}, which would repeat the row lengths"


class Positional(nn.Module):
    """A model as recorders take it: tensors in, a tensor out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return hidden


def export(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    return torch.export.export(model, inputs, strict=False).module()


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    traced: Callable[..., Tensor] = torch.jit.trace(model, inputs, check_trace=False)
    return traced


def record(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    return make_fx(model)(*inputs)


RECORDERS = pytest.mark.parametrize(
    ("tool", "name"),
    [(export, "torch.export"), (trace, "torch.jit.trace"), (record, "make_fx")],
    ids=["export", "trace", "make_fx"],
)
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


@RECORDERS
@pytest.mark.parametrize("prepare", [lambda model: model, unpad], ids=["plain", "unpad"])
@torch.no_grad()
def test_recorders_of_attention_are_refused(tool: Callable[..., Any], name: str, prepare: Callable[[Any], Any]) -> None:
    if tool is trace and prepare is not unpad and Version("5.6") > TRANSFORMERS_VERSION:
        pytest.skip("transformers' own mask functions cannot be traced")
    model = prepare(build_model(BertModel, BertConfig(**SIZES), "flashinfer"))
    batch = right_padded((7, 3))
    before = Positional(model)(*batch)
    with pytest.raises(UnsupportedAttentionError, match=REFUSAL.format(name)):
        tool(Positional(model), batch)
    torch.testing.assert_close(Positional(model)(*batch), before, rtol=0, atol=0)


@RECORDERS
@torch.no_grad()
def test_recorders_of_attention_without_a_mask_are_refused(tool: Callable[..., Any], name: str) -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    model = build_model(ViTModel, config, "flashinfer")

    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor) -> Tensor:
            hidden: Tensor = self.model(pixel_values=pixels).last_hidden_state
            return hidden

    with pytest.raises(UnsupportedAttentionError, match=REFUSAL.format(name)):
        tool(Pixels(), (torch.randn(2, 3, 8, 8),))


def test_a_strict_export_gives_the_reason() -> None:
    model = Positional(build_model(BertModel, BertConfig(**SIZES), "flashinfer"))
    with pytest.raises(Exception, match="export with attn_implementation='eager'"):
        torch.export.export(model, right_padded((7, 3)), strict=True)


@RECORDERS
@torch.no_grad()
def test_attention_of_a_models_own_can_be_recorded(tool: Callable[..., Any], name: str) -> None:
    """Such a model adds our mask to its logits, and gets the one of eager attention instead."""
    config = MPNetConfig(**SIZES)
    recorded = tool(Positional(build_model(MPNetModel, config, "flashinfer")), right_padded((7, 3)))
    tokens, mask = right_padded((2, 7), seed=1)
    expected = Positional(build_model(MPNetModel, config, "eager"))(tokens, mask)
    torch.testing.assert_close(recorded(tokens, mask)[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
