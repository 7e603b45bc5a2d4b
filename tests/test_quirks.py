"""Layers that need care are recognised by what they are and by what they take, in subclasses and copies as well."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BertConfig,
    BertModel,
    Cache,
    Gemma3TextConfig,
    Gemma3TextModel,
    MistralConfig,
    MistralModel,
    PixtralVisionConfig,
    PixtralVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipTextConfig,
    SiglipTextModel,
    Wav2Vec2Config,
)
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.mobilebert.modeling_mobilebert import MobileBertSelfAttention
from transformers.models.pixtral.modeling_pixtral import PixtralAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Attention

import hf_flashinfer_attn
from hf_flashinfer_attn.attention.quirks import padded_queries_reason
from hf_flashinfer_attn.integration.functions import attention_forward
from hf_flashinfer_attn.tools.model_plan import plan_of_config

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
IDS = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(0))


def become(model: nn.Module, kind: type[nn.Module], name: str = "Mine") -> nn.Module:
    """Makes a user's subclass of each layer of a kind."""
    for module in model.modules():
        if isinstance(module, kind):
            module.__class__ = type(name, (type(module),), {})
    return model


def pair(make: Callable[[str], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """An eager model and ours with the same weights, large enough for attention to matter."""
    models = []
    for name in ("eager", "flashinfer"):
        torch.manual_seed(0)
        model = make(name).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        models.append(model)
    models[1].load_state_dict(models[0].state_dict())
    return models[0], models[1]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", ["Mine", "Siglip"])
@torch.no_grad()
def test_a_subclass_that_pools_padding(name: str) -> None:
    config = SiglipTextConfig(**SMALL, vocab_size=50, max_position_embeddings=8)
    eager, ours = pair(
        lambda kind: SiglipTextModel._from_config(config.__class__(**config.to_dict()), attn_implementation=kind)
    )
    become(ours, SiglipAttention, name)
    close(
        ours(IDS, attention_mask=MASK).pooler_output,
        eager(IDS, attention_mask=MASK).pooler_output,
    )


def pixtral(kind: str) -> PixtralVisionModel:
    config = PixtralVisionConfig(**SMALL | {"num_hidden_layers": 4}, image_size=32, patch_size=8)
    return PixtralVisionModel._from_config(config, attn_implementation=kind)


MODES = [torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_subclass", [False, True])
def test_images_do_not_see_each_other(is_subclass: bool, mode: Callable[[], AbstractContextManager[None]]) -> None:
    eager, ours = pair(pixtral)
    if is_subclass:
        become(ours, PixtralAttention)
    for sizes in ([(32, 32), (16, 24)], [(16, 24), (32, 32)]):
        pixels = torch.randn(2, 3, 32, 32)
        with mode(), hf_flashinfer_attn.trace() as trace:
            expected = eager(pixels, image_sizes=torch.tensor(sizes)).last_hidden_state
            close(ours(pixels, image_sizes=torch.tensor(sizes)).last_hidden_state, expected)
        assert (len(trace.calls), trace.layouts) == (4, 1)


@torch.inference_mode()
def test_positions_that_were_written_to_are_read_again() -> None:
    """Inference tensors count no versions."""
    layers = [layer.attention for layer in pixtral("flashinfer").eval().transformer.layers]
    query = torch.randn(1, 2, 6, 16)
    positions = torch.tensor([0, 1, 2, 0, 1, 2])[None]

    def run(layer: nn.Module) -> torch.Tensor:
        return attention_forward(layer, query, query, query, None, position_ids=positions)[0]

    def by_parts(lengths: list[int]) -> torch.Tensor:
        parts = [attention_forward(layers[0], part, part, part, None)[0] for part in query.split(lengths, 2)]
        return torch.cat(parts, 1)

    for layer in layers:
        close(run(layer), by_parts([3, 3]))
    positions.copy_(torch.tensor([0, 1, 0, 1, 2, 3]))
    for layer in layers:
        close(run(layer), by_parts([2, 4]))
    offsets, others = torch.tensor([0, 2, 6]), torch.tensor([0, 2, 6])
    for lengths in ([2, 4], [5, 1]):
        offsets[1] = others[1] = lengths[0]
        expected = by_parts(lengths)
        for keys in (offsets, others):
            with hf_flashinfer_attn.trace() as trace:
                for layer in layers:
                    packed = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": keys}
                    close(attention_forward(layer, query, query, query, None, **packed)[0], expected)
            assert trace.layouts == 1
    # Another model is given the same offsets after they were written to.
    offsets[1] = others[1] = 3
    packed = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": others}
    for layer in pixtral("flashinfer").eval().transformer.layers:
        close(attention_forward(layer.attention, query, query, query, None, **packed)[0], by_parts([3, 3]))


def test_a_subclass_that_reads_neighbours_is_not_packed() -> None:
    class Mine(MobileBertSelfAttention):
        pass

    side, offsets = torch.randn(1, 2, 4, 8), torch.tensor([0, 2, 4])
    with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match="packed sequences in Mine"):
        attention_forward(Mine.__new__(Mine), side, side, side, None, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)


def layer_of(parameters: str, base: type = nn.Module) -> nn.Module:
    """A layer of the user's whose forward takes these parameters after its input."""
    scope = {"Any": Any, "Cache": Cache, "Tensor": torch.Tensor}
    exec(f"def forward(self, states, {parameters}): ...", scope)
    layer = type("Mine", (base,), {"forward": scope["forward"]})
    made: nn.Module = layer.__new__(layer)
    nn.Module.__init__(made)
    made.config = BertConfig()
    return made


@pytest.mark.parametrize(
    ("parameters", "second"),
    [
        ("attention_mask: Tensor, position_embeddings: tuple[Tensor, Tensor], position_ids: Tensor", None),
        ("cache: Cache | None = None, past_key_values: Cache = None, state: Cache = None", None),
        ("past_key_values=None, layer_past=None, cache=None, use_cache: bool = False, layer: int = 0", None),
        ("cu_seqlens: Tensor, position_bias: Tensor, mask: Tensor, **kwargs: Tensor", None),
        ("attention_mask, key_value_states: Tensor | None = None", "key_value_states"),
        ("encoder_hidden_states=None, attention_mask=None", "encoder_hidden_states"),
        ("key: Tensor, value: Tensor", "key"),
        ("context: Tensor, attention_mask: Tensor", "context"),
        ("something_new: Tensor | None = None", "something_new"),
        ("something_new=None", "something_new"),
        ("something_new: Any = None", "something_new"),
        ("something_new: object = None", "something_new"),
        ("hidden_states: Tensor", "hidden_states"),
        ("shared: dict[str, tuple[Tensor, Tensor]]", "shared"),
    ],
)
def test_a_tensor_that_may_be_another_sequence(parameters: str, second: str | None) -> None:
    layer = layer_of(parameters)
    why = padded_queries_reason(layer, is_causal=False)
    if second is None:
        assert why is None
    else:
        assert f"{second} may be another sequence" in str(why)
    # What a causal query sees is of its own sequence.
    assert padded_queries_reason(layer, is_causal=True) is None


def test_an_encoder_that_never_gets_a_second_sequence() -> None:
    config = Wav2Vec2Config(hidden_size=32)
    layer = Wav2Vec2Attention(32, 2, config=config)
    assert padded_queries_reason(layer, is_causal=False) is None
    layer.config = Wav2Vec2Config(hidden_size=32, add_adapter=True)
    assert "reads the hidden states of padding" in str(padded_queries_reason(layer, is_causal=False))
    # A forward of the user's may be given one.
    of_user = layer_of("key_value_states: Tensor", Wav2Vec2Attention)
    assert "key_value_states" in str(padded_queries_reason(of_user, is_causal=False))


class KeepsPadding(BertSelfAttention):
    def forward(self, hidden_states, attention_mask=None, memory=None, **kwargs):  # type: ignore[no-untyped-def]
        return super().forward(hidden_states, attention_mask, **kwargs)


@torch.no_grad()
def test_kept_padded_queries_are_said(caplog: pytest.LogCaptureFixture) -> None:
    hf_flashinfer_attn.configure(backend="torch")
    model = BertModel._from_config(BertConfig(**SMALL, vocab_size=50), attn_implementation="flashinfer").eval()
    for module in model.modules():
        if type(module) is BertSelfAttention:
            module.__class__ = KeepsPadding
    said = "KeepsPadding also computes padded queries: memory may be another sequence"
    with caplog.at_level(logging.WARNING, logger="hf_flashinfer_attn"):
        with hf_flashinfer_attn.trace() as trace:
            model(IDS)
        assert trace.notes == ()
        assert "padded queries" not in caplog.text
        with hf_flashinfer_attn.trace() as trace:
            for _ in range(2):
                model(IDS, attention_mask=MASK)
    assert len(trace.notes) == 1
    assert trace.notes[0].startswith(said)
    assert said in str(trace)
    assert said in trace._repr_html_()
    assert trace.fallbacks == ()
    assert sum(said in record.message for record in caplog.records) == 1


def test_the_plan_of_a_model_says_what_is_kept() -> None:
    (layer,) = plan_of_config(BertConfig(**SMALL), capability=(9, 0)).layers
    assert layer.note is None
    config = BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
    )
    plan = plan_of_config(config, capability=(9, 0))
    layer, *_ = [layer for layer in plan.layers if layer.note is not None]
    assert layer.reason is None
    assert layer.pattern == "full"
    assert "key_value_states may be another sequence" in str(layer.note)
    assert any(layer.note is None for layer in plan.layers)
    assert str(layer.note) in " ".join(str(plan).split())
    assert str(layer.note) in plan._repr_html_()


def mistral(window: int | None) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    heads = {"num_key_value_heads": 2, "head_dim": 16}
    return MistralModel, MistralConfig(**SMALL, **heads, vocab_size=50, sliding_window=window)


def embedding_gemma(window: int) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3TextModel, Gemma3TextConfig(
        **SMALL, num_key_value_heads=1, head_dim=16, vocab_size=50, sliding_window=window, layer_types=kinds,
        use_bidirectional_attention=True,
    )  # fmt: skip


@pytest.mark.parametrize(("make", "window"), [(mistral, 3), (mistral, None), (embedding_gemma, 3)])
@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_windows_run_without_a_mask(make: Callable, window: int | None, padded: bool) -> None:
    hf_flashinfer_attn.configure(backend="torch")
    model_class, config = make(window)
    eager, ours = pair(lambda kind: model_class._from_config(copy.deepcopy(config), attn_implementation=kind))
    if padded:
        inputs, valid = {"input_ids": IDS, "attention_mask": MASK}, MASK.bool()
    else:
        inputs, valid = {"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 0, 1, 2]])}, torch.ones(1, 5).bool()
    expected = eager(**inputs).last_hidden_state
    with hf_flashinfer_attn.trace() as trace:
        close(ours(**inputs).last_hidden_state[valid], expected[valid])
    assert {(call.kernel, call.reason, call.note) for call in trace.calls} == {("torch", None, None)}


@pytest.mark.parametrize("is_decoder", [False, True])
@torch.no_grad()
def test_restarting_positions_are_not_noticed_without_a_causal_mask(is_decoder: bool) -> None:
    """As in eager attention, which docs/support.md says."""
    model_class, config = BertModel, BertConfig(**SMALL, vocab_size=50)
    if is_decoder:
        model_class, config = mistral(None)
        config.is_causal = False
    eager, ours = pair(lambda kind: model_class._from_config(copy.deepcopy(config), attn_implementation=kind))
    inputs = {"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 0, 1, 2]])}
    expected = eager(**inputs).last_hidden_state
    close(ours(**inputs).last_hidden_state, expected)
    offsets = torch.tensor([0, 2, 5])
    packed = ours(**inputs, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets).last_hidden_state
    assert (packed - expected).abs().max() > 1e-2
    alone = eager(input_ids=IDS[:1, :2]).last_hidden_state
    close(packed[:, :2], alone)
