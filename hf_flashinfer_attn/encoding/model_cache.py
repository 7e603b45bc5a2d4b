"""Per-model state kept between calls: copies of the tokenizer, and where they replace the model's preprocessing."""

from __future__ import annotations

import weakref
from itertools import chain
from operator import attrgetter, is_
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from .tokens import TextTokenizer, TypeIds

__all__ = ["ModelCache", "Preparation"]

_MAX_PREPARATIONS = 64


# Tokenizer in place of the model's own preprocessing, unless None, and the features that are the same in every batch.
Preparation: TypeAlias = "tuple[TextTokenizer | None, dict[str, Any]]"


class ModelCache:
    """Cache of one model. It lives as long as the model, or until the model's tokenizer changes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, state: object) -> None:
        self._tokenizer, self._state = tokenizer, state
        self._tokenisers: dict[tuple[int | None, TypeIds], TextTokenizer] = {}
        self.preparations: dict[object, Preparation] = {}
        self._modules: list[torch.nn.Module] = []
        self._dicts: list[dict[str, torch.nn.Module | None]] = []
        self._children: list[torch.nn.Module | None] = []

    @classmethod
    def of(cls, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> ModelCache:
        """Returns the cache of a model, a new one if its tokenizer (None: of no use here) has changed."""
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

    def keep(self, key: object, found: Preparation) -> None:
        """Caches how texts are prepared."""
        if len(self.preparations) >= _MAX_PREPARATIONS:
            self.preparations.clear()
        self.preparations[key] = found

    def enter_eval(self, model: torch.nn.Module) -> None:
        """Puts a model into eval mode. Faster than `model.eval()` if no module was exchanged or is in training mode."""
        found = list(chain.from_iterable(map(dict.values, self._dicts)))
        is_known = len(found) == len(self._children) and all(map(is_, found, self._children))
        if not self._dicts or not is_known or any(map(attrgetter("training"), [model, *self._modules])):
            model.eval()
            # Without the model itself, which the cache must not keep alive.
            self._modules = [module for module in model.modules() if module is not model]
            self._dicts = [module._modules for module in [model, *self._modules]]
            self._children = list(chain.from_iterable(map(dict.values, self._dicts)))

    def device_of(self, model: torch.nn.Module) -> torch.device:
        """Returns the device of the first weight, after `enter_eval`. Faster than to ask `model.parameters()`."""
        weights = chain.from_iterable(map(dict.values, map(attrgetter("_parameters"), [model, *self._modules])))
        # Weights offloaded by accelerate are on "meta".
        found = (weight.device for weight in weights if weight is not None and weight.device.type != "meta")
        return next(found, torch.device("cpu"))


_known: weakref.WeakKeyDictionary[torch.nn.Module, ModelCache] = weakref.WeakKeyDictionary()
