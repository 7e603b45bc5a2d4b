"""Embeds parts of a plan: read, tokenised, run and written, all at the same time."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from encoder import MAX_GRAPH_ROWS, Encoder, Rows
from plan import EMBEDDING, FORMAT, ROW, Part, PartReport, Plan

__all__ = ["PartEmbedder", "embed_parts", "shapes_to_capture"]

# While one part is on the GPU, the next one is read and tokenised, and the one before is written.
THREADS = 4


class _Reader:
    """Reads rows by number. Parts are smaller than row groups, as a rule, so the last few of these are kept."""

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


def shapes_to_capture(tokens_per_batch: int, max_length: int) -> list[tuple[int, int]]:
    """Returns rows and tokens of the batches that parts are cut into, but for the last few of the input."""
    counts = [1 << power for power in range(3, MAX_GRAPH_ROWS.bit_length())]
    sizes = (tokens_per_batch * 15 // 16, tokens_per_batch, tokens_per_batch * 17 // 16)
    # A text has three tokens at least, two of which are special.
    return [(rows, size) for size in sizes for rows in counts if 3 * rows <= size <= max_length * rows]


class PartEmbedder:
    """Embeds parts. Several threads may: they take turns on the model, and read, tokenise and write beside it.

    Args:
        plan: Of the run.
        device: Where the model runs.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        options = plan.options
        self.plan, self.device = plan, device
        self.encoder = Encoder(options.model, device, pooling=options.pooling, max_length=options.max_length)
        self._reader = _Reader(plan)
        # Tokenising a part takes all cores: one after the other, so that the first one is soon ready for the model.
        self._preparing, self._turn = threading.Lock(), threading.Lock()
        # Whoever launches kernels should not wait 5 ms each time for threads that unpack tokens.
        sys.setswitchinterval(5e-4)
        self.encoder.capture(shapes_to_capture(plan.options.tokens_per_batch, self.encoder.max_length))

    def _batches(self, lengths: np.ndarray) -> list[slice]:
        """Cuts rows that are sorted by length into batches of as many tokens each: few sizes, so few graphs."""
        ends = np.cumsum(lengths)
        count = -(-int(ends[-1]) // self.plan.options.tokens_per_batch)
        bounds = [0, *np.searchsorted(ends, ends[-1] * np.arange(1, count) / count, side="right"), len(lengths)]
        batches = []
        for start, stop in zip(bounds[:-1], bounds[1:]):
            pieces = -(-int(stop - start) // MAX_GRAPH_ROWS)
            cuts = [int(start + (stop - start) * piece // pieces) for piece in range(pieces)] + [int(stop)]
            batches += [slice(*cut) for cut in zip(cuts[:-1], cuts[1:])]
        return batches

    def embed(self, part: Part) -> PartReport:
        """Embeds a part and writes its file."""
        with self._preparing:
            started = time.time()
            table = self._reader.read(part)
            tokens = self.encoder.tokenise(table[self.plan.options.column].to_pylist())
        # Longest first, so that memory is asked for at the beginning; in a stable order, so that it is always the same.
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        order = np.argsort(-lengths, kind="stable")
        rows = Rows.of([tokens[at] for at in order])
        ends = np.concatenate([[0], np.cumsum(rows.lengths)])
        slices = self._batches(rows.lengths)
        batches = [Rows(rows.ids[ends[cut.start] : ends[cut.stop]], rows.lengths[cut]) for cut in slices]
        on_gpu = self.device.type == "cuda"
        found = torch.empty((len(order), self.encoder.hidden_size), pin_memory=on_gpu)
        with self._turn:
            for cut, batch in zip(slices, batches):
                found[cut].copy_(self.encoder.embed(batch), non_blocking=on_gpu)
            done = torch.cuda.Event() if on_gpu else None
            if done is not None:
                done.record(torch.cuda.current_stream(self.device))
        # The next part is launched behind this one while it is waited for.
        if done is not None:
            done.synchronize()
        embeddings = np.empty(found.shape, np.float32)
        embeddings[order] = found.numpy()
        if not np.isfinite(embeddings).all():
            raise ValueError(f"embeddings of rows {part.start} to {part.stop} are not finite.")
        self._write(part, table, embeddings)
        return PartReport(part.index, os.getpid(), len(order), int(lengths.sum()), len(batches), started, time.time())

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
    """Embeds parts one after the other, reading, tokenising and writing beside the model."""
    with ThreadPoolExecutor(THREADS) as threads:
        futures = [threads.submit(embedder.embed, part) for part in parts]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
