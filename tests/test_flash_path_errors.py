"""Where transformers' own flash-attention path is silently wrong, "flashinfer" equals eager attention.

Each test also computes the wrong answer, with eager attention and the mistake put in by hand, to see that the input can
tell one from the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from paired_models import (
    BOS,
    EOS,
    PAD,
    T5_IS_ON_THE_INTERFACE,
    VOCAB_SIZE,
    build_model,
    decoder_config,
    encoder_decoder_config,
    left_padded,
    right_padded,
    t5_config,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_flashinfer_attn

TOLERANCE = 1e-5
# What each mistake changes at least.
NOTICEABLE = 1e-2
LAYERS = 2
ENCODER_LENGTHS = (9, 5, 7, 3)


@torch.no_grad()
def assert_right(
    right: Callable[[], Tensor], ours: Callable[[], Tensor], wrong: Callable[[], Tensor], *, calls: int = LAYERS
) -> None:
    expected = right()
    assert expected.numel() > 0
    with hf_flashinfer_attn.trace() as trace:
        actual = ours()
    assert len(trace.calls) == calls
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * max(1.0, expected.abs().max().item()))
    assert (wrong() - expected).abs().max() > NOTICEABLE


def pair_of(model_class: type[PreTrainedModel], config: Any) -> tuple[Any, Any]:
    return build_model(model_class, config, "eager"), build_model(model_class, config, "flashinfer")


# Cross-attention to a padded encoder: the flash path takes the encoder's mask for the queries' too, and drops queries.


def drop_queries(attention: nn.Module, mask: Tensor) -> Callable[[], None]:
    """Makes an attention layer lose the queries that a mask of its keys calls padding."""

    def zero(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (output[0] * mask[..., None], *output[1:])

    return attention.register_forward_hook(zero).remove


@pytest.mark.parametrize("decoder_length", [9, 4, 1, 12])
@pytest.mark.parametrize("config_class", ["BartConfig", "MBartConfig", "MarianConfig"])
def test_cross_attention_to_a_padded_encoder(config_class: str, decoder_length: int) -> None:
    model_class = getattr(transformers, config_class.replace("Config", "Model"))
    eager, model = pair_of(model_class, encoder_decoder_config(getattr(transformers, config_class)))
    tokens, mask = right_padded(ENCODER_LENGTHS)
    decoder_tokens, _ = right_padded((decoder_length,) * len(tokens), seed=1)
    inputs = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": decoder_tokens, "use_cache": False}

    def wrong() -> Tensor:
        if decoder_length != mask.shape[1]:
            # Queries cannot be dropped by a mask of another length: here the mistake is to forget the mask.
            return eager(**{**inputs, "attention_mask": torch.ones_like(mask)}).last_hidden_state
        removes = [drop_queries(layer.encoder_attn, mask) for layer in eager.decoder.layers]
        hidden: Tensor = eager(**inputs).last_hidden_state
        for remove in removes:
            remove()
        return hidden

    assert_right(
        lambda: eager(**inputs).last_hidden_state,
        lambda: model(**inputs).last_hidden_state,
        wrong,
        calls=3 * LAYERS,
    )


@pytest.mark.parametrize("decoder_length", [9, 4])
def test_cross_attention_of_a_bert_decoder(decoder_length: int) -> None:
    """Self-attention and cross-attention are classes of encoders here, and the encoder's states come from outside."""
    config = transformers.BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=PAD, is_decoder=True, add_cross_attention=True, use_cache=False,
    )  # fmt: skip
    eager, model = pair_of(transformers.BertModel, config)
    _, mask = right_padded(ENCODER_LENGTHS)
    states = torch.randn(*mask.shape, 32, generator=torch.Generator().manual_seed(3))
    tokens, _ = right_padded((decoder_length,) * len(mask), seed=1)
    inputs = {"input_ids": tokens, "encoder_hidden_states": states, "encoder_attention_mask": mask}

    def wrong() -> Tensor:
        if decoder_length != mask.shape[1]:
            return eager(**{**inputs, "encoder_attention_mask": torch.ones_like(mask)}).last_hidden_state
        removes = [drop_queries(layer.crossattention.self, mask) for layer in eager.encoder.layer]
        hidden: Tensor = eager(**inputs).last_hidden_state
        for remove in removes:
            remove()
        return hidden

    assert_right(
        lambda: eager(**inputs).last_hidden_state,
        lambda: model(**inputs).last_hidden_state,
        wrong,
        calls=2 * LAYERS,
    )


# Image blocks: tokens of an image see each other both ways; the flash path is causal throughout.

IMAGE_TOKEN, IMAGE_TOKENS = VOCAB_SIZE - 1, 4


def gemma3_config() -> Any:
    text = decoder_config(
        transformers.Gemma3TextConfig, query_pre_attn_scalar=8, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
    }
    return transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE_TOKEN, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
def test_image_blocks(padded: bool) -> None:
    eager, model = pair_of(transformers.Gemma3ForConditionalGeneration, gemma3_config())
    tokens, mask = left_padded((16, 13, 16)) if padded else left_padded((16, 16, 16))
    tokens = tokens.clamp(max=IMAGE_TOKEN - 1)
    # Two blocks a row, at other places in each.
    for row, starts in enumerate([(1, 8), (5, 10), (3, 11)]):
        for start in starts:
            tokens[row, start : start + IMAGE_TOKENS] = IMAGE_TOKEN
    kinds = (tokens == IMAGE_TOKEN).long()
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens, "attention_mask": mask, "pixel_values": pixels, "use_cache": False}
    valid = mask.bool()
    assert_right(
        lambda: eager(**inputs, token_type_ids=kinds).logits[valid],
        lambda: model(**inputs, token_type_ids=kinds).logits[valid],
        lambda: eager(**inputs, token_type_ids=torch.zeros_like(kinds)).logits[valid],
        # The vision tower too.
        calls=LAYERS + 1,
    )


# Packed sequences in a batch of several rows: the flash path looks for restarting positions in a single row only.


@pytest.mark.parametrize("window", [None, 3], ids=["causal", "window"])
@pytest.mark.parametrize("family", ["Qwen3", "Mistral"])
def test_packed_rows(family: str, window: int | None) -> None:
    settings: dict[str, Any] = {"sliding_window": window}
    if family == "Qwen3":
        settings |= {"use_sliding_window": window is not None, "max_window_layers": 0}
    config = decoder_config(getattr(transformers, f"{family}Config"), **settings)
    eager, model = pair_of(getattr(transformers, f"{family}Model"), config)
    tokens, _ = right_padded((12, 12), seed=2)
    lengths = [(5, 7), (3, 4, 5)]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False}

    def alone() -> Tensor:
        """Each sequence in a forward of its own."""
        rows = [
            torch.cat([eager(part[None]).last_hidden_state[0] for part in row.split(list(parts))])
            for row, parts in zip(tokens, lengths)
        ]
        return torch.stack(rows)

    # A mask of ones switches the detection of packed sequences off.
    assert_right(
        lambda: eager(**inputs).last_hidden_state,
        lambda: model(**inputs).last_hidden_state,
        lambda: eager(**inputs, attention_mask=torch.ones_like(tokens)).last_hidden_state,
    )
    assert_right(
        alone,
        lambda: model(**inputs).last_hidden_state,
        lambda: eager(**inputs, attention_mask=torch.ones_like(tokens)).last_hidden_state,
    )


@pytest.mark.parametrize("switch", ["cache", "mask"])
def test_restarting_positions_that_are_not_packed(switch: str) -> None:
    """With a cache or a padding mask, eager attention does not take restarting positions for packed sequences."""
    eager, model = pair_of(transformers.Qwen3Model, decoder_config(transformers.Qwen3Config))
    tokens, mask = right_padded((12, 12), seed=2)
    inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": torch.arange(12).remainder(5).repeat(2, 1)}
    inputs |= {"use_cache": True} if switch == "cache" else {"attention_mask": mask, "use_cache": False}
    packed = {"input_ids": tokens, "position_ids": inputs["position_ids"], "use_cache": False}
    assert_right(
        lambda: eager(**inputs).last_hidden_state,
        lambda: model(**inputs).last_hidden_state,
        lambda: eager(**packed).last_hidden_state,
    )


# A window to both sides: the flash path makes it one narrower on either side.


def t5gemma_config(window: int, *, is_encoder_decoder: bool = False) -> Any:
    module = decoder_config(
        transformers.T5GemmaModuleConfig, query_pre_attn_scalar=8, attn_logit_softcapping=None, sliding_window=window,
        layer_types=["sliding_attention", "full_attention"],
    ).to_dict()  # fmt: skip
    return transformers.T5GemmaConfig(
        encoder=module, decoder=module, vocab_size=VOCAB_SIZE, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        is_encoder_decoder=is_encoder_decoder,
    )  # fmt: skip


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("window", [1, 4])
def test_window_to_both_sides(window: int, padding: str) -> None:
    model_class = transformers.T5GemmaEncoderModel
    eager, model = pair_of(model_class, t5gemma_config(window))
    narrower = build_model(model_class, t5gemma_config(window - 1), "eager")
    lengths = (13, 13, 13) if padding == "none" else (13, 6, 10)
    tokens, mask = (left_padded if padding == "left" else right_padded)(lengths)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    valid = mask.bool()
    assert_right(
        lambda: eager(**inputs).last_hidden_state[valid],
        lambda: model(**inputs).last_hidden_state[valid],
        lambda: narrower(**inputs).last_hidden_state[valid],
    )


@pytest.mark.parametrize("decoder_length", [13, 4])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_that_only_the_encoder_masks(padding: str, decoder_length: int) -> None:
    """Without a mask T5Gemma's encoder masks its pad tokens, and its decoder attends to what became of them."""
    eager, model = pair_of(transformers.T5GemmaModel, t5gemma_config(4, is_encoder_decoder=True))
    tokens, mask = (left_padded if padding == "left" else right_padded)((13, 6, 10))
    decoder_tokens, _ = right_padded((decoder_length,) * len(tokens), seed=1)
    inputs = {"input_ids": tokens, "decoder_input_ids": decoder_tokens, "use_cache": False}

    def wrong() -> Tensor:
        removes = [drop_queries(layer.self_attn, mask) for layer in eager.encoder.layers]
        hidden: Tensor = eager(**inputs).last_hidden_state
        for remove in removes:
            remove()
        return hidden

    assert_right(
        lambda: eager(**inputs).last_hidden_state,
        lambda: model(**inputs).last_hidden_state,
        wrong,
        calls=3 * LAYERS,
    )


# Windows over a padding mask with holes: distances are between positions, but the flash path takes the holes out first.

HOLES = torch.tensor(
    [
        [1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1],
        [0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1],
        [1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 0],
    ]
)


@pytest.mark.parametrize("family", ["Mistral", "Gemma3"])
def test_window_over_holes(family: str) -> None:
    if family == "Mistral":
        eager, model = pair_of(transformers.MistralModel, decoder_config(transformers.MistralConfig, sliding_window=4))
    else:
        config = decoder_config(
            transformers.Gemma3TextConfig, query_pre_attn_scalar=8, sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        eager, model = pair_of(transformers.Gemma3TextModel, config)
    tokens, _ = right_padded((HOLES.shape[1],) * len(HOLES), seed=4)
    inputs = {"input_ids": tokens, "attention_mask": HOLES, "use_cache": False}
    valid = HOLES.bool()

    def without_holes() -> Tensor:
        """Each row without its padding, and every token at the position that it had."""
        positions = torch.arange(HOLES.shape[1])
        rows = [
            eager(row[keep][None], position_ids=positions[keep][None], attention_mask=torch.ones_like(row[keep][None]))
            for row, keep in zip(tokens, valid)
        ]
        return torch.cat([row.last_hidden_state[0] for row in rows])

    assert_right(
        lambda: eager(**inputs).last_hidden_state[valid],
        lambda: model(**inputs).last_hidden_state[valid],
        without_holes,
    )


# Relative position bias: the flash path drops it.


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", ["T5", "UMT5"])
def test_position_bias(family: str, padded: bool) -> None:
    config = t5_config(getattr(transformers, f"{family}Config"))
    eager, model = pair_of(getattr(transformers, f"{family}Model"), config)
    unbiased = build_model(type(eager), config, "eager")
    for name, weight in unbiased.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.zeros_(weight)
    tokens, mask = right_padded(ENCODER_LENGTHS if padded else (9, 9, 9, 9))
    decoder_tokens, decoder_mask = right_padded((6, 4, 6, 5) if padded else (6, 6, 6, 6), seed=1)
    inputs = {
        "input_ids": tokens,
        "attention_mask": mask,
        "decoder_input_ids": decoder_tokens,
        "decoder_attention_mask": decoder_mask,
        "use_cache": False,
    }

    def both_sides(model: Any) -> Tensor:
        result = model(**inputs)
        encoder, decoder = result.encoder_last_hidden_state[mask.bool()], result.last_hidden_state[decoder_mask.bool()]
        return torch.cat([encoder, decoder])

    assert_right(
        lambda: both_sides(eager),
        lambda: both_sides(model),
        lambda: both_sides(unbiased),
        calls=3 * LAYERS if T5_IS_ON_THE_INTERFACE else 0,
    )


# A row of padding only: the flash path leaves it to the kernel what a query without keys gets.


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_row_of_padding(family: str) -> None:
    """It is finite, and changes nothing in other rows."""
    if family == "Bert":
        config = transformers.BertConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
            intermediate_size=32, max_position_embeddings=64, pad_token_id=PAD,
        )  # fmt: skip
    else:
        config = decoder_config(transformers.LlamaConfig)
    eager, model = pair_of(getattr(transformers, f"{family}Model"), config)
    tokens, mask = left_padded((9, 5, 7, 3))
    mask[2] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    with torch.no_grad():
        assert model(**inputs).last_hidden_state.isfinite().all()
    assert_right(
        lambda: eager(**inputs).last_hidden_state[mask.bool()],
        lambda: model(**inputs).last_hidden_state[mask.bool()],
        lambda: eager(tokens, attention_mask=torch.ones_like(mask)).last_hidden_state[mask.bool()],
    )
