"""`encode` after changes of the model, in batches of any size, and what it logs."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import encode_models as em
import numpy as np
import pytest
import torch
from encode_models import KINDS, TEXTS, WIDTH, assert_encodes, assert_same, encoder, fresh, many_texts, tiny
from hypothesis import given, settings
from hypothesis import strategies as some
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from torch import nn

from hf_flashinfer_attn import encode, encode_iter, repad, unpad


def test_dropout_does_not_run_in_a_stream_while_the_model_is_trained() -> None:
    model, texts = encoder("bert", "flashinfer"), TEXTS * 100
    vectors = []
    for vector in encode_iter(model, texts):
        vectors.append(vector)
        model.train()
    assert_same(np.stack(vectors), np.tile(tiny("sdpa").encode(TEXTS), (100, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_never_runs(kind: str) -> None:
    model, expected = em.of_kind(kind, functools.partial(encoder, "bert")), tiny("sdpa").encode(TEXTS)
    backbone = model[0].model
    for module in (model, backbone, backbone.encoder.layer[1].attention.self, backbone.embeddings.dropout):
        for inputs, vectors in ((TEXTS, expected), (TEXTS[0], expected[0])):
            module.train()
            assert_same(encode(model, inputs), vectors)
    assert not any(module.training for module in model.modules())


def test_repad_gives_the_model_back() -> None:
    model, expected = encoder("bert", "flashinfer"), tiny("sdpa").encode(TEXTS)
    changes: list[Callable[[], Any]] = [
        lambda: None, lambda: repad(model), lambda: unpad(model), lambda: setattr(model[0], "unpad_inputs", True),
    ]  # fmt: skip
    for change in changes:
        change()
        assert_same(encode(model, TEXTS), expected)
        assert_same(model.encode(TEXTS), expected)
    repad(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert_same(model.encode(TEXTS), expected)


def _truncate_on_the_left(model: Any) -> None:
    model.max_seq_length = 11
    model.tokenizer.truncation_side = "left"


def _replace_post_processor(model: Any) -> None:
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] [CLS] $A [SEP]", pair="$A $B", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )


def _replace_normalizer(model: Any) -> None:
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("statement", "cat"), normalizers.Lowercase()]
    )


def _add_a_new_token(model: Any) -> None:
    assert model.tokenizer.add_tokens(["atement"]) == 1
    model[0].model.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    with torch.no_grad():
        model[0].model.get_input_embeddings().weight[-1] = 0.5


def _scale_weights(model: Any) -> None:
    with torch.no_grad():
        model[0].model.get_input_embeddings().weight.mul_(1.5)


class Halving(nn.Module):
    """Has dropout, and halves vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        features["sentence_embedding"] = self.dropout(features["sentence_embedding"]) / 2
        return features


CHANGES: dict[str, Callable[[Any], Any]] = {
    "max_seq_length": lambda model: setattr(model, "max_seq_length", 11),
    "truncation_side": _truncate_on_the_left,
    "post_processor": _replace_post_processor,
    "normalizer": _replace_normalizer,
    "new token": _add_a_new_token,
    "known token": lambda model: model.tokenizer.add_tokens(["state"]),
    "processing_kwargs": lambda model: setattr(model[0], "processing_kwargs", {"text": {"max_length": 9}}),
    "include_prompt": lambda model: model.set_pooling_include_prompt(False),
    "pooling": lambda model: model.__setitem__(1, Pooling(WIDTH, "max")),
    "new module": lambda model: model.append(Halving().train()),
    "weights": _scale_weights,
}


@pytest.mark.parametrize("case", CHANGES)
def test_changes_between_calls(case: str) -> None:
    model, reference = fresh()
    encodes = functools.partial(assert_encodes, model, reference, prompt="a few words: ")
    before = reference.encode(TEXTS, prompt="a few words: ")
    for inputs in (TEXTS, TEXTS[0]):
        encodes(inputs)
    for each in (model, reference):
        CHANGES[case](each)
    assert np.abs(reference.encode(TEXTS, prompt="a few words: ") - before).max() > 1e-3
    for inputs in (TEXTS, TEXTS[0]):
        encodes(inputs)


class Doubling(em.st.SentenceTransformer):
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        features = super().forward(*args, **kwargs)
        features["sentence_embedding"] = features["sentence_embedding"] * 2
        return features


class Replacing(em.st.SentenceTransformer):
    def preprocess(self, inputs: list[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().preprocess([text.replace("statement", "cat") for text in inputs], *args, **kwargs)


@pytest.mark.parametrize("subclass", [Doubling, Replacing])
def test_subclasses_keep_their_own_methods(subclass: Any) -> None:
    model, reference = (subclass(modules=list(encoder("bert", name)), device="cpu") for name in ("flashinfer", "sdpa"))
    assert_encodes(model, reference)


def _mask_second(module: nn.Module, args: tuple[Any, ...]) -> None:
    args[0]["attention_mask"][:, 1] = 0


def _subtract_first(features: Any) -> None:
    name = "token_embeddings" if "token_embeddings" in features else "last_hidden_state"
    features[name] = features[name] - features[name][:, :1]


class Subtracting(Transformer):
    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        names = ("input_ids", "attention_mask", "token_type_ids")
        hidden = self.model(**{name: features[name] for name in names}).last_hidden_state
        features["token_embeddings"] = hidden - hidden[:, :1]
        return features


@pytest.mark.parametrize("how", ["hook", "pre-hook", "class"])
def test_what_others_add_to_a_transformer_gets_padded_rows(how: str) -> None:
    def change(model: Any) -> Any:
        if how == "class":
            model[0].__class__ = Subtracting
        elif how == "hook":
            model[0].register_forward_hook(lambda module, args, output: _subtract_first(output))
        else:
            model[0].register_forward_pre_hook(_mask_second)
        return model

    expected = change(encoder("bert", "sdpa")).encode(TEXTS)
    assert np.abs(expected - tiny("sdpa").encode(TEXTS)).max() > 1e-3
    assert_same(encode(change(encoder("bert", "flashinfer")), TEXTS), expected)
    if how == "class":
        assert_same(unpad(change(encoder("bert", "flashinfer"))).encode(TEXTS), expected)
    elif how == "hook":
        assert_same(encode(change(unpad(encoder("bert", "flashinfer"))), TEXTS), expected)


def test_hooks_of_a_plain_model_get_padded_rows() -> None:
    vectors = []
    for model in fresh():
        backbone, options = model[0].model, {"tokenizer": model.tokenizer, "pooling": "mean"}
        before = encode(backbone, TEXTS, **options)
        backbone.register_forward_hook(lambda module, args, output: _subtract_first(output))
        vectors.append(encode(backbone, TEXTS, **options))
        assert np.abs(vectors[-1] - before).max() > 1e-3
    assert_same(*vectors)


class Alone(Transformer):
    def preprocess(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        assert self.lock.acquire(blocking=False), "two threads at once"
        try:
            threading.Event().wait(0.02)
        finally:
            self.lock.release()
        return super().preprocess(*args, **kwargs)


def test_preprocessing_of_others_runs_in_one_thread() -> None:
    model, texts = encoder("bert", "flashinfer"), [f"text {index}" for index in range(600)]
    expected = encode(model, texts, batch_size=50)
    model[0].__class__ = Alone
    model[0].lock = threading.Lock()
    assert_same(encode(model, texts, batch_size=50), expected)


def test_copies_and_models_that_share_modules() -> None:
    model, reference = fresh()
    assert_encodes(model, reference)
    twin, other = copy.deepcopy(model), copy.deepcopy(reference)
    for each in (twin, other):
        _scale_weights(each)
        each.max_seq_length = 11
    maximum = em.st.SentenceTransformer(modules=[model[0], Pooling(WIDTH, "max")], device="cpu")
    expected = em.st.SentenceTransformer(modules=[reference[0], Pooling(WIDTH, "max")], device="cpu").encode(TEXTS)
    for _ in range(2):
        assert_encodes(twin, other)
        assert_same(encode(maximum, TEXTS), expected)
        assert_encodes(model, reference)
        vectors = encode(model[0].model, TEXTS, tokenizer=model.tokenizer, pooling="mean")
        assert_same(vectors, reference.encode(TEXTS))


def test_training_goes_on_afterwards() -> None:
    model = encoder("bert", "flashinfer")
    encode(model, TEXTS)
    model.train()
    model(model.preprocess(TEXTS[:3]))["sentence_embedding"].square().sum().backward()
    assert model[0].model.get_input_embeddings().weight.grad.abs().max() > 0


def test_padded_batches_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    encode(em.of_kind("flashinfer", tiny), TEXTS)
    assert "padded" not in caplog.text
    # A model that was encoded with before is known.
    model = encoder("bert", "sdpa")
    for _ in range(3):
        encode(model, TEXTS)
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if "runs on padded batches" in message] == [
        "SentenceTransformer with attn_implementation='sdpa' runs on padded batches; load it with "
        "attn_implementation='flashinfer' to skip padding"
    ]


@pytest.mark.parametrize("kind", ["unpadded", "sdpa"])
@settings(max_examples=15)
@given(
    tokens=some.integers(1, 500), rows=some.integers(1, 200), first=some.integers(0, 140), count=some.integers(1, 150)
)
def test_batches_of_any_size(kind: str, tokens: int, rows: int, first: int, count: int) -> None:
    model = em.of_kind(kind, tiny)
    texts, expected = (values[first : first + count] for values in many_texts())
    budget = {"tokens_per_batch": tokens, "batch_size": rows}
    assert_same(encode(model, texts, **budget), expected)
    assert_same(np.stack(list(encode_iter(model, iter(texts), **budget))), expected)


@pytest.mark.parametrize("kind", ["unpadded", "sdpa"])
def test_budgets_are_kept(kind: str) -> None:
    model, (texts, expected) = em.of_kind(kind, functools.partial(encoder, "bert")), many_texts()
    sizes: list[tuple[int, int]] = []
    embeddings = model[0].model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: sizes.append(tuple(args[0].shape)))
    assert_same(encode(model, texts, tokens_per_batch=100), expected)
    assert max(rows * width for rows, width in sizes) <= 100
    assert sum(rows * width for rows, width in sizes) / len(sizes) > 60
    sizes.clear()
    assert_same(encode(model, texts, batch_size=7), expected)
    assert len(sizes) >= len(texts) / 7
    assert kind == "unpadded" or max(rows for rows, _ in sizes) <= 7
