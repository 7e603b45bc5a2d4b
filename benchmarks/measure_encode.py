"""Measures `encode` and `predict`, strings in and numpy arrays out, against sentence-transformers with sdpa.

    python benchmarks/measure_encode.py --json benchmarks/results/encode_h200.json

The texts are 20,000 paragraphs of Python's documentation, drawn with replacement; weights are random, float16. Two
floors are measured in the same run: the tokenizers library alone, on the threads of `encode`, and the forward alone, on
batches that are tokenised ahead. A file is written after each measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import psutil
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

import hf_flashinfer_attn
from hf_flashinfer_attn.encoding import pipeline
from hf_flashinfer_attn.encoding.api import ROWS_PER_BATCH, TOKENS_PER_BATCH
from hf_flashinfer_attn.encoding.sentence_engine import SentenceEngine
from hf_flashinfer_attn.encoding.tokens import Budget, TextTokenizer
from hf_flashinfer_attn.tools.demo import model_path
from hf_flashinfer_attn.tools.environment import describe_environment

SHAPES = {
    "1x64": {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64},
    "6x384": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "12x768": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
MAX_LENGTH, QUERIES = 256, 200
# About as many as fill a batch.
TEXTS = 600
QUESTION = "which values are considered false, and how is that defined for a class?"


def paragraphs(count: int, seed: int) -> list[str]:
    """Draws paragraphs of more than two words from Python's documentation, with replacement."""
    found = [
        " ".join(paragraph.split())
        for text in topics.values()
        for paragraph in text.split("\n\n")
        if len(paragraph.split()) > 2
    ]
    return random.Random(seed).choices(found, k=count)


def save_model(folder: Path, shape: str, tokenizer: str, *, head: bool) -> str:
    """Saves a random model, once; returns its path."""
    path = folder / f"{shape}{'-head' if head else ''}"
    if not path.exists():
        torch.manual_seed(0)
        config = BertConfig(**SHAPES[shape], num_labels=1)
        model = BertForSequenceClassification(config) if head else BertModel(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.mul_(2)
        model.half().save_pretrained(path)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path)
    return str(path)


def load_encoder(path: str, implementation: str, device: str, dtype: torch.dtype) -> SentenceTransformer:
    transformer = Transformer(
        path, model_kwargs={"attn_implementation": implementation, "dtype": dtype}, max_seq_length=MAX_LENGTH
    )
    pooling = Pooling(transformer.model.config.hidden_size, "mean")
    return SentenceTransformer(modules=[transformer, pooling], device=device)


def load_reranker(path: str, implementation: str, device: str, dtype: torch.dtype) -> CrossEncoder:
    settings = {"attn_implementation": implementation, "dtype": dtype}
    return CrossEncoder(path, model_kwargs=settings, device=device, max_length=MAX_LENGTH)


def seconds_of(run: Callable[[], object], passes: int) -> list[float]:
    found = []
    for _ in range(passes):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def tokenizer_alone(tokenise: TextTokenizer, texts: Sequence[str]) -> None:
    chunks = [texts[start : start + 1_024] for start in range(0, len(texts), 1_024)]
    with ThreadPoolExecutor(2) as threads:
        for _ in threads.map(tokenise.backend.encode_batch_fast, chunks):
            pass


def forward_alone(engine: SentenceEngine, batches: Sequence[Any]) -> None:
    for batch in batches:
        engine.run(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def error_ratio(ours: np.ndarray[Any, Any], rival: np.ndarray[Any, Any], exact: np.ndarray[Any, Any]) -> float:
    """Error of ours over that of the rival, both against float32."""
    errors = [float(np.linalg.norm(found.astype(np.float64) - exact)) for found in (ours, rival)]
    return errors[0] / max(errors[1], 1e-12)


class Report:
    def __init__(self, path: Path, **settings: object) -> None:
        self._path = path
        self._content: dict[str, Any] = {**settings, "cells": {}, "environment": describe_environment()}

    def add(self, cell: str, **figures: object) -> None:
        self._content["cells"].setdefault(cell, {}).update(figures)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._content, indent=1) + "\n")
        print(cell, json.dumps(figures), flush=True)


def measure_encoding(report: Report, path: str, cell: str, options: argparse.Namespace, texts: list[str]) -> None:
    dtype = torch.float16 if options.device == "cuda" else torch.float32
    ours = load_encoder(path, "flashinfer", options.device, dtype)
    # Kernels are compiled, and nothing else is warm.
    hf_flashinfer_attn.encode(ours, texts[:2_000])
    ours = load_encoder(path, "flashinfer", options.device, dtype)
    encode = hf_flashinfer_attn.encode
    report.add(cell, cold_seconds=seconds_of(lambda: encode(ours, texts), 1))
    report.add(cell, warm_seconds=seconds_of(lambda: encode(ours, texts), options.passes))
    engine = SentenceEngine(ours, lambda features: features["sentence_embedding"], prompt=None, options={})
    tokenise = engine.fast_tokenizer
    report.add(cell, tokenizer_seconds=seconds_of(lambda: tokenizer_alone(tokenise, texts), options.passes))
    windows = [
        engine.prepare(texts[start : start + TEXTS], Budget(TOKENS_PER_BATCH, ROWS_PER_BATCH))
        for start in range(0, len(texts), TEXTS)
    ]
    batches = [batch for window in windows for batch in window.batches]
    report.add(cell, batches=len(batches), tokens=sum(window.tokens for window in windows))
    report.add(cell, forward_seconds=seconds_of(lambda: forward_alone(engine, batches), options.passes))
    queries = paragraphs(QUERIES, seed=1)
    queries = [" ".join(query.split()[:12]) for query in queries]
    for query in queries[:20]:
        encode(ours, query)
    stream = iter(queries)
    report.add(cell, query_ms=1e3 * statistics.median(seconds_of(lambda: encode(ours, next(stream)), QUERIES)))
    report.add(cell, graphs=hf_flashinfer_attn.graph_statistics(ours).captured)
    sdpa = load_encoder(path, "sdpa", options.device, dtype)
    for query in queries[:20]:
        sdpa.encode(query)
    again = iter(queries)
    report.add(cell, sdpa_query_ms=1e3 * statistics.median(seconds_of(lambda: sdpa.encode(next(again)), QUERIES)))
    sample = texts[:1_000]
    exact = load_encoder(path, "sdpa", options.device, torch.float32).encode(sample, batch_size=256)
    report.add(cell, error_over_sdpa=error_ratio(encode(ours, sample), sdpa.encode(sample, batch_size=256), exact))
    for batch_size in (256, 32):
        figures = seconds_of(lambda size=batch_size: sdpa.encode(texts, batch_size=size), options.rival_passes)
        report.add(cell, **{f"sdpa_{batch_size}_seconds": figures})


def measure_reranking(report: Report, path: str, cell: str, options: argparse.Namespace, texts: list[str]) -> None:
    dtype = torch.float16 if options.device == "cuda" else torch.float32
    pairs = [(QUESTION, text) for text in texts]
    ours = load_reranker(path, "flashinfer", options.device, dtype)
    hf_flashinfer_attn.predict(ours, pairs[:500])
    ours = load_reranker(path, "flashinfer", options.device, dtype)
    report.add(cell, cold_seconds=seconds_of(lambda: hf_flashinfer_attn.predict(ours, pairs), 1))
    report.add(cell, warm_seconds=seconds_of(lambda: hf_flashinfer_attn.predict(ours, pairs), options.passes))
    sdpa = load_reranker(path, "sdpa", options.device, dtype)
    sample = pairs[:1_000]
    exact = load_reranker(path, "sdpa", options.device, torch.float32).predict(sample, batch_size=256)
    found = hf_flashinfer_attn.predict(ours, sample)
    report.add(cell, error_over_sdpa=error_ratio(found, sdpa.predict(sample, batch_size=256), exact))
    for batch_size in (256, 32):
        figures = seconds_of(lambda size=batch_size: sdpa.predict(pairs, batch_size=size), options.rival_passes)
        report.add(cell, **{f"sdpa_{batch_size}_seconds": figures})


def measure_stream(report: Report, path: str, cell: str, options: argparse.Namespace) -> None:
    """Measures memory while a generator of texts is encoded."""
    dtype = torch.float16 if options.device == "cuda" else torch.float32
    model = load_encoder(path, "flashinfer", options.device, dtype)
    known = paragraphs(2_000, seed=2)
    choice = random.Random(3).choice
    stream = (choice(known)[:100] for _ in range(options.stream))
    process, resident, reserved = psutil.Process(), [], []
    start = time.perf_counter()
    for place, _ in enumerate(hf_flashinfer_attn.encode_iter(model, stream)):
        if (place + 1) % (options.stream // 10) == 0:
            resident.append(process.memory_info().rss // 2**20)
            reserved.append(torch.cuda.memory_reserved() // 2**20 if options.device == "cuda" else None)
    seconds = time.perf_counter() - start
    # Where glibc's heap does not return large buffers, as by default, it grows with the sizes of a model's on a CPU.
    malloc = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    report.add(
        cell, texts=options.stream, seconds=seconds, resident_mib=resident, reserved_gpu_mib=reserved, malloc=malloc
    )  # fmt: skip


def main(command_line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=5_000)
    parser.add_argument("--stream", type=int, default=200_000, help="texts of a generator")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--rival-passes", type=int, default=2)
    parser.add_argument("--shapes", default="6x384,12x768")
    parser.add_argument("--stream-shape", default="6x384", choices=list(SHAPES))
    parser.add_argument("--tokenizer", help="default: that of all-MiniLM-L6-v2, from its package")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(command_line)
    report = Report(
        options.json, texts=options.texts, pairs=options.pairs, tokens_per_batch=TOKENS_PER_BATCH,
        threads=pipeline.THREADS, max_length=MAX_LENGTH,
    )  # fmt: skip
    texts = paragraphs(options.texts, seed=0)
    tokenizer = options.tokenizer or str(model_path())
    with tempfile.TemporaryDirectory() as folder:
        for shape in filter(None, options.shapes.split(",")):
            path = save_model(Path(folder), shape, tokenizer, head=False)
            measure_encoding(report, path, shape, options, texts)
        if options.pairs:
            path = save_model(Path(folder), "12x768", tokenizer, head=True)
            measure_reranking(report, path, "12x768 reranker", options, texts[: options.pairs])
        if options.stream:
            path = save_model(Path(folder), options.stream_shape, tokenizer, head=False)
            measure_stream(report, path, f"{options.stream_shape} stream", options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
