"""Handles the arguments of `encode` and `predict` that all kinds of models share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel

from ..errors import UnsupportedAttentionError, first_line
from ..log import log_once
from ..settings import NAME
from ..unpadding.families import family_of
from ..unpadding.hooks import HANDLES
from ..unpadding.model import unpad
from ..unpadding.reasons import implementation_of

__all__ = ["Precision", "Task", "place", "prompt_of", "quantizer_of", "require_iterable"]

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
Task = Literal["query", "document"]
# Prompt names for each task; the first one that the model has is used.
_PROMPTS: dict[str, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}
# Two threads that unpad one model would add its hooks twice.
_unpadding = threading.Lock()


def place(model: torch.nn.Module, device: str | torch.device | None) -> None:
    """Moves a model to `device`, unless None, and unpads it if possible."""
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


def prompt_of(model: Any, prompt_name: str | None, prompt: str | None, task: Task | None) -> str | None:
    """Returns the prompt that sentence-transformers would use."""
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


def quantizer_of(precision: Precision | None) -> Callable[[Any], Any] | None:
    """Returns a function that quantises embeddings; None for float32."""
    if precision is None or precision == "float32":
        return None
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(map(repr, get_args(Precision)))}.")
    try:
        from sentence_transformers.util import quantize_embeddings
    except ImportError as error:
        raise ValueError(f"precision={precision!r} needs sentence-transformers installed.") from error
    return lambda vectors: quantize_embeddings(vectors, precision=precision)


def require_iterable(inputs: object) -> None:
    """Raises a `TypeError` for inputs that are not a list, array or other iterable of texts."""
    is_scalar = not isinstance(inputs, str) and getattr(inputs, "ndim", 1) == 0
    if is_scalar or isinstance(inputs, (Mapping, bytes)) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs is a {type(inputs).__name__}; expected strings, or pairs of strings for predict.")
