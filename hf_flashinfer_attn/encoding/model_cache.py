"""Per-model cache of tokenizers and preprocessing, kept between calls."""

from __future__ import annotations

import itertools
import operator
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .tokens import TextTokenizer, TypeIds

__all__ = ["FastPreparation", "ModelCache"]

_MAX_PREPARATIONS = 64


@dataclass(frozen=True, slots=True)
class FastPreparation:
    """Replacement for a model's own preprocessing.

    Args:
        tokenise: Returns token ids and token type ids.
        constants: All other features, the same for every batch.
    """

    tokenise: TextTokenizer
    constants: dict[str, Any]


class ModelCache:
    """Cache of one model. It lives as long as the model, or until the model's tokenizer changes.

    Args:
        tokenizer: Tokenizer of the model; None if it is not of the tokenizers library.
        state: State of the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, state: object) -> None:
        self._tokenizer, self._state = tokenizer, state
        self._tokenisers: dict[tuple[int | None, TypeIds], TextTokenizer] = {}
        self._preparations: dict[object, FastPreparation | None] = {}
        self._modules: list[torch.nn.Module] = []
        self._dicts: list[dict[str, torch.nn.Module | None]] = []
        self._children: list[torch.nn.Module | None] = []

    @classmethod
    def of(cls, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> ModelCache:
        """Returns the cache of a model, a new one if its tokenizer has changed."""
        state = None if tokenizer is None else TextTokenizer.state_of(tokenizer)
        known = _known.get(model)
        if known is None or known._tokenizer is not tokenizer or known._state != state:
            known = _known[model] = cls(tokenizer, state)
        return known

    def tokeniser(self, max_length: int | None, type_ids: TypeIds) -> TextTokenizer:
        """Returns a copy of the tokenizer, made on first use."""
        assert self._tokenizer is not None
        key = max_length, type_ids
        if key not in self._tokenisers:
            self._tokenisers[key] = TextTokenizer(self._tokenizer, *key)
        return self._tokenisers[key]

    def preparation(self, key: object) -> tuple[bool, FastPreparation | None]:
        """Returns whether the key is cached, and its value."""
        return key in self._preparations, self._preparations.get(key)

    def keep_preparation(self, key: object, found: FastPreparation | None) -> None:
        """Caches how texts are prepared; None for the model's own preprocessing."""
        if len(self._preparations) >= _MAX_PREPARATIONS:
            self._preparations.clear()
        self._preparations[key] = found

    def enter_eval(self, model: torch.nn.Module) -> None:
        """Puts a model into eval mode. Faster than `model.eval()` if no module was exchanged or is in training mode."""
        found = list(itertools.chain.from_iterable(map(dict.values, self._dicts)))
        is_known = len(found) == len(self._children) and all(map(operator.is_, found, self._children))
        if not self._dicts or not is_known or any(map(operator.attrgetter("training"), [model, *self._modules])):
            model.eval()
            # Without the model itself, which the cache must not keep alive.
            self._modules = [module for module in model.modules() if module is not model]
            self._dicts = [module._modules for module in [model, *self._modules]]
            self._children = list(itertools.chain.from_iterable(map(dict.values, self._dicts)))


_known: weakref.WeakKeyDictionary[torch.nn.Module, ModelCache] = weakref.WeakKeyDictionary()
