"""Per-model cache of tokenizers; device placement and unpadding of a model."""

from __future__ import annotations

import threading
import weakref
from itertools import chain
from operator import attrgetter, is_
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UnsupportedAttentionError, first_line
from ..log import log_once
from ..settings import NAME
from ..unpadding.families import family_of
from ..unpadding.hooks import HANDLES
from ..unpadding.model import unpad
from ..unpadding.reasons import implementation_of
from .tokens import TextTokenizer, TypeIds

__all__ = ["ModelCache", "Preparation", "place"]

_MAX_PREPARATIONS = 64
# Without it, two threads could add the hooks of `unpad` to one model twice.
_unpadding = threading.Lock()


# Tokenizer that replaces the model's own preprocessing (None: not replaced), and the constant features of a batch.
Preparation: TypeAlias = "tuple[TextTokenizer | None, dict[str, Any]]"


class ModelCache:
    """Cache of one model, valid until the model is freed or its tokenizer changes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, state: object) -> None:
        self._tokenizer, self._state = tokenizer, state
        self._tokenisers: dict[tuple[int | None, TypeIds], TextTokenizer] = {}
        self.preparations: dict[object, Preparation] = {}
        self._modules: list[torch.nn.Module] = []
        self._dicts: list[dict[str, torch.nn.Module | None]] = []
        self._children: list[torch.nn.Module | None] = []

    @classmethod
    def of(cls, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> ModelCache:
        """Returns the cache of a model; a new one if its fast tokenizer (None without one) has changed."""
        state = None if tokenizer is None else TextTokenizer.state_of(tokenizer)
        cached = _caches.get(model)
        if cached is None or cached._tokenizer is not tokenizer or cached._state != state:
            cached = _caches[model] = cls(tokenizer, state)
        return cached

    def tokeniser(self, max_length: int | None, type_ids: TypeIds) -> TextTokenizer:
        """Returns a private copy of the tokenizer, made on first use."""
        assert self._tokenizer is not None
        key = max_length, type_ids
        if key not in self._tokenisers:
            self._tokenisers[key] = TextTokenizer(self._tokenizer, *key)
        return self._tokenisers[key]

    def keep(self, key: object, preparation: Preparation) -> None:
        """Caches a preparation."""
        if len(self.preparations) >= _MAX_PREPARATIONS:
            self.preparations.clear()
        self.preparations[key] = preparation

    def enter_eval(self, model: torch.nn.Module) -> None:
        """Puts a model into eval mode; faster than `model.eval()` if no module was replaced or is in training mode."""
        children = list(chain.from_iterable(map(dict.values, self._dicts)))
        is_unchanged = len(children) == len(self._children) and all(map(is_, children, self._children))
        if not self._dicts or not is_unchanged or any(map(attrgetter("training"), [model, *self._modules])):
            model.eval()
            # Without the model itself: the cache must not keep it alive.
            self._modules = [module for module in model.modules() if module is not model]
            self._dicts = [module._modules for module in [model, *self._modules]]
            self._children = list(chain.from_iterable(map(dict.values, self._dicts)))

    def device_of(self, model: torch.nn.Module) -> torch.device:
        """Returns the device of the first weight; faster than `model.parameters()`. Call `enter_eval` first."""
        weights = chain.from_iterable(map(dict.values, map(attrgetter("_parameters"), [model, *self._modules])))
        # Weights offloaded by accelerate are on "meta".
        devices = (weight.device for weight in weights if weight is not None and weight.device.type != "meta")
        return next(devices, torch.device("cpu"))


_caches: weakref.WeakKeyDictionary[torch.nn.Module, ModelCache] = weakref.WeakKeyDictionary()


def place(model: torch.nn.Module, device: str | torch.device | None) -> None:
    """Moves a model to `device` (None: leaves it in place), and unpads it if possible."""
    if isinstance(device, (list, tuple)):
        raise ValueError(f"device={device!r}: expected one device. examples/ has programs for several GPUs.")
    if device is not None and torch.device(device) != getattr(model, "device", None):
        model.to(device)
    first = model if isinstance(model, PreTrainedModel) else next(model.children(), model)
    if HANDLES in vars(first._modules.get("model", first)) and not _unpadding.locked():
        return
    with _unpadding:
        models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        if not models or any(HANDLES in vars(module) for module in model.modules()):
            return
        backbone = next((module for module in models if family_of(module) is not None), models[0])
        if (implementation := implementation_of(backbone)) != NAME:
            log_once(
                f"{type(model).__name__} with attn_implementation={implementation!r} runs on padded batches; load it "
                f"with attn_implementation={NAME!r} to skip padding"
            )
            return
        try:
            unpad(model, cuda_graphs=True)
        except UnsupportedAttentionError as error:
            log_once(f"{type(model).__name__} runs on padded batches: {first_line(error)}")
