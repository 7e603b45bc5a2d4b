"""Packing rules of model families: position ids, refused models, own attention code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import ModuleType

import torch
from transformers import PreTrainedModel

__all__ = ["FAMILIES", "REFUSED", "Family", "Positions", "family_of", "reason_against", "required_family"]


class Positions(Enum):
    """Default position ids of a model, without a `position_ids` argument."""

    SLOTS = "by padded position, from 0"
    AFTER_PADDING_ID = "by token, from padding_idx + 1"


def _refuse_rotary_layers(model: PreTrainedModel) -> str | None:
    if model.config.position_embedding_type == "rotary" and getattr(model, "rotary_embeddings", None) is None:
        return "its layers number tokens by themselves, through all packed rows, in this version of transformers"
    return None


def _mpnet() -> ModuleType:
    # A lazy import: it is slow, and few models need it.
    from . import mpnet

    return mpnet


@dataclass(frozen=True, slots=True)
class Family:
    """Packing rules of a backbone class."""

    positions: Positions = Positions.SLOTS
    # A decoder: it may cache keys, and transformers detects packed sequences by restarting position ids.
    is_causal: bool = False
    # The embeddings read whole rows, so they run before packing.
    embeds_rows: bool = False
    # The attention bias depends on distances in padded rows.
    measures_slots: bool = False
    # Returns the reason if a model of the family cannot be packed.
    refuse: Callable[[PreTrainedModel], str | None] = lambda model: None
    # Imports the module that replaces (`route`) and restores (`restore`) the family's own attention code.
    own_attention: Callable[[], ModuleType] | None = None

    @property
    def packs_ids_alone(self) -> bool:
        """Whether only integers are packed, as CUDA graphs need."""
        return self.own_attention is None and not self.embeds_rows


_OWN_ATTENTION = "it computes attention by itself, over padded rows"
_POSITION_BIAS = "its relative position bias is counted in slots of padded rows"
REFUSED = {
    "deberta": _OWN_ATTENTION,
    "deberta-v2": _OWN_ATTENTION,
    "longformer": _OWN_ATTENTION,
    "mobilebert": "with trigram_input=True, its embeddings join each token with its neighbours, which in packed input "
    "may belong to other rows",
    "mt5": _POSITION_BIAS,
    "t5": _POSITION_BIAS,
    "umt5": _POSITION_BIAS,
    "xlnet": _OWN_ATTENTION,
}
_ENCODERS = (
    "AlbertModel", "BertModel", "DistilBertModel", "ElectraModel", "EuroBertModel", "JinaEmbeddingsV3Model",
    "ModernBertModel", "NomicBertModel",
)  # fmt: skip
_ROBERTAS = ("CamembertModel", "Data2VecTextModel", "RobertaModel", "XLMRobertaModel")
_DECODERS = ("Gemma3TextModel", "GemmaModel", "LlamaModel", "MistralModel", "Qwen3Model")
FAMILIES = {
    **dict.fromkeys(_ENCODERS, Family()),
    **dict.fromkeys(_ROBERTAS, Family(Positions.AFTER_PADDING_ID)),
    **dict.fromkeys(_DECODERS, Family(is_causal=True)),
    # Token dropout scales each row by its share of mask tokens.
    "EsmModel": Family(embeds_rows=True, refuse=_refuse_rotary_layers),
    "MPNetModel": Family(
        Positions.AFTER_PADDING_ID,
        measures_slots=True,
        refuse=lambda model: _mpnet().reason_to_refuse(model),
        own_attention=_mpnet,
    ),
    "MobileBertModel": Family(refuse=lambda model: REFUSED["mobilebert"] if model.config.trigram_input else None),
}


def family_of(model: torch.nn.Module | None) -> Family | None:
    """Returns the packing rules of a backbone; None for any other module."""
    return _family_of_type(type(model))  # type: ignore[arg-type]  # mypy: a class is not Hashable


@functools.cache
def _family_of_type(model_class: type) -> Family | None:
    for parent in model_class.__mro__:
        if parent.__module__.startswith("transformers.models.") and parent.__name__ in FAMILIES:
            return FAMILIES[parent.__name__]
    return None


def required_family(backbone: torch.nn.Module) -> Family:
    """Returns the packing rules of a supported backbone."""
    family = family_of(backbone)
    assert family is not None
    return family


def reason_against(model: torch.nn.Module) -> str:
    """Returns the reason to refuse a model without a supported backbone."""
    inner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    supported = ", ".join(sorted(name.removesuffix("Model") for name in FAMILIES))
    return REFUSED.get(model_type or "", f"nothing is known about packing it; known are {supported}")
