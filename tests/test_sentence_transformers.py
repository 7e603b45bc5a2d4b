"""sentence-transformers on "flashinfer": its own flattening, and `unpad` where it pads; the numbers of sdpa."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import encode_models as em
import numpy as np
import pytest
import snippets
import torch
import transformers
from encode_models import LAYERS, SIZES, TOKENS, encoder, fresh, reranker, saved, st
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_flashinfer_attn
from hf_flashinfer_attn import UnsupportedAttentionError, repad, unpad
from hf_flashinfer_attn.attention import select
from hf_flashinfer_attn.tools import demo

from sentence_transformers.sentence_transformer.modules import Transformer  # isort: skip
from sentence_transformers.sparse_encoder.modules import SpladePooling  # isort: skip

# Before, positions start at 0 whatever the model.
FLATTENS_ROBERTA = Version("5.6.1") <= em.VERSION
# Before, a language model's head keeps inputs padded.
FLATTENS_SPARSE = Version("6") <= em.VERSION

TOLERANCE = 1e-5
QUERIES = ("how does a with statement call __exit__?", "format a number with a thousands separator", "slots of a class")
DOCS = Path(__file__).resolve().parents[1] / "docs" / "unpad.md"
# Passages of Python's documentation, of many lengths.
TEXTS = [passage[: 40 + 90 * (index % 7)] for index, passage in enumerate(demo.load_passages(20))]
FEW = TEXTS[:4]
MOBILEBERT = (transformers.MobileBertModel, {**SIZES, "embedding_size": 32, "intra_bottleneck_size": 64})


def minilm(implementation: str, **settings: Any) -> Any:
    settings["attn_implementation"] = implementation
    return st.SentenceTransformer(str(demo.model_path()), model_kwargs=settings, device="cpu")


def unpadded(family: str = "bert", *, never_flattened: bool = False) -> tuple[Any, Any]:
    """A tiny model that is unpadded, and its reference."""
    ours, sdpa = fresh(family=family)
    unpad(ours)
    if never_flattened:
        ours[0].unpad_inputs = False
    return ours, sdpa


def seen_by_embeddings(model: nn.Module) -> list[tuple[int, ...]]:
    """Keeps the shapes of the token ids that a model embeds."""
    shapes: list[tuple[int, ...]] = []
    backbone = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    backbone.get_input_embeddings().register_forward_hook(
        lambda module, args, output: shapes.append(tuple(args[0].shape))
    )
    return shapes


def token_count(model: Any, inputs: Sequence[Any]) -> int:
    return sum(model.preprocess([text])["input_ids"].numel() for text in inputs)


def assert_only_tokens(shapes: list[tuple[int, ...]], tokens: int, batches: int) -> None:
    assert len(shapes) == batches
    assert all(rows == 1 for rows, _ in shapes), shapes
    assert sum(width for _, width in shapes) == tokens


def assert_near(ours: Tensor, expected: Tensor) -> None:
    """Equal within a tolerance of the largest value."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


def assert_computes_tokens_alone(
    ours: Any, reference: Any, inputs: Sequence[Any], *, method: str = "encode", layers: int = LAYERS
) -> tuple[Tensor, Tensor]:
    """A model embeds tokens alone, with one layout a batch, and returns what its reference does: both results."""
    tokens, shapes = token_count(ours, inputs), seen_by_embeddings(ours)
    with hf_flashinfer_attn.trace() as trace:
        results = [getattr(ours, method)(inputs, batch_size=8, convert_to_tensor=True).to_dense()]
    results.append(getattr(reference, method)(inputs, batch_size=8, convert_to_tensor=True).to_dense())
    assert_only_tokens(shapes, tokens, batches=3)
    assert (trace.layouts, trace.host_copies, len(trace.calls), trace.kernels) == (3, 0, 3 * layers, ("torch",))
    assert_near(*results)
    return results[0], results[1]


def assert_equal_rankings(ours: Tensor, expected: Tensor) -> None:
    """Orders are equal, and could have been others: no two neighbours are closer than what ours may be off."""
    assert (expected.sort(-1).values.diff(dim=-1) > 2e-7).all()
    assert torch.equal(ours.argsort(-1), expected.argsort(-1))


@pytest.mark.parametrize("is_unpadded", [False, True], ids=["as-it-is", "unpad"])
def test_minilm_computes_tokens_alone(is_unpadded: bool) -> None:
    sdpa, ours = minilm("sdpa"), minilm("flashinfer")
    if is_unpadded:
        unpad(ours)
    assert ours[0].can_flatten_inputs is not is_unpadded
    assert not sdpa[0].can_flatten_inputs
    embeddings, expected = assert_computes_tokens_alone(ours, sdpa, TEXTS, layers=6)
    for prompt in (None, "query: "):
        queries = [model.encode(QUERIES, prompt=prompt, convert_to_tensor=True) for model in (ours, sdpa)]
        torch.testing.assert_close(*queries, rtol=0, atol=TOLERANCE)
        assert_equal_rankings(queries[0] @ embeddings.T, queries[1] @ expected.T)


@pytest.mark.parametrize("family", em.FLATTENED)
def test_families_flatten_with_one_layout_per_forward(family: str) -> None:
    if family == "roberta" and not FLATTENS_ROBERTA:
        pytest.skip("this version of sentence-transformers numbers RoBERTa's tokens from 0")
    assert_computes_tokens_alone(*fresh(family=family), TEXTS)


@pytest.mark.parametrize("family", em.FLATTENED)
def test_unpad_packs_what_is_not_flattened(family: str) -> None:
    models = unpadded(family, never_flattened=True)
    assert_computes_tokens_alone(*models, TEXTS)
    # Flattened by sentence-transformers itself, these lack the mask that it cuts them with.
    ours, expected = (model.encode(TEXTS[:5], output_value="token_embeddings") for model in models)
    for rows, others in zip(ours, expected, strict=True):
        assert_near(rows, others)


def test_each_text_gets_its_own_after_unpad() -> None:
    """Vectors of tokens, all outputs, and pairs, of which flattening loses the token types."""
    ours, sdpa = unpadded()
    for inputs in (TEXTS[:5], [(QUERIES[0], text) for text in FEW]):
        tokens, shapes = token_count(ours, inputs), seen_by_embeddings(ours)
        rows, others = (model.encode(inputs, output_value="token_embeddings") for model in (ours, sdpa))
        assert_only_tokens(shapes, tokens, batches=1)
        whole, expected = (model.encode(inputs, output_value=None) for model in (ours, sdpa))
        for name in ("token_embeddings", "sentence_embedding", "input_ids", "attention_mask", "token_type_ids"):
            for index, right in enumerate(expected):
                valid = right["attention_mask"].bool() if name == "token_embeddings" else slice(None)
                torch.testing.assert_close(whole[index][name][valid], right[name][valid], rtol=0, atol=1e-4)
        for row, other in zip(rows, others, strict=True):
            torch.testing.assert_close(row, other, rtol=0, atol=1e-4)


def test_repad_and_the_user_bring_flattening_back() -> None:
    model = encoder("bert", "flashinfer")
    assert model[0].can_flatten_inputs
    assert not unpad(model)[0].can_flatten_inputs
    assert copy.deepcopy(model)[0].unpad_inputs is None
    assert repad(model)[0].can_flatten_inputs
    model[0].unpad_inputs = True
    assert unpad(model)[0].can_flatten_inputs
    model[0].unpad_inputs = False
    assert not repad(model)[0].can_flatten_inputs


@pytest.mark.parametrize("flattens", [False, True])
@pytest.mark.parametrize("wrapper", ["compile", "peft", "another model"])
def test_an_inner_model_that_is_replaced(wrapper: str, flattens: bool) -> None:
    ours, sdpa = unpadded()
    tokens, shapes = token_count(ours, FEW), seen_by_embeddings(ours)
    if wrapper == "compile":
        ours[0].model = torch.compile(ours[0].model, backend="eager")
    elif wrapper == "peft":
        peft = pytest.importorskip("peft")
        ours[0].model = peft.get_peft_model(ours[0].model, peft.LoraConfig(target_modules=["query", "value"]))
    else:
        ours[0].model = encoder("bert", "flashinfer")[0].model
        shapes = seen_by_embeddings(ours)
    ours[0].unpad_inputs = flattens
    assert_near(*(model.encode(FEW, convert_to_tensor=True) for model in (ours, sdpa)))
    if flattens or wrapper != "another model":
        assert_only_tokens(shapes, tokens, batches=1)


def test_features_come_back_as_they_were_given() -> None:
    ours, sdpa = fresh()
    ours[0].unpad_inputs = False
    for model in (sdpa, ours):
        model[0].model.config.output_hidden_states = True
    features = ours.preprocess(FEW)
    given = dict(features)
    valid = given["attention_mask"].bool()
    shapes = seen_by_embeddings(unpad(ours))
    with torch.no_grad():
        for option in ({}, {"token_type_ids": torch.ones_like(given["token_type_ids"])}):
            expected, actual = sdpa[0]({**given, **option}), ours[0](features, **option)
            assert actual is features
            assert (actual["token_embeddings"][~valid] == 0).all()
            states, others = ((one["token_embeddings"], *one["all_layer_embeddings"]) for one in (actual, expected))
            for state, other in zip(states, others, strict=True):
                torch.testing.assert_close(state[valid], other[valid], rtol=0, atol=TOLERANCE * 10)
        assert {name: features[name] for name in given} == given
        assert features.keys() - given.keys() == {"token_embeddings", "all_layer_embeddings"}
        whole = {name: value[:1, :5] if isinstance(value, Tensor) else value for name, value in given.items()}
        with hf_flashinfer_attn.trace() as trace:
            ours[0](whole)
        assert len(trace.calls) == LAYERS
    tokens = int(valid.sum())
    assert shapes == [(1, tokens), (1, tokens), (1, 5)]


def test_gradients_of_unpadded_features() -> None:
    models = unpadded(never_flattened=True)
    for model in models:
        model(model.preprocess(FEW))["sentence_embedding"].square().sum().backward()
    assert_near(*(model[0].model.get_input_embeddings().weight.grad for model in models))


def test_repad_and_copies_of_an_encoder() -> None:
    model, _ = unpadded(never_flattened=True)
    twin = repad(copy.deepcopy(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())
    packed, padded = seen_by_embeddings(model), seen_by_embeddings(twin)
    assert_near(*(one.encode(FEW, convert_to_tensor=True) for one in (model, twin)))
    assert packed[0][0] == 1
    assert padded[0][0] == 4


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "qwen3"])
def test_reranker(family: str) -> None:
    head = "ForCausalLM" if family == "qwen3" else "ForSequenceClassification"
    sdpa, ours = (reranker(family, implementation, head) for implementation in ("sdpa", "flashinfer"))
    assert not unpad(ours)[0].can_flatten_inputs
    pairs = [(QUERIES[0], text) for text in TEXTS]
    scores, expected = assert_computes_tokens_alone(ours, sdpa, pairs, method="predict")
    assert expected.std() > 1e-2
    torch.testing.assert_close(scores, expected, rtol=0, atol=TOLERANCE)
    assert_equal_rankings(scores, expected)
    for query in QUERIES:
        orders = [[result["corpus_id"] for result in model.rank(query, TEXTS)] for model in (ours, sdpa)]
        assert orders[0] == orders[1]


def test_reranker_of_minilm_after_repad() -> None:
    settings = {"attn_implementation": "flashinfer"}
    ours = unpad(st.CrossEncoder(str(demo.model_path()), model_kwargs=settings, device="cpu", max_length=TOKENS))
    pairs = [(QUERIES[1], text) for text in TEXTS[:6]]
    packed = ours.predict(pairs)
    shapes = seen_by_embeddings(repad(ours))
    np.testing.assert_allclose(ours.predict(pairs), packed, rtol=0, atol=TOLERANCE)
    assert shapes[0][0] == len(pairs)


@pytest.mark.parametrize("how", ["flattened", "unpad"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_sparse_encoder(family: str, how: str) -> None:
    if how == "flattened" and not FLATTENS_SPARSE:
        pytest.skip("this version of sentence-transformers does not flatten beneath a language model's head")
    ours, sdpa = (
        st.SparseEncoder(
            modules=[
                Transformer(
                    saved(family, "ForMaskedLM"), transformer_task="fill-mask", max_seq_length=TOKENS,
                    model_kwargs={"attn_implementation": implementation},
                ),
                SpladePooling("max"),
            ],
            device="cpu",
        )
        for implementation in ("flashinfer", "sdpa")
    )  # fmt: skip
    if how == "unpad":
        unpad(ours)[0].unpad_inputs = False
    assert_computes_tokens_alone(ours, sdpa, TEXTS)


def test_refusals_name_the_model_inside(tmp_path: Path) -> None:
    em.save_random_model(tmp_path, *MOBILEBERT)
    with pytest.raises(UnsupportedAttentionError, match="unpad for MobileBertModel: with trigram_input=True"):
        unpad(encoder(str(tmp_path), "flashinfer"))
    with pytest.raises(UnsupportedAttentionError, match=r"attn_implementation='sdpa'"):
        unpad(encoder("bert", "sdpa"))


def test_mpnet_whose_hooks_are_passed_by() -> None:
    ours, eager = fresh(family="mpnet")
    expected = eager.encode(TEXTS[:6], convert_to_tensor=True)
    unpad(ours)
    with hf_flashinfer_attn.trace() as recorded:
        embeddings = ours.encode(TEXTS[:6], convert_to_tensor=True)
    assert_near(embeddings, expected)
    assert (recorded.layouts, len(recorded.calls)) == (1, LAYERS)
    with pytest.raises(IndexError):
        ours[0]({"input_ids": torch.full((2, 3), 10**6), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])})
    torch.testing.assert_close(ours.encode(TEXTS[:1], convert_to_tensor=True), expected[:1], rtol=0, atol=1e-4)


def test_mobilebert_says_how_to_pad(tmp_path: Path) -> None:
    em.save_random_model(tmp_path, *MOBILEBERT)
    ours, sdpa = fresh(family=str(tmp_path))
    with pytest.raises(UnsupportedAttentionError, match=r"MobileBert.*model\[0\]\.unpad_inputs = False"):
        ours.encode(FEW)
    ours[0].unpad_inputs = False
    assert_near(*(model.encode(FEW, convert_to_tensor=True) for model in (ours, sdpa)))


@pytest.mark.parametrize("block", snippets.python_blocks(DOCS))
def test_python_block_of_the_docs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    snippets.run(block)
    told = "GraphStatistics(captured=" if "cuda_graphs" in block else "layouts 1, host copies"
    assert told in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["flattened", "unpad", "reranker"])
def test_on_a_gpu_as_exact_as_sdpa(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16, against float64, with one wait for lengths per forward."""
    # Kernels take small batches, too.
    monkeypatch.setattr(select, "SMALL_LOGITS", 0)
    texts = demo.load_passages(256)
    pairs = [(query, text) for query in QUERIES for text in texts[:128]]
    classifier = torch.randn(16, 384, generator=torch.Generator().manual_seed(0))

    def run(implementation: str, dtype: torch.dtype) -> Tensor:
        if how == "reranker":
            settings = {"attn_implementation": implementation, "dtype": dtype}
            model = st.CrossEncoder(str(demo.model_path()), num_labels=16, device="cuda", model_kwargs=settings)
            model.model.classifier.load_state_dict({"weight": classifier, "bias": torch.zeros(16)})
            if implementation == "flashinfer":
                unpad(model)
            return model.predict(pairs, batch_size=64, convert_to_tensor=True).double()
        model = minilm(implementation, dtype=dtype).to("cuda")
        if implementation == "flashinfer":
            unpad(model)[0].unpad_inputs = None if how == "flattened" else False
            assert model[0].can_flatten_inputs is (how == "flattened")
        return model.encode(texts, batch_size=64, device="cuda", convert_to_tensor=True).double()

    exact, sdpa = run("eager", torch.float64), run("sdpa", torch.float16)
    with hf_flashinfer_attn.trace() as trace:
        ours = run("flashinfer", torch.float16)
    assert all(kernel.startswith("flashinfer") for kernel in trace.kernels)
    batches = 6 if how == "reranker" else 4
    assert (trace.layouts, trace.host_copies, trace.plans, len(trace.calls)) == (batches, batches, batches, batches * 6)
    assert (ours - exact).norm() <= 1.25 * (sdpa - exact).norm()


@pytest.mark.parametrize("is_padded", [True, False])
def test_a_shallow_copy_with_graphs_is_itself(is_padded: bool) -> None:
    """Its forward is still that of the model that it was copied from, and must be told."""
    models = [unpad(encoder("bert", "flashinfer"), cuda_graphs=True) for _ in range(2)]
    original = models[0][0].model
    shallow = models[0][0].model = copy.copy(original)
    shallow._modules = dict(original._modules)
    shallow._modules["encoder"] = copy.deepcopy(original.encoder)
    with torch.no_grad():
        for changed in (shallow, models[1][0].model):
            changed.encoder.layer[0].output.dense.weight.mul_(2)
        inputs = {"input_ids": torch.tensor([[101, 2054, 2003, 102], [101, 102, 0, 0]])}
        if is_padded:
            inputs["attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        for model in models:
            # As for models whose forward names all that it takes.
            model[0].model_forward_params = {"input_ids", "attention_mask", "position_ids", "return_dict"}
        actual, expected = (model[0](dict(inputs))["token_embeddings"] for model in models)
    torch.testing.assert_close(actual, expected)
