"""The measured models: loaded, or made with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from ...errors import first_line
from ..pretrained import reading
from .contenders import BASELINE
from .errors import BenchError
from .workload import shape_config

__all__ = ["OnStep", "Subject", "load_subjects", "shown_name"]

OnStep = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to measure.

    Args:
        name: Path, id or shape, as given by the user.
        model: The model with sdpa.
        longest: Maximum tokens of a request; None without a limit.
        prepared: Cache of the model as prepared for each contender, by the contender's name.
    """

    name: str
    model: PreTrainedModel
    longest: int | None
    prepared: dict[str, Any]


def shown_name(model: str) -> str:
    """Returns the displayed name of a model: the last part of an absolute path, otherwise the whole id."""
    return Path(model).name if Path(model).is_absolute() else model


def load_subjects(
    model_name: str | None,
    shapes: Sequence[str],
    layers: int | None,
    device: torch.device,
    dtype: torch.dtype,
    on_step: OnStep,
) -> Iterator[Subject]:
    """Yields a loaded model, or models of named shapes, one at a time.

    Args:
        model_name: A folder or Hub id; None for the shapes.
        shapes: Names of `SHAPES`.
        layers: Number of layers, instead of the shapes' own.
        device: Device of the models.
        dtype: Dtype of the weights.
        on_step: Called before each model is loaded.

    Raises:
        BenchError: If the model cannot be loaded.
    """
    for name in [model_name] if model_name is not None else shapes:
        on_step(f"{shown_name(name)}: loading", "")
        model = _load(name, dtype) if model_name is not None else _random_model(name, layers, device, dtype)
        model.to(device).eval()
        if hasattr(model.config, "use_cache"):
            # Nothing is generated here, and a cache of all layers would cost memory.
            model.config.use_cache = False
        yield Subject(name, model, _longest(model), {})


def _load(name: str, dtype: torch.dtype) -> PreTrainedModel:
    with reading(name):
        config = AutoConfig.from_pretrained(name)
    try:
        model: PreTrainedModel = AutoModel.from_pretrained(
            name, config=config, attn_implementation=BASELINE, dtype=dtype
        )
    except (OSError, ValueError) as error:
        raise BenchError(f"the model {name!r} cannot be loaded: {first_line(error)}") from error
    return model


def _random_model(name: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    config = shape_config(name, layers)
    auto = AutoModelForSequenceClassification if config.architectures else AutoModel
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), device:
        torch.manual_seed(0)
        model: PreTrainedModel = auto.from_config(config, attn_implementation=BASELINE, dtype=dtype)
    return model


def _longest(model: PreTrainedModel) -> int | None:
    """Returns the maximum tokens of a request; None without a limit."""
    longest: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # RoBERTa-like models number positions from padding_idx + 1.
            longest = module.num_embeddings - module.padding_idx - 1
    return longest
