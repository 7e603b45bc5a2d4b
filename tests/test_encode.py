"""`encode` returns what `SentenceTransformer.encode` returns for the same model on sdpa, for every argument."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import encode_models as em
import numpy as np
import pytest
from encode_models import KINDS, QUERY, TEXTS, TOLERANCE, WIDTH, assert_encodes, assert_same, both, encoder, fresh, tiny
from sentence_transformers.sentence_transformer import modules as parts
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router
from test_sentence_transformers import assert_equal_rankings
from tokenizers.normalizers import BertNormalizer
from torch import nn

from hf_flashinfer_attn import encode, encode_iter

PASSAGES = [text[: 40 + 20 * index] for index, text in enumerate(TEXTS[:6])]
QUERIES = (QUERY, "format a number with a thousands separator", "slots of a class")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "prompt": {"prompt": "clustering: "},
    "empty prompt": {"prompt": ""},
    "prompt_name": {"prompt_name": "other"},
    "both prompts": {"prompt": "clustering: ", "prompt_name": "other"},
    "normalize": {"normalize_embeddings": True},
    "truncate_dim": {"truncate_dim": 32},
    "truncated and normalized": {"truncate_dim": 32, "normalize_embeddings": True},
    "tensor": {"convert_to_tensor": True},
    "list": {"convert_to_numpy": False},
    "truncated list": {"convert_to_numpy": False, "truncate_dim": 8, "normalize_embeddings": True},
    "batch_size": {"batch_size": 3},
    "device": {"device": "cpu"},
    "processing_kwargs": {"processing_kwargs": {"text": {"max_length": 9, "truncation": True}}},
    "padded to max_length": {"processing_kwargs": {"text": {"padding": "max_length", "max_length": 40}}},
    "no progress bar": {"show_progress_bar": False},
}


@functools.cache
def expected_of(case: str, is_single: bool) -> Any:
    return em.minilm("sdpa").encode(PASSAGES[1] if is_single else PASSAGES, **ARGUMENTS[case])


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str, kind: str) -> None:
    for is_single in (False, True):
        vectors = encode(em.of_kind(kind, em.minilm), PASSAGES[1] if is_single else PASSAGES, **ARGUMENTS[case])
        assert_same(vectors, expected_of(case, is_single))


def test_rankings_are_equal(kind: str) -> None:
    model, reference = both(kind, em.minilm)
    scores = []
    for function in (functools.partial(encode, model), reference.encode):
        queries, passages = (function(texts, convert_to_tensor=True) for texts in (QUERIES, PASSAGES))
        scores.append(queries @ passages.T)
    assert_equal_rankings(*scores)


@pytest.mark.parametrize("task", ["query", "document"])
def test_tasks_are_encode_query_and_encode_document(task: Any, kind: str) -> None:
    model, reference = both(kind)
    own = {"query": reference.encode_query, "document": reference.encode_document}[task]
    default = encode(model, TEXTS)
    for options in ({}, {"prompt": "x: "}, {"prompt_name": "other"}):
        vectors = encode(model, TEXTS, task=task, **options)
        assert_same(vectors, own(TEXTS, **options))
        assert np.abs(vectors - default).max() > 1e-3
    assert_same(encode(model, QUERY, task=task), own(QUERY))


def test_default_prompt_and_dimension_of_the_model() -> None:
    model, reference = fresh()
    for name, dimension in (("query", None), ("other", 12), (None, None)):
        for each in (model, reference):
            each.prompts, each.default_prompt_name, each.truncate_dim = dict(em.PROMPTS), name, dimension
        assert_encodes(model, reference)
        assert_encodes(model, reference, prompt="", truncate_dim=20)
        assert_same(encode(model, TEXTS, task="document"), reference.encode_document(TEXTS))


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_precision(precision: Any, kind: str) -> None:
    model, reference = both(kind)
    exact = reference.encode(TEXTS)
    for options in ({}, {"convert_to_tensor": True}, {"convert_to_numpy": False}):
        vectors = encode(model, TEXTS, precision=precision, **options)
        others = reference.encode(TEXTS, precision=precision, **options)
        assert type(vectors) is type(others)
        ours, expected = (np.stack([np.asarray(row) for row in rows]) for rows in (vectors, others))
        assert ours.dtype == expected.dtype
        if "binary" in precision:
            offset = 128 if precision == "binary" else 0
            bits = [np.unpackbits((rows.astype(int) + offset).astype(np.uint8), axis=1) for rows in (ours, expected)]
            assert np.abs(exact[bits[0] != bits[1]]).max(initial=0) < TOLERANCE
        else:
            # The smallest and the largest number of each dimension lie at the edge of a bucket.
            assert np.abs(ours.astype(int) - expected).max() <= 1
    if "binary" in precision:
        assert_encodes(model, reference, QUERY, precision=precision)


def test_any_iterable_of_strings() -> None:
    model, expected = tiny("flashinfer"), tiny("sdpa").encode(TEXTS)
    for inputs in (
        tuple(TEXTS), np.array(TEXTS), np.array(TEXTS, dtype=object), iter(TEXTS), (text for text in TEXTS),
        map(str, TEXTS), dict.fromkeys(TEXTS).keys(),
    ):  # fmt: skip
        assert_same(encode(model, inputs), expected)
    with pytest.raises(TypeError, match="dict"):
        encode(model, dict.fromkeys(TEXTS))
    assert_same(encode(model, np.str_(TEXTS[0])), expected[0])
    assert_same(encode(model, [TEXTS[0]]), expected[:1])


def test_empty_strings_and_empty_inputs(kind: str) -> None:
    model, reference = both(kind)
    for text in ("", " \n", "\x00", "[SEP] [PAD] [MASK]", "https://example.org/cat.png"):
        assert_encodes(model, reference, text)
        assert_encodes(model, reference, [text, "a"])
    for options in (
        {}, {"convert_to_tensor": True}, {"convert_to_numpy": False}, {"precision": "int8"},
        {"output_value": "token_embeddings"}, {"output_value": None},
    ):  # fmt: skip
        assert_encodes(model, reference, [], **options)
    assert encode(model, iter(())).shape == (0,)


def test_token_embeddings(kind: str) -> None:
    model, reference = both(kind)
    for inputs in (TEXTS, TEXTS[3], TEXTS[:1]):
        expected = reference.encode(inputs, output_value="token_embeddings")
        assert_same(encode(model, inputs, output_value="token_embeddings"), expected)
        assert_same(encode(model, inputs, output_value="token_embeddings", tokens_per_batch=50), expected)


def test_all_features(kind: str) -> None:
    model, reference = both(kind)
    for options in ({}, {"prompt": "words: "}, {"batch_size": 4}, {"truncate_dim": 8}):
        expected = reference.encode(TEXTS, output_value=None, **options)
        for one, other in zip(encode(model, TEXTS, output_value=None, **options), expected, strict=True):
            assert one.keys() == other.keys()
            assert_same(one["sentence_embedding"], other["sentence_embedding"])
            # Padding is that of the batch.
            tokens = [features["token_embeddings"][features["attention_mask"].bool()] for features in (one, other)]
            assert_same(*tokens)
    ours, expected = encode(model, QUERY, output_value=None), reference.encode(QUERY, output_value=None)
    assert ours.keys() == expected.keys()


@pytest.mark.parametrize("is_lists", [True, False])
def test_long_texts_are_truncated(is_lists: bool) -> None:
    model, reference = fresh()
    texts = ["word " * 1000, "a", "another " * 200, *TEXTS]
    for length in (None, 17, 128, 3):
        for each in (model, reference):
            each.max_seq_length = length or each.max_seq_length
        inputs = texts if is_lists else texts[0]
        assert_same(encode(model, inputs, tokens_per_batch=60), reference.encode(inputs))
    for each in (model, reference):
        each.tokenizer.truncation_side = "left"
    assert_encodes(model, reference, ["first " + texts[0] + "last"])


def test_the_progress_bar_tells_texts_per_second(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("flashinfer")
    for function in (encode, lambda *inputs, **options: list(encode_iter(*inputs, **options))):
        for inputs, count in ((TEXTS, f"{len(TEXTS)}/{len(TEXTS)}"), (iter(TEXTS), f"{len(TEXTS)} texts")):
            function(model, inputs, show_progress_bar=True)
            output = capsys.readouterr()
            assert count in output.err
            assert " texts/s" in output.err
            assert output.out == ""
            function(model, inputs, show_progress_bar=False)
            assert capsys.readouterr().err == ""


# Families, pooling and other modules.

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@functools.cache
def with_all_modes(family: str, implementation: str) -> Any:
    return encoder(family, implementation, Pooling(WIDTH, MODES), is_left_padded=family == "qwen3")


@pytest.mark.parametrize("family", em.FAMILIES)
def test_families_with_all_modes_of_pooling(family: str, kind: str) -> None:
    model, reference = both(kind, functools.partial(with_all_modes, family))
    for each in (model, reference):
        each.set_pooling_include_prompt(True)
    for inputs in (TEXTS, TEXTS[0]):
        assert_encodes(model, reference, inputs)
    for each in (model, reference):
        each.set_pooling_include_prompt(False)
    for inputs in (TEXTS, TEXTS[0]):
        assert_encodes(model, reference, inputs, prompt="a few words: ", batch_size=4)
    assert_encodes(model, reference)


class Weighting(nn.Module):
    """Weights tokens by their ids, as no module of sentence-transformers does."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        weights = features["attention_mask"] * (features["input_ids"] % 7 + 1)
        weights = weights + features["token_type_ids"]
        features["sentence_embedding"] = (features["token_embeddings"] * weights[:, :, None]).sum(1)
        return features


class LastPlace(nn.Module):
    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        features["sentence_embedding"] = features["token_embeddings"][:, -1]
        return features


SHARED_LAYER = Dense(WIDTH, WIDTH)
MODULES: dict[str, Callable[[], list[nn.Module]]] = {
    "dense": lambda: [Pooling(WIDTH), Dense(WIDTH, 24), parts.LayerNorm(24), Normalize()],
    "dense of tokens": lambda: [
        Dense(WIDTH, 24, module_input_name="token_embeddings", module_output_name="token_embeddings"), Pooling(24),
    ],
    "dropout": lambda: [Pooling(WIDTH), parts.Dropout(0.5)],
    "one layer twice": lambda: [Pooling(WIDTH), SHARED_LAYER, Normalize(), SHARED_LAYER],
    "custom": lambda: [Weighting()],
    "layers": lambda: [parts.WeightedLayerPooling(WIDTH, num_hidden_layers=em.LAYERS, layer_start=1), Pooling(WIDTH)],
    **{mode: functools.partial(lambda mode: [Pooling(WIDTH, mode), Normalize()], mode) for mode in MODES},
    "route after pooling": lambda: [
        Pooling(WIDTH), Router.for_query_document([Dense(WIDTH, 8)], [Dense(WIDTH, 8), Normalize()]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", MODULES)
def test_modules_after_the_transformer(case: str, kind: str) -> None:
    reference = encoder("bert", "sdpa", *MODULES[case]())
    model = em.of_kind(kind, lambda implementation: encoder("bert", implementation, *MODULES[case]()))
    for place, module in enumerate(reference):
        if place:
            model[place].load_state_dict(module.state_dict())
    if case == "layers":
        for each in (model, reference):
            each[0].model.config.output_hidden_states = True
    model.train()
    # Sums over tokens are larger than their means.
    tolerance = TOLERANCE * (3 if case == "custom" else 1)
    for options in ({"task": "query"}, {"task": "document"}, {}) if "route" in case else ({},):
        for inputs in (TEXTS, TEXTS[0]):
            assert_encodes(model, reference, inputs, tolerance, **options)


def test_a_module_that_reads_the_last_place() -> None:
    assert_encodes(*fresh(LastPlace(), family="qwen3", is_left_padded=True))


def router(implementation: str) -> Any:
    families = {"bert": Pooling(WIDTH), "modernbert": Pooling(WIDTH, "cls")}
    routes = [list(encoder(family, implementation, pooling)) for family, pooling in families.items()]
    modules = [Router.for_query_document(*routes), Normalize()]
    return em.st.SentenceTransformer(modules=modules, prompts=em.PROMPTS, device="cpu")


def test_routes_of_queries_and_documents(kind: str) -> None:
    model, reference = both(kind, router)
    for inputs in (TEXTS, TEXTS[2]):
        assert_same(encode(model, inputs, task="query"), reference.encode_query(inputs))
        assert_same(encode(model, inputs, task="document"), reference.encode_document(inputs))
        assert_encodes(model, reference, inputs)
    expected = reference.encode_query(TEXTS, output_value="token_embeddings")
    assert_same(encode(model, TEXTS, task="query", output_value="token_embeddings"), expected)


def test_each_route_has_its_tokenizer(kind: str) -> None:
    def accented(implementation: str) -> Any:
        model = router(implementation)
        document = model[0].sub_modules["document"][0].tokenizer
        document.backend_tokenizer.normalizer = BertNormalizer(strip_accents=False)
        return model

    model, reference = both(kind, accented)
    texts = [*TEXTS, "un café naïve, déjà vu"]
    plain = router("sdpa").encode_document(texts)
    expected = reference.encode_document(texts)
    assert np.abs(expected - plain).max() > 1e-3
    assert_same(encode(model, texts, task="document"), expected)
    assert_same(encode(model, texts, task="query"), reference.encode_query(texts))
