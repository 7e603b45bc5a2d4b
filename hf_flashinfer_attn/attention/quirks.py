"""Per-class attention quirks: layers that read padding, pack images, or attend to another sequence."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

__all__ = [
    "CAUSAL_BY_MASK",
    "CAUSAL_PADDING_IS_READ",
    "FAILS_ON_MASKS",
    "PACKED_IMAGES",
    "READS_NEIGHBOURS",
    "is_one_of",
    "layer_name",
    "padded_queries_reason",
]

# Causal layers of models that read padded hidden states: Blt pools bytes into patches, DiffusionGemma's canvas attends
# to its prompt, and MiniMax M3 selects blocks of tokens.
CAUSAL_PADDING_IS_READ = frozenset({"BltSelfAttention", "DiffusionGemmaEncoderTextAttention", "MiniMaxM3VLAttention"})
# SigLIP's text tower pools the last position, even if it is padding. Recurrent layers carry padded hidden states on.
# Without a user mask, T5Gemma's encoder masks pad tokens itself, and its decoder attends to all of them.
_PADDING_IS_READ = frozenset(
    {
        "SiglipAttention", "Siglip2Attention", "RecurrentGemmaAttention", "RecurrentGemmaSdpaAttention",
        "T5GemmaSelfAttention", *CAUSAL_PADDING_IS_READ,
    }
)  # fmt: skip
# Model types, not layers: the encoder adds the mask to scores of another shape, and works only without a mask.
FAILS_ON_MASKS = frozenset({"autoformer"})
# Layers whose `is_causal` is wrong, for example in cross-attention; causal attention of these models has a mask.
CAUSAL_BY_MASK = frozenset(
    {"BridgeTowerSelfAttention", "IdeficsAttention", "KosmosTextAttention", "LightGlueAttention"}
)
# Embeddings that join each token with its neighbours.
READS_NEIGHBOURS = frozenset({"MobileBertSelfAttention"})
# Layers that take many images as one row; position_ids separate them.
PACKED_IMAGES = frozenset({"PixtralAttention"})
# Substrings of parameter names that belong to a layer's own sequence. Any other tensor may be another sequence.
_OWN_TENSORS = ("attention_mask", "position", "seqlen", "cache", "past", "freqs", "rotary", "value_embeds", "codebook")
_ANYTHING = frozenset(map(str, (inspect.Parameter.empty, Any, object, "Any", "object")))
# Layers that could take a second sequence, but never get one in these encoders.
_ENCODER_ONLY_LAYERS = frozenset(
    {
        "EsmSelfAttention", "HubertAttention", "SEWAttention", "UniSpeechAttention", "UniSpeechSatAttention",
        "Wav2Vec2Attention", "Data2VecAudioAttention", "MCTCTAttention",
    }
)  # fmt: skip


@functools.cache
def _names_of(layer: type) -> frozenset[str]:
    return frozenset(base.__name__ for base in layer.__mro__)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_one_of(layer: type, names: frozenset[str]) -> bool:
    """Whether a class or one of its bases has one of these names; copies of transformers' classes match too."""
    return not names.isdisjoint(_names_of(layer))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _reads_padding(layer: type) -> bool:
    # Conformers convolve over padding.
    names = _names_of(layer)
    return not names.isdisjoint(_PADDING_IS_READ) or any("Conformer" in name for name in names)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _second_sequence(layer: type, is_encoder: bool) -> str | None:
    return _parameter_of_second_sequence(layer, is_encoder)


@functools.cache
def _parameter_of_second_sequence(layer: type, is_encoder: bool) -> str | None:
    """Returns the parameter of a layer's forward that may be another sequence; None if there is none."""
    owner = next(base for base in layer.__mro__ if "forward" in vars(base))
    if is_encoder and owner.__module__.startswith("transformers.") and owner.__name__ in _ENCODER_ONLY_LAYERS:
        return None
    # `self` and the layer's input come first.
    for parameter in list(inspect.signature(vars(owner)["forward"]).parameters.values())[2:]:
        kind, annotation = parameter.kind, str(parameter.annotation)
        may_be_tensor = annotation in _ANYTHING or "Tensor" in annotation
        if kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not may_be_tensor:
            continue
        name = parameter.name
        if name != "mask" and not any(own in name for own in _OWN_TENSORS):
            return name
    return None


def padded_queries_reason(module: torch.nn.Module, *, is_causal: bool) -> str | None:
    """Returns why padded queries must be computed; None if no valid output can depend on them.

    Mask functions do not distinguish self-attention from cross-attention to a sequence of equal length. A layer that
    takes only its own sequence, or is causal, does self-attention. Some models read the hidden states of padding later.
    In doubt, padded queries are computed, which is slower but correct.
    """
    layer = type(module)
    config = getattr(module, "config", None)
    if _reads_padding(layer) or getattr(config, "add_adapter", False):
        why = "the model reads the hidden states of padding"
    elif config is not None and not hasattr(config, "vocab_size"):
        why = "a tower without a vocabulary may pool or convolve padding"
    elif is_causal:
        return None
    else:
        attends_across = getattr(config, "add_cross_attention", False) or getattr(config, "is_decoder", False)
        name = _second_sequence(layer, not attends_across)
        if name is None:
            return None
        why = f"{name} may be another sequence than the queries"
    return f"{layer.__name__} also computes padded queries: {why}"


def layer_name(module: torch.nn.Module) -> str:
    """Returns the name of a layer in traces: its class, and its index if it has one."""
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ if index is None else f"{type(module).__name__}[{index}]"
