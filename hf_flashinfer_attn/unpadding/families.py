"""Packing rules of model families: positions, pooler, reasons to refuse a model, attention of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from types import ModuleType

import torch
from transformers import PreTrainedModel

__all__ = ["FAMILIES", "REFUSED", "Family", "Positions", "family_of", "reason_against", "required_family"]


class Positions(Enum):
    """How a model numbers the tokens of a padded row when it is not told their positions."""

    SLOTS = "by slot, from 0"
    AFTER_PADDING_ID = "by token, from the id of padding + 1"


def _apply_pooler(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor | None:
    pooler: torch.nn.Module | None = getattr(model, "pooler", None)
    return None if pooler is None else pooler(hidden)


def _apply_albert_pooler(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor | None:
    if model.pooler is None:
        return None
    pooled: torch.Tensor = model.pooler_activation(model.pooler(hidden[:, 0]))
    return pooled


def _accept(model: PreTrainedModel) -> str | None:
    return None


def _refuse_rotary_layers(model: PreTrainedModel) -> str | None:
    if model.config.position_embedding_type == "rotary" and getattr(model, "rotary_embeddings", None) is None:
        return "its layers number tokens by themselves, through all packed rows, in this version of transformers"
    return None


def _refuse_trigrams(model: PreTrainedModel) -> str | None:
    return REFUSED["mobilebert"] if model.config.trigram_input else None


def _mpnet() -> ModuleType:
    # What it takes from transformers is slow to import, and few models need it.
    from . import mpnet

    return mpnet


def _refuse_changed_mpnet(model: PreTrainedModel) -> str | None:
    reason: str | None = _mpnet().reason_to_refuse(model)
    return reason


@dataclass(frozen=True, slots=True)
class Family:
    """How to run a backbone on packed tokens.

    Args:
        positions: What to number tokens by.
        is_causal: Whether its mask is made by transformers' causal helpers, which take a jump of positions for the
            start of a packed sequence, and whether it keeps a cache by default.
        embeds_rows: Whether embeddings look at whole rows, so that they come before packing.
        measures_slots: Whether a bias depends on how many slots are between two tokens.
        pool: Computes `pooler_output` from padded hidden states.
        refuse: Says why a model of the family cannot be packed after all.
        own_attention: Imports what makes attention ours, by `route`, and its own again, by `restore`, where the family
            computes it by itself.
    """

    positions: Positions = Positions.SLOTS
    is_causal: bool = False
    embeds_rows: bool = False
    measures_slots: bool = False
    pool: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor | None] = _apply_pooler
    refuse: Callable[[PreTrainedModel], str | None] = _accept
    own_attention: Callable[[], ModuleType] | None = None

    @property
    def packs_ids_alone(self) -> bool:
        """Whether nothing but numbers is packed, of which graphs are captured."""
        return self.own_attention is None and not self.embeds_rows


_ENCODER = Family()
_ROBERTA = Family(positions=Positions.AFTER_PADDING_ID)
_DECODER = Family(is_causal=True)
FAMILIES = {
    "AlbertModel": replace(_ENCODER, pool=_apply_albert_pooler),
    "BertModel": _ENCODER,
    "CamembertModel": _ROBERTA,
    "Data2VecTextModel": _ROBERTA,
    "DistilBertModel": _ENCODER,
    "ElectraModel": _ENCODER,
    # Its token dropout scales a row by how much of it is masked.
    "EsmModel": replace(_ENCODER, embeds_rows=True, refuse=_refuse_rotary_layers),
    "EuroBertModel": _ENCODER,
    "Gemma3TextModel": _DECODER,
    "GemmaModel": _DECODER,
    "JinaEmbeddingsV3Model": _ENCODER,
    "LlamaModel": _DECODER,
    "MPNetModel": replace(_ROBERTA, measures_slots=True, refuse=_refuse_changed_mpnet, own_attention=_mpnet),
    "MistralModel": _DECODER,
    "MobileBertModel": replace(_ENCODER, refuse=_refuse_trigrams),
    "ModernBertModel": _ENCODER,
    "NomicBertModel": _ENCODER,
    "Qwen3Model": _DECODER,
    "RobertaModel": _ROBERTA,
    "XLMRobertaModel": _ROBERTA,
}
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
