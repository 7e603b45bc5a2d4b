"""`predict` and `rank` return what a `CrossEncoder` on sdpa does."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from encode_models import KINDS, QUERY, TEXTS, assert_same, both, classifier, of_kind, reranker
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from hf_flashinfer_attn import predict, rank, repad

HEADS = dict.fromkeys(("bert", "roberta", "modernbert", "distilbert"), "ForSequenceClassification")
HEADS["qwen3"] = "ForCausalLM"
PAIRS = [(QUERY, text) for text in TEXTS]


@functools.cache
def tiny(implementation: str) -> Any:
    model = reranker("bert", implementation)
    model.prompts = {"short": "Q: "}
    return model


several_labels = functools.cache(classifier)


def fresh() -> list[Any]:
    """A tiny model that `predict` unpads, and its reference; tests may change both."""
    return [reranker("bert", implementation) for implementation in ("flashinfer", "sdpa")]


def assert_predicts(model: Any, reference: Any, inputs: Any = PAIRS, **options: Any) -> None:
    assert_same(predict(model, inputs, **options), reference.predict(inputs, **options))


ARGUMENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "tensor": {"convert_to_tensor": True},
    "list": {"convert_to_numpy": False},
    "identity": {"activation_fn": nn.Identity()},
    "function": {"activation_fn": lambda logits: logits / 3 + 1},
    "softmax": {"apply_softmax": True},
    "softmax of a function": {"apply_softmax": True, "activation_fn": nn.Sigmoid()},
    "batch_size": {"batch_size": 3},
    "device": {"device": "cpu"},
    "prompt": {"prompt": "a few words: "},
    "processing_kwargs": {"processing_kwargs": {"text": {"max_length": 12, "truncation": True}}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str, labels: int, kind: str) -> None:
    model, reference = both(kind, tiny if labels == 1 else several_labels)
    for inputs in (PAIRS, PAIRS[1], PAIRS[:1], []):
        assert_predicts(model, reference, inputs, **ARGUMENTS[case])


@functools.cache
def with_head(family: str, implementation: str) -> Any:
    return reranker(family, implementation, HEADS[family])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", HEADS)
def test_families(family: str, kind: str) -> None:
    model, reference = both(kind, functools.partial(with_head, family))
    expected = reference.predict(PAIRS)
    assert expected.std() > 1e-2
    assert_same(predict(model, PAIRS), expected)
    assert_same(predict(model, PAIRS, batch_size=4, tokens_per_batch=200), expected)
    assert_same(predict(model, PAIRS[0]), expected[0])
    assert [one["corpus_id"] for one in rank(model, QUERY, TEXTS)] == np.argsort(-expected, kind="stable").tolist()


def test_any_iterable_of_pairs() -> None:
    model, expected = tiny("flashinfer"), tiny("sdpa").predict(PAIRS)
    pair = PAIRS[0]
    for inputs in (
        tuple(PAIRS), list(map(list, PAIRS)), np.array(PAIRS), np.array(PAIRS, dtype=object), (pair for pair in PAIRS),
        zip([QUERY] * len(TEXTS), TEXTS), dict.fromkeys(PAIRS).keys(),
    ):  # fmt: skip
        assert_same(predict(model, inputs), expected)
    for inputs in (pair, list(pair), np.array(pair), np.array(pair, dtype=object)):
        assert_same(predict(model, inputs), expected[0])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_the_model(kind: str) -> None:
    model, reference = both(kind, tiny)
    expected = reference.predict(PAIRS, prompt_name="short")
    assert np.abs(expected - reference.predict(PAIRS)).max() > 1e-3
    assert_same(predict(model, PAIRS, prompt_name="short"), expected)
    assert_same(predict(model, PAIRS[0], prompt_name="short"), expected[0])
    ranked = [one["score"] for one in rank(model, QUERY, TEXTS, prompt_name="short")]
    assert_same(np.array(ranked, np.float32), np.sort(expected)[::-1].copy())
    with pytest.raises(ValueError, match="prompt_name='missing'"):
        predict(model, PAIRS, prompt_name="missing")
    model, reference = fresh()
    for each in (model, reference):
        each.prompts, each.default_prompt_name = {"short": "Q: "}, "short"
    assert_predicts(model, reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 1, 3, 100])
@pytest.mark.parametrize("return_documents", [False, True])
def test_rank(return_documents: bool, top_k: int | None, kind: str) -> None:
    options = {"top_k": top_k, "return_documents": return_documents}
    model, reference = both(kind, tiny)
    expected = reference.rank(QUERY, TEXTS, **options)
    for one, other in zip(rank(model, QUERY, TEXTS, **options), expected, strict=True):
        assert list(one) == list(other)
        assert one.pop("score") == pytest.approx(other.pop("score"), abs=1e-6)
        assert one == other
    assert rank(model, QUERY, [], **options) == []


def test_rank_takes_the_arguments_of_predict() -> None:
    model, reference = tiny("flashinfer"), tiny("sdpa")
    options = {"activation_fn": nn.Identity(), "batch_size": 2, "prompt": "words: ", "show_progress_bar": False}
    ours, expected = (one(QUERY, TEXTS, **options) for one in (functools.partial(rank, model), reference.rank))
    assert [one["corpus_id"] for one in ours] == [one["corpus_id"] for one in expected]
    assert_same(*(np.array([one["score"] for one in found]) for found in (ours, expected)))
    with pytest.raises(ValueError, match="rank with a model of 3 labels"):
        rank(several_labels("flashinfer"), QUERY, TEXTS)


@functools.cache
def many_pairs() -> tuple[list[tuple[str, str]], Any]:
    pairs = [(f"query {index % 5} " * (index % 3), "word " * (index * 7 % 40)) for index in range(90)]
    return pairs, tiny("sdpa").predict(pairs)


@pytest.mark.parametrize("kind", ["unpadded", "sdpa"])
@settings(max_examples=10)
@given(tokens=some.integers(1, 400), rows=some.integers(1, 100), count=some.integers(1, 90))
def test_batches_of_any_size(kind: str, tokens: int, rows: int, count: int) -> None:
    pairs, expected = (values[:count] for values in many_pairs())
    assert_same(predict(of_kind(kind, tiny), pairs, tokens_per_batch=tokens, batch_size=rows), expected)


def test_both_texts_are_truncated() -> None:
    model, reference = fresh()
    pairs = [("word " * 300, "other " * 300), ("a", "other " * 300), ("word " * 300, "b"), ("", ""), ("a", "")]
    for length in (128, 20, 128):
        for each in (model, reference):
            each.tokenizer.model_max_length = length
        for inputs in (pairs, pairs[0]):
            assert_predicts(model, reference, inputs)


def test_state_of_the_model() -> None:
    model, reference = fresh()
    expected = reference.predict(PAIRS)
    for module in (model, model[0].model, model[0].model.dropout, model[0].model.bert.encoder.layer[1]):
        module.train()
        assert_same(predict(model, PAIRS), expected)
    repad(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for _ in range(2):
        assert_same(model.predict(PAIRS), expected)
        assert_same(predict(model, PAIRS), expected)
    for activation in (nn.Identity(), None):
        for each in (model, reference):
            each.activation_fn = activation
        assert_predicts(model, reference)


# Errors.

GOOD = (QUERY, "a text")
BAD_PAIRS: list[Any] = [
    (QUERY,), (QUERY, "b", "c"), (QUERY, None), (b"bytes", "a"), "ab", {"text": "a"}, None, 5, [QUERY, ["b"]], (),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_PAIRS, ids=repr)
def test_what_is_no_pair_of_strings(bad: Any) -> None:
    for kind in ("unpadded", "sdpa"):
        for good in ([GOOD], [GOOD] * 700):
            with pytest.raises(TypeError, match=rf"pair {len(good)} is .*expected two strings"):
                predict(of_kind(kind, tiny), [*good, bad, GOOD])


def test_inputs_that_are_no_pairs() -> None:
    for bad in ("a string", 5, None, (QUERY, None), [QUERY], [[], []], b"bytes", {QUERY: "a text"}):
        with pytest.raises(TypeError, match=r"pair 0 is|inputs is a"):
            predict(tiny("flashinfer"), bad)
    with pytest.raises(TypeError, match="pair 1 is"):
        rank(tiny("flashinfer"), QUERY, ["a", None, "b"])  # type: ignore[list-item]


@pytest.fixture
def _no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("_no_thread_stays")
@pytest.mark.parametrize("place", [0, 900])
def test_lone_surrogates(place: int) -> None:
    for bad in ((QUERY, "b\ud800"), ("\udfff", "a text")):
        with pytest.raises(ValueError, match=rf"{place} cannot be tokenised.*surrogates not allowed"):
            predict(tiny("flashinfer"), [GOOD] * place + [bad] + [GOOD] * 50)
        with pytest.raises(ValueError, match="0 cannot be tokenised"):
            predict(tiny("flashinfer"), bad)


@pytest.mark.usefixtures("_no_thread_stays")
def test_an_error_in_the_model_stops_the_threads() -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    model = reranker("bert", "flashinfer")
    model[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        predict(model, [GOOD] * 3_000, batch_size=100)
