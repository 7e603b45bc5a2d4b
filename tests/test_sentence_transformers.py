"""sentence-transformers on "flashinfer": its own flattening, and `unpad` where it pads; the numbers of sdpa."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import snippets
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

import hf_flashinfer_attn
from hf_flashinfer_attn import UnsupportedAttentionError, repad, unpad
from hf_flashinfer_attn.attention import plan as prepared_module
from hf_flashinfer_attn.tools import demo

st = pytest.importorskip("sentence_transformers", "5.4", reason="needs sentence-transformers of 5.4 or newer")

from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402
from sentence_transformers.sparse_encoder.modules import SpladePooling  # noqa: E402

VERSION = Version(st.__version__)
# Before, positions start at 0 whatever the model.
FLATTENS_ROBERTA = Version("5.6.1") <= VERSION
# Before, a language model's head keeps inputs padded.
FLATTENS_SPARSE = Version("6") <= VERSION
# Before, decoders keep a cache by default.
TURNS_CACHES_OFF = Version("6.2") <= VERSION

TOLERANCE = 1e-5
LAYERS, TOKENS = 2, 128
QUERIES = ("how does a with statement call __exit__?", "format a number with a thousands separator", "slots of a class")
DOCS = Path(__file__).resolve().parents[1] / "docs" / "unpad.md"

_SIZES: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": TOKENS + 8,
    "pad_token_id": 0,
}
_DECODER: dict[str, Any] = {**_SIZES, "num_key_value_heads": 1, "head_dim": 32}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# Per family: the prefix of its classes, and its config.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _SIZES),
    "roberta": ("Roberta", _SIZES),
    "modernbert": ("ModernBert", {**_SIZES, "local_attention": 8, "global_attn_every_n_layers": 2}),
    "qwen3": ("Qwen3", _DECODER),
    "embedding-gemma": (
        "Gemma3Text", {**_DECODER, **_WINDOWS, "query_pre_attn_scalar": 32, "use_bidirectional_attention": True},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Passages of Python's documentation, of many lengths."""
    passages = demo.load_passages(20)
    return [passage[: 40 + 90 * (index % 7)] for index, passage in enumerate(passages)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    """Saves random models, once each, with the tokenizer of all-MiniLM-L6-v2."""
    folders: dict[tuple[str, str], str] = {}

    def save(family: str, head: str = "Model") -> str:
        if (family, head) not in folders:
            prefix, sizes = FAMILIES[family]
            folder = folders[family, head] = str(tmp_path_factory.mktemp(f"{family}-{head}"))
            made = random_model(getattr(transformers, prefix + head), sizes)
            made.save_pretrained(folder)
            AutoTokenizer.from_pretrained(demo.model_path()).save_pretrained(folder)
        return folders[family, head]

    return save


def random_model(model_class: type[PreTrainedModel], sizes: dict[str, Any]) -> PreTrainedModel:
    """Builds a model whose weights are wide enough apart that its scores are too."""
    generator = torch.Generator().manual_seed(0)
    model = model_class(model_class.config_class(**sizes, num_labels=1))
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.copy_(torch.randn(weights.shape, generator=generator) * 0.15)
    return model


def encoder(path: str | Path, implementation: str, **settings: Any) -> Any:
    if Path(path) == demo.model_path():
        return st.SentenceTransformer(
            str(path), model_kwargs={"attn_implementation": implementation, **settings}, device="cpu"
        )
    transformer = Transformer(str(path), model_kwargs={"attn_implementation": implementation}, max_seq_length=TOKENS)
    if not TURNS_CACHES_OFF:
        transformer.model.config.use_cache = False
    pooling = Pooling(transformer.model.config.hidden_size, "mean")
    return st.SentenceTransformer(modules=[transformer, pooling], device="cpu")


def reranker(path: str, implementation: str) -> Any:
    model = st.CrossEncoder(path, model_kwargs={"attn_implementation": implementation}, device="cpu", max_length=TOKENS)
    if not TURNS_CACHES_OFF:
        model.model.config.use_cache = False
    return model


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


def assert_equal_rankings(ours: Tensor, expected: Tensor) -> None:
    """Orders are equal, and could have been others: no two neighbours are closer than what ours may be off."""
    assert (expected.sort(-1).values.diff(dim=-1) > 2e-7).all()
    assert torch.equal(ours.argsort(-1), expected.argsort(-1))


@pytest.mark.parametrize("is_unpadded", [False, True], ids=["as-it-is", "unpad"])
def test_minilm_computes_tokens_alone(texts: list[str], is_unpadded: bool) -> None:
    sdpa, ours = (encoder(demo.model_path(), implementation) for implementation in ("sdpa", "flashinfer"))
    if is_unpadded:
        unpad(ours)
    assert ours[0].can_flatten_inputs is not is_unpadded
    assert not sdpa[0].can_flatten_inputs
    tokens, shapes = token_count(ours, texts), seen_by_embeddings(ours)
    with hf_flashinfer_attn.trace() as trace:
        embeddings = ours.encode(texts, batch_size=8, convert_to_tensor=True)
    assert_only_tokens(shapes, tokens, batches=3)
    assert (trace.layouts, trace.host_copies, len(trace.calls), trace.kernels) == (3, 0, 3 * 6, ("torch",))
    expected = sdpa.encode(texts, batch_size=8, convert_to_tensor=True)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=TOLERANCE)
    for prompt in (None, "query: "):
        queries = [model.encode(QUERIES, prompt=prompt, convert_to_tensor=True) for model in (ours, sdpa)]
        torch.testing.assert_close(*queries, rtol=0, atol=TOLERANCE)
        assert_equal_rankings(queries[0] @ embeddings.T, queries[1] @ expected.T)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_flatten_with_one_layout_per_forward(family: str, texts: list[str], saved: Any) -> None:
    if family == "roberta" and not FLATTENS_ROBERTA:
        pytest.skip("this version of sentence-transformers numbers RoBERTa's tokens from 0")
    sdpa, ours = (encoder(saved(family), implementation) for implementation in ("sdpa", "flashinfer"))
    tokens, shapes = token_count(ours, texts), seen_by_embeddings(ours)
    with hf_flashinfer_attn.trace() as trace:
        embeddings = ours.encode(texts, batch_size=8, convert_to_tensor=True)
    assert_only_tokens(shapes, tokens, batches=3)
    assert (trace.layouts, trace.host_copies, len(trace.calls), trace.kernels) == (3, 0, 3 * LAYERS, ("torch",))
    expected = sdpa.encode(texts, batch_size=8, convert_to_tensor=True)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_unpad_packs_what_is_not_flattened(family: str, texts: list[str], saved: Any) -> None:
    sdpa, ours = encoder(saved(family), "sdpa"), unpad(encoder(saved(family), "flashinfer"))
    ours[0].unpad_inputs = False
    tokens, shapes = token_count(ours, texts), seen_by_embeddings(ours)
    with hf_flashinfer_attn.trace() as trace:
        embeddings = ours.encode(texts, batch_size=8, convert_to_tensor=True)
    assert_only_tokens(shapes, tokens, batches=3)
    assert (trace.layouts, trace.host_copies, len(trace.calls)) == (3, 0, 3 * LAYERS)
    expected = sdpa.encode(texts, batch_size=8, convert_to_tensor=True)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())
    # Flattened by sentence-transformers itself, these lack the mask that it cuts them with.
    ours, expected = (model.encode(texts[:5], output_value="token_embeddings") for model in (ours, sdpa))
    for rows, others in zip(ours, expected, strict=True):
        torch.testing.assert_close(rows, others, rtol=0, atol=TOLERANCE * others.abs().max().item())


def test_each_text_gets_its_own_after_unpad(texts: list[str], saved: Any) -> None:
    """Vectors of tokens, all outputs, and pairs, of which flattening loses the token types."""
    sdpa, ours = encoder(saved("bert"), "sdpa"), unpad(encoder(saved("bert"), "flashinfer"))
    pairs = [(QUERIES[0], text) for text in texts[:4]]
    for inputs in (texts[:5], pairs):
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


def test_repad_and_the_user_bring_flattening_back(saved: Any) -> None:
    model = encoder(saved("bert"), "flashinfer")
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
def test_an_inner_model_that_is_replaced(wrapper: str, flattens: bool, texts: list[str], saved: Any) -> None:
    sdpa, ours = encoder(saved("bert"), "sdpa"), unpad(encoder(saved("bert"), "flashinfer"))
    tokens, shapes = token_count(ours, texts[:4]), seen_by_embeddings(ours)
    if wrapper == "compile":
        ours[0].model = torch.compile(ours[0].model, backend="eager")
    elif wrapper == "peft":
        peft = pytest.importorskip("peft")
        ours[0].model = peft.get_peft_model(ours[0].model, peft.LoraConfig(target_modules=["query", "value"]))
    else:
        ours[0].model = encoder(saved("bert"), "flashinfer")[0].model
        shapes = seen_by_embeddings(ours)
    ours[0].unpad_inputs = flattens
    embeddings, expected = (model.encode(texts[:4], convert_to_tensor=True) for model in (ours, sdpa))
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=TOLERANCE)
    if flattens or wrapper != "another model":
        assert_only_tokens(shapes, tokens, batches=1)


def test_features_come_back_as_they_were_given(texts: list[str], saved: Any) -> None:
    sdpa, ours = (encoder(saved("bert"), implementation) for implementation in ("sdpa", "flashinfer"))
    ours[0].unpad_inputs = False
    for model in (sdpa, ours):
        model[0].model.config.output_hidden_states = True
    features = ours.preprocess(texts[:4])
    given = dict(features)
    shapes = seen_by_embeddings(unpad(ours))
    with torch.no_grad():
        for option in ({}, {"token_type_ids": torch.ones_like(given["token_type_ids"])}):
            expected, actual = sdpa[0]({**given, **option}), ours[0](features, **option)
            assert actual is features
            valid = given["attention_mask"].bool()
            assert (actual["token_embeddings"][~valid] == 0).all()
            pairs = zip(
                (actual["token_embeddings"], *actual["all_layer_embeddings"]),
                (expected["token_embeddings"], *expected["all_layer_embeddings"]),
                strict=True,
            )
            for ours_states, states in pairs:
                torch.testing.assert_close(ours_states[valid], states[valid], rtol=0, atol=TOLERANCE * 10)
        assert {name: features[name] for name in given} == given
        assert features.keys() - given.keys() == {"token_embeddings", "all_layer_embeddings"}
        whole = {name: value[:1] if isinstance(value, Tensor) else value for name, value in given.items()}
        whole = {name: value[:, :5] if isinstance(value, Tensor) else value for name, value in whole.items()}
        with hf_flashinfer_attn.trace() as trace:
            ours[0](dict(whole))
        assert len(trace.calls) == LAYERS
    tokens = int(given["attention_mask"].sum())
    assert shapes == [(1, tokens), (1, tokens), (1, 5)]


def test_gradients_of_unpadded_features(texts: list[str], saved: Any) -> None:
    sdpa, ours = encoder(saved("bert"), "sdpa"), unpad(encoder(saved("bert"), "flashinfer"))
    ours[0].unpad_inputs = False
    for model in (sdpa, ours):
        model(model.preprocess(texts[:4]))["sentence_embedding"].square().sum().backward()
    gradients = [model[0].model.get_input_embeddings().weight.grad for model in (ours, sdpa)]
    torch.testing.assert_close(*gradients, rtol=0, atol=TOLERANCE * gradients[1].abs().max().item())


def test_repad_and_copies_of_an_encoder(texts: list[str], saved: Any) -> None:
    model = unpad(encoder(saved("bert"), "flashinfer"))
    model[0].unpad_inputs = False
    twin = repad(copy.deepcopy(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())
    packed, padded = seen_by_embeddings(model), seen_by_embeddings(twin)
    expected = twin.encode(texts[:4], convert_to_tensor=True)
    torch.testing.assert_close(model.encode(texts[:4], convert_to_tensor=True), expected, rtol=0, atol=TOLERANCE)
    assert packed[0][0] == 1
    assert padded[0][0] == 4


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", "ForSequenceClassification"),
        ("roberta", "ForSequenceClassification"),
        ("modernbert", "ForSequenceClassification"),
        ("qwen3", "ForCausalLM"),
    ],
)
def test_reranker(family: str, head: str, texts: list[str], saved: Any) -> None:
    path = saved(family, head)
    sdpa, ours = reranker(path, "sdpa"), unpad(reranker(path, "flashinfer"))
    assert not ours[0].can_flatten_inputs
    pairs = [(QUERIES[0], text) for text in texts]
    tokens, shapes = token_count(ours, pairs), seen_by_embeddings(ours)
    with hf_flashinfer_attn.trace() as trace:
        scores = ours.predict(pairs, batch_size=8)
    assert_only_tokens(shapes, tokens, batches=3)
    assert (trace.layouts, trace.host_copies, len(trace.calls), trace.kernels) == (3, 0, 3 * LAYERS, ("torch",))
    expected = sdpa.predict(pairs, batch_size=8)
    assert expected.std() > 1e-2
    np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)
    assert_equal_rankings(torch.tensor(scores), torch.tensor(expected))
    for query in QUERIES:
        orders = [[result["corpus_id"] for result in model.rank(query, texts)] for model in (ours, sdpa)]
        assert orders[0] == orders[1]


def test_reranker_of_minilm_after_repad(texts: list[str]) -> None:
    ours = unpad(reranker(str(demo.model_path()), "flashinfer"))
    pairs = [(QUERIES[1], text) for text in texts[:6]]
    packed = ours.predict(pairs)
    shapes = seen_by_embeddings(repad(ours))
    np.testing.assert_allclose(ours.predict(pairs), packed, rtol=0, atol=TOLERANCE)
    assert shapes[0][0] == len(pairs)


@pytest.mark.parametrize("how", ["flattened", "unpad"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_sparse_encoder(family: str, how: str, texts: list[str], saved: Any) -> None:
    if how == "flattened" and not FLATTENS_SPARSE:
        pytest.skip("this version of sentence-transformers does not flatten beneath a language model's head")
    path = saved(family, "ForMaskedLM")

    def make(implementation: str) -> Any:
        transformer = Transformer(
            path, transformer_task="fill-mask", model_kwargs={"attn_implementation": implementation},
            max_seq_length=TOKENS,
        )  # fmt: skip
        return st.SparseEncoder(modules=[transformer, SpladePooling("max")], device="cpu")

    sdpa, ours = make("sdpa"), make("flashinfer")
    if how == "unpad":
        unpad(ours)[0].unpad_inputs = False
    tokens, shapes = token_count(ours, texts), seen_by_embeddings(ours)
    with hf_flashinfer_attn.trace() as trace:
        weights = ours.encode(texts, batch_size=8).to_dense()
    assert_only_tokens(shapes, tokens, batches=3)
    assert trace.layouts == 3
    expected = sdpa.encode(texts, batch_size=8).to_dense()
    torch.testing.assert_close(weights, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


def test_refusals_name_the_model_inside(saved: Any, tmp_path: Path) -> None:
    random_model(
        transformers.MobileBertModel, {**_SIZES, "embedding_size": 32, "intra_bottleneck_size": 64}
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo.model_path()).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedAttentionError, match="unpad for MobileBertModel: with trigram_input=True"):
        unpad(encoder(tmp_path, "flashinfer"))
    with pytest.raises(UnsupportedAttentionError, match=r"attn_implementation='sdpa'"):
        unpad(encoder(saved("bert"), "sdpa"))


def test_mpnet_whose_hooks_are_passed_by(texts: list[str], tmp_path: Path) -> None:
    random_model(transformers.MPNetModel, _SIZES).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo.model_path()).save_pretrained(tmp_path)
    eager, ours = (encoder(tmp_path, implementation) for implementation in ("eager", "flashinfer"))
    expected = eager.encode(texts[:6], convert_to_tensor=True)
    unpad(ours)
    with hf_flashinfer_attn.trace() as recorded:
        embeddings = ours.encode(texts[:6], convert_to_tensor=True)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())
    assert (recorded.layouts, len(recorded.calls)) == (1, _SIZES["num_hidden_layers"])
    with pytest.raises(IndexError):
        ours[0]({"input_ids": torch.full((2, 3), 10**6), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])})
    torch.testing.assert_close(ours.encode(texts[:1], convert_to_tensor=True), expected[:1], rtol=0, atol=1e-4)


def test_mobilebert_says_how_to_pad(texts: list[str], tmp_path: Path) -> None:
    sizes = {**_SIZES, "embedding_size": 32, "intra_bottleneck_size": 64}
    random_model(transformers.MobileBertModel, sizes).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo.model_path()).save_pretrained(tmp_path)
    sdpa, ours = (encoder(tmp_path, implementation) for implementation in ("sdpa", "flashinfer"))
    with pytest.raises(UnsupportedAttentionError, match=r"MobileBert.*model\[0\]\.unpad_inputs = False"):
        ours.encode(texts[:4])
    ours[0].unpad_inputs = False
    expected = sdpa.encode(texts[:4], convert_to_tensor=True)
    embeddings = ours.encode(texts[:4], convert_to_tensor=True)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


@pytest.mark.parametrize("block", snippets.python_blocks(DOCS))
def test_python_block_of_the_docs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    snippets.run(block)
    told = "GraphStatistics(captured=" if "cuda_graphs" in block else "layouts 1, host copies"
    assert told in capsys.readouterr().out


# On a GPU: as exact as sdpa, and one wait for lengths per forward.


@pytest.fixture
def _no_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_module, "SMALL_LOGITS", 0)


COMPARED = (
    ("float64", "eager", torch.float64),
    ("sdpa", "sdpa", torch.float16),
    ("flashinfer", "flashinfer", torch.float16),
)


def errors_of(outputs: dict[str, Tensor]) -> tuple[float, float]:
    exact = outputs["float64"].double()
    ours, sdpa = (((outputs[name].double() - exact).norm() / exact.norm()).item() for name in ("flashinfer", "sdpa"))
    return ours, sdpa


@pytest.mark.gpu
@pytest.mark.usefixtures("_no_small_batches")
@pytest.mark.parametrize("how", ["flattened", "unpad"])
def test_encoder_on_a_gpu_is_as_exact_as_sdpa(how: str) -> None:
    texts = demo.load_passages(256)
    outputs = {}
    for name, implementation, dtype in COMPARED:
        model = encoder(demo.model_path(), implementation, dtype=dtype).to("cuda")
        if name == "flashinfer":
            unpad(model)[0].unpad_inputs = None if how == "flattened" else False
            assert model[0].can_flatten_inputs is (how == "flattened")
        with hf_flashinfer_attn.trace() as trace:
            outputs[name] = model.encode(texts, batch_size=64, device="cuda", convert_to_tensor=True)
    assert all(kernel.startswith("flashinfer") for kernel in trace.kernels)
    assert (trace.layouts, trace.host_copies, trace.plans, len(trace.calls)) == (4, 4, 4, 4 * 6)
    ours, sdpa = errors_of(outputs)
    assert ours <= 1.25 * sdpa


@pytest.mark.gpu
@pytest.mark.usefixtures("_no_small_batches")
def test_reranker_on_a_gpu_is_as_exact_as_sdpa() -> None:
    pairs = [(query, text) for query in QUERIES for text in demo.load_passages(128)]
    classifier = torch.randn(16, 384, generator=torch.Generator().manual_seed(0))
    outputs = {}
    for name, implementation, dtype in COMPARED:
        model = st.CrossEncoder(
            str(demo.model_path()), num_labels=16, device="cuda",
            model_kwargs={"attn_implementation": implementation, "dtype": dtype},
        )  # fmt: skip
        model.model.classifier.load_state_dict({"weight": classifier, "bias": torch.zeros(16)})
        if name == "flashinfer":
            unpad(model)
        with hf_flashinfer_attn.trace() as trace:
            outputs[name] = model.predict(pairs, batch_size=64, convert_to_tensor=True)
    assert all(kernel.startswith("flashinfer") for kernel in trace.kernels)
    assert (trace.layouts, trace.host_copies, trace.plans, len(trace.calls)) == (6, 6, 6, 6 * 6)
    ours, sdpa = errors_of(outputs)
    assert ours <= 1.25 * sdpa


@pytest.mark.parametrize("is_padded", [True, False])
def test_a_shallow_copy_with_graphs_is_itself(is_padded: bool, saved: Any) -> None:
    """Its forward is still that of the model that it was copied from, and must be told."""
    models = [unpad(encoder(saved("bert"), "flashinfer"), cuda_graphs=True) for _ in range(2)]
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
