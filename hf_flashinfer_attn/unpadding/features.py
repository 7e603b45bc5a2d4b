"""Packing for modules of sentence-transformers, which call their model's `forward` without its hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .families import family_of
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
    """Features in place of the caller's, which are put in again afterwards.

    Args:
        features: What a `Transformer` is called with, and hands to its model.
        original: The caller's.
        packing: Where the tokens were, if they are packed; None for a batch without padding.
    """

    def __init__(self, features: dict[str, Any], original: dict[str, Any], packing: Packing | None) -> None:
        super().__init__(features)
        self.original = original
        self.packing = packing


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
    # A forward of somebody else may read the mask, or leave out what packed inputs have besides.
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


def pack_features(
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    pack: Callable[[Any, dict[str, Any]], tuple[dict[str, Any], Packing | None]],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the forward of a `Transformer`: packs its features, unless they are packed or have to stay as they are.

    Args:
        module: The `Transformer`.
        args: Its positional arguments.
        kwargs: Its arguments by name, of which all but the features override features.
        pack: Returns the inputs of a backbone as they are to be, and where tokens were in a batch that it packed.
    """
    options = dict(kwargs)
    features: dict[str, Any] = args[0] if args else options.pop("features")
    call = module.modality_config[features.get("modality", "text")]
    if "cu_seq_lens_q" in features or call["method"] != "forward" or call["method_output_name"] not in _PACKED_OUTPUTS:
        return None
    names = inspect.signature(type(module.model).forward).parameters
    given = {**features, **options}
    packed, packing = pack(module.model, {name: value for name, value in given.items() if name in names})
    is_as_before = packed.get("attention_mask") is given.get("attention_mask") and CALLER not in packed
    if packing is None and is_as_before:
        return None
    admit_packed_inputs(module)
    return (_SwappedFeatures({**given, **packed}, features, packing),), {}


def admit_packed_inputs(module: Any) -> None:
    """Makes a `Transformer` pass what packed inputs have besides the model's named arguments."""
    if module.model_forward_params is not None:
        # As its `unpad_inputs` does: what is not in there does not reach the model.
        module.model_forward_params |= _ADDED


def spread_features(module: Any, args: tuple[Any, ...], output: dict[str, Any]) -> dict[str, Any] | None:
    """After the forward of a `Transformer`: puts padding back, into the features that it was called with."""
    if not isinstance(output, _SwappedFeatures):
        return None
    features, packing = output.original, output.packing
    for name in (module.module_output_name, "all_layer_embeddings"):
        if name in output:
            features[name] = output[name] if packing is None else _spread(output[name], packing)
    return features


def _spread(packed: torch.Tensor | Iterable[torch.Tensor], packing: Packing) -> torch.Tensor | tuple[torch.Tensor, ...]:
    return packing.spread(packed) if isinstance(packed, torch.Tensor) else tuple(map(packing.spread, packed))
