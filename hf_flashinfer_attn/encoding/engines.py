"""Engines, one per class of model: batches from texts, vectors or scores from batches."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..log import log_once
from ..ragged.host_copy import to_device_async
from ..unpadding.hooks import HANDLES, has_other_hooks
from ..unpadding.packed_inputs import PackedTokens, reason_against_packed_inputs
from .model_cache import ModelCache, Preparation
from .tokens import Budget, Numbers, Padding, Text, Tokens, TypeIds, limit_of, strings_of

__all__ = ["Batch", "CrossEngine", "Engine", "Features", "Output", "PlainEngine", "Pooling", "Window", "is_instance"]

Pooling = Literal["mean", "cls", "last"]
Features: TypeAlias = "dict[str, Any]"
# Input of `Engine.run`: features of a padded batch, or packed tokens.
Batch: TypeAlias = Any
# Rows of a batch, in order: one tensor of shape `(rows, ...)`, or one tensor per row.
Output: TypeAlias = "torch.Tensor | list[torch.Tensor]"

_CHARACTERS_PER_TOKEN = 4
# transformers sets truncation and padding on the tokenizer in each call, so threads cannot share a tokenizer.
_preprocessing = threading.Lock()
_LIBRARIES = ("builtins", "sentence_transformers", "torch", "transformers")
_TOKENIZER_METHODS = ("__call__", "_encode_plus", "_batch_encode_plus", "pad", "prepare_for_tokenization")
_PREPROCESSING_METHODS = ("preprocess", "tokenize")
_PLAIN = (type(None), bool, int, float, str, tuple, list, dict)
_NO_TOKENS = "it has no tokens to pool"
_SENTENCES = ("A text.", "Another text, which is longer than the first one.")


def is_instance(model: object, name: Literal["SentenceTransformer", "CrossEncoder"]) -> bool:
    """Whether a model is an instance of a sentence-transformers class; False if the package is not imported."""
    package = sys.modules.get("sentence_transformers")
    return package is not None and isinstance(model, getattr(package, name))


class Window(NamedTuple):
    """Texts sorted by length and cut into batches, the index of each text, and the total number of tokens."""

    batches: list[Batch]
    order: Numbers
    tokens: int


class Engine:
    """A sentence-transformers model and the arguments of one call.

    `prepare` may run in any thread, `run` in one thread at a time. `finish` maps the model's features to the output.
    """

    takes_pairs = False
    # Number of batches in a window. Windows are sorted by length, so more than one batch reduces padding.
    batches_per_window = 8

    def __init__(
        self,
        model: Any,
        finish: Callable[[Any], Output],
        *,
        prompt: str | None,
        options: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ) -> None:
        self.model, self._finish = model, finish
        self.prompt, self.max_length, self.options = prompt or None, max_length, dict(options)
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
        self._tokenizer: Any = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
        is_fast = self._tokenizer is not None and self._tokenizer.is_fast
        self._cache = ModelCache.of(model, self._tokenizer if is_fast else None)
        self._cache.enter_eval(model)
        self.device = self._input_device = self._cache.device_of(model)
        self._padding = Padding.of(self._tokenizer) if is_fast else Padding(0, 0, False)
        # None: `prepare` uses the model's own preprocessing.
        self.fast_tokenizer, self._constants = self._find_preparation() if is_fast else (None, {})
        if self._tokenizer is not None and not is_fast:
            log_once(f"the tokenizer of {type(model).__name__} is written in Python, which is slower")

    def enter_eval(self) -> None:
        """Puts the model into eval mode, if necessary."""
        self._cache.enter_eval(self.model)

    def check(self, inputs: Sequence[Any], start: int = 0) -> list[Text]:
        """Returns inputs as strings or pairs of strings; the index in an error counts from `start`."""
        if not self.takes_pairs:
            return check_texts(inputs, start)
        pairs: list[Text] = []
        for index, pair in enumerate(inputs, start):
            texts = tuple(pair) if isinstance(pair, (list, tuple, np.ndarray)) else ()
            if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
                raise TypeError(f"pair {index} is {pair!r:.100}; expected two strings.")
            pairs.append((texts[0], texts[1]))
        return pairs

    def prepare(self, texts: list[Text], budget: Budget) -> Window:
        """Tokenises texts with the prompt, and cuts them into batches. Thread-safe."""
        if self.fast_tokenizer is not None:
            tokens, order = self.fast_tokenizer(self._prompted(texts))
            parts = tokens.split(budget, padded=self.batches_per_window > 1)
            return Window([self._batch_of(part) for part in parts], order, len(tokens.ids))
        sizes = np.array([sum(map(len, strings_of(text))) // _CHARACTERS_PER_TOKEN + 1 for text in texts])
        order, batches = np.argsort(-sizes, kind="stable"), []
        for rows in budget.cut(sizes[order], padded=True):
            with _preprocessing:
                batches.append(self._prepare_slowly([texts[index] for index in order[rows]]))
        return Window(batches, order, int(sizes.sum()))

    def run(self, batch: Batch) -> Output:
        """Runs a batch; asynchronously on a GPU."""
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with torch.inference_mode(), on_device:
            return self._forward(batch)

    def _forward(self, batch: Batch) -> Output:
        return self._finish(self.model(self._moved(batch), **self.options))

    def _moved(self, features: Features) -> Features:
        device = self._input_device
        return {
            n: to_device_async(value, device) if isinstance(value, torch.Tensor) else value
            for n, value in features.items()
        }

    def _prepare_slowly(self, texts: list[Text]) -> Features:
        """Tokenises and pads with the model's own preprocessing."""
        return dict(self.model.preprocess(texts, prompt=self.prompt, **self.options))

    def _batch_of(self, tokens: Tokens) -> Batch:
        """Makes a batch on the CPU from tokens, longest text first."""
        return self._constants | tokens.pad(self._padding)

    def _prompted(self, texts: list[Text]) -> list[Text]:
        if (prompt := self.prompt) is None:
            return texts
        return [prompt + text if isinstance(text, str) else (prompt + text[0], text[1]) for text in texts]

    def _find_preparation(self) -> Preparation:
        """Returns the cached preparation for this call; compares again after a change of the model."""
        firsts = _first_modules(self.model)
        watched: list[tuple[Any, tuple[str, ...]]] = [(self._tokenizer, _TOKENIZER_METHODS)]
        watched += [(part, _PREPROCESSING_METHODS) for part in ([self.model, *firsts] if firsts else [])]
        # The tokenizer of a router is that of one of its routes.
        is_other = any(getattr(part, "tokenizer", None) not in (None, self._tokenizer) for part in firsts)
        # Public attributes, such as `processing_kwargs`.
        settings = [
            item for part in firsts for item in vars(part).items() if item[0][0] != "_" and isinstance(item[1], _PLAIN)
        ]
        key = (
            self.prompt, self.max_length, repr((sorted(self.options.items()), settings)), self._padding, is_other,
            *[(name in vars(part), getattr(type(part), name, None)) for part, names in watched for name in names],
        )  # fmt: skip
        preparation = self._cache.preparations.get(key)
        if preparation is None:
            # A comparison on a few texts may miss the effects of user code.
            is_customised = is_other or any(_overrides(part, names) for part, names in watched)
            with _preprocessing:
                preparation = (None, {}) if is_customised else self._compare_preparations()
            self._cache.keep(key, preparation)
        return preparation

    def _compare_preparations(self) -> Preparation:
        """Compares the tokenizers library with the model's own preprocessing, on a few texts."""
        limit = limit_of(self._tokenizer, self.max_length)
        texts = [*_SENTENCES, *([] if limit is None else ["word " * (limit + 2)])]
        inputs: list[Text] = [(text, _SENTENCES[1]) for text in texts] if self.takes_pairs else [*texts]
        # Twice, since another thread may use the model's tokenizer at the same time.
        for _ in range(2):
            own = self._prepare_slowly(inputs)
            types = own.get("token_type_ids")
            # Making zeros is faster than reading them from encodings.
            type_ids: TypeIds = "none" if types is None else "own" if self.takes_pairs or types.any() else "zeros"
            tokenise = self._cache.tokeniser(self.max_length, type_ids)
            tokens, order = tokenise(self._prompted(inputs))
            features = {name: value[np.argsort(order)] for name, value in tokens.pad(self._padding).items()}
            constants = {name: value for name, value in own.items() if name not in features}
            if not any(isinstance(value, torch.Tensor) for value in constants.values()) and all(
                isinstance(own.get(name), torch.Tensor) and torch.equal(own[name], features[name]) for name in features
            ):
                return tokenise, constants
        log_once(
            f"{type(self.model).__name__} preprocesses texts differently from its tokenizer; the model's own "
            "preprocessing is used, which is slower"
        )
        return None, {}


class CrossEngine(Engine):
    """Engine of a `CrossEncoder`; `finish` computes scores."""

    takes_pairs = True

    def __init__(self, model: Any, finish: Callable[[Features], Output], **arguments: Any) -> None:
        super().__init__(model, finish, **arguments)
        first, *others = model.children()
        # The hooks of `unpad` pack on the CPU, and move the head's inputs to its device.
        if not others and HANDLES in vars(getattr(first, "model", first)) and self.device.type != "cpu":
            self._input_device, self.batches_per_window = torch.device("cpu"), 2


class PlainEngine(Engine):
    """Engine of a transformers model; `finish` receives the pooled last hidden states."""

    def __init__(
        self, model: PreTrainedModel, finish: Callable[[torch.Tensor], Output], pooling: Pooling, **arguments: Any
    ) -> None:
        super().__init__(model, finish, options={}, **arguments)
        self._pooling = pooling
        reason = "it has hooks" if has_other_hooks(model) else reason_against_packed_inputs(model)
        self._packs = self.fast_tokenizer is not None and reason is None
        self.batches_per_window = 1 if self._packs else 8
        if reason is not None and HANDLES in vars(model):
            log_once(f"batches of {type(model).__name__} are padded: {reason}")

    def _prepare_slowly(self, texts: list[Text]) -> Features:
        limit = limit_of(self._tokenizer, self.max_length)
        truncation = {} if limit is None else {"truncation": True, "max_length": limit}
        features = dict(self._tokenizer(self._prompted(texts), padding=True, return_tensors="pt", **truncation))
        if not features["attention_mask"].any(1).all():
            raise ValueError(_NO_TOKENS)
        return features

    def _batch_of(self, tokens: Tokens) -> Batch:
        if not tokens.lengths.all():
            raise ValueError(_NO_TOKENS)
        if not self._packs:
            return super()._batch_of(tokens)
        return PackedTokens(self.model, self.device, tokens.lengths, tokens.ids, tokens.type_ids)

    def _forward(self, batch: Batch) -> Output:
        is_packed = isinstance(batch, PackedTokens)
        inputs = batch.inputs() if is_packed else {**self._moved(batch), "return_dict": True}
        hidden = getattr(self.model(**inputs), "last_hidden_state", None)
        if hidden is None:
            raise TypeError(
                f"{type(self.model).__name__} returns no last_hidden_state; expected a model without a head."
            )
        if is_packed:
            return self._finish(self._pool_packed(hidden[0], inputs["cu_seq_lens_q"]))
        return self._finish(self._pool_padded(hidden, inputs["attention_mask"].bool()))

    def _pool_packed(self, hidden: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        if self._pooling == "cls":
            return hidden[cu_seqlens[:-1]]
        if self._pooling == "last":
            return hidden[cu_seqlens[1:] - 1]
        sums = torch.segment_reduce(hidden.float(), "sum", offsets=cu_seqlens, unsafe=True)
        return (sums / cu_seqlens.diff()[:, None]).to(hidden.dtype)

    def _pool_padded(self, hidden: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(valid), device=valid.device)
        if self._pooling == "cls":
            return hidden[rows, valid.long().argmax(1)]
        if self._pooling == "last":
            return hidden[rows, valid.shape[1] - 1 - valid.flip(1).long().argmax(1)]
        sums = hidden.float().masked_fill(~valid[:, :, None], 0).sum(1)
        return (sums / valid.sum(1)[:, None]).to(hidden.dtype)


def check_texts(inputs: Sequence[Any], start: int = 0) -> list[Text]:
    """Returns the inputs, which must be strings; the index in an error counts from `start`."""
    for index, text in enumerate(inputs, start):
        if not isinstance(text, str):
            raise TypeError(
                f"text {index} is a {type(text).__name__}; expected a string. Use the model's own encode for messages, "
                "pairs, images and audio."
            )
    return list(inputs)


def _first_modules(model: torch.nn.Module) -> list[Any]:
    """Returns the preprocessing modules: the first module and, if it is a router, the first module of each route."""
    if isinstance(model, PreTrainedModel):
        return []
    first: Any = next(model.children())
    routes: Any = first.sub_modules.values() if "sub_modules" in first._modules else ()
    return [first, *(next(route.children()) for route in routes)]


def _overrides(value: object, methods: Iterable[str]) -> bool:
    """Whether an object, or one of its classes from user code, overrides one of the methods."""
    own = [vars(value), *(vars(k) for k in type(value).__mro__ if k.__module__.partition(".")[0] not in _LIBRARIES)]
    return any(name in names for names in own for name in methods)
