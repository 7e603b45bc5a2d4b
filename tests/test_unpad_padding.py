"""`unpad` where something reads padding: it stays padded with its reason, or a log line says what is dropped."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from test_unpad import (
    _CAUSAL,
    _CHOICE,
    _MASKED,
    _QUESTION,
    _SEQUENCE,
    _TOKENS,
    LENGTHS,
    PAD,
    SLOTS,
    build,
    inputs_of,
    inputs_without_ids,
    record_inputs,
    reference,
    unpadded,
)
from torch import Tensor, nn

import hf_flashinfer_attn
from hf_flashinfer_attn import UnsupportedAttentionError, unpad

PACKED, PADDED = {(1, sum(LENGTHS))}, {(4, SLOTS)}
LABELS = "labels other than -100 in masked positions"
POSITIONS = "start_positions and end_positions, whose loss includes masked positions"


def labels_of(inputs: dict[str, Tensor], in_padding: int) -> Tensor:
    return (inputs["input_ids"] % 2).masked_fill(inputs["attention_mask"] == 0, in_padding)


def labelled(head: str, padding: str, in_padding: int) -> dict[str, Tensor]:
    inputs = inputs_of(padding)
    if head == _QUESTION:
        return {**inputs, "start_positions": torch.tensor([1, 0, 2, 1]), "end_positions": torch.tensor([3, 2, 4, 1])}
    return {**inputs, "labels": labels_of(inputs, in_padding)}


READ = [
    ("bert", _TOKENS, "right", 0, LABELS),
    ("roberta", _MASKED, "left", PAD, LABELS),
    ("distilbert", _QUESTION, "right", -100, POSITIONS),
    ("qwen3", _TOKENS, "left", 0, LABELS),
    # The position before a row's first token predicts it.
    ("llama", _CAUSAL, "left", -100, LABELS),
    ("llama", _CAUSAL, "right", 0, LABELS),
]


@pytest.mark.parametrize(("family", "head", "padding", "in_padding", "reason"), READ)
def test_a_loss_over_padding_stays_padded(
    family: str, head: str, padding: str, in_padding: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = labelled(head, padding, in_padding)
    model, plain = unpad(build(family, head)), build(family, head)
    shapes = record_inputs(model)
    with caplog.at_level(logging.WARNING, "hf_flashinfer_attn"):
        loss = model(**inputs).loss
    assert shapes
    assert set(shapes) == PADDED
    assert torch.equal(loss, plain(**inputs).loss)
    assert reason in caplog.text
    hf_flashinfer_attn.configure(padded_queries="keep")
    torch.testing.assert_close(model(**inputs).loss, reference(family, head)(**inputs).loss)
    hf_flashinfer_attn.configure(strict=True)
    with pytest.raises(UnsupportedAttentionError, match="padded_queries|" + reason):
        model(**inputs)


@pytest.mark.parametrize(
    ("family", "head", "padding"),
    [("bert", _TOKENS, "right"), ("roberta", _MASKED, "left"), ("llama", _CAUSAL, "right"), ("qwen3", _TOKENS, "left")],
)
def test_a_loss_over_tokens_is_packed(family: str, head: str, padding: str) -> None:
    inputs = labelled(head, padding, -100)
    model = unpad(build(family, head))
    shapes = record_inputs(model)
    loss = model(**inputs).loss
    assert set(shapes) == PACKED
    torch.testing.assert_close(loss, reference(family, head)(**inputs).loss)


@pytest.mark.parametrize(
    ("family", "head", "labels"),
    [
        ("bert", _SEQUENCE, torch.tensor([0, 1, 1, 0])),
        # Of the shape of the mask by chance.
        ("bert", _SEQUENCE, torch.rand(4, SLOTS)),
        ("bert", _CHOICE, torch.tensor([0, 1])),
    ],
)
def test_labels_of_rows_are_packed(family: str, head: str, labels: Tensor) -> None:
    settings = {"num_labels": SLOTS} if labels.is_floating_point() else {}
    model = unpad(build(family, head, **settings))
    shapes = record_inputs(model)
    assert model(**inputs_of("right", head), labels=labels).loss.isfinite()
    assert set(shapes) == PACKED


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_was_read_once_is_packed_the_next_time(mode: Any) -> None:
    """What a head finds in one forward's labels is not kept on the caller's mask."""
    model, inputs = unpad(build("bert", _TOKENS)), inputs_of("right")
    shapes = record_inputs(model)
    with mode():
        for in_padding, expected in ((0, PADDED), (-100, PACKED), (0, PADDED)):
            model(**inputs, labels=labels_of(inputs, in_padding))
            assert set(shapes) == expected
            shapes.clear()
        model(**inputs)
    assert set(shapes) == PACKED


@pytest.mark.parametrize(("padding", "expected"), [("right", PADDED), ("left", PACKED)])
def test_a_head_that_reads_the_last_position(padding: str, expected: set[tuple[int, int]]) -> None:
    """Without ids, the sequence classification of decoders takes the last position for the last token."""
    inputs = inputs_without_ids(inputs_of(padding)) | {"inputs_embeds": torch.randn(4, SLOTS, 32)}
    model = unpad(build("qwen3", _SEQUENCE))
    shapes = record_inputs(model)
    with torch.no_grad():
        logits, plain = model(**inputs).logits, build("qwen3", _SEQUENCE)(**inputs).logits
    assert set(shapes) == expected
    torch.testing.assert_close(logits, plain)
    assert logits.abs().min() > 0


@pytest.mark.parametrize("fill", [PAD, 4])
def test_masked_ids_that_are_not_padding_are_named(fill: int, caplog: pytest.LogCaptureFixture) -> None:
    """As in ColBERT, which expands queries with `[MASK]` tokens that its attention mask hides."""
    inputs = inputs_of("right")
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, fill)
    # A token with the id of padding is none of them.
    inputs["input_ids"][0, 2] = PAD
    with torch.no_grad(), caplog.at_level(logging.WARNING, "hf_flashinfer_attn"):
        for _ in range(2):
            unpadded("bert", "")(**inputs)
    lines = [record.message for record in caplog.records if "drops masked positions" in record.message]
    assert len(lines) == (fill != PAD)
    assert all(f"pad_token_id={PAD}" in line for line in lines)


def test_queries_that_are_kept_stay_padded() -> None:
    hf_flashinfer_attn.configure(padded_queries="keep")
    model, inputs = unpad(build("bert")), inputs_of("right")
    shapes = record_inputs(model)
    with torch.no_grad():
        actual, expected = (part(**inputs).last_hidden_state for part in (model, reference("bert", "")))
    assert set(shapes) == PADDED
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def scale_by_width(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """NEFTune's hook, with the bound of its noise in place of the noise."""
    if not module.training:
        return output
    return output + module.neftune_noise_alpha / (output.size(1) * output.size(2)) ** 0.5


def test_neftune_stays_padded(caplog: pytest.LogCaptureFixture) -> None:
    no_dropout = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    models, inputs = [unpad(build("bert", **no_dropout)), build("bert", **no_dropout)], inputs_of("right")
    shapes = record_inputs(models[0])
    for model in models:
        embeddings = model.train().get_input_embeddings()
        embeddings.neftune_noise_alpha = 5.0
        embeddings.register_forward_hook(scale_by_width)
    with caplog.at_level(logging.WARNING, "hf_flashinfer_attn"):
        actual, expected = (model(**inputs).last_hidden_state for model in models)
    assert set(shapes) == PADDED
    assert torch.equal(actual, expected)
    assert "NEFTune" in caplog.text
    shapes.clear()
    models[0].eval()(**inputs)
    assert set(shapes) == PACKED
