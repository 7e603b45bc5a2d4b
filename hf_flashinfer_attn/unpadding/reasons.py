"""Reasons to leave a forward padded, checked before row lengths are read."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from ..ragged.host_copy import HostCopy
from ..settings import NAME, current_settings
from .families import family_of, required_family
from .packing import CALLER

__all__ = [
    "PER_TOKEN", "implementation_of", "is_asked_for", "measure_of_distance", "reason_of_head", "reason_to_stay",
    "require_positions",
]  # fmt: skip

PER_TOKEN = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
_PACKED = frozenset({*PER_TOKEN, "attention_mask", CALLER})


def is_asked_for(name: str, module: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Returns a flag of a forward, from its arguments or by default from the config."""
    value = kwargs.get(name)
    return bool(getattr(module.config, name, False) if value is None else value)


def implementation_of(module: torch.nn.Module) -> str | None:
    """Returns the name of a model's attention implementation; None if its config has none."""
    implementation: str | None = getattr(module.config, "_attn_implementation", None)
    return implementation


def reason_to_stay(module: PreTrainedModel, inputs: dict[str, Any]) -> str | None:
    """Returns the reason if a forward cannot be packed, without reading row lengths."""
    mask, ids = inputs["attention_mask"], inputs.get("input_ids")
    if implementation_of(module) != NAME:
        return f"attn_implementation={implementation_of(module)!r}, expected {NAME!r}"
    if current_settings().padded_queries == "keep":
        return "configure(padded_queries='keep')"
    if module.training and getattr(module.get_input_embeddings(), "neftune_noise_alpha", None) is not None:
        return "NEFTune, which scales its noise by the padded row length"
    if is_asked_for("output_attentions", module, inputs):
        return "output_attentions=True"
    if inputs.get("encoder_hidden_states") is not None:
        return "cross-attention"
    # By class, because the argument has different names in different versions of transformers.
    if any(isinstance(value, Cache) for value in inputs.values()) or (
        (required_family(module).is_causal or getattr(module.config, "is_decoder", False))
        and is_asked_for("use_cache", module, inputs)
        and not (getattr(module, "gradient_checkpointing", False) and module.training)
    ):
        return "a cache of keys and values; pass use_cache=False where none is needed"
    tokens = inputs.get("inputs_embeds") if ids is None else ids
    if not isinstance(mask, torch.Tensor) or tokens is None or mask.shape != tokens.shape[:2]:
        return "an attention mask of another shape than the tokens"
    for name in ("token_type_ids", "position_ids"):
        value = inputs.get(name)
        if value is not None and tuple(value.shape) not in (tuple(mask.shape), (1, mask.shape[1])):
            return f"{name} of another shape than the tokens"
    if inputs.get("position_ids") is None and (table := _position_table(module)) is not None:
        (size, padding_id), width = table, mask.shape[1]
        if padding_id is None and width > size:
            # The model raises its own error.
            return f"{width} positions in a row, more than the model's {size}"
        # A family that embeds padded rows makes its own position ids.
        is_numbered = ids is not None or not required_family(module).embeds_rows
        if padding_id is not None and padding_id + 1 + width > size and is_numbered:
            # Raise before any launch.
            require_positions(module, width if ids is None else HostCopy(ids.ne(padding_id).sum(1).max()).values)
    for name, value in inputs.items():
        if name not in _PACKED and not _is_of_whole_batch(value):
            return f"{name}, which unpad cannot pack"
    return None


def _position_table(module: PreTrainedModel) -> tuple[int, int | None] | None:
    """Returns the size and padding_idx of the table of learned positions; None if the model has none."""
    table = getattr(getattr(module, "embeddings", None), "position_embeddings", None)
    size: int | None = getattr(table, "num_embeddings", None)
    return None if table is None or size is None else (size, table.padding_idx)


def require_positions(module: PreTrainedModel, longest: int) -> None:
    """Raises an IndexError if a row of packed tokens is longer than the table of learned positions."""
    if (table := _position_table(module)) is None:
        return
    size, padding_id = table
    # Positions up to padding_id are reserved for padding.
    first = 0 if padding_id is None else padding_id + 1
    if first + longest > size:
        raise IndexError(
            f"a row of {longest} tokens for {type(module).__name__}, expected at most {size - first}: its table of "
            f"{size} positions starts at {first}. Truncate texts to that length."
        )


def reason_of_head(head: PreTrainedModel, inputs: dict[str, Any]) -> str | None:
    """Returns the reason if a head reads masked positions, which a packed backbone fills with zeros."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None
    if any(inputs.get(name) is not None for name in ("start_positions", "end_positions")):
        return "start_positions and end_positions, whose loss includes masked positions"
    for name, value in inputs.items():
        if "label" in name and isinstance(value, torch.Tensor) and _counts_padding(head, value, mask):
            return f"{name} other than -100 in masked positions"
    if isinstance(head, GenericForSequenceClassification):
        finds_last_token = inputs.get("input_ids") is not None and head.config.pad_token_id is not None
        if not finds_last_token and not HostCopy((mask[:, -1] != 0).all()).values:
            return "a head that reads the last position of each row, masked in some"
    return None


def _counts_padding(head: PreTrainedModel, labels: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether a per-token loss includes masked positions."""
    if labels.is_floating_point() or labels.shape[:2] != mask.shape:
        return False
    counted = labels.flatten(2).ne(-100).any(2) if labels.ndim > 2 else labels.ne(-100)
    if head.get_output_embeddings() is not None:
        # Causal language models shift labels by one position.
        is_causal = any(family.is_causal for family in map(family_of, head.modules()) if family is not None)
        if is_causal or getattr(head.config, "is_decoder", False):
            counted = torch.nn.functional.pad(counted[:, 1:], (0, 1))
    return bool(HostCopy((counted & mask.to(counted.device).eq(0)).any()).values)


def _is_of_whole_batch(value: object) -> bool:
    """Whether an argument applies to the whole batch, not to single rows or tokens."""
    if isinstance(value, torch.Tensor):
        return value.numel() <= 1
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def measure_of_distance(module: PreTrainedModel) -> str | None:
    """Names the part of a model's attention that depends on distances in padded rows; None if there is none."""
    if required_family(module).measures_slots:
        return "a relative position bias"
    layer_types = getattr(module.config, "layer_types", None)
    if layer_types is None:
        has_window = getattr(module.config, "sliding_window", None) is not None
    else:
        has_window = any(layer_type != "full_attention" for layer_type in layer_types)
    return "a window" if has_window else None
