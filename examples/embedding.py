"""Embeds parts of a plan with `hf_flashinfer_attn.encode`; reads and writes other parts while the model runs."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModel, AutoTokenizer

import hf_flashinfer_attn
from plan import EMBEDDING, FORMAT, PARTS_AT_A_TIME, ROW, Options, Part, PartReport, Plan

__all__ = ["PartEmbedder", "embed_parts"]


class _Reader:
    """Reads rows by number. Several parts share a row group, so the last few row groups are cached."""

    def __init__(self, plan: Plan) -> None:
        self._columns = [plan.options.column, *plan.options.keep]
        self._groups: list[tuple[int, int, str, int]] = []
        first = 0
        for path, *_ in plan.files:
            metadata = pq.read_metadata(path)
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                self._groups.append((first, first + rows, path, group))
                first += rows
        self._read_group = functools.lru_cache(maxsize=2)(self._read_anew)

    def _read_anew(self, path: str, group: int) -> pa.Table:
        with pq.ParquetFile(path) as file:
            return file.read_row_group(group, columns=self._columns)

    def read(self, part: Part) -> pa.Table:
        return pa.concat_tables(
            self._read_group(path, group)[max(part.start - first, 0) : part.stop - first]
            for first, last, path, group in self._groups
            if first < part.stop and part.start < last
        )


def _load_model(options: Options, device: torch.device) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Loads a model in float16 on a GPU, in float32 elsewhere.

    Returns:
        A `SentenceTransformer`, or a model of transformers if `options.pooling` is given; and what `encode` needs
        besides.
    """
    loading = {
        "attn_implementation": "flashinfer", "dtype": torch.float16 if device.type == "cuda" else torch.float32
    }  # fmt: skip
    if options.pooling is None:
        from sentence_transformers import SentenceTransformer

        transformer = SentenceTransformer(options.model, device=str(device), model_kwargs=loading)
        if options.max_length is not None:
            transformer.max_seq_length = options.max_length
        return transformer, {}
    model = AutoModel.from_pretrained(options.model, **loading).to(device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    return model, {"tokenizer": tokenizer, "pooling": options.pooling, "max_length": options.max_length}


class PartEmbedder:
    """Embeds parts. Threads may share it: they read one after the other, and take turns on the model.

    Each part is one call of `encode`. Its batches, and so the bytes of its embeddings, do not depend on other parts.

    Args:
        plan: The plan of the run.
        device: Device of the model.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.model, self._arguments = _load_model(plan.options, device)
        self._reader = _Reader(plan)
        self._reading, self._running = threading.Lock(), threading.Lock()
        # Compiles kernels, which does not count as embedding.
        self._encode(["a text"])

    def _encode(self, texts: list[str]) -> np.ndarray:
        embeddings: np.ndarray = hf_flashinfer_attn.encode(
            self.model, texts, tokens_per_batch=self.plan.options.tokens_per_batch, normalize_embeddings=True,
            show_progress_bar=False, **self._arguments,
        )  # fmt: skip
        return embeddings.astype(np.float32, copy=False)

    def embed(self, part: Part) -> PartReport:
        """Embeds a part and writes its file.

        Raises:
            ValueError: If an embedding is not finite.
        """
        with self._reading:
            started = time.time()
            table = self._reader.read(part)
            texts = table[self.plan.options.column].to_pylist()
        with self._running:
            start = time.perf_counter()
            embeddings = self._encode(texts)
            seconds = time.perf_counter() - start
        if not np.isfinite(embeddings).all():
            raise ValueError(f"embeddings of rows {part.start} to {part.stop} are not finite.")
        self._write(part, table, embeddings)
        return PartReport(part.index, os.getpid(), len(texts), seconds, started, time.time())

    def _write(self, part: Part, table: pa.Table, embeddings: np.ndarray) -> None:
        columns = {
            ROW: pa.array(np.arange(part.start, part.stop)),
            **{name: table[name] for name in self.plan.options.keep},
            EMBEDDING: pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1]),
        }
        path = self.plan.folder / part.name
        temporary = path.with_suffix(f".{os.getpid()}-{threading.get_native_id()}.tmp")
        pq.write_table(pa.table(columns), temporary, **FORMAT)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def embed_parts(embedder: PartEmbedder, parts: Sequence[Part]) -> list[PartReport]:
    """Embeds parts, and returns their reports in order."""
    with ThreadPoolExecutor(PARTS_AT_A_TIME) as threads:
        futures = [threads.submit(embedder.embed, part) for part in parts]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
