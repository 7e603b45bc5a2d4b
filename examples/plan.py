"""Cuts the input into parts, and joins their files to one output. Imports neither torch nor models.

Parts have about as many bytes of text each, and do not depend on the number of workers. A part is the unit that a
process or actor takes, a resumed run skips, and a restarted actor repeats. Its file appears under its name when it is
complete, and never before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from tqdm.auto import tqdm

__all__ = [
    "EMBEDDING",
    "FORMAT",
    "PARTS_AT_A_TIME",
    "ROW",
    "Gatherer",
    "Options",
    "Part",
    "PartReport",
    "Plan",
    "Pooling",
    "add_arguments",
    "options_from",
    "write_report",
]

# Bytes of UTF-8. Used to weigh long texts, which are truncated, against short ones.
BYTES_PER_TOKEN, SPECIAL_TOKENS = 5, 2
# The number of parts is a multiple of this, so that 2, 4 or 8 workers have as many each.
PARTS_MULTIPLE = 8
# Of each worker: the model runs on one part while the next one is read and the one before is written.
PARTS_AT_A_TIME = 3
Pooling = Literal["mean", "cls", "last"]
_PLAN, ROW, EMBEDDING = "plan", "row", "embedding"


@dataclass(frozen=True, slots=True)
class Options:
    """Options that embeddings depend on.

    Args:
        model: Path or Hub id of a `SentenceTransformer` or of an encoder.
        input: A Parquet file, or a folder of them, taken in the order of their names.
        column: Column of the texts.
        keep: Other columns to copy to the output.
        pooling: "mean", "cls" or "last" for an encoder; None for a `SentenceTransformer`, which has its own.
        max_length: Longer texts are truncated, in tokens; None for the model's own limit.
        tokens_per_batch: Most tokens of a forward.
        part_megabytes: Text of a part, about. What a killed process was at is lost, at most three parts.
    """

    model: str
    input: str
    column: str = "text"
    keep: tuple[str, ...] = ()
    pooling: Pooling | None = None
    max_length: int | None = None
    tokens_per_batch: int = 32_768
    part_megabytes: float = 8.0

    def __post_init__(self) -> None:
        for name in ("tokens_per_batch", "part_megabytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a number above 0.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that both programs have."""
    parser.add_argument("--model", required=True, help="path or Hub id of a SentenceTransformer or an encoder")
    parser.add_argument("--input", required=True, help="a Parquet file, or a folder of them")
    parser.add_argument("--output", type=Path, required=True, help="the Parquet file to write")
    parser.add_argument("--column", default="text")
    parser.add_argument("--keep", default="", metavar="A,B", help="columns to copy to the output")
    parser.add_argument("--pooling", choices=get_args(Pooling), help="of an encoder; a SentenceTransformer has its own")
    parser.add_argument("--max-length", type=int, help="longer texts are truncated, in tokens")
    parser.add_argument("--tokens-per-batch", type=int, default=32_768, help="most tokens of a forward")
    parser.add_argument("--part-megabytes", type=float, default=8.0, help="text of a part, about")
    parser.add_argument("--report", type=Path, help="JSON to write, with times and rows of each part")


def options_from(arguments: argparse.Namespace) -> Options:
    """Makes options of parsed arguments."""
    local = Path(arguments.model).is_dir()
    return Options(
        model=str(Path(arguments.model).resolve()) if local else arguments.model,
        input=str(Path(arguments.input).resolve()),
        column=arguments.column,
        keep=tuple(filter(None, arguments.keep.split(","))),
        pooling=arguments.pooling,
        max_length=arguments.max_length,
        tokens_per_batch=arguments.tokens_per_batch,
        part_megabytes=arguments.part_megabytes,
    )


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `start` to `stop` of the input, counted over all files."""

    index: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"part-{self.index:06d}.parquet"


@dataclass(frozen=True, slots=True)
class PartReport:
    """Report of an embedded part.

    Args:
        index: Index of the part.
        worker: Id of the process that embedded it.
        rows: Number of rows.
        encode_seconds: Time in `encode`.
        started: When reading began, in seconds since the epoch.
        ended: When its file was complete.
    """

    index: int
    worker: int
    rows: int
    encode_seconds: float
    started: float
    ended: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Parts of a run. Written next to the output, so that a resumed run has the same.

    Args:
        options: Options of the run.
        output: The file to write in the end.
        files: Files of the input, as path, bytes, time of the last change in nanoseconds, and rows.
        parts: All parts, in order.
    """

    options: Options
    output: Path
    files: tuple[tuple[str, int, int, int], ...]
    parts: tuple[Part, ...]

    @property
    def folder(self) -> Path:
        """Folder of the parts until they are gathered."""
        return self.output.with_name(self.output.name + ".parts")

    @property
    def rows(self) -> int:
        return self.parts[-1].stop

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the output depends on."""
        return hashlib.sha256(json.dumps([asdict(self.options), self.files]).encode()).hexdigest()

    def remaining(self) -> list[Part]:
        """Returns the parts that have no file yet."""
        return [part for part in self.parts if not self.is_done(part)]

    def is_done(self, part: Part) -> bool:
        path = self.folder / part.name
        return path.exists() and pq.read_metadata(path).num_rows == part.stop - part.start

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Reads `plan.json` from the folder of parts of a run."""
        found = json.loads(path.read_text())
        options = Options(**{**found["options"], "keep": tuple(found["options"]["keep"])})
        files, parts = tuple(map(tuple, found["files"])), tuple(Part(*one) for one in found["parts"])
        return cls(options, path.parent.with_suffix(""), files, parts)

    @classmethod
    def make(cls, options: Options, output: Path) -> Plan | None:
        """Makes a plan, or reads that of an earlier run that did not finish.

        Args:
            options: Options of the run.
            output: The file to write.

        Returns:
            None if the output exists, of the same input and options.

        Raises:
            ValueError: If there is nothing to embed, if the output or its parts are of another input or of other
                options, or if the pooling does not fit the model.
        """
        _check_pooling(options)
        files = tuple(_describe(path, options) for path in _input_files(options.input))
        plan = cls(options, output.resolve(), files, ())
        if output.exists():
            metadata = pq.read_metadata(output).metadata or {}
            if metadata.get(_PLAN.encode(), b"").decode() == plan.fingerprint:
                shutil.rmtree(plan.folder, ignore_errors=True)
                return None
            raise ValueError(
                f"{output} is there already, of another input or other options; remove it or name another."
            )
        saved = plan.folder / "plan.json"
        if saved.exists():
            earlier = cls.load(saved)
            if earlier.fingerprint != plan.fingerprint:
                was, now = asdict(earlier.options), asdict(options)
                changed = [f"{name} was {was[name]!r}" for name in now if was[name] != now[name]]
                raise ValueError(
                    f"{plan.folder} is of another run: {', '.join(changed) or 'the input was changed since'}. "
                    "Go on with what it was, or remove the folder."
                )
            return earlier
        plan = cls(options, output.resolve(), files, tuple(_cut(files, options)))
        plan.folder.mkdir(parents=True, exist_ok=True)
        parts = [[part.index, part.start, part.stop] for part in plan.parts]
        temporary = saved.with_suffix(".tmp")
        temporary.write_text(json.dumps({"options": asdict(options), "files": files, "parts": parts}))
        os.replace(temporary, saved)
        return plan


def _check_pooling(options: Options) -> None:
    has_modules = _has_modules(options.model)
    if has_modules and options.pooling is not None:
        raise ValueError(f"{options.model} is a SentenceTransformer, which has its own pooling; leave out --pooling.")
    if not has_modules and options.pooling not in get_args(Pooling):
        raise ValueError(
            f"pooling={options.pooling!r} for {options.model}, which has no modules.json as a SentenceTransformer has; "
            f"expected --pooling with one of {', '.join(get_args(Pooling))}."
        )


def _has_modules(model: str) -> bool:
    if Path(model).is_dir():
        return (Path(model) / "modules.json").exists()
    try:
        hf_hub_download(model, "modules.json")
    except EntryNotFoundError:
        return False
    return True


def _input_files(path: str) -> list[Path]:
    files = sorted(Path(path).glob("*.parquet")) if Path(path).is_dir() else [Path(path)]
    if not files or not files[0].is_file():
        raise ValueError(f"{path}: expected a Parquet file, or a folder with such files.")
    return files


def _describe(path: Path, options: Options) -> tuple[str, int, int, int]:
    metadata, status = pq.read_metadata(path), path.stat()
    names = metadata.schema.to_arrow_schema().names
    if reserved := {ROW, EMBEDDING}.intersection(options.keep):
        raise ValueError(f"{', '.join(sorted(reserved))} cannot be kept: the output has columns of that name.")
    if missing := [name for name in (options.column, *options.keep) if name not in names]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; expected one of {names}.")
    return str(path), status.st_size, status.st_mtime_ns, metadata.num_rows


def _cut(files: Sequence[tuple[str, int, int, int]], options: Options) -> Iterator[Part]:
    """Cuts rows into parts of about as many tokens, estimated from bytes of text."""
    found = []
    for path, *_ in files:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                texts = file.read_row_group(group, columns=[options.column])[options.column]
                if texts.null_count:
                    raise ValueError(f"{path}: {texts.null_count} rows without a text in row group {group}.")
                found.append(pc.binary_length(texts.cast(pa.large_string())).to_numpy())
    sizes = np.concatenate(found) if found else np.zeros(0, np.int64)
    if not len(sizes):
        raise ValueError(f"{options.input} has no rows; expected at least one.")
    longest = BYTES_PER_TOKEN * (options.max_length or 1_000_000)
    ends = np.cumsum(np.minimum(sizes, longest) + BYTES_PER_TOKEN * SPECIAL_TOKENS)
    count = -(-int(ends[-1]) // int(options.part_megabytes * 1e6))
    count = -(-count // PARTS_MULTIPLE) * PARTS_MULTIPLE
    stops = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count, side="right")
    bounds = np.unique([0, *stops, len(sizes)])
    for index, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist())):
        yield Part(index, start, stop)


# Floating-point numbers neither repeat nor compress.
FORMAT: dict[str, Any] = {"use_dictionary": False, "compression": "none", "write_statistics": False}


class Gatherer:
    """Joins parts in a thread, each as soon as it and those before it are complete.

    Leaving the context waits for all parts, and removes their folder.

    Args:
        plan: The plan of the run.
        progress: Whether to show a progress bar on stderr.

    Raises:
        RuntimeError: When the context is left, if rows are missing or out of order.
    """

    def __init__(self, plan: Plan, *, progress: bool = True) -> None:
        self._plan, self._progress = plan, progress
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Gatherer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stop.set()
        self._thread.join()
        if kind is not None:
            return
        if self._error is not None:
            raise RuntimeError(f"{self._plan.output} could not be gathered: {self._error}") from self._error
        # Only now: a retried task may have written a part again after it was gathered.
        shutil.rmtree(self._plan.folder)

    def _run(self) -> None:
        try:
            self._gather()
        except (OSError, RuntimeError, pa.ArrowException) as error:
            self._error = error

    def _gather(self) -> None:
        plan = self._plan
        temporary = plan.folder / f"gathered.{os.getpid()}.tmp"
        writer: pq.ParquetWriter | None = None
        bar = tqdm(total=plan.rows, unit="row", unit_scale=True, desc="embedding", disable=not self._progress)
        with bar:
            for part in plan.parts:
                path = plan.folder / part.name
                while not path.exists():
                    if self._stop.wait(0.02):
                        return
                table = pq.read_table(path)
                if not np.array_equal(table[ROW].to_numpy(), np.arange(part.start, part.stop)):
                    raise RuntimeError(f"{path} does not have rows {part.start} to {part.stop}")
                if writer is None:
                    schema = table.schema.with_metadata({_PLAN: plan.fingerprint})
                    writer = pq.ParquetWriter(temporary, schema, **FORMAT)
                writer.write_table(table.replace_schema_metadata(schema.metadata))
                bar.update(table.num_rows)
        assert writer is not None
        writer.close()
        os.replace(temporary, plan.output)


def write_report(path: Path | None, plan: Plan, reports: Sequence[PartReport], began: float, workers: int) -> None:
    """Writes the time that a run took, to stdout and as JSON.

    Args:
        path: Path of the JSON; None for none.
        plan: The plan of the run.
        reports: Reports of the parts that this run embedded.
        began: When the program began, in seconds since the epoch.
        workers: Number of processes or actors.
    """
    rows = sum(one.rows for one in reports)
    # From the first row read, with models loaded, to the last one written.
    seconds = max(one.ended for one in reports) - min(one.started for one in reports) if reports else 0.0
    report = {
        "rows": plan.rows, "parts": len(plan.parts), "workers": workers, "embedded_rows": rows,
        "embedded_parts": len(reports), "embedding_seconds": seconds,
        "total_seconds": time.time() - began, "options": asdict(plan.options),
        "part_reports": [asdict(one) for one in sorted(reports, key=lambda one: one.index)],
    }  # fmt: skip
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")
    rate = f", {rows / seconds:,.0f} rows/s" if seconds else ""
    print(f"{plan.output}: {plan.rows:,} rows, {rows:,} of them embedded now in {seconds:.1f} s{rate}", flush=True)
