"""generate() writes the same tokens with attn_implementation="flashinfer" as with transformers' own attention."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from paired_models import (
    BOS,
    EOS,
    PAD,
    T5_IS_ON_THE_INTERFACE,
    TRANSFORMERS_VERSION,
    VOCAB_SIZE,
    build_model,
    decoder_config,
    encoder_decoder_config,
    left_padded,
    right_padded,
    t5_config,
)
from torch import Tensor
from transformers import PreTrainedConfig

import hf_flashinfer_attn
from hf_flashinfer_attn.integration.functions import attention_mask

NEW_TOKENS = 8
# The longest is longer than the window, which so cuts keys off in the prompt already; the shorter ones are short enough
# for the last token to see padding through two layers of windows.
PROMPT_LENGTHS = (11, 7, 8, 4)
ENCODER_LENGTHS = (9, 5, 7, 3)
WINDOW = 5
LAYERS = 2
TOLERANCE = 1e-4
# What a mask or a window changes in the logits at least.
NOTICEABLE = 1e-2


@dataclass(frozen=True)
class Case:
    """A model that writes.

    Args:
        model_class: Name in transformers.
        make_config: Makes its config.
        reference: The implementation to compare with.
        without: Settings of the config that switch its special feature off, to see that the feature matters.
    """

    model_class: str
    make_config: Callable[..., PreTrainedConfig]
    reference: str = "sdpa"
    without: dict[str, Any] = field(default_factory=dict)


def of_llama(config_class: str, **settings: Any) -> Callable[..., PreTrainedConfig]:
    return functools.partial(decoder_config, getattr(transformers, config_class), **settings)


def of_bart(config_class: str, **settings: Any) -> Callable[..., PreTrainedConfig]:
    return functools.partial(encoder_decoder_config, getattr(transformers, config_class), **settings)


def gpt2_config(**settings: Any) -> PreTrainedConfig:
    return transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=BOS, eos_token_id=EOS,
        pad_token_id=PAD, tie_word_embeddings=False, **settings,
    )  # fmt: skip


def t5gemma_config() -> PreTrainedConfig:
    module = decoder_config(transformers.T5GemmaModuleConfig, attn_logit_softcapping=2.0, **GEMMA).to_dict()
    return transformers.T5GemmaConfig(
        encoder=module, decoder=module, vocab_size=VOCAB_SIZE, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        decoder_start_token_id=BOS, tie_word_embeddings=False,
    )  # fmt: skip


ALTERNATING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 8, **ALTERNATING}
DECODERS = {
    "llama": Case("LlamaForCausalLM", of_llama("LlamaConfig")),
    "qwen3": Case("Qwen3ForCausalLM", of_llama("Qwen3Config")),
    "mistral-window": Case(
        "MistralForCausalLM", of_llama("MistralConfig", sliding_window=WINDOW), without={"sliding_window": None}
    ),
    # Not sdpa, which raises on softcap from 5.23 on and ignores it before.
    "gemma2": Case(
        "Gemma2ForCausalLM",
        of_llama("Gemma2Config", attn_logit_softcapping=2.0, **GEMMA),
        reference="eager",
        without={"attn_logit_softcapping": None},
    ),
    "gemma3": Case("Gemma3ForCausalLM", of_llama("Gemma3TextConfig", **GEMMA), without={"sliding_window": 64}),
    "gpt2": Case("GPT2LMHeadModel", gpt2_config),
}
ENCODER_DECODERS = {
    "bart": Case("BartForConditionalGeneration", of_bart("BartConfig")),
    "mbart": Case("MBartForConditionalGeneration", of_bart("MBartConfig")),
    "marian": Case("MarianMTModel", of_bart("MarianConfig")),
    # Not sdpa, which T5 does not have before 5.15.
    "t5": Case("T5ForConditionalGeneration", functools.partial(t5_config, transformers.T5Config), reference="eager"),
    "t5gemma": Case("T5GemmaForConditionalGeneration", t5gemma_config, reference="eager"),
    "whisper": Case(
        "WhisperForConditionalGeneration",
        of_bart("WhisperConfig", num_mel_bins=8, max_source_positions=12, max_target_positions=64),
    ),
}
MODES: dict[str, dict[str, Any]] = {
    "dynamic-cache": {},
    "static-cache": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
}
each_decoder = pytest.mark.parametrize("name", DECODERS)
each_encoder_decoder = pytest.mark.parametrize("name", ENCODER_DECODERS)


@functools.lru_cache(maxsize=2)
def model_of(name: str, implementation: str, **settings: Any) -> Any:
    case = (DECODERS | ENCODER_DECODERS)[name]
    model = build_model(getattr(transformers, case.model_class), case.make_config(**settings), implementation)
    if name == "whisper":
        # Its checkpoints bring these; None stands for "nothing is suppressed or forced".
        model.generation_config.update(suppress_tokens=None, begin_suppress_tokens=None, max_length=64)
    return model


def require_cache(name: str, mode: str = "dynamic-cache") -> None:
    if name == "t5gemma" and mode != "no-cache" and Version("5.17") > TRANSFORMERS_VERSION:
        # Under eager attention too: the cached keys of the encoder are cut to the window, the mask is not.
        pytest.skip(f"transformers {TRANSFORMERS_VERSION} cannot cache an encoder longer than T5Gemma's window")


def generate(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Any:
    """Generates NEW_TOKENS tokens in every row, and returns the sequences with the logits of each step."""
    with torch.no_grad():
        return model.generate(
            **inputs,
            **{
                "max_new_tokens": NEW_TOKENS,
                "min_new_tokens": NEW_TOKENS,
                "do_sample": False,
                "output_logits": True,
                "return_dict_in_generate": True,
                **settings,
            },
        )


def logits_of(result: Any) -> Tensor:
    return torch.stack(result.logits)


def assert_same(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    assert len(actual.logits) == len(expected.logits) >= NEW_TOKENS
    torch.testing.assert_close(logits_of(actual), logits_of(expected), rtol=0, atol=TOLERANCE)


def assert_rows_differ(sequences: Tensor) -> None:
    assert len({tuple(row[-NEW_TOKENS:].tolist()) for row in sequences}) == len(sequences)


def prompts() -> dict[str, Tensor]:
    tokens, mask = left_padded(PROMPT_LENGTHS)
    return {"input_ids": tokens, "attention_mask": mask}


def encoder_inputs(name: str) -> dict[str, Tensor]:
    if name == "whisper":
        features = torch.randn(len(ENCODER_LENGTHS), 8, 24, generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(24)[None] < 2 * torch.tensor(ENCODER_LENGTHS)[:, None]).long()
        return {"input_features": features * mask[:, None], "attention_mask": mask}
    tokens, mask = right_padded(ENCODER_LENGTHS)
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("mode", MODES)
@each_decoder
def test_decoder_is_greedy_alike(name: str, mode: str) -> None:
    expected = generate(model_of(name, DECODERS[name].reference), prompts(), **MODES[mode])
    with hf_flashinfer_attn.trace() as trace:
        actual = generate(model_of(name, "flashinfer"), prompts(), **MODES[mode])
    assert_same(actual, expected)
    # The prompt in one forward, then one forward a token but for the last.
    assert len(trace.calls) == LAYERS * NEW_TOKENS
    assert_rows_differ(expected.sequences)


@pytest.mark.parametrize("mode", ["dynamic-cache", "static-cache"])
@each_decoder
def test_decoder_searches_beams_alike(name: str, mode: str) -> None:
    settings = {"num_beams": 3, "output_scores": True, **MODES[mode]}
    expected = generate(model_of(name, DECODERS[name].reference), prompts(), **settings)
    with hf_flashinfer_attn.trace() as trace:
        actual = generate(model_of(name, "flashinfer"), prompts(), **settings)
    assert_same(actual, expected)
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, rtol=0, atol=TOLERANCE)
    assert len(trace.calls) == LAYERS * NEW_TOKENS


@each_decoder
def test_decoder_sees_no_padding(name: str) -> None:
    """A row of a padded batch gives what it gives alone: all of the comparisons above would miss a shared mistake."""
    model, inputs = model_of(name, "flashinfer"), prompts()
    together = generate(model, inputs)
    for row, length in enumerate(PROMPT_LENGTHS):
        alone = generate(model, {key: value[row : row + 1, -length:] for key, value in inputs.items()})
        assert torch.equal(together.sequences[row, -NEW_TOKENS:], alone.sequences[0, -NEW_TOKENS:])
        torch.testing.assert_close(logits_of(together)[:, row], logits_of(alone)[:, 0], rtol=0, atol=TOLERANCE)


@each_decoder
def test_decoder_needs_its_mask(name: str) -> None:
    """The inputs can tell a right mask from a wrong one."""
    model, inputs = model_of(name, DECODERS[name].reference), prompts()
    unmasked = generate(model, {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])})
    change = (logits_of(generate(model, inputs))[0] - logits_of(unmasked)[0]).abs().amax(-1)
    assert (change[1:] > NOTICEABLE).all()


@pytest.mark.parametrize("name", [name for name, case in DECODERS.items() if case.without])
def test_decoder_needs_its_feature(name: str) -> None:
    case = DECODERS[name]
    with_feature = logits_of(generate(model_of(name, case.reference), prompts()))
    without = logits_of(generate(model_of(name, case.reference, **case.without), prompts()))
    assert (with_feature[0] - without[0]).abs().max() > NOTICEABLE


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3"])
def test_prompt_in_chunks(name: str) -> None:
    """A chunk has fewer queries than keys, and in a padded batch its first queries may see nothing."""
    settings = {"prefill_chunk_size": 4}
    expected = generate(model_of(name, DECODERS[name].reference), prompts(), **settings)
    with hf_flashinfer_attn.trace() as trace:
        actual = generate(model_of(name, "flashinfer"), prompts(), **settings)
    assert_same(actual, expected)
    chunks = -(-max(PROMPT_LENGTHS) // 4)
    assert len(trace.calls) == LAYERS * (chunks + NEW_TOKENS - 1)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gpt2"])
def test_second_turn_on_the_same_cache(name: str) -> None:
    inputs, results = prompts(), []
    more = torch.randint(4, VOCAB_SIZE, (len(PROMPT_LENGTHS), 3), generator=torch.Generator().manual_seed(1))
    for implementation in (DECODERS[name].reference, "flashinfer"):
        model = model_of(name, implementation)
        first = generate(model, inputs)
        tokens = torch.cat([first.sequences, more], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(tokens), NEW_TOKENS + 3, dtype=torch.long)], dim=1)
        second = {"input_ids": tokens, "attention_mask": mask}
        with hf_flashinfer_attn.trace() as trace:
            results.append(generate(model, second, past_key_values=first.past_key_values))
        # The last token of the first turn is not in the cache: four queries, then one at a time.
        assert len(trace.calls) == (LAYERS * NEW_TOKENS if implementation == "flashinfer" else 0)
    assert_same(results[1], results[0])


@pytest.mark.parametrize("shape", [(), (1,)], ids=["number", "vector"])
def test_a_mask_is_of_the_moment_it_was_made(shape: tuple[int, ...]) -> None:
    """A static cache counts its tokens in a tensor, and has counted on when a layer first asks for the dense mask."""
    offset = torch.full(shape, 2)
    mask = attention_mask(1, 2, 6, q_offset=offset)
    offset.add_(2)
    visible = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    assert torch.equal(mask.dense()[0, 0] == 0, visible)


@pytest.mark.parametrize("helper", ["assistant-model", "prompt-lookup"])
def test_assisted_generation(helper: str) -> None:
    """Several tokens are checked in one forward, and rejected ones are taken out of the cache."""
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    config = DECODERS["llama"].make_config()
    results = []
    for implementation in ("sdpa", "flashinfer"):
        model = model_of("llama", implementation)
        settings: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
        if helper == "assistant-model":
            # Nearly the same weights: some of its proposals are right, some wrong.
            assistant = build_model(transformers.LlamaForCausalLM, config, implementation)
            with torch.no_grad():
                assistant.lm_head.weight.add_(0.1 * torch.randn(assistant.lm_head.weight.shape))
            settings = {"assistant_model": assistant}
        with hf_flashinfer_attn.trace() as trace:
            results.append(generate(model, inputs, **settings))
        assert bool(trace.calls) == (implementation == "flashinfer")
    assert_same(results[1], results[0])
    assert torch.equal(results[1].sequences, generate(model_of("llama", "sdpa"), inputs).sequences)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beams", [1, 2])
@each_encoder_decoder
def test_encoder_decoder_writes_alike(name: str, beams: int, mode: str) -> None:
    require_cache(name, mode)
    case, inputs = ENCODER_DECODERS[name], encoder_inputs(name)
    # These random models repeat themselves, and tokens that are all alike hide a wrong cache. No model is trained to
    # write padding, and T5Gemma takes what it wrote for padding.
    settings = {"num_beams": beams, "no_repeat_ngram_size": 1, "suppress_tokens": [PAD], **MODES[mode]}
    expected = generate(model_of(name, case.reference), inputs, **settings)
    with hf_flashinfer_attn.trace() as trace:
        actual = generate(model_of(name, "flashinfer"), inputs, **settings)
    assert_same(actual, expected)
    if name == "t5" and not T5_IS_ON_THE_INTERFACE:
        assert trace.calls == []
    else:
        # The encoder once, then self-attention and cross-attention for every token.
        assert len(trace.calls) == LAYERS * (1 + 2 * NEW_TOKENS)
    assert_rows_differ(expected.sequences)


@pytest.mark.parametrize("name", [name for name in ENCODER_DECODERS if name != "whisper"])
def test_encoder_decoder_needs_its_mask(name: str) -> None:
    """Whisper aside, whose encoder attends to silence."""
    require_cache(name)
    model, inputs = model_of(name, ENCODER_DECODERS[name].reference), encoder_inputs(name)
    unmasked = generate(model, {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])})
    change = (logits_of(generate(model, inputs))[0] - logits_of(unmasked)[0]).abs().amax(-1)
    assert (change[1:] > NOTICEABLE).all()


# Older versions call the paged functions, which are refused, whatever the model's own implementation is.
BATCHES_CONTINUOUSLY = "paged|sdpa" not in transformers.AttentionInterface().valid_keys()


@pytest.mark.skipif(not BATCHES_CONTINUOUSLY, reason="continuous batching asks for 'paged|flashinfer' in this version")
def test_continuous_batching_writes_the_same_tokens(caplog: pytest.LogCaptureFixture) -> None:
    settings = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=EOS, pad_token_id=PAD)
    prompts = [torch.randint(4, VOCAB_SIZE, (length,)).tolist() for length in (9, 1, 4)]
    reference, model = model_of("llama", "eager"), model_of("llama", "flashinfer")
    expected = [
        reference.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    options = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    with caplog.at_level(logging.WARNING, "hf_flashinfer_attn"):
        results = model.generate_batch(
            prompts, generation_config=settings, continuous_batching_config=options, progress_bar=False
        )
    assert [result.generated_tokens for result in results.values()] == expected
    assert "argument" not in caplog.text
