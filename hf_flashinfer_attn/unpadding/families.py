"""Packing rules of model families: positions, pooler, reasons to refuse a model, attention of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import ModuleType

import torch
from transformers import PreTrainedModel

__all__ = ["FAMILIES", "REFUSED", "Family", "Positions", "family_of", "reason_against", "required_family"]


class Positions(Enum):
    """How a model numbers the tokens of a padded row when it is given no `position_ids`."""

    SLOTS = "by slot, from 0"
    AFTER_PADDING_ID = "by token, from the id of padding + 1"


def _refuse_rotary_layers(model: PreTrainedModel) -> str | None:
    if model.config.position_embedding_type == "rotary" and getattr(model, "rotary_embeddings", None) is None:
        return "its layers number tokens by themselves, through all packed rows, in this version of transformers"
    return None


def _mpnet() -> ModuleType:
    # Its import from transformers is slow, and few models need it.
    from . import mpnet

    return mpnet


@dataclass(frozen=True, slots=True)
class Family:
    """How to run a backbone on packed tokens."""

    positions: Positions = Positions.SLOTS
    # Transformers' causal helpers make its mask and take restarting positions for packed sequences; it caches keys.
    is_causal: bool = False
    # Its embeddings read whole rows, so they run before packing.
    embeds_rows: bool = False
    # A bias depends on distances in padded rows.
    measures_slots: bool = False
    # Returns why a model of the family cannot be packed after all.
    refuse: Callable[[PreTrainedModel], str | None] = lambda model: None
    # Imports the module that replaces the family's own attention (`route`) and puts it back (`restore`).
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
    # Its token dropout scales a row by how much of it is masked.
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
    """Returns how to pack the tokens of a backbone; None for any other module."""
    for parent in type(model).__mro__:
        if parent.__module__.startswith("transformers.models.") and parent.__name__ in FAMILIES:
            return FAMILIES[parent.__name__]
    return None


def required_family(backbone: torch.nn.Module) -> Family:
    """Returns the family of a backbone, which must have one."""
    family = family_of(backbone)
    assert family is not None
    return family


def reason_against(model: torch.nn.Module) -> str:
    """Says why a model without a known backbone cannot be packed."""
    inner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    known = ", ".join(sorted(name.removesuffix("Model") for name in FAMILIES))
    return REFUSED.get(model_type or "", f"nothing is known about packing it; known are {known}")
