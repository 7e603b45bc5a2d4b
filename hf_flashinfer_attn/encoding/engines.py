"""One engine per kind of model: texts to batches, batches to vectors or scores."""

from __future__ import annotations

import abc
import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..log import log_once
from ..ragged.host_copy import to_device_async
from ..unpadding.hooks import HANDLES, has_other_hooks
from ..unpadding.packed_inputs import PackedTokens, reason_against_packed_inputs
from .model_cache import FastPreparation, ModelCache
from .tokens import Budget, Numbers, Text, TextTokenizer, Tokens, TypeIds, limit_of, strings_of

__all__ = [
    "Batch",
    "CrossEngine",
    "Engine",
    "Features",
    "Output",
    "PlainEngine",
    "Pooling",
    "SentenceTransformersEngine",
    "Window",
    "is_instance",
    "tokenizer_of",
]

Pooling = Literal["mean", "cls", "last"]
Features: TypeAlias = "dict[str, Any]"
# Input of `run`: the features of a padded batch, or packed tokens.
Batch: TypeAlias = Any
# Rows of a batch, in order: one tensor of shape `(rows, ...)`, or one tensor for each row.
Output: TypeAlias = "torch.Tensor | list[torch.Tensor]"

_CHARACTERS_PER_TOKEN = 4
# transformers writes truncation and padding into a tokenizer for each call, so that threads cannot share one.
_preprocessing = threading.Lock()
_LIBRARIES = ("builtins", "sentence_transformers", "torch", "transformers")
_TOKENIZER_METHODS = ("__call__", "_encode_plus", "_batch_encode_plus", "pad", "prepare_for_tokenization")
_NO_TOKENS = "it has no tokens to pool"
_SENTENCES = ("A text.", "Another text, which is longer than the first one.")


def is_instance(model: object, name: Literal["SentenceTransformer", "CrossEncoder"]) -> bool:
    """Whether a model is of a sentence-transformers class; the package need not be installed."""
    package = sys.modules.get("sentence_transformers")
    return package is not None and isinstance(model, getattr(package, name))


@dataclass(frozen=True, slots=True)
class Window:
    """Texts that were sorted by length and cut into batches.

    Args:
        batches: Inputs of `Engine.run`, in order.
        order: Index of each row's text, over all batches, int64, shape `(texts,)`.
        tokens: Number of tokens.
    """

    batches: list[Batch]
    order: Numbers
    tokens: int


class Engine(abc.ABC):
    """One model with the arguments of one call. Any thread may tokenise; forwards run in one thread at a time.

    Args:
        model: The model, in eval mode.
        tokenizer: Tokenizer of the model; None if it has none.
        prompt: Prefix of every text, or of the first text of every pair.
        max_length: Maximum length of a text in tokens; None for the tokenizer's own limit.
        options: Further arguments of preprocessing and forward.
    """

    takes_pairs = False

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        prompt: str | None = None,
        max_length: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.prompt = prompt or None
        self.max_length = max_length
        self.options = dict(options or {})
        # Weights offloaded by accelerate are on "meta".
        devices = (weight.device for weight in model.parameters())
        self.device = next((device for device in devices if device.type != "meta"), torch.device("cpu"))
        self._tokenizer = tokenizer
        is_fast = tokenizer is not None and tokenizer.is_fast
        self._cache = ModelCache.of(model, tokenizer if is_fast else None)
        self._cache.enter_eval(model)
        self._fast = self._find_preparation() if is_fast and not self._is_customised() else None
        if tokenizer is not None and not is_fast:
            log_once(f"the tokenizer of {type(model).__name__} is written in Python, which is slower")

    @property
    def fast_tokenizer(self) -> TextTokenizer | None:
        """The tokenizer of `prepare`; None if the model's own preprocessing is used."""
        return None if self._fast is None else self._fast.tokenise

    @property
    def batches_per_window(self) -> int:
        """Number of batches in a window, which is sorted by length: more if batches are padded."""
        return 8

    @abc.abstractmethod
    def _prepare_slowly(self, texts: Sequence[Text]) -> Features:
        """Tokenises and pads with the model's own preprocessing."""

    @abc.abstractmethod
    def _forward(self, batch: Batch) -> Output:
        """Runs a batch on the current device, in inference mode."""

    def check(self, inputs: Sequence[Any], start: int = 0) -> list[Text]:
        """Returns inputs as strings or pairs of strings.

        Args:
            inputs: Consecutive inputs of a call.
            start: Index of the first one.

        Raises:
            TypeError: If an input is of another type; the message has its index.
        """
        if not self.takes_pairs:
            for place, text in enumerate(inputs):
                if not isinstance(text, str):
                    raise TypeError(
                        f"text {start + place} is a {type(text).__name__}; expected a string. Use the model's own "
                        "encode for messages, pairs, images and audio."
                    )
            return list(inputs)
        pairs: list[Text] = []
        for place, pair in enumerate(inputs):
            texts = tuple(pair) if isinstance(pair, (list, tuple, np.ndarray)) else ()
            if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
                raise TypeError(f"pair {start + place} is {pair!r:.100}; expected two strings.")
            pairs.append((texts[0], texts[1]))
        return pairs

    def prepare(self, texts: Sequence[Text], budget: Budget) -> Window:
        """Tokenises texts, with the prompt, and cuts them into batches. May be called in any thread."""
        if self._fast is None:
            return self._prepare_window_slowly(texts, budget)
        tokens, order = self._fast.tokenise(self._prompted(texts))
        return Window(
            [self._batch_of(part) for part in tokens.split(budget, padded=self.batches_per_window > 1)],
            order,
            len(tokens.ids),
        )

    def _prepare_window_slowly(self, texts: Sequence[Text], budget: Budget) -> Window:
        sizes = np.array([sum(map(len, strings_of(text))) // _CHARACTERS_PER_TOKEN + 1 for text in texts])
        order = np.argsort(-sizes, kind="stable")
        batches, start = [], 0
        while start < len(texts):
            stop = start + min(max(budget.tokens // int(sizes[order[start]]), 1), budget.rows)
            with _preprocessing:
                batches.append(self._prepare_slowly([texts[place] for place in order[start:stop]]))
            start = stop
        return Window(batches, order, int(sizes.sum()))

    def _batch_of(self, tokens: Tokens) -> Batch:
        """Makes a batch on the host from tokens, longest text first."""
        assert self._fast is not None
        return {**self._fast.constants, **self._pad(tokens)}

    def enter_eval(self) -> None:
        """Puts the model into eval mode, if it is not."""
        self._cache.enter_eval(self.model)

    def run(self, batch: Batch) -> Output:
        """Runs a batch; asynchronously on a GPU."""
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with torch.inference_mode(), on_device:
            return self._forward(batch)

    def _prompted(self, texts: Sequence[Text]) -> list[Text]:
        prompt = self.prompt
        if prompt is None:
            return list(texts)
        return [prompt + text if isinstance(text, str) else (prompt + text[0], text[1]) for text in texts]

    def _settings(self) -> object:
        """Returns the state of preprocessing besides the tokenizer and the arguments of the call."""
        return None

    def _is_customised(self) -> bool:
        """Whether user code takes part in preprocessing, which a comparison on a few texts may miss."""
        return _overrides(self._tokenizer, _TOKENIZER_METHODS)

    def _find_preparation(self) -> FastPreparation | None:
        key = self.prompt, self.max_length, repr(sorted(self.options.items())), self._padding(), self._settings()
        is_known, found = self._cache.preparation(key)
        if not is_known:
            with _preprocessing:
                # Compared twice: another thread may have used the model's own tokenizer meanwhile.
                found = self._compare_preparations() or self._compare_preparations()
            if found is None:
                log_once(
                    f"{type(self.model).__name__} preprocesses texts differently from its tokenizer; the model's own "
                    "preprocessing is used, which is slower"
                )
            self._cache.keep_preparation(key, found)
        return found

    def _compare_preparations(self) -> FastPreparation | None:
        """Compares the tokenizers library with the model's own preprocessing on a few texts; None if they differ."""
        assert self._tokenizer is not None
        limit = limit_of(self._tokenizer, self.max_length)
        texts = [*_SENTENCES, *([] if limit is None else ["word " * (limit + 2)])]
        inputs: list[Text] = [(text, _SENTENCES[1]) for text in texts] if self.takes_pairs else [*texts]
        own = self._prepare_slowly(inputs)
        types = own.get("token_type_ids")
        # Making zeros is faster than reading them from the tokenizer.
        type_ids: TypeIds = "none" if types is None else "own" if self.takes_pairs or types.any() else "zeros"
        tokenise = self._cache.tokeniser(self.max_length, type_ids)
        tokens, order = tokenise(self._prompted(inputs))
        ours = {name: value[np.argsort(order)] for name, value in self._pad(tokens).items()}
        constants = {name: value for name, value in own.items() if name not in ours}
        if not any(isinstance(value, torch.Tensor) for value in constants.values()) and all(
            isinstance(own.get(name), torch.Tensor) and torch.equal(own[name], ours[name]) for name in ours
        ):
            return FastPreparation(tokenise, constants)
        return None

    def _padding(self) -> tuple[int, int, bool]:
        """Returns the padding id, its token type id, and whether padding is on the left."""
        tokenizer = self._tokenizer
        assert tokenizer is not None
        return tokenizer.pad_token_id or 0, tokenizer.pad_token_type_id, tokenizer.padding_side == "left"

    def _pad(self, tokens: Tokens) -> Features:
        pad_id, pad_type_id, on_left = self._padding()
        return dict(tokens.pad(pad_id, pad_type_id, on_left=on_left))

    @staticmethod
    def _moved(features: Features, device: torch.device) -> Features:
        return {
            n: to_device_async(value, device) if isinstance(value, torch.Tensor) else value
            for n, value in features.items()
        }


class SentenceTransformersEngine(Engine):
    """A sentence-transformers model, whose first module preprocesses texts."""

    def _settings(self) -> object:
        # `processing_kwargs`, for example.
        plain = (type(None), bool, int, float, str, tuple, list, dict)
        items = (item for part in self._first_modules() for item in vars(part).items())
        return repr([item for item in items if isinstance(item[1], plain) and item[0][0] != "_"])

    def _first_modules(self) -> list[torch.nn.Module]:
        """Returns the first module and, if it chooses between several by task, the first of each route."""
        first: Any = next(self.model.children())
        routes: Any = first.sub_modules.values() if hasattr(first, "sub_modules") else ()
        return [first, *(next(route.children()) for route in routes)]

    def _prepare_slowly(self, texts: Sequence[Text]) -> Features:
        features: Features = dict(cast(Any, self.model).preprocess(list(texts), prompt=self.prompt, **self.options))
        return features

    def _is_customised(self) -> bool:
        firsts = self._first_modules()
        # A router names the tokenizer of one of its routes as its own.
        is_other = any(getattr(part, "tokenizer", None) not in (None, self._tokenizer) for part in firsts)
        return (
            super()._is_customised()
            or is_other
            or any(_overrides(part, ("preprocess", "tokenize")) for part in (self.model, *firsts))
        )


class CrossEngine(SentenceTransformersEngine):
    """A `CrossEncoder`.

    Args:
        model: The model.
        score: Computes scores from the features that the model returns.
        prompt: Prefix of the first text of every pair.
        options: Further arguments of its `preprocess` and `forward`.
    """

    takes_pairs = True

    def __init__(
        self, model: Any, score: Callable[[Features], torch.Tensor], *, prompt: str | None, options: Mapping[str, Any]
    ) -> None:
        super().__init__(model, tokenizer_of(model), prompt=prompt, options=options)
        self._score = score
        # The unpadding hooks pack on the host and move what the head needs.
        first, *others = model.children()
        on_host = not others and HANDLES in vars(getattr(first, "model", first))
        self._input_device = torch.device("cpu") if on_host else self.device

    @property
    def batches_per_window(self) -> int:
        return 8 if self._input_device == self.device else 2

    def _forward(self, batch: Batch) -> Output:
        return self._score(self.model(self._moved(batch, self._input_device), **self.options))


class PlainEngine(Engine):
    """A transformers model, with pooling of its last hidden states.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        pooling: Pooling of the hidden states.
        finish: Computes the output from the pooled vectors.
        prompt: Prefix of every text.
        max_length: Maximum length of a text in tokens; None for the tokenizer's own limit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: Pooling,
        finish: Callable[[torch.Tensor], torch.Tensor],
        *,
        prompt: str | None,
        max_length: int | None,
    ) -> None:
        super().__init__(model, tokenizer, prompt=prompt, max_length=max_length)
        self._pooling = pooling
        self._finish = finish
        reason = "it has hooks" if has_other_hooks(model) else reason_against_packed_inputs(model)
        self._packs = self._fast is not None and reason is None
        if reason is not None and HANDLES in vars(model):
            log_once(f"batches of {type(model).__name__} are padded: {reason}")

    @property
    def batches_per_window(self) -> int:
        return 1 if self._packs else 8

    def _prepare_slowly(self, texts: Sequence[Text]) -> Features:
        assert self._tokenizer is not None
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
        return PackedTokens(cast(PreTrainedModel, self.model), self.device, tokens.lengths, tokens.ids, tokens.type_ids)

    def _forward(self, batch: Batch) -> Output:
        is_packed = isinstance(batch, PackedTokens)
        inputs = batch.inputs() if is_packed else {**self._moved(batch, self.device), "return_dict": True}
        hidden = getattr(self.model(**inputs), "last_hidden_state", None)
        if hidden is None:
            raise TypeError(
                f"{type(self.model).__name__} returns no last_hidden_state; expected a model without a head."
            )
        if is_packed:
            return self._finish(self._pool_packed(hidden[0], inputs["cu_seq_lens_q"]))
        return self._finish(self._pool_padded(hidden, inputs["attention_mask"].bool()))

    def _pool_packed(self, hidden: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        if self._pooling == "cls":
            return hidden[offsets[:-1]]
        if self._pooling == "last":
            return hidden[offsets[1:] - 1]
        sums = torch.segment_reduce(hidden.float(), "sum", offsets=offsets, unsafe=True)
        return (sums / offsets.diff()[:, None]).to(hidden.dtype)

    def _pool_padded(self, hidden: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(valid), device=valid.device)
        if self._pooling == "cls":
            return hidden[rows, valid.long().argmax(1)]
        if self._pooling == "last":
            return hidden[rows, valid.shape[1] - 1 - valid.flip(1).long().argmax(1)]
        sums = hidden.float().masked_fill(~valid[:, :, None], 0).sum(1)
        return (sums / valid.sum(1)[:, None]).to(hidden.dtype)


def tokenizer_of(model: Any) -> PreTrainedTokenizerBase | None:
    """Returns the transformers tokenizer of a sentence-transformers model; None if it has none."""
    tokenizer = model.tokenizer
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def _overrides(value: object, methods: Iterable[str]) -> bool:
    """Whether an object, or a class of it outside the libraries, overrides one of the methods."""
    own = [vars(value), *(vars(k) for k in type(value).__mro__ if k.__module__.partition(".")[0] not in _LIBRARIES)]
    return any(name in names for names in own for name in methods)
