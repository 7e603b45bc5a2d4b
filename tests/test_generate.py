"""generate() writes the same tokens with attn_implementation="flashinfer" as with transformers' own attention."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import paired_models as pm
import pytest
import torch
import transformers
from packaging.version import Version
from paired_models import TRANSFORMERS_VERSION, VOCAB_SIZE, build_model, decoder_config, encoder_decoder_config
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
IDS = {"bos_token_id": pm.BOS, "eos_token_id": pm.EOS, "pad_token_id": pm.PAD}


class Case(NamedTuple):
    """A model that writes, what to compare it with, and settings that switch off what is special about it."""

    model_class: type[transformers.PreTrainedModel]
    make_config: Callable[..., PreTrainedConfig]
    reference: str = "sdpa"
    without: dict[str, Any] | None = None


def t5gemma_config() -> PreTrainedConfig:
    module = decoder_config(transformers.T5GemmaModuleConfig, attn_logit_softcapping=2.0, **GEMMA).to_dict()
    return transformers.T5GemmaConfig(
        encoder=module, decoder=module, vocab_size=VOCAB_SIZE, decoder_start_token_id=pm.BOS,
        tie_word_embeddings=False, **IDS,
    )  # fmt: skip


ALTERNATING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 8, **ALTERNATING}
GPT2 = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64}
# fmt: off
DECODERS = {
    "llama": Case(transformers.LlamaForCausalLM, partial(decoder_config, transformers.LlamaConfig)),
    "qwen3": Case(transformers.Qwen3ForCausalLM, partial(decoder_config, transformers.Qwen3Config)),
    "mistral-window": Case(transformers.MistralForCausalLM,
        partial(decoder_config, transformers.MistralConfig, sliding_window=WINDOW), without={"sliding_window": None}),
    # Not sdpa, which raises on softcap from 5.23 on and ignores it before.
    "gemma2": Case(transformers.Gemma2ForCausalLM,
        partial(decoder_config, transformers.Gemma2Config, attn_logit_softcapping=2.0, **GEMMA), "eager",
        without={"attn_logit_softcapping": None}),
    "gemma3": Case(transformers.Gemma3ForCausalLM, partial(decoder_config, transformers.Gemma3TextConfig, **GEMMA),
        without={"sliding_window": 64}),
    "gpt2": Case(transformers.GPT2LMHeadModel, partial(transformers.GPT2Config, vocab_size=VOCAB_SIZE, **GPT2, **IDS)),
}
ENCODER_DECODERS = {
    "bart": Case(transformers.BartForConditionalGeneration, partial(encoder_decoder_config, transformers.BartConfig)),
    "mbart": Case(transformers.MBartForConditionalGeneration,
        partial(encoder_decoder_config, transformers.MBartConfig)),
    "marian": Case(transformers.MarianMTModel, partial(encoder_decoder_config, transformers.MarianConfig)),
    # Not sdpa, which T5 does not have before 5.15.
    "t5": Case(transformers.T5ForConditionalGeneration, partial(pm.t5_config, transformers.T5Config), "eager"),
    "t5gemma": Case(transformers.T5GemmaForConditionalGeneration, t5gemma_config, "eager"),
    "whisper": Case(transformers.WhisperForConditionalGeneration,
        partial(encoder_decoder_config, transformers.WhisperConfig, **WHISPER)),
}
# fmt: on
CASES = DECODERS | ENCODER_DECODERS
MODES: dict[str, dict[str, Any]] = {
    "dynamic-cache": {},
    "static-cache": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
}
each_decoder = pytest.mark.parametrize("name", DECODERS)


@functools.lru_cache(maxsize=2)
def model_of(name: str, implementation: str = "", **settings: Any) -> Any:
    """A model with the implementation, or the reference's."""
    case = CASES[name]
    model = build_model(case.model_class, case.make_config(**settings), implementation or case.reference)
    if name == "whisper":
        # Its checkpoints bring these; None stands for "nothing is suppressed or forced".
        model.generation_config.update(suppress_tokens=None, begin_suppress_tokens=None, max_length=64)
    return model


def require_cache(name: str, mode: str = "dynamic-cache") -> None:
    if name == "t5gemma" and mode != "no-cache" and Version("5.17") > TRANSFORMERS_VERSION:
        # Under eager attention too: the cached keys of the encoder are cut to the window, the mask is not.
        pytest.skip(f"transformers {TRANSFORMERS_VERSION} cannot cache an encoder longer than T5Gemma's window")


@torch.no_grad()
def generate(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Any:
    """Generates NEW_TOKENS tokens in every row, and returns the sequences with the logits of each step."""
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    result = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **length, **result, **settings)


def logits_of(result: Any) -> Tensor:
    return torch.stack(result.logits)


def assert_same(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    assert len(actual.logits) == len(expected.logits) >= NEW_TOKENS
    torch.testing.assert_close(logits_of(actual), logits_of(expected), rtol=0, atol=TOLERANCE)


def generate_alike(name: str, calls: int = LAYERS * NEW_TOKENS, **settings: Any) -> tuple[Any, Any]:
    """Both implementations write the same, ours with so many calls: both results."""
    inputs = inputs_of(name)
    expected = generate(model_of(name), inputs, **settings)
    with hf_flashinfer_attn.trace() as trace:
        actual = generate(model_of(name, "flashinfer"), inputs, **settings)
    assert_same(actual, expected)
    assert len(trace.calls) == calls
    return actual, expected


def assert_rows_differ(sequences: Tensor) -> None:
    assert len({tuple(row[-NEW_TOKENS:].tolist()) for row in sequences}) == len(sequences)


def inputs_of(name: str) -> dict[str, Tensor]:
    if name == "whisper":
        features = torch.randn(len(ENCODER_LENGTHS), 8, 24, generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(24)[None] < 2 * torch.tensor(ENCODER_LENGTHS)[:, None]).long()
        return {"input_features": features * mask[:, None], "attention_mask": mask}
    tokens, mask = pm.left_padded(PROMPT_LENGTHS) if name in DECODERS else pm.right_padded(ENCODER_LENGTHS)
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("mode", MODES)
@each_decoder
def test_decoder_is_greedy_alike(name: str, mode: str) -> None:
    # The prompt in one forward, then one forward a token but for the last.
    _, expected = generate_alike(name, **MODES[mode])
    assert_rows_differ(expected.sequences)


@pytest.mark.parametrize("mode", ["dynamic-cache", "static-cache"])
@each_decoder
def test_decoder_searches_beams_alike(name: str, mode: str) -> None:
    actual, expected = generate_alike(name, num_beams=3, output_scores=True, **MODES[mode])
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, rtol=0, atol=TOLERANCE)


@each_decoder
def test_decoder_sees_no_padding(name: str) -> None:
    """A row of a padded batch gives what it gives alone: all of the comparisons above would miss a shared mistake."""
    model, inputs = model_of(name, "flashinfer"), inputs_of(name)
    together = generate(model, inputs)
    for row, length in enumerate(PROMPT_LENGTHS):
        alone = generate(model, {key: value[row : row + 1, -length:] for key, value in inputs.items()})
        assert torch.equal(together.sequences[row, -NEW_TOKENS:], alone.sequences[0, -NEW_TOKENS:])
        torch.testing.assert_close(logits_of(together)[:, row], logits_of(alone)[:, 0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in CASES if name != "whisper"])
def test_the_mask_matters(name: str) -> None:
    """The inputs can tell a right mask from a wrong one; Whisper aside, whose encoder attends to silence."""
    require_cache(name)
    model, inputs = model_of(name), inputs_of(name)
    unmasked = generate(model, {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])})
    change = (logits_of(generate(model, inputs))[0] - logits_of(unmasked)[0]).abs().amax(-1)
    assert (change[1:] > NOTICEABLE).all()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.without])
def test_the_feature_of_a_decoder_matters(name: str) -> None:
    models = model_of(name), model_of(name, **CASES[name].without)
    with_feature, without = (logits_of(generate(model, inputs_of(name))) for model in models)
    assert (with_feature[0] - without[0]).abs().max() > NOTICEABLE


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3"])
def test_prompt_in_chunks(name: str) -> None:
    """A chunk has fewer queries than keys, and in a padded batch its first queries may see nothing."""
    chunks = -(-max(PROMPT_LENGTHS) // 4)
    generate_alike(name, LAYERS * (chunks + NEW_TOKENS - 1), prefill_chunk_size=4)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gpt2"])
def test_second_turn_on_the_same_cache(name: str) -> None:
    inputs, results = inputs_of(name), []
    more = torch.randint(4, VOCAB_SIZE, (len(PROMPT_LENGTHS), 3), generator=torch.Generator().manual_seed(1))
    for implementation in ("", "flashinfer"):
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
    results = []
    for implementation in ("sdpa", "flashinfer"):
        settings: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
        if helper == "assistant-model":
            # Nearly the same weights: some of its proposals are right, some wrong.
            assistant = build_model(transformers.LlamaForCausalLM, CASES["llama"].make_config(), implementation)
            with torch.no_grad():
                assistant.lm_head.weight.add_(0.1 * torch.randn(assistant.lm_head.weight.shape))
            settings = {"assistant_model": assistant}
        with hf_flashinfer_attn.trace() as trace:
            results.append(generate(model_of("llama", implementation), inputs, **settings))
        assert bool(trace.calls) == (implementation == "flashinfer")
    assert_same(results[1], results[0])
    assert torch.equal(results[1].sequences, generate(model_of("llama", "sdpa"), inputs).sequences)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder_writes_alike(name: str, beams: int, mode: str) -> None:
    require_cache(name, mode)
    # These random models repeat themselves, and tokens that are all alike hide a wrong cache. No model is trained to
    # write padding, and T5Gemma takes what it wrote for padding.
    settings = {"num_beams": beams, "no_repeat_ngram_size": 1, "suppress_tokens": [pm.PAD], **MODES[mode]}
    # The encoder once, then self-attention and cross-attention for every token.
    calls = 0 if name == "t5" and not pm.T5_IS_ON_THE_INTERFACE else LAYERS * (1 + 2 * NEW_TOKENS)
    _, expected = generate_alike(name, calls, **settings)
    assert_rows_differ(expected.sequences)


# Older versions call the paged functions, which are refused, whatever the model's own implementation is.
BATCHES_CONTINUOUSLY = "paged|sdpa" not in transformers.AttentionInterface().valid_keys()


@pytest.mark.skipif(not BATCHES_CONTINUOUSLY, reason="continuous batching asks for 'paged|flashinfer' in this version")
def test_continuous_batching_writes_the_same_tokens(caplog: pytest.LogCaptureFixture) -> None:
    settings = transformers.GenerationConfig(
        max_new_tokens=5, do_sample=False, eos_token_id=pm.EOS, pad_token_id=pm.PAD
    )
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
