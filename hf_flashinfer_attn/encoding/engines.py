"""How each kind of model turns tokens into vectors or scores."""

from __future__ import annotations

import abc
import contextlib
import operator
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..dispatch import log_once
from ..movement import sent
from ..unpadding.families import family_of
from ..unpadding.features import admit_packed_inputs, forwards_features
from ..unpadding.hooks import HANDLES
from ..unpadding.packed_inputs import packed_inputs, reason_against_packed_inputs
from .tokens import Text, TextTokenizer, Tokens, TypeIds

__all__ = ["CrossEngine", "Engine", "Features", "Output", "PlainEngine", "Pooling", "SentenceEngine", "is_instance"]

Pooling = Literal["mean", "cls", "last"]
Features: TypeAlias = "dict[str, Any]"
# Rows of a batch, in order: one tensor of shape `(rows, ...)`, or one tensor for each row.
Output: TypeAlias = "torch.Tensor | list[torch.Tensor]"

# Features of packed tokens, which are padded for the modules after the transformer or left out.
_PACKED_FEATURES = frozenset(
    {
        "attention_mask", "cu_seq_lens_k", "cu_seq_lens_q", "input_ids", "max_length_k", "max_length_q", "position_ids",
        "return_dict", "token_embeddings", "token_type_ids", "use_cache",
    }
)  # fmt: skip
_SENTENCES = ("A text.", "Another text, which is longer than the first one.")


def is_instance(model: object, name: Literal["SentenceTransformer", "CrossEncoder"]) -> bool:
    """Whether a model is of a class of sentence-transformers, which need not be installed."""
    package = sys.modules.get("sentence_transformers")
    return package is not None and isinstance(model, getattr(package, name))


@dataclass(frozen=True, slots=True)
class _FastPreparation:
    """How to make a model's features without its own preprocessing.

    Args:
        tokenise: Makes ids and type ids.
        constants: All other features, which are the same for every batch.
    """

    tokenise: TextTokenizer
    constants: Features


@dataclass(slots=True)
class _Known:
    """What is known of a model between calls.

    Args:
        tokenizer_state: State of the tokenizer when this was found out.
        tokenisers: Copies of the tokenizer, by maximum length and what type ids they make.
        preparations: By prompt and options; None where the model has to prepare texts itself.
        modules: All modules but the model itself.
    """

    tokenizer_state: tuple[object, ...]
    tokenisers: dict[tuple[int | None, TypeIds], TextTokenizer] = field(default_factory=dict)
    preparations: dict[object, _FastPreparation | None] = field(default_factory=dict)
    modules: list[torch.nn.Module] = field(default_factory=list)


_known: weakref.WeakKeyDictionary[torch.nn.Module, _Known] = weakref.WeakKeyDictionary()


class Engine(abc.ABC):
    """One model with the arguments of one call. Tokenising may happen in any thread, forwards in one at a time.

    Args:
        model: The model, in eval mode.
        tokenizer: Tokenizer of the model; None if it has none.
        prompt: What every text, or the first one of every pair, begins with.
        max_length: Longer texts are truncated, in tokens; None for the tokenizer's own limit.
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
        self.device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
        self._tokenizer = tokenizer
        is_fast = tokenizer is not None and tokenizer.is_fast
        state = (id(tokenizer), *(TextTokenizer.state_of(tokenizer) if is_fast and tokenizer is not None else ()))
        known = _known.get(model)
        if known is None or known.tokenizer_state != state:
            known = _known[model] = _Known(state)
        self._known = known
        if not known.modules or any(map(operator.attrgetter("training"), known.modules)):
            self._enter_eval()
        self._fast = self._find_preparation() if is_fast else None

    @property
    def makes_tokens(self) -> bool:
        """Whether `prepare` returns `Tokens` of any number of texts; otherwise the features of one padded batch."""
        return self._fast is not None

    @property
    def fast_tokenizer(self) -> TextTokenizer | None:
        """What `prepare` tokenises with; None if the model prepares texts itself."""
        return None if self._fast is None else self._fast.tokenise

    @property
    @abc.abstractmethod
    def packs(self) -> bool:
        """Whether batches of `Tokens` are run without padding."""

    @abc.abstractmethod
    def _prepare_slowly(self, texts: Sequence[Text]) -> Features:
        """Tokenises and pads as the model itself does."""

    @abc.abstractmethod
    def _forward(self, batch: Tokens | Features) -> Output:
        """Runs a batch on the current device, in inference mode."""

    def check(self, inputs: Sequence[Any], start: int = 0) -> list[Text]:
        """Returns inputs as strings or pairs of strings.

        Args:
            inputs: Some of a call's inputs.
            start: Index of the first of them.

        Raises:
            TypeError: For another input, with its index.
        """
        if not self.takes_pairs:
            for place, text in enumerate(inputs):
                if not isinstance(text, str):
                    raise TypeError(
                        f"text {start + place} is a {type(text).__name__}; expected a string. The model's own encode "
                        "takes messages, pairs, images and audio."
                    )
            return list(inputs)
        pairs: list[Text] = []
        for place, pair in enumerate(inputs):
            texts = tuple(pair) if isinstance(pair, (list, tuple, np.ndarray)) else ()
            if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
                raise TypeError(f"pair {start + place} is {pair!r:.100}; expected two strings.")
            pairs.append((texts[0], texts[1]))
        return pairs

    def prepare(self, texts: Sequence[Text]) -> Tokens | Features:
        """Tokenises texts, with the prompt."""
        return self._prepare_slowly(texts) if self._fast is None else self._fast.tokenise(self._prompted(texts))

    def run(self, batch: Tokens | Features) -> Output:
        """Runs a batch, longest texts first: launched on a GPU, not waited for."""
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with torch.inference_mode(), on_device:
            return self._forward(batch)

    def _enter_eval(self) -> None:
        self.model.eval()
        self._known.modules = [module for module in self.model.modules() if module is not self.model]

    def _prompted(self, texts: Sequence[Text]) -> list[Text]:
        prompt = self.prompt
        if prompt is None:
            return list(texts)
        return [prompt + text if isinstance(text, str) else (prompt + text[0], text[1]) for text in texts]

    def _find_preparation(self) -> _FastPreparation | None:
        key: object = (self.prompt, self.max_length, repr(sorted(self.options.items())))
        known = self._known.preparations
        if key not in known:
            known[key] = self._compare_preparations()
        return known[key]

    def _compare_preparations(self) -> _FastPreparation | None:
        """Compares the tokenizers library with the model's own preprocessing, on a few texts."""
        assert self._tokenizer is not None
        limit = self._tokenizer.model_max_length if self.max_length is None else self.max_length
        texts = [*_SENTENCES, *(["word " * (limit + 2)] if limit <= TextTokenizer.UNLIMITED else [])]
        inputs: list[Text] = [(text, _SENTENCES[1]) for text in texts] if self.takes_pairs else [*texts]
        own = self._prepare_slowly(inputs)
        types = own.get("token_type_ids")
        # Zeros are faster to make than to read.
        key: tuple[int | None, TypeIds]
        key = self.max_length, "none" if types is None else "own" if self.takes_pairs or types.any() else "zeros"
        tokenisers = self._known.tokenisers
        if key not in tokenisers:
            tokenisers[key] = TextTokenizer(self._tokenizer, *key)
        ours = self._pad(tokenisers[key](self._prompted(inputs)))
        constants = {name: value for name, value in own.items() if name not in ours}
        if not any(isinstance(value, torch.Tensor) for value in constants.values()) and all(
            isinstance(own.get(name), torch.Tensor) and torch.equal(own[name], ours[name]) for name in ours
        ):
            return _FastPreparation(tokenisers[key], constants)
        log_once(
            f"{type(self.model).__name__} prepares texts in another way than its tokenizer alone; they are prepared by "
            "the model's own preprocessing, which is slower"
        )
        return None

    def _pad(self, tokens: Tokens) -> Features:
        tokenizer = self._tokenizer
        assert tokenizer is not None
        pad_id = tokenizer.pad_token_id or 0
        return dict(tokens.pad(pad_id, tokenizer.pad_token_type_id, on_left=tokenizer.padding_side == "left"))

    def _padded(self, batch: Tokens | Features, device: torch.device) -> Features:
        """Returns the features of a batch, padded, with tensors on a device."""
        if isinstance(batch, Tokens):
            assert self._fast is not None
            batch = {**self._fast.constants, **self._pad(batch)}
        return {
            name: sent(value, device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
        }

    def _packed(
        self, backbone: PreTrainedModel, tokens: Tokens, extras: Mapping[str, np.ndarray[Any, Any]]
    ) -> Features:
        """Returns the features of a batch, packed, with tensors on the model's device."""
        assert self._fast is not None
        return self._fast.constants | packed_inputs(
            backbone, tokens.ids, tokens.lengths, tokens.type_ids, self.device, extras
        )


class SentenceEngine(Engine):
    """A `SentenceTransformer`.

    Where its transformer can be given packed tokens, the other modules are given the padded token embeddings of some
    rows of similar length at a time: what they compute is what they compute in `encode`.

    Args:
        model: The model.
        select: Makes rows of the features that the model returns.
        prompt: What every text begins with.
        options: Further arguments of its `preprocess` and `forward`.
    """

    def __init__(
        self, model: Any, select: Callable[[Features], Output], *, prompt: str | None, options: Mapping[str, Any]
    ) -> None:
        super().__init__(model, _tokenizer_of(model), prompt=prompt, options=options)
        self._select = select
        self._backbone = self._find_backbone()

    @property
    def packs(self) -> bool:
        return self._backbone is not None

    def _prepare_slowly(self, texts: Sequence[Text]) -> Features:
        features: Features = dict(cast(Any, self.model).preprocess(list(texts), prompt=self.prompt, **self.options))
        return features

    def _forward(self, batch: Tokens | Features) -> Output:
        if self._backbone is None or not isinstance(batch, Tokens):
            return self._select(self.model(self._padded(batch, self.device), **self.options))
        groups = _groups_of(batch.lengths)
        extras = {} if len(groups) == 1 and groups[0].is_full else {"slots": np.concatenate([g.slots for g in groups])}
        features = self._packed(self._backbone, batch, extras)
        slots = features.pop("slots", None)
        (name, transformer), *others = self.model.named_children()
        features = transformer(features, **self._options_of(name, transformer))
        lengths = features["cu_seq_lens_q"].diff()
        outputs = []
        for group in groups:
            padded = group.pad(features, slots, lengths)
            for name, module in others:
                padded = module(padded, **self._options_of(name, module))
            outputs.append(self._select(padded))
        if all(isinstance(output, torch.Tensor) for output in outputs):
            return torch.cat(cast("list[torch.Tensor]", outputs)) if len(outputs) > 1 else outputs[0]
        return [row for output in outputs for row in output]

    def _options_of(self, name: str, module: torch.nn.Module) -> dict[str, Any]:
        """Returns the arguments that sentence-transformers passes on to a module."""
        if not self.options:
            return {}
        names = {*(cast(Any, self.model).module_kwargs or {}).get(name, ()), *getattr(module, "forward_kwargs", ())}
        return {name: value for name, value in self.options.items() if name in names}

    def _find_backbone(self) -> PreTrainedModel | None:
        """Returns the model that can be given packed tokens; None if batches have to be padded."""
        if self._fast is None:
            return None
        transformer, *others = self.model.children()
        if not forwards_features(transformer):
            reason: str | None = f"a {type(transformer).__name__} comes first in it"
        elif any(isinstance(module, torch.nn.ModuleDict) or hasattr(module, "sub_modules") for module in others):
            reason = "it chooses its modules by task"
        else:
            reason = reason_against_packed_inputs(cast(Any, transformer).model)
        if reason is not None:
            log_once(f"batches of {type(self.model).__name__} are padded: {reason}")
            return None
        admit_packed_inputs(transformer)
        backbone: PreTrainedModel = transformer.model
        return backbone


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of a packed batch that are padded together.

    Args:
        rows: Which rows.
        tokens: Which tokens.
        width: Tokens of the longest row.
        lengths: Tokens of each row.
    """

    rows: slice
    tokens: slice
    width: int
    lengths: np.ndarray[Any, Any]

    @property
    def is_full(self) -> bool:
        """Whether rows are of one length."""
        return bool(len(self.lengths) * self.width == self.tokens.stop - self.tokens.start)

    @property
    def slots(self) -> np.ndarray[Any, Any]:
        """Slot of each token among the padded ones, int64, shape `(tokens,)`."""
        starts = np.arange(len(self.lengths)) * self.width - (np.cumsum(self.lengths) - self.lengths)
        return np.repeat(starts, self.lengths) + np.arange(self.tokens.stop - self.tokens.start)

    def pad(self, packed: Features, slots: torch.Tensor | None, lengths: torch.Tensor) -> Features:
        """Pads token embeddings and ids with zeros, on their device.

        Args:
            packed: Of the whole batch.
            slots: Of all tokens, shape `(1, total_tokens)`.
            lengths: Of all rows, int64, shape `(rows,)`.
        """
        rows = len(self.lengths)
        padded = {name: value for name, value in packed.items() if name not in _PACKED_FEATURES}
        for name in ("token_embeddings", "input_ids", "token_type_ids"):
            if name not in packed:
                continue
            values = packed[name][0, self.tokens]
            if not self.is_full:
                assert slots is not None
                spread = values.new_zeros(rows * self.width, *values.shape[1:])
                values = spread.index_copy_(0, slots[0, self.tokens], values)
            padded[name] = values.view(rows, self.width, *values.shape[1:])
        slot = torch.arange(self.width, device=lengths.device)
        padded["attention_mask"] = (slot < lengths[self.rows, None]).long()
        return padded


# Rows at most this much longer than others are padded together.
_MAX_RATIO, _MAX_SHORT = 2, 16


def _groups_of(lengths: np.ndarray[Any, Any]) -> list[_Group]:
    """Cuts rows, longest first, into groups of similar length."""
    groups = []
    start = token = 0
    while start < len(lengths):
        width = int(lengths[start])
        shortest = 0 if width <= _MAX_SHORT else -(-width // _MAX_RATIO)
        stop = int(np.searchsorted(-lengths, -shortest, side="right"))
        taken = lengths[start:stop]
        end = token + int(taken.sum())
        groups.append(_Group(slice(start, stop), slice(token, end), width, taken))
        start, token = stop, end
    return groups


def _tokenizer_of(model: Any) -> PreTrainedTokenizerBase | None:
    tokenizer = model.tokenizer
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


class CrossEngine(Engine):
    """A `CrossEncoder`.

    Args:
        model: The model.
        score: Makes scores of the features that the model returns.
        prompt: What the first text of every pair begins with.
        options: Further arguments of its `preprocess` and `forward`.
    """

    takes_pairs = True

    def __init__(
        self, model: Any, score: Callable[[Features], torch.Tensor], *, prompt: str | None, options: Mapping[str, Any]
    ) -> None:
        super().__init__(model, _tokenizer_of(model), prompt=prompt, options=options)
        self._score = score
        # Hooks of the head move what it needs, and pack on the host.
        only = list(model.children())
        on_host = len(only) == 1 and HANDLES in vars(getattr(only[0], "model", None) or only[0])
        self._input_device = torch.device("cpu") if on_host else self.device

    @property
    def packs(self) -> bool:
        return False

    def _prepare_slowly(self, texts: Sequence[Text]) -> Features:
        features: Features = dict(cast(Any, self.model).preprocess(list(texts), prompt=self.prompt, **self.options))
        return features

    def _forward(self, batch: Tokens | Features) -> Output:
        return self._score(self.model(self._padded(batch, self._input_device), **self.options))


class PlainEngine(Engine):
    """A model of transformers, with pooling of its last hidden states.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        pooling: How hidden states become a vector.
        finish: Makes rows of the pooled vectors.
        prompt: What every text begins with.
        max_length: Longer texts are truncated, in tokens; None for the tokenizer's own limit.
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
        self._takes_cache_flag = family_of(model) is not None
        self._packs = self._fast is not None and reason_against_packed_inputs(model) is None

    @property
    def packs(self) -> bool:
        return self._packs

    def _prepare_slowly(self, texts: Sequence[Text]) -> Features:
        assert self._tokenizer is not None
        limit = self._tokenizer.model_max_length if self.max_length is None else self.max_length
        truncation = {"truncation": True, "max_length": limit} if limit <= TextTokenizer.UNLIMITED else {}
        return dict(self._tokenizer(self._prompted(texts), padding=True, return_tensors="pt", **truncation))

    def _forward(self, batch: Tokens | Features) -> Output:
        model = cast(PreTrainedModel, self.model)
        if self.packs and isinstance(batch, Tokens):
            inputs = self._packed(model, batch, {})
            hidden = model(**inputs).last_hidden_state[0]
            return self._finish(self._pool_packed(hidden, inputs["cu_seq_lens_q"]))
        features = self._padded(batch, self.device)
        hidden = model(**features).last_hidden_state
        return self._finish(self._pool_padded(hidden, features["attention_mask"].bool()))

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
