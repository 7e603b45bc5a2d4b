"""`encode` of models of transformers, against float64; signatures, and arguments that are refused."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import encode_models as em
import numpy as np
import pytest
import torch
from encode_models import KINDS, TEXTS, TOKENS, assert_same, saved
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, CanineTokenizer

from hf_flashinfer_attn import encode, encode_iter, predict, rank

POOLINGS = ("mean", "cls", "last")


@functools.cache
def plain(family: str, implementation: str) -> Any:
    implementation = "eager" if family == "mpnet" and implementation == "sdpa" else implementation
    return AutoModel.from_pretrained(saved(family), attn_implementation=implementation)


@functools.cache
def tokenizer_of(family: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(saved(family), model_max_length=TOKENS)
    tokenizer.padding_side = "left" if family == "qwen3" else "right"
    return tokenizer


def pooled(hidden: Tensor) -> dict[str, Tensor]:
    return {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}


@functools.cache
def exact_states(family: str, prompt: str, max_length: int) -> list[Tensor]:
    """In float64, by eager attention, one text at a time."""
    model = copy.deepcopy(plain(family, "eager")).double().eval()
    options = {"truncation": True, "max_length": max_length, "return_tensors": "pt"}
    with torch.no_grad():
        return [model(**tokenizer_of(family)(prompt + text, **options)).last_hidden_state[0] for text in TEXTS]


def exact_vectors(family: str, pooling: str, prompt: str = "", max_length: int = TOKENS) -> Tensor:
    return torch.stack([pooled(hidden)[pooling] for hidden in exact_states(family, prompt, max_length)])


def error_of(vectors: Any, exact: Tensor) -> float:
    return float((torch.as_tensor(vectors).double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", em.FAMILIES)
def test_plain_models_are_as_exact_as_sdpa(family: str, pooling: Any) -> None:
    tokenizer, exact = tokenizer_of(family), exact_vectors(family, pooling)
    batch = tokenizer(TEXTS, truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = plain(family, "sdpa").eval()(**batch).last_hidden_state
    rows = [pooled(states[mask.bool()])[pooling] for states, mask in zip(hidden, batch["attention_mask"])]
    allowed = 1.25 * error_of(torch.stack(rows), exact)
    for kind in KINDS:
        model = em.of_kind(kind, functools.partial(plain, family)).train()
        vectors = encode(model, TEXTS, tokenizer=tokenizer, pooling=pooling)
        assert (vectors.dtype, vectors.shape) == (np.float32, exact.shape)
        assert error_of(vectors, exact) <= allowed
        assert_same(encode(model, TEXTS[0], tokenizer=tokenizer, pooling=pooling), exact[0].float().numpy())


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_arguments_of_plain_models(family: str, pooling: Any) -> None:
    own = functools.partial(encode, plain(family, "flashinfer"), tokenizer=tokenizer_of(family), pooling=pooling)
    exact, longest = exact_vectors(family, pooling, "words: ", 9).float(), exact_vectors(family, pooling).float()
    short = functools.partial(own, prompt="words: ", max_length=9, batch_size=3)
    assert_same(short(TEXTS), exact.numpy())
    assert_same(short(TEXTS[0]), exact[0].numpy())
    assert_same(short(TEXTS, convert_to_tensor=True), exact)
    assert_same(short(TEXTS, convert_to_numpy=False), list(exact))
    assert_same(list(encode_iter(*short.args, iter(TEXTS), **short.keywords)), list(exact.numpy()))
    unit = nn.functional.normalize(exact[:, :5])
    assert_same(short(TEXTS, truncate_dim=5, normalize_embeddings=True), unit.numpy())
    bits = short(TEXTS, precision="ubinary")
    assert (bits != np.packbits(exact.numpy() > 0, axis=1)).sum() <= (exact.abs() < 1e-5).sum()
    assert_same(own(TEXTS), longest.numpy())
    # The first token of a causal model sees no other.
    assert (longest - exact).abs().max() > 1e-2 or (family, pooling) == ("qwen3", "cls")


def character_model(implementation: str) -> Any:
    """A tiny model for a tokenizer of characters; all have the same weights."""
    config = BertConfig(
        vocab_size=58_000, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertModel._from_config(config, attn_implementation=implementation).eval()


def test_a_tokenizer_written_in_python() -> None:
    eager, tokenizer = character_model("eager"), CanineTokenizer(model_max_length=64)
    assert not tokenizer.is_fast
    with torch.no_grad():
        batches = [tokenizer(text, truncation=True, return_tensors="pt") for text in TEXTS]
        expected = torch.stack([eager(**batch).last_hidden_state[0].mean(0) for batch in batches]).numpy()
    for implementation in ("flashinfer", "sdpa"):
        model = character_model(implementation)
        assert_same(encode(model, TEXTS, tokenizer=tokenizer, pooling="mean", batch_size=4), expected)
        assert_same(encode(model, TEXTS[0], tokenizer=tokenizer, pooling="mean"), expected[0])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_texts_without_tokens_have_no_vector(pooling: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved("bert"), model_max_length=TOKENS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    for texts in (["some words", "", "more"], ["", "some words"], ["some words", "", ""]):
        with pytest.raises(ValueError, match=f"text {texts.index('')}"):
            encode(plain("bert", "flashinfer"), texts, tokenizer=tokenizer, pooling=pooling)


class Bare(CanineTokenizer):
    """Written in Python, and without special tokens."""

    def build_inputs_with_special_tokens(self, first: list[int], second: list[int] | None = None) -> list[int]:
        return first + (second or [])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_texts_without_tokens_of_a_tokenizer_in_python(pooling: Any) -> None:
    with pytest.raises(ValueError, match="text 1 cannot be tokenised: it has no tokens"):
        encode(
            character_model("flashinfer"), ["some words", "", "more"], tokenizer=Bare(model_max_length=64),
            pooling=pooling,
        )  # fmt: skip


@pytest.mark.parametrize("family", ["bert", "qwen3", "modernbert"])
def test_a_model_without_padding_logs_nothing_of_it(family: str, caplog: pytest.LogCaptureFixture) -> None:
    encode(plain(family, "flashinfer"), TEXTS, tokenizer=tokenizer_of(family), pooling="last")
    assert "padded" not in caplog.text


# Arguments.


def test_signatures_are_those_of_sentence_transformers() -> None:
    other = {"self", "inputs", "pool", "chunk_size", "kwargs"}
    for function, own, more in (
        (encode, em.st.SentenceTransformer.encode, {"task"}), (predict, em.st.CrossEncoder.predict, set()),
        (rank, em.st.CrossEncoder.rank, set()),
    ):  # fmt: skip
        expected = {
            name: parameter.default
            for name, parameter in inspect.signature(inspect.unwrap(own)).parameters.items()
            if name not in other
        }
        parameters = inspect.signature(function).parameters
        assert more <= parameters.keys()
        if function is rank:
            # It passes on what it does not take itself.
            parameters = {**inspect.signature(predict).parameters, **parameters}
        assert expected.keys() <= parameters.keys()
        for name, default in expected.items():
            # Batches are cut by their number of tokens.
            assert parameters[name].default == default or name == "batch_size", name


def test_encode_iter_takes_the_arguments_of_encode() -> None:
    own, other = (inspect.signature(function).parameters for function in (encode_iter, encode))
    assert own.keys() == other.keys() - {"output_value", "precision", "convert_to_numpy"}
    assert all(own[name].default == other[name].default for name in own)


WRONG_ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("nonsense", {"nonsense": 1}),
    ("output_value='words'", {"output_value": "words"}),
    ("precision='int4'", {"precision": "int4"}),
    (r"device=\['cpu', 'cpu'\]", {"device": ["cpu", "cpu"]}),
]
WRONG_FOR_PLAIN: list[tuple[str, dict[str, Any]]] = [
    ("prompt_name", {"prompt_name": "query"}),
    ("task", {"task": "query"}),
    ("output_value", {"output_value": "token_embeddings"}),
    ("output_value=None", {"output_value": None}),
    ("batch_size=0", {"batch_size": 0}),
    ("batch_size=-1", {"batch_size": -1}),
    ("tokens_per_batch=0", {"tokens_per_batch": 0}),
    ("pooling='max'", {"pooling": "max"}),
    ("without pooling", {"pooling": None}),
    ("without tokenizer", {"tokenizer": None}),
    ("max_length=0", {"max_length": 0}),
    ("max_length=-1", {"max_length": -1}),
]
WRONG_FOR_SENTENCE_TRANSFORMERS: list[tuple[str, dict[str, Any]]] = [
    ("prompt_name='missing'", {"prompt_name": "missing"}),
    ("task='words'", {"task": "words"}),
    ("pool", {"pool": {}}),
    *[(f"{name} for a SentenceTransformer", {name: 5}) for name in ("tokenizer", "pooling", "max_length")],
]


@pytest.mark.parametrize(("message", "options"), WRONG_ARGUMENTS + WRONG_FOR_PLAIN)
def test_wrong_arguments_for_a_plain_model(message: str, options: dict[str, Any]) -> None:
    arguments = {"tokenizer": tokenizer_of("bert"), "pooling": "mean", **options}
    with pytest.raises(ValueError, match=message):
        encode(plain("bert", "flashinfer"), TEXTS, **arguments)


@pytest.mark.parametrize(("message", "options"), WRONG_ARGUMENTS + WRONG_FOR_SENTENCE_TRANSFORMERS)
def test_wrong_arguments_for_a_sentence_transformer(message: str, options: dict[str, Any]) -> None:
    for inputs in (TEXTS, TEXTS[0], []):
        with pytest.raises(ValueError, match=message):
            encode(em.tiny("sdpa"), inputs, **options)


@pytest.mark.parametrize("model", ["a/path", None, nn.Linear(2, 2), 5])
def test_wrong_models(model: Any) -> None:
    for function in (encode, encode_iter, predict):
        with pytest.raises(TypeError, match=type(model).__name__):
            function(model, TEXTS)
    with pytest.raises(TypeError, match=type(model).__name__):
        rank(model, TEXTS[0], TEXTS)


def test_models_of_the_other_kind() -> None:
    with pytest.raises(TypeError, match=r"encode\(CrossEncoder\): expected a SentenceTransformer"):
        encode(em.reranker("bert", "sdpa"), TEXTS)
    with pytest.raises(TypeError, match=r"encode\(SparseEncoder\): expected a SentenceTransformer"):
        encode(em.st.SparseEncoder(saved("bert", "ForMaskedLM"), device="cpu"), TEXTS)
    with pytest.raises(TypeError, match=r"predict\(SentenceTransformer\): expected a CrossEncoder"):
        predict(em.tiny("sdpa"), TEXTS)
