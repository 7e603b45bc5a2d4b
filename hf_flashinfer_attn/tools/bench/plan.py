"""Benchmark plan: validated options, and the models and batches made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from ...errors import first_line
from ..pretrained import reading
from . import workload
from .contenders import BASELINE, CONTENDERS, Contender, first_position
from .workload import BenchError, PaddedBatch, RequestSet, shown_name

__all__ = ["OnStep", "Plan", "Subject", "Workload"]

TEXTS_BATCH_SIZE = 64
# Arguments: a step and its progress, such as "batch 3 of 40".
OnStep = Callable[[str, str], None]


@dataclass(slots=True)
class Subject:
    """A model to measure, loaded with sdpa."""

    name: str
    model: PreTrainedModel
    prepared: dict[str, Any] = field(default_factory=dict)  # models by contender

    @property
    def longest(self) -> int | None:
        """Maximum number of tokens in a request; None without a limit."""
        longest: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if longest is None else longest - first_position(self.model)


@dataclass(frozen=True, slots=True)
class Workload:
    """A named list of batches."""

    name: str
    batch_size: int
    batches: list[PaddedBatch]


@dataclass(frozen=True, slots=True)
class Plan:
    """Options of a benchmark: named shapes with random weights or a user's model, and request sets or texts."""

    shapes: tuple[str, ...] = ()
    model: str | None = None  # folder or id
    texts: tuple[str, ...] | None = None
    request_sets: tuple[RequestSet, ...] = ()
    against: tuple[str, ...] = (BASELINE,)  # rivals; sdpa is always included
    ours: tuple[str, ...] | None = None  # variants of this package; by default all that can run here
    batch_size: int | None = None  # overrides that of the request sets
    requests: int | None = None  # maximum number per request set
    layers: int | None = None  # overrides the number of the shapes
    sort: bool = False  # sorts texts, longest first
    max_length: int | None = None  # truncates texts to this many tokens; by default to the model's limit
    device: str = "auto"  # or "cpu", "cuda"
    dtype: str = "auto"  # or "float32", "float16", "bfloat16"; auto is float16 on a GPU and float32 elsewhere
    repeats: int = 3  # timed passes per contender
    seconds: float | None = None  # per request set and model; no new round of passes starts after it

    def check(self) -> None:
        """Raises a `BenchError` for unknown or conflicting options."""
        for shape in self.shapes:
            if shape not in workload.SHAPES:
                raise BenchError(f"{shape!r} is no shape; expected some of {list(workload.SHAPES)}.")
        if (self.model is None) == (not self.shapes):
            raise BenchError("expected either a model of yours (--model) or named shapes (--shape).")
        if self.texts is not None and (self.model is None or self.request_sets):
            raise BenchError("texts go with a model of yours, and instead of request sets (--model and --texts).")
        if self.texts is None and not self.request_sets:
            raise BenchError("expected request sets (--lengths) or texts (--texts).")
        if self.texts is not None and not self.texts:
            raise BenchError("there are no texts; expected one a line.")
        if self.texts is None and (self.sort or self.max_length is not None):
            raise BenchError("sorting and cutting are for texts (--sort and --max-length with --texts).")
        if self.model is not None and self.layers is not None:
            raise BenchError("layers are for named shapes; a model of yours has its own (--layers with --shape).")

    def place(self) -> tuple[torch.device, torch.dtype]:
        """Returns the device and the dtype of the models."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BenchError("device='cuda' was asked for, but torch finds no CUDA GPU. Use --device cpu.")
        on_gpu = self.device != "cpu" and torch.cuda.is_available()
        name = self.dtype if self.dtype != "auto" else "float16" if on_gpu else "float32"
        return torch.device("cuda" if on_gpu else "cpu"), getattr(torch, name)

    def contenders(self, device: torch.device, dtype: torch.dtype) -> list[Contender]:
        """Returns the contenders, sdpa first; named contenders are included even if they cannot run here."""
        ours = self.ours
        if ours is None:
            ours = tuple(name for name, one in CONTENDERS.items() if one.ours and one.refuse(device, dtype) is None)
        names = dict.fromkeys((BASELINE, *self.against, *ours))
        for name in names:
            if name not in CONTENDERS:
                raise BenchError(f"{name!r} is no contender; expected some of {list(CONTENDERS)}.")
        return [CONTENDERS[name] for name in names]

    def subjects(self, device: torch.device, dtype: torch.dtype, on_step: OnStep) -> Iterator[Subject]:
        """Yields the models, one at a time."""
        for name in self.shapes or (str(self.model),):
            on_step(f"{shown_name(name)}: loading", "")
            model = _random_model(name, self.layers, device, dtype) if self.shapes else _load(name, dtype)
            model.to(device).eval()
            if hasattr(model.config, "use_cache"):
                # Nothing is generated, and a cache would cost memory.
                model.config.use_cache = False
            yield Subject(name, model)

    def workloads(self, subject: Subject, device: torch.device, skipped: list[str]) -> Iterator[Workload]:
        """Yields the texts or each request set; request sets too long for the model are appended to `skipped`."""
        longest = subject.longest
        if self.texts is not None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(subject.name)
            except (OSError, ValueError) as error:
                raise BenchError(f"the tokenizer of {subject.name!r} cannot be loaded: {first_line(error)}") from error
            batch_size = self.batch_size or TEXTS_BATCH_SIZE
            most = min(limit for limit in (self.max_length, longest, tokenizer.model_max_length) if limit is not None)
            texts = self.texts[: self.requests]
            batches = workload.text_batches(texts, tokenizer, batch_size, most, device, self.sort)
            yield Workload("texts", batch_size, batches)
        for requests in self.request_sets:
            if longest is not None and requests.longest > longest:
                skipped.append(
                    f"{requests.name} has requests of {requests.longest} tokens, {subject.name} takes {longest}"
                )
                continue
            batch_size = self.batch_size or requests.batch_size
            lengths = requests.lengths(self.requests)
            batches = workload.synthetic_batches(lengths, batch_size, subject.model.config, device)
            yield Workload(requests.name, batch_size, batches)


def _load(name: str, dtype: torch.dtype) -> PreTrainedModel:
    with reading(name):
        model: PreTrainedModel = AutoModel.from_pretrained(name, attn_implementation=BASELINE, dtype=dtype)
    return model


def _random_model(name: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    config = workload.shape_config(name, layers)
    auto = AutoModelForSequenceClassification if config.architectures else AutoModel
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), device:
        torch.manual_seed(0)
        model: PreTrainedModel = auto.from_config(config, attn_implementation=BASELINE, dtype=dtype)
    return model
