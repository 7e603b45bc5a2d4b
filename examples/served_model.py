"""Models of `serve.py`, which run the texts of several requests as one batch."""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from batched.aio import AsyncBatchProcessor
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.util import is_sentence_transformer_model
from transformers import AutoModel, AutoTokenizer

import hf_flashinfer_attn
from hf_flashinfer_attn.unpadding.graph_options import token_bucket

__all__ = ["Limits", "Loading", "RequestError", "ServedModel", "load_embedder", "load_reranker"]

Inputs: TypeAlias = "Sequence[str] | Sequence[tuple[str, str]]"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of requests and batches.

    Args:
        max_texts: Texts of a request.
        max_characters: Characters of a text, checked before tokenisation.
        max_body_bytes: Bytes of a request's body.
        max_waiting: Texts in the queue of a model. Requests beyond that are answered with 503.
        client_seconds: Time for a client to send a body, and to read its answer after SIGTERM.
        rows_per_batch: Texts of a batch.
        tokens_per_batch: Tokens of a batch; a text that has more is a batch of its own.
        wait_ms: How long the first text of a batch waits for others.
        warm_up_tokens: CUDA graphs are captured at the start for texts of up to so many tokens on average.
    """

    max_texts: int = 2_048
    max_characters: int = 20_000
    max_body_bytes: int = 4_000_000
    max_waiting: int = 4_096
    client_seconds: int = 30
    rows_per_batch: int = 128
    tokens_per_batch: int = 16_384
    wait_ms: float = 1.0
    warm_up_tokens: int = 128


class RequestError(Exception):
    """A request that cannot be served.

    Args:
        status: Status of the answer.
        message: What was sent, and what was expected.
        param: Field of the request.
        code: OpenAI's name of the error.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


@dataclass(frozen=True, slots=True)
class _Item:
    """A text, or a query and a text, in a queue. Its length is its number of tokens."""

    content: Any
    tokens: int

    def __len__(self) -> int:
        return self.tokens


class ServedModel:
    """A model and its queue.

    Args:
        model: The model.
        tokenizer: Tokenizer of the model.
        run: Returns an array of one row for each text or pair.
        limits: Limits of requests and batches.
        thread: Runs the forwards of all models, one at a time.
        takes_pairs: Whether the model takes pairs of a query and a text.

    Raises:
        ValueError: If the tokenizer is not one of the tokenizers library or has no maximum length.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        run: Callable[[Inputs], np.ndarray],
        limits: Limits,
        thread: ThreadPoolExecutor,
        *,
        takes_pairs: bool = False,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is in Python; expected a tokenizer of the tokenizers library."
            )
        self.max_length: int = tokenizer.model_max_length
        if not 1 <= self.max_length <= 1_000_000:
            raise ValueError(f"the tokenizer's limit is {self.max_length} tokens; expected --max-length, such as 512.")
        # A copy, because a model may change the truncation of its own tokenizer meanwhile.
        self._tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._prompt: str = getattr(model, "prompts", {}).get(getattr(model, "default_prompt_name", None)) or ""
        self._model, self._run, self._limits, self._thread = model, run, limits, thread
        self._takes_pairs = takes_pairs
        self._forwards = self._texts = self._waiting = self._largest_batch = 0
        self._batches: AsyncBatchProcessor[_Item, Any] = AsyncBatchProcessor(
            self._forward, batch_size=limits.rows_per_batch, timeout_ms=limits.wait_ms,
            max_batch_length=limits.tokens_per_batch,
        )  # fmt: skip
        # This also unpads the model, and raises an error for one that cannot be served.
        self.dimensions: int = run(self._filler([1])).size

    async def __call__(
        self, texts: list[str], query: str | None = None, *, truncate: bool = False
    ) -> tuple[np.ndarray, int]:
        """Returns float32 rows, one for each text, and the number of tokens.

        Args:
            texts: The texts.
            query: The query, for a model that takes pairs.
            truncate: Whether texts may be longer than the model's limit.

        Raises:
            RequestError: If a limit is exceeded.
        """
        limits, param = self._limits, "texts" if self._takes_pairs else "input"
        most = min(limits.max_texts, limits.max_waiting)
        if len(texts) > most:
            raise RequestError(400, f"{len(texts)} texts; expected at most {most}", param)
        for name, text in (("query", query or ""), *((f"text {index}", text) for index, text in enumerate(texts))):
            if len(text) > limits.max_characters:
                message = f"{name} has {len(text)} characters; expected at most {limits.max_characters}"
                raise RequestError(400, message, "query" if name == "query" else param)
        if self._waiting + len(texts) > limits.max_waiting:
            raise RequestError(503, f"{self._waiting} texts are waiting; expected at most {limits.max_waiting}")
        self._waiting += len(texts)
        try:
            inputs: Inputs = texts if query is None else [(query, text) for text in texts]
            counts = await asyncio.to_thread(self._count, inputs)
            for index, count in enumerate(counts):
                if not count or (count > self.max_length and not truncate):
                    message = f"text {index} has {count} tokens; expected 1 to {self.max_length}"
                    raise RequestError(400, message, param, "context_length_exceeded" if count else None)
            items = [_Item(one, min(count, self.max_length)) for one, count in zip(inputs, counts)]
            rows = await self._batches(items)
        finally:
            self._waiting -= len(texts)
        return np.stack(rows).astype(np.float32, copy=False), sum(map(len, items))

    def warm_up(self) -> None:
        """Captures CUDA graphs of the most likely batches, on a GPU; others are captured when they are first needed."""
        if self._model.device.type != "cuda":
            return
        limits = self._limits
        special = self._count(self._filler([1]))[0] - 1
        rows = 8
        while rows <= max(limits.rows_per_batch, 8):
            tokens = token_bucket(rows * 4)
            while tokens <= min(rows * min(limits.warm_up_tokens, self.max_length), limits.tokens_per_batch):
                lengths = [tokens // rows + (row < tokens % rows) for row in range(rows)]
                self._run(self._filler([max(1, length - special) for length in lengths]))
                tokens = token_bucket(tokens + 1)
            rows *= 2

    def statistics(self) -> dict[str, Any]:
        """Returns numbers for `/statistics`, since the start."""
        graphs = hf_flashinfer_attn.graph_statistics(self._model)
        return {
            "forwards": self._forwards, "texts": self._texts, "waiting": self._waiting,
            "largest_batch": self._largest_batch, "graphs_captured": graphs.captured,
            "graphs_replayed": graphs.replayed, "device": str(self._model.device), "max_length": self.max_length,
        }  # fmt: skip

    def _filler(self, lengths: Sequence[int]) -> Inputs:
        """Makes inputs of so many words."""
        texts = [" ".join(["a"] * length) for length in lengths]
        return [("a", text) for text in texts] if self._takes_pairs else texts

    def _count(self, inputs: Inputs) -> list[int]:
        """Counts the tokens of inputs, with the model's prompt. Other threads run meanwhile."""
        prompt = self._prompt
        whole = [prompt + one if isinstance(one, str) else (prompt + one[0], one[1]) for one in inputs]
        return [len(encoding) for encoding in self._tokenizer.encode_batch_fast(whole)]

    async def _forward(self, items: list[_Item]) -> list[Any]:
        contents = [item.content for item in items]
        rows = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, contents)
        self._forwards, self._texts = self._forwards + 1, self._texts + len(items)
        self._largest_batch = max(self._largest_batch, len(items))
        return list(rows)


@dataclass(frozen=True, slots=True)
class Loading:
    """How models are loaded.

    Args:
        device: Device of the model.
        attention: Its `attn_implementation`.
        max_length: Most tokens of an input; None for the limit of the tokenizer.
        limits: Limits of requests and batches.
        thread: Runs the forwards of all models.
    """

    device: str
    attention: str
    max_length: int | None
    limits: Limits
    thread: ThreadPoolExecutor

    @property
    def options(self) -> dict[str, Any]:
        half = torch.device(self.device).type == "cuda"
        return {"attn_implementation": self.attention, "dtype": torch.float16 if half else torch.float32}

    def serve(self, model: Any, tokenizer: Any, function: Callable[..., Any], /, **arguments: Any) -> ServedModel:
        tokenizer.model_max_length = self.max_length or tokenizer.model_max_length
        run = functools.partial(function, model, tokens_per_batch=self.limits.tokens_per_batch, **arguments)
        takes_pairs = isinstance(model, CrossEncoder)
        return ServedModel(model, tokenizer, run, self.limits, self.thread, takes_pairs=takes_pairs)


def load_embedder(path: str, pooling: str | None, loading: Loading) -> ServedModel:
    """Loads a SentenceTransformer, or a model of transformers together with `pooling`.

    Raises:
        ValueError: If the model has its own pooling and another is given, or if it has none and none is given.
    """
    if is_sentence_transformer_model(path):
        if pooling is not None:
            raise ValueError(f"--pooling {pooling} for {path}, a SentenceTransformer with its own; expected none.")
        sentence_transformer: Any = SentenceTransformer(path, device=loading.device, model_kwargs=loading.options)
        return loading.serve(sentence_transformer, sentence_transformer.tokenizer, hf_flashinfer_attn.encode)
    if pooling is None:
        raise ValueError(f"{path} is no SentenceTransformer; expected --pooling mean, cls or last.")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path, **loading.options).to(loading.device)
    return loading.serve(model, tokenizer, hf_flashinfer_attn.encode, tokenizer=tokenizer, pooling=pooling)


def load_reranker(path: str, loading: Loading) -> ServedModel:
    """Loads a CrossEncoder, whose rows are logits.

    Raises:
        ValueError: If the model has several labels.
    """
    model: Any = CrossEncoder(path, device=loading.device, model_kwargs=loading.options)
    if model.num_labels != 1:
        raise ValueError(f"{path} has {model.num_labels} labels; expected a reranker, which has one.")
    return loading.serve(model, model.tokenizer, hf_flashinfer_attn.predict, activation_fn=torch.nn.Identity())
