"""Models for the tests of `encode`, `encode_iter`, `predict` and `rank`, and what their results are compared by."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from hf_flashinfer_attn import encode, repad, unpad
from hf_flashinfer_attn.tools import demo

st = pytest.importorskip("sentence_transformers", "5.4", reason="needs sentence-transformers of 5.4 or newer")

from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402

VERSION = Version(st.__version__)
# Before, decoders keep a cache by default.
TURNS_CACHES_OFF = Version("6.2") <= VERSION

TOKENS, WIDTH, LAYERS = 128, 64, 2
SIZES: dict[str, Any] = {
    "vocab_size": 30522, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": TOKENS + 8, "pad_token_id": 0,
}  # fmt: skip
_DECODER: dict[str, Any] = {**SIZES, "num_key_value_heads": 1, "head_dim": 32}
_GEMMA: dict[str, Any] = {
    **_DECODER, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 32, "use_bidirectional_attention": True,
}  # fmt: skip
_DISTILBERT: dict[str, Any] = {
    "vocab_size": 30522, "dim": WIDTH, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 96,
    "max_position_embeddings": TOKENS + 8, "pad_token_id": 0,
}  # fmt: skip
# Families that sentence-transformers flattens: the prefix of their classes, and their configs.
FLATTENED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", SIZES),
    "roberta": ("Roberta", SIZES),
    "modernbert": ("ModernBert", {**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2}),
    "qwen3": ("Qwen3", _DECODER),
    "embedding-gemma": ("Gemma3Text", _GEMMA),
}
FAMILIES = {**FLATTENED, "distilbert": ("DistilBert", _DISTILBERT), "mpnet": ("MPNet", SIZES)}
# What `encode` may be given: it unpads "flashinfer" itself, and pads batches for "sdpa".
KINDS = ("unpadded", "flashinfer", "sdpa")
# Of the largest absolute value, in float32: the distance of transformers' sdpa from float64 is up to 1.5e-6.
TOLERANCE = 3e-6
PROMPTS = {"query": "query: ", "passage": "passage: ", "other": "words of another kind: "}
QUERY = "how does a with statement call __exit__?"
TEXTS = [text[: 40 + 90 * (index % 5)] for index, text in enumerate(demo.load_passages(11))] + ["", "  two\n words "]

_folders = tempfile.TemporaryDirectory()


def save_random_model(folder: str | Path, model_class: type[PreTrainedModel], sizes: dict[str, Any]) -> None:
    """Saves a model whose weights are wide enough apart that its scores are too, and all-MiniLM-L6-v2's tokenizer."""
    generator = torch.Generator().manual_seed(0)
    model = model_class(model_class.config_class(**sizes, num_labels=1))
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.copy_(torch.randn(weights.shape, generator=generator) * 0.15)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.model_path()).save_pretrained(folder)


@functools.cache
def saved(family: str, head: str = "Model") -> str:
    """Saves a random model, once; returns its folder."""
    prefix, sizes = FAMILIES[family]
    folder = str(Path(_folders.name, f"{family}-{head}"))
    save_random_model(folder, getattr(transformers, prefix + head), sizes)
    return folder


def encoder(family: str, implementation: str, *modules: nn.Module, is_left_padded: bool = False) -> Any:
    """A tiny `SentenceTransformer` of a family or a folder, with mean pooling unless modules are given."""
    if family == "mpnet" and implementation == "sdpa":
        # It computes attention in its own code.
        implementation = "eager"
    path = saved(family) if family in FAMILIES else family
    transformer = Transformer(path, model_kwargs={"attn_implementation": implementation}, max_seq_length=TOKENS)
    if not TURNS_CACHES_OFF:
        transformer.model.config.use_cache = False
    if is_left_padded:
        transformer.tokenizer.padding_side = "left"
    return st.SentenceTransformer(modules=[transformer, *(modules or (Pooling(WIDTH),))], device="cpu")


@functools.cache
def minilm(implementation: str) -> Any:
    """all-MiniLM-L6-v2, with prompts, which tests do not change but for unpadding."""
    settings = {"attn_implementation": implementation}
    return st.SentenceTransformer(str(demo.model_path()), model_kwargs=settings, prompts=dict(PROMPTS), device="cpu")


@functools.cache
def tiny(implementation: str) -> Any:
    """A tiny model, with prompts, which tests do not change but for unpadding."""
    model = encoder("bert", implementation)
    model.prompts = dict(PROMPTS)
    return model


def fresh(*modules: nn.Module, family: str = "bert", **options: Any) -> list[Any]:
    """A tiny model that `encode` unpads, and its reference; tests may change both."""
    return [encoder(family, implementation, *modules, **options) for implementation in ("flashinfer", "sdpa")]


@functools.cache
def many_texts() -> tuple[list[str], Any]:
    """Texts of 2 to 50 tokens, shuffled, and their vectors."""
    texts = ["word " * (index * 7 % 49) + str(index) for index in range(150)]
    return texts, tiny("sdpa").encode(texts)


def reranker(family: str, implementation: str, head: str = "ForSequenceClassification", **options: Any) -> Any:
    model = st.CrossEncoder(
        saved(family, head), model_kwargs={"attn_implementation": implementation}, device="cpu", max_length=TOKENS,
        **options,
    )  # fmt: skip
    if not TURNS_CACHES_OFF:
        model.model.config.use_cache = False
    return model


def classifier(implementation: str, labels: int = 3) -> Any:
    """A tiny `CrossEncoder` of several labels."""
    model = reranker("bert", implementation, "Model", num_labels=labels)
    weight = torch.randn(labels, WIDTH, generator=torch.Generator().manual_seed(0))
    model.model.classifier.load_state_dict({"weight": weight, "bias": torch.zeros(labels)})
    return model


def of_kind(kind: str, make: Callable[[str], Any]) -> Any:
    """Makes a model of one of `KINDS`, which may have been unpadded by another test."""
    if kind == "sdpa":
        return make("sdpa")
    return unpad(make("flashinfer")) if kind == "unpadded" else repad(make("flashinfer"))


def both(kind: str, make: Callable[[str], Any] = tiny) -> tuple[Any, Any]:
    """Makes a model of one of `KINDS`, and its reference."""
    return of_kind(kind, make), make("sdpa")


def assert_encodes(
    model: Any, reference: Any, inputs: Any = TEXTS, tolerance: float = TOLERANCE, **options: Any
) -> None:
    """`encode` of a model returns what the reference's own does."""
    assert_same(encode(model, inputs, **options), reference.encode(inputs, **options), tolerance)


def assert_same(ours: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Types, shapes and dtypes are equal, and numbers are within sdpa's own error."""
    assert type(ours) is type(expected)
    if isinstance(ours, list):
        assert len(ours) == len(expected)
        for one, other in zip(ours, expected):
            assert_same(one, other, tolerance)
        return
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    ours, expected = torch.as_tensor(ours), torch.as_tensor(expected)
    scale = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * scale)
