"""`encode`, `encode_iter`, `predict` and `rank`: vectors and scores from strings."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .engines import CrossEngine, Engine, Features, Output, PlainEngine, Pooling, check_texts, is_instance
from .model_cache import place
from .pipeline import Array, count_of, prepare, run_all
from .sentence_engine import SentenceEngine
from .tokens import Budget

__all__ = ["encode", "encode_iter", "predict", "rank"]

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
Task = Literal["query", "document"]
# Candidate prompt names for each task; the first one in `model.prompts` is used.
_PROMPTS: dict[str, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}
TOKENS_PER_BATCH, ROWS_PER_BATCH = 32_768, 1_024


def encode(
    model: torch.nn.Module,
    inputs: str | Iterable[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pooling: Pooling | None = None,
    max_length: int | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
    task: Task | None = None,
    batch_size: int = ROWS_PER_BATCH,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    show_progress_bar: bool | None = None,
    output_value: Literal["sentence_embedding", "token_embeddings"] | None = "sentence_embedding",
    precision: Precision | None = "float32",
    convert_to_numpy: bool = True,
    convert_to_tensor: bool = False,
    device: str | torch.device | None = None,
    normalize_embeddings: bool = False,
    truncate_dim: int | None = None,
    **kwargs: Any,
) -> Any:
    """Computes embeddings of texts, with the results of `SentenceTransformer.encode`.

    Background threads tokenise while the model runs. Batches have a token budget. A model with
    `attn_implementation="flashinfer"` is unpadded in place, with `unpad(model, cuda_graphs=True)`; `repad` undoes
    this. Other models run on padded batches. The model is put into eval mode.

    Args:
        model: A `SentenceTransformer`, or a transformers model together with `tokenizer` and `pooling`.
        inputs: One text or several, from any iterable.
        tokenizer: Tokenizer of a transformers model.
        pooling: Pooling of a transformers model's last hidden states: "mean" of all tokens, "cls" (the first token),
            or "last" (the last token).
        max_length: Maximum length of a text in tokens, for a transformers model; longer texts are truncated. Default:
            the tokenizer's limit. A `SentenceTransformer` has `max_seq_length`.
        prompt_name: Key of one of the model's prompts.
        prompt: Prefix of every text; overrides `prompt_name`.
        task: "query" or "document", as in `encode_query` and `encode_document`: selects the model's prompt, and its
            route if it has several.
        batch_size: Maximum number of texts per batch.
        tokens_per_batch: Maximum number of tokens per batch; a longer text is a batch of its own.
        show_progress_bar: Whether to show a progress bar with texts per second. Default: whether the logger of
            sentence-transformers shows INFO.
        output_value: "sentence_embedding"; "token_embeddings" for the vectors of each text's tokens, without
            padding; None for all features of each text, computed by `model.encode`.
        precision: Precision of sentence embeddings. Those other than "float32" are quantised by
            sentence-transformers.
        convert_to_numpy: Whether to return one array.
        convert_to_tensor: Whether to return one tensor, on the model's device (on the CPU if quantised).
        device: Device to move the model to first.
        normalize_embeddings: Whether to scale sentence embeddings to length 1.
        truncate_dim: Number of dimensions to keep. Default: the model's.
        kwargs: Further arguments of the `preprocess` and `forward` of a `SentenceTransformer`.

    Returns:
        Sentence embeddings of shape `(texts, dimensions)`, in the order of `inputs`, in the model's dtype (arrays of a
        bfloat16 model are float32). A list of tensors if `convert_to_numpy` and `convert_to_tensor` are both False.
        Token embeddings: a list of tensors of shape `(tokens, dimensions)`. One item if `inputs` is one text.

    Raises:
        TypeError: If `model` is of another class, or an input is not a string; the message has its index.
        ValueError: If a text cannot be tokenised, or an argument does not fit the model.

    Examples:
        >>> import hf_flashinfer_attn
        >>> from transformers import AutoModel, AutoTokenizer
        >>> from hf_flashinfer_attn.tools.demo import model_path
        >>> path = model_path()  # all-MiniLM-L6-v2
        >>> model = AutoModel.from_pretrained(path, attn_implementation="flashinfer")
        >>> tokenizer = AutoTokenizer.from_pretrained(path)
        >>> texts = ["How do I open a file?", "Open a file with open()."]
        >>> hf_flashinfer_attn.encode(model, texts, tokenizer=tokenizer, pooling="mean").shape
        (2, 384)
    """
    _require_iterable(inputs)
    is_single = isinstance(inputs, str)
    if output_value is None:
        if not is_instance(model, "SentenceTransformer"):
            raise ValueError(f"output_value=None: expected a SentenceTransformer, not a {type(model).__name__}.")
        place(model, device)
        features = cast(Any, model).encode(
            [inputs] if is_single else check_texts(list(inputs)), output_value=None,
            prompt=_prompt_of(model, prompt_name, prompt, task), show_progress_bar=show_progress_bar,
            truncate_dim=truncate_dim, **kwargs, **({} if task is None else {"task": task}),
        )  # fmt: skip
        return features[0] if is_single else features
    if output_value not in ("sentence_embedding", "token_embeddings"):
        raise ValueError(f"output_value={output_value!r}: expected 'sentence_embedding', 'token_embeddings' or None.")
    wants_tokens = output_value == "token_embeddings"
    engine = _encode_engine(
        model, tokenizer, pooling, max_length, prompt_name, prompt, task, device, normalize_embeddings, truncate_dim,
        wants_tokens, kwargs,
    )  # fmt: skip
    quantize, budget = _quantizer_of(precision), Budget(tokens_per_batch, batch_size)
    if isinstance(inputs, str):
        rows: Any = engine.run(prepare(engine, 0, [inputs], budget).batches[0])
    else:
        to_host = convert_to_numpy and not convert_to_tensor and not wants_tokens
        rows = _collect(engine, inputs, budget, to_host=to_host, bar=show_progress_bar)
    if wants_tokens:
        return rows[0] if is_single else list(rows)
    if quantize is not None and len(rows):
        rows = quantize(rows)
    rows = _converted(rows, engine, to_tensor=convert_to_tensor, to_numpy=convert_to_numpy)
    return rows[0] if is_single else rows


def encode_iter(
    model: torch.nn.Module,
    inputs: Iterable[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pooling: Pooling | None = None,
    max_length: int | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
    task: Task | None = None,
    batch_size: int = ROWS_PER_BATCH,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    show_progress_bar: bool | None = None,
    convert_to_tensor: bool = False,
    device: str | torch.device | None = None,
    normalize_embeddings: bool = False,
    truncate_dim: int | None = None,
    **kwargs: Any,
) -> Iterator[Any]:
    """Computes embeddings of a stream of texts in bounded memory.

    At most 16,384 texts are read ahead.

    Args:
        model: As for `encode`.
        inputs: Texts; read in the caller's thread as vectors are consumed.
        tokenizer: As for `encode`.
        pooling: As for `encode`.
        max_length: As for `encode`.
        prompt_name: As for `encode`.
        prompt: As for `encode`.
        task: As for `encode`.
        batch_size: As for `encode`.
        tokens_per_batch: As for `encode`.
        show_progress_bar: As for `encode`.
        convert_to_tensor: Whether to yield tensors on the model's device instead of arrays.
        device: As for `encode`.
        normalize_embeddings: As for `encode`.
        truncate_dim: As for `encode`.
        kwargs: As for `encode`.

    Yields:
        One vector of shape `(dimensions,)` per text, in order.

    Raises:
        TypeError: As for `encode`.
        ValueError: As for `encode`.

    Examples:
        >>> import hf_flashinfer_attn
        >>> from transformers import AutoModel, AutoTokenizer
        >>> from hf_flashinfer_attn.tools.demo import model_path
        >>> path = model_path()  # all-MiniLM-L6-v2
        >>> model = AutoModel.from_pretrained(path, attn_implementation="flashinfer")
        >>> tokenizer = AutoTokenizer.from_pretrained(path)
        >>> lines = (f"line {number}" for number in range(3))
        >>> vectors = hf_flashinfer_attn.encode_iter(model, lines, tokenizer=tokenizer, pooling="cls")
        >>> [vector.shape for vector in vectors]
        [(384,), (384,), (384,)]
    """
    _require_iterable(inputs)
    if isinstance(inputs, str):
        raise TypeError("inputs is a string; expected an iterable of strings. Use encode for one text.")
    engine = _encode_engine(
        model, tokenizer, pooling, max_length, prompt_name, prompt, task, device, normalize_embeddings, truncate_dim,
        False, kwargs,
    )  # fmt: skip
    budget = Budget(tokens_per_batch, batch_size)
    return _rows(run_all(engine, inputs, budget, to_host=not convert_to_tensor, bar=show_progress_bar))


def _rows(outputs: Generator[Output | Array, None, None]) -> Iterator[Any]:
    with closing(outputs):
        for output in outputs:
            # Copies, since a view of one row keeps the whole output alive.
            yield from map(np.copy, output) if isinstance(output, np.ndarray) else output


def predict(
    model: torch.nn.Module,
    inputs: Any,
    *,
    prompt_name: str | None = None,
    prompt: str | None = None,
    batch_size: int = ROWS_PER_BATCH,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    show_progress_bar: bool | None = None,
    activation_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    apply_softmax: bool | None = False,
    convert_to_numpy: bool = True,
    convert_to_tensor: bool = False,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> Any:
    """Computes scores of pairs of texts, with the results of `CrossEncoder.predict`.

    Background threads tokenise while the model runs. A model with `attn_implementation="flashinfer"` is unpadded in
    place, with `unpad(model, cuda_graphs=True)`. The model is put into eval mode.

    Args:
        model: A `CrossEncoder`.
        inputs: One pair of texts or several, from any iterable.
        prompt_name: Key of one of the model's prompts.
        prompt: Prefix of the first text of every pair; overrides `prompt_name`.
        batch_size: Maximum number of pairs per batch.
        tokens_per_batch: Maximum number of tokens per batch; a longer pair is a batch of its own.
        show_progress_bar: As for `encode`.
        activation_fn: Function applied to the logits, in float32. Default: the model's.
        apply_softmax: Whether to apply softmax to the scores of several labels.
        convert_to_numpy: Whether to return one array.
        convert_to_tensor: Whether to return one tensor, on the model's device.
        device: Device to move the model to first.
        kwargs: Further arguments of the model's `preprocess` and `forward`.

    Returns:
        Scores, float32, of shape `(pairs,)`, or `(pairs, labels)` for a model with several labels. A list of tensors
        if `convert_to_numpy` and `convert_to_tensor` are both False. One item if `inputs` is one pair.

    Raises:
        TypeError: If `model` is not a `CrossEncoder`, or an input is not a pair of strings; the message has its index.
        ValueError: If a pair cannot be tokenised, or an argument does not fit the model.

    Examples:
        >>> import hf_flashinfer_attn
        >>> from hf_flashinfer_attn.tools.demo import model_path
        >>> from sentence_transformers import CrossEncoder
        >>> settings = {"attn_implementation": "flashinfer"}
        >>> model = CrossEncoder(str(model_path()), num_labels=1, model_kwargs=settings)  # an untrained head
        >>> hf_flashinfer_attn.predict(model, [("a question", "an answer"), ("another", "one")]).shape
        (2,)
    """
    _require_iterable(inputs)
    if not is_instance(model, "CrossEncoder"):
        raise TypeError(f"predict({type(model).__name__}): expected a CrossEncoder of sentence-transformers.")
    encoder = cast(Any, model)
    place(model, device)
    activation = encoder.activation_fn if activation_fn is None else activation_fn

    def score(features: Features) -> torch.Tensor:
        scores: torch.Tensor = features["scores"]
        # Half precision would create ties.
        scores = scores.float() if scores.dtype.itemsize < 4 else scores
        scores = scores if activation is None else activation(scores)
        if encoder.num_labels == 1 and scores.ndim > 1:
            scores = scores.squeeze(-1)
        return scores.softmax(1) if apply_softmax and scores.ndim > 1 else scores

    engine = CrossEngine(encoder, score, prompt=_prompt_of(model, prompt_name, prompt, None), options=kwargs)
    is_single = isinstance(inputs, (list, tuple, np.ndarray)) and len(inputs) == 2 and isinstance(inputs[0], str)
    budget, to_host = Budget(tokens_per_batch, batch_size), convert_to_numpy and not convert_to_tensor
    scores = _collect(engine, [inputs] if is_single else inputs, budget, to_host=to_host, bar=show_progress_bar)
    scores = _converted(scores, engine, to_tensor=convert_to_tensor, to_numpy=convert_to_numpy)
    return scores[0] if is_single else scores


def rank(
    model: torch.nn.Module,
    query: str,
    documents: Iterable[str],
    *,
    top_k: int | None = None,
    return_documents: bool = False,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Sorts documents by their scores for a query, with the results of `CrossEncoder.rank`.

    Args:
        model: A `CrossEncoder` with one label.
        query: The query.
        documents: The documents.
        top_k: Number of documents to return. Default: all.
        return_documents: Whether to return the texts of the documents too.
        kwargs: As for `predict`, without `convert_to_numpy` and `convert_to_tensor`.

    Returns:
        One dictionary per document, best first: `corpus_id` (index in `documents`), `score`, and `text` if
        `return_documents`.

    Raises:
        TypeError: As for `predict`.
        ValueError: As for `predict`, or if the model has several labels.

    Examples:
        >>> import hf_flashinfer_attn
        >>> from hf_flashinfer_attn.tools.demo import model_path
        >>> from sentence_transformers import CrossEncoder
        >>> settings = {"attn_implementation": "flashinfer"}
        >>> model = CrossEncoder(str(model_path()), num_labels=1, model_kwargs=settings)  # an untrained head
        >>> [sorted(one) for one in hf_flashinfer_attn.rank(model, "a question", ["an answer", "another"], top_k=1)]
        [['corpus_id', 'score']]
    """
    if is_instance(model, "CrossEncoder") and cast(Any, model).num_labels != 1:
        raise ValueError(f"rank with a model of {cast(Any, model).num_labels} labels; expected one, or use predict.")
    documents = list(documents)
    pairs = [(query, document) for document in documents]
    scores = predict(model, pairs, **{**kwargs, "convert_to_tensor": True}).tolist()
    results = [
        {"corpus_id": index, "score": score, **({"text": documents[index]} if return_documents else {})}
        for index, score in enumerate(scores)
    ]
    return sorted(results, key=lambda result: result["score"], reverse=True)[:top_k]


def _encode_engine(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    pooling: Pooling | None,
    max_length: int | None,
    prompt_name: str | None,
    prompt: str | None,
    task: Task | None,
    device: str | torch.device | None,
    normalize: bool,
    truncate_dim: int | None,
    wants_tokens: bool,
    options: dict[str, Any],
) -> Engine:
    if truncate_dim is not None and truncate_dim < 1:
        raise ValueError(f"truncate_dim={truncate_dim!r}: expected a number above 0.")

    def finish(vectors: torch.Tensor) -> torch.Tensor:
        vectors = vectors if truncate_dim is None else vectors[..., :truncate_dim]
        return torch.nn.functional.normalize(vectors, p=2, dim=1) if normalize else vectors

    if is_instance(model, "SentenceTransformer"):
        unused = {"tokenizer": tokenizer, "pooling": pooling, "max_length": max_length}
        if names := [name for name, value in unused.items() if value is not None]:
            raise ValueError(
                f"{', '.join(names)} for a SentenceTransformer, which has its own; expected none. Its maximum length "
                "is model.max_seq_length."
            )
        sentence_transformer = cast(Any, model)
        if truncate_dim is None:
            truncate_dim = sentence_transformer.truncate_dim
        accepted = {*sentence_transformer.get_model_kwargs(), "processing_kwargs"} if options else set()
        if unknown := sorted(options.keys() - accepted):
            raise ValueError(f"{', '.join(unknown)}: not an argument of encode or of this model ({sorted(accepted)}).")
        place(model, device)

        def select(features: Features) -> Output:
            if not wants_tokens:
                return finish(features["sentence_embedding"])
            masks = features["attention_mask"].bool()
            return [row[mask] for row, mask in zip(features["token_embeddings"], masks)]

        options = options if task is None else {**options, "task": task}
        return SentenceEngine(model, select, prompt=_prompt_of(model, prompt_name, prompt, task), options=options)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"encode({type(model).__name__}): expected a SentenceTransformer or a loaded transformers model."
        )
    if tokenizer is None or pooling is None:
        missing = "tokenizer" if tokenizer is None else "pooling"
        raise ValueError(
            f"encode({type(model).__name__}) without {missing}: expected tokenizer= and pooling= for a transformers "
            f"model; pooling is {' or '.join(map(repr, get_args(Pooling)))}."
        )
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling={pooling!r}: expected {' or '.join(map(repr, get_args(Pooling)))}.")
    unsupported = [name for name, value in (("prompt_name", prompt_name), ("task", task)) if value is not None]
    if wants_tokens or unsupported or options:
        names = [*unsupported, *options, *(["output_value"] if wants_tokens else [])]
        raise ValueError(f"{', '.join(names)}: expected a SentenceTransformer, not a {type(model).__name__}.")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; expected a loaded transformers tokenizer.")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length={max_length!r}: expected a number above 0.")
    place(model, device)
    prompt = _prompt_of(model, None, prompt, None)
    return PlainEngine(model, finish, pooling, tokenizer=tokenizer, prompt=prompt, max_length=max_length)


def _collect(
    engine: Engine, inputs: Iterable[Any], budget: Budget, *, to_host: bool, bar: bool | None
) -> Output | Array:
    """Returns all rows as one array, one tensor or a list."""
    parts: list[Any] = []
    whole: Array | None = None
    count, done = count_of(inputs), 0
    with closing(run_all(engine, inputs, budget, to_host=to_host, bar=bar)) as outputs:
        for output in outputs:
            start, done = done, done + len(output)
            if count is None or not isinstance(output, np.ndarray):
                parts.append(output)
                continue
            # Copied into one array while the model runs.
            whole = np.empty((count, *output.shape[1:]), output.dtype) if whole is None else whole
            if done > count:
                raise ValueError(f"inputs yields more than its length, {count}.")
            whole[start:done] = output
    if whole is not None:
        return whole[:done]
    if parts and isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return np.concatenate(parts) if parts and to_host else [row for part in parts for row in part]


def _converted(rows: Any, engine: Engine, *, to_tensor: bool, to_numpy: bool) -> Any:
    """Converts rows to one tensor, one array or a list of tensors, as sentence-transformers does."""
    if to_numpy and not to_tensor:
        if isinstance(rows, torch.Tensor):
            rows = (rows.float() if rows.dtype is torch.bfloat16 else rows).cpu().numpy()
        return rows if len(rows) else np.array([])
    rows = torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows
    if not to_tensor:
        return list(rows)
    return rows if len(rows) else torch.tensor([], device=engine.device)


def _prompt_of(model: Any, prompt_name: str | None, prompt: str | None, task: Task | None) -> str | None:
    """Returns the prompt that sentence-transformers would use; None without one."""
    if task is not None and task not in get_args(Task):
        raise ValueError(f"task={task!r}: expected 'query', 'document' or None.")
    if prompt is not None:
        if not isinstance(prompt, str):
            raise TypeError(f"prompt={prompt!r}: expected a string.")
        return prompt
    prompts: dict[str, str] = getattr(model, "prompts", {})
    if prompt_name is None and task is not None:
        prompt_name = next((name for name in _PROMPTS[task] if name in prompts), None)
    if prompt_name is None:
        return prompts.get(getattr(model, "default_prompt_name", None) or "")
    if prompt_name not in prompts:
        raise ValueError(f"prompt_name={prompt_name!r}: expected one of the model's prompts, {sorted(prompts)}.")
    return prompts[prompt_name]


def _quantizer_of(precision: Precision | None) -> Callable[[Any], Any] | None:
    """Returns the quantisation function of a precision; None for float32."""
    if precision is None or precision == "float32":
        return None
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(map(repr, get_args(Precision)))}.")
    try:
        from sentence_transformers.util import quantize_embeddings
    except ImportError as error:
        raise ValueError(f"precision={precision!r} needs sentence-transformers installed.") from error
    return lambda vectors: quantize_embeddings(vectors, precision=precision)


def _require_iterable(inputs: object) -> None:
    """Raises a `TypeError` unless inputs are an iterable of texts or pairs."""
    is_scalar = not isinstance(inputs, str) and getattr(inputs, "ndim", 1) == 0
    if is_scalar or isinstance(inputs, (Mapping, bytes)) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs is a {type(inputs).__name__}; expected strings, or pairs of strings for predict.")
