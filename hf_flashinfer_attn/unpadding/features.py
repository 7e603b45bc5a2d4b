"""Packing for modules of sentence-transformers, which call their model's `forward` without its hooks."""

from __future__ import annotations

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
    """Features for the model, with the caller's own, and the packing of a packed batch."""

    def __init__(self, features: dict[str, Any], original: dict[str, Any], packing: Packing | None) -> None:
        super().__init__(features)
        self.original, self.packing = original, packing


def is_transformer(module: torch.nn.Module) -> bool:
    """Whether a module is sentence-transformers' `Transformer`."""
    return any(
        parent.__name__ == "Transformer" and parent.__module__.startswith("sentence_transformers.")
        for parent in type(module).__mro__
    )


def forwards_features(module: Any) -> bool:
    """Whether a module is sentence-transformers' `Transformer`, with its own forward, around a bare backbone."""
    if not is_transformer(module) or family_of(getattr(module, "model", None)) is None:
        return False
    # Any other forward may read the mask, or leave out the arguments of packed inputs.
    is_own: bool = type(module).forward.__module__.startswith("sentence_transformers.")
    # Accelerate wraps a forward, and keeps it.
    return is_own and ("forward" not in vars(module) or "_old_forward" in vars(module))


def stop_flattening(module: Any) -> None:
    """Makes a `Transformer` pad its inputs, one row per text, unless `unpad_inputs=True` was passed."""
    if getattr(module, "unpad_inputs", None) is not True:
        module.can_flatten_inputs = False


def resume_flattening(module: Any) -> None:
    """Makes a `Transformer` flatten its inputs again, if it did before `stop_flattening`."""
    if hasattr(module, "unpad_inputs"):
        # The setter determines again whether inputs can be flattened.
        module.unpad_inputs = module.unpad_inputs


def admit_packed_inputs(module: Any) -> None:
    """Makes a `Transformer` pass the additional arguments of packed inputs to its model."""
    if module.model_forward_params is not None:
        module.model_forward_params |= _ADDED


def pack_features(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a `Transformer`: packs its features, unless they are packed or must stay as they are."""
    if HANDLES not in vars(module.model):
        # Set after `unpad`. Wrappers such as torch.compile's and PEFT's call the backbone with its hooks.
        return None
    options = dict(kwargs)
    features: dict[str, Any] = args[0] if args else options.pop("features")
    call = module.modality_config[features.get("modality", "text")]
    if "cu_seq_lens_q" in features or call["method"] != "forward" or call["method_output_name"] not in _PACKED_OUTPUTS:
        return None
    given = {**features, **options}
    names = signature_of(type(module.model).forward).parameters
    _, packed = pack(module.model, (), {name: value for name, value in given.items() if name in names})
    packing = packing_of(packed)
    if packing is None and packed.get("attention_mask") is given.get("attention_mask") and CALLER not in packed:
        return None
    admit_packed_inputs(module)
    return (_SwappedFeatures({**given, **packed}, features, packing),), {}


def spread_features(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Forward hook of a `Transformer`, called after errors, too: pads outputs again, in the caller's features."""
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
