"""Packing hooks of sentence-transformers' `Transformer`, which bypasses the hooks of its backbone."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .families import family_of
from .hooks import HANDLES, leave_own_attention, pack, packing_of, signature_of
from .packing import CALLER, Packing

__all__ = [
    "admit_packed_inputs",
    "forwards_features",
    "is_transformer",
    "pack_features",
    "resume_flattening",
    "spread_features",
    "stop_flattening",
]

_ADDED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", CALLER})
_PACKED_OUTPUTS = ("last_hidden_state", ("last_hidden_state",), ["last_hidden_state"])


class _SwappedFeatures(dict[str, Any]):
    """Features for the model, with the original features and the packing (None for a padded batch)."""

    def __init__(self, features: dict[str, Any], original: dict[str, Any], packing: Packing | None) -> None:
        super().__init__(features)
        self.original, self.packing = original, packing


def is_transformer(module: torch.nn.Module) -> bool:
    """Whether a module is sentence-transformers' `Transformer`."""
    return _is_transformer_type(type(module))  # type: ignore[arg-type]  # mypy: a class is not Hashable


@functools.cache
def _is_transformer_type(module_class: type) -> bool:
    return any(
        parent.__name__ == "Transformer" and parent.__module__.startswith("sentence_transformers.")
        for parent in module_class.__mro__
    )


def forwards_features(module: Any) -> bool:
    """Whether a module is a `Transformer` with an unmodified forward and a supported backbone as its model."""
    if not is_transformer(module) or family_of(getattr(module, "model", None)) is None:
        return False
    # A custom forward may read the mask, or drop the arguments of packed inputs.
    is_own: bool = type(module).forward.__module__.startswith("sentence_transformers.")
    # Accelerate replaces `forward` and saves the original as `_old_forward`.
    return is_own and ("forward" not in vars(module) or "_old_forward" in vars(module))


def stop_flattening(module: Any) -> None:
    """Makes a `Transformer` pad its inputs, unless `unpad_inputs=True` was passed."""
    if getattr(module, "unpad_inputs", None) is not True:
        module.can_flatten_inputs = False


def resume_flattening(module: Any) -> None:
    """Undoes `stop_flattening`."""
    if hasattr(module, "unpad_inputs"):
        # The setter computes `can_flatten_inputs` again.
        module.unpad_inputs = module.unpad_inputs


def admit_packed_inputs(module: Any) -> None:
    """Makes a `Transformer` pass cu_seqlens and the other packing arguments to its model."""
    if module.model_forward_params is not None:
        module.model_forward_params |= _ADDED


def pack_features(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a `Transformer`: packs its features, if they are padded and can be packed."""
    if HANDLES not in vars(module.model):
        # The model was wrapped after `unpad`, by torch.compile or PEFT; the wrapper runs the backbone's own hooks.
        return None
    options = dict(kwargs)
    features: dict[str, Any] = args[0] if args else options.pop("features")
    call = module.modality_config[features.get("modality", "text")]
    if "cu_seq_lens_q" in features or call["method"] != "forward" or call["method_output_name"] not in _PACKED_OUTPUTS:
        return None
    inputs = {**features, **options}
    names = signature_of(type(module.model).forward).parameters
    _, packed = pack(module.model, (), {name: value for name, value in inputs.items() if name in names})
    packing = packing_of(packed)
    if packing is None and packed.get("attention_mask") is inputs.get("attention_mask") and CALLER not in packed:
        return None
    admit_packed_inputs(module)
    return (_SwappedFeatures({**inputs, **packed}, features, packing),), {}


def spread_features(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Forward hook of a `Transformer`: pads outputs, and writes them to the original features. Also runs on errors."""
    leave_own_attention(module.model, args[0] if args else kwargs.get("features", {}))
    if not isinstance(output, _SwappedFeatures):
        return None
    packing = output.packing
    for name in (module.module_output_name, "all_layer_embeddings"):
        if (value := output.get(name)) is not None and packing is not None:
            value = packing.spread(value) if isinstance(value, torch.Tensor) else tuple(map(packing.spread, value))
        if name in output:
            output.original[name] = value
    return output.original
