"""`encode` and `predict` on a GPU: CUDA graphs, pinned copies, another device than the current one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

import hf_flashinfer_attn
from hf_flashinfer_attn import graph_statistics

st = pytest.importorskip("sentence_transformers", "5.4", reason="needs sentence-transformers of 5.4 or newer")

from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer  # noqa: E402

pytestmark = pytest.mark.gpu

WORDS, LONGEST = 500, 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with head_dim 32, one with a head, and a tokenizer of whole words."""
    path = tmp_path_factory.mktemp("models")
    vocabulary = {
        name: place for place, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(WORDS))])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=LONGEST,
    )  # fmt: skip
    config = BertConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, vocab_size=len(vocabulary),
        num_labels=1,
    )  # fmt: skip
    for name, model_class in (("encoder", BertModel), ("reranker", BertForSequenceClassification)):
        model = model_class(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.mul_(4)
        model.half().save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    return path


@pytest.fixture
def texts() -> list[str]:
    return [" ".join(map(str, random.choices(range(WORDS), k=random.choice((3, 9, 40, 300))))) for _ in range(400)]


def encoder(folder: Path, implementation: str, dtype: torch.dtype, pooling: str = "mean", device: str = "cuda") -> Any:
    settings = {"attn_implementation": implementation, "dtype": dtype}
    transformer = Transformer(str(folder / "encoder"), model_kwargs=settings)
    return st.SentenceTransformer(modules=[transformer, Pooling(128, pooling), Normalize()], device=device)


def assert_as_exact(ours: Any, sdpa: Any, exact: Any) -> None:
    ours, sdpa, exact = (np.asarray(found, np.float64) for found in (ours, sdpa, exact))
    assert ours.shape == exact.shape
    assert np.isfinite(ours).all()
    assert np.linalg.norm(ours - exact) <= 1.25 * np.linalg.norm(sdpa - exact)


@pytest.mark.parametrize("tokens_per_batch", [600, 32_768])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
def test_vectors_are_as_exact_as_sdpas(folder: Path, texts: list[str], pooling: str, tokens_per_batch: int) -> None:
    model = encoder(folder, "flashinfer", torch.float16, pooling)
    sdpa = encoder(folder, "sdpa", torch.float16, pooling).encode(texts)
    exact = encoder(folder, "eager", torch.float64, pooling).encode(texts)
    for _ in range(2):
        found = hf_flashinfer_attn.encode(model, texts, tokens_per_batch=tokens_per_batch)
        assert found.dtype == np.float16
        assert_as_exact(found, sdpa, exact)
    assert graph_statistics(model).replayed >= 2
    tensor = hf_flashinfer_attn.encode(model, texts, tokens_per_batch=tokens_per_batch, convert_to_tensor=True)
    assert tensor.is_cuda
    assert_as_exact(tensor.cpu(), sdpa, exact)


def test_bytes_are_the_same_in_every_pass(folder: Path, texts: list[str]) -> None:
    passes = []
    for _ in range(2):
        model = encoder(folder, "flashinfer", torch.float16)
        passes += [hf_flashinfer_attn.encode(model, texts, tokens_per_batch=2_000).tobytes() for _ in range(3)]
    assert len(set(passes)) == 1


def test_one_text_is_replayed(folder: Path, texts: list[str]) -> None:
    model = encoder(folder, "flashinfer", torch.float16)
    sdpa = encoder(folder, "sdpa", torch.float16).encode(texts[:50])
    exact = encoder(folder, "eager", torch.float64).encode(texts[:50])
    found = [hf_flashinfer_attn.encode(model, text) for text in texts[:50]]
    assert_as_exact(found, sdpa, exact)
    assert graph_statistics(model).replayed == 50


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_plain_model(folder: Path, texts: list[str], pooling: Any) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "encoder")
    found = {}
    for implementation, dtype in (("eager", torch.float64), ("sdpa", torch.float16), ("flashinfer", torch.float16)):
        model = AutoModel.from_pretrained(folder / "encoder", attn_implementation=implementation, dtype=dtype).cuda()
        found[implementation] = hf_flashinfer_attn.encode(
            model, texts, tokenizer=tokenizer, pooling=pooling, tokens_per_batch=3_000
        )
    assert_as_exact(found["flashinfer"], found["sdpa"], found["eager"])


def test_a_stream_of_texts_on_a_stream_of_its_own(folder: Path, texts: list[str]) -> None:
    model = encoder(folder, "flashinfer", torch.float16)
    expected = hf_flashinfer_attn.encode(model, texts, tokens_per_batch=1_000)
    with torch.cuda.stream(torch.cuda.Stream()):
        found = list(hf_flashinfer_attn.encode_iter(model, iter(texts), tokens_per_batch=1_000))
    np.testing.assert_array_equal(np.stack(found), expected)


def test_scores_are_as_exact_as_sdpas(folder: Path, texts: list[str]) -> None:
    pairs = list(zip(texts[:200], texts[200:]))
    found = {}
    for implementation, dtype in (("eager", torch.float64), ("sdpa", torch.float16), ("flashinfer", torch.float16)):
        settings = {"attn_implementation": implementation, "dtype": dtype}
        model = st.CrossEncoder(str(folder / "reranker"), model_kwargs=settings, device="cuda")
        predict = hf_flashinfer_attn.predict if implementation == "flashinfer" else type(model).predict
        found[implementation] = predict(model, pairs, activation_fn=torch.nn.Identity())
    assert_as_exact(found["flashinfer"], found["sdpa"], found["eager"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_another_device_than_the_current_one(folder: Path, texts: list[str]) -> None:
    expected = hf_flashinfer_attn.encode(encoder(folder, "flashinfer", torch.float16), texts)
    before = torch.cuda.memory_reserved(0)
    model = encoder(folder, "flashinfer", torch.float16, device="cuda:1")
    np.testing.assert_array_equal(hf_flashinfer_attn.encode(model, texts), expected)
    assert hf_flashinfer_attn.encode(model, texts, convert_to_tensor=True).device.index == 1
    assert (torch.cuda.current_device(), torch.cuda.memory_reserved(0)) == (0, before)
