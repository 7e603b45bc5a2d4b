"""What is known of attention layers by their class: which read padding, join tokens, or take another sequence."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

__all__ = [
    "CAUSAL_BY_MASK",
    "CAUSAL_PADDING_IS_READ",
    "FAILS_ON_MASKS",
    "PACKED_IMAGES",
    "READS_NEIGHBOURS",
    "layer_name",
    "padded_queries_are_idle",
]

# What the forward of an attention layer may take without attending to another sequence than its own.
_OWN_SEQUENCE = frozenset(
    {
        "self", "hidden_states", "attention_mask", "position_embeddings", "position_ids", "past_key_values",
        "layer_past", "use_cache", "output_attentions", "cu_seqlens", "max_seqlen", "mask", "position_bias", "kwargs",
        "relative_position_embeddings", "layer_idx", "cache_position", "value_embeds", "freqs_ci", "position_mask",
        "codebook_idx", "cycle_offset", "sliding_window", "rotary_pos_emb", "deterministic",
    }
)  # fmt: skip
# Padding included, Blt's bytes become patches, DiffusionGemma's prompt the keys of its canvas, and MiniMax M3's tokens
# the blocks that it chooses from.
CAUSAL_PADDING_IS_READ = frozenset({"BltSelfAttention", "DiffusionGemmaEncoderTextAttention", "MiniMaxM3VLAttention"})
# SigLIP's text tower pools the last position, padding or not; Conformers, and adapters on speech models, convolve over
# the hidden states of padding; recurrent layers carry them on. Without a mask from the user, T5Gemma's encoder masks
# its pad tokens by itself, and its decoder attends to all of them.
_PADDING_IS_READ = frozenset(
    {
        "SiglipAttention", "Siglip2Attention", "RecurrentGemmaAttention", "RecurrentGemmaSdpaAttention",
        "T5GemmaSelfAttention", *CAUSAL_PADDING_IS_READ,
    }
)  # fmt: skip
# Types of models, not layers: adds a mask to scores of another shape, as its encoder does only if it is given one.
FAILS_ON_MASKS = frozenset({"autoformer"})
# Say that they are causal where they are not, as in cross-attention; what is causal in these models has a mask.
CAUSAL_BY_MASK = frozenset(
    {"BridgeTowerSelfAttention", "IdeficsAttention", "KosmosTextAttention", "LightGlueAttention"}
)
# Its embeddings join each token with its neighbours.
READS_NEIGHBOURS = frozenset({"MobileBertSelfAttention"})
# Takes many images as one row, and tells them apart by positions.
PACKED_IMAGES = frozenset({"PixtralAttention"})
# Takes for a second sequence that these encoder-only models never give.
_SECOND_SEQUENCE = frozenset({"key_value_states", "encoder_hidden_states", "encoder_attention_mask"})
_ENCODER_ONLY_LAYERS = frozenset(
    {
        "EsmSelfAttention", "HubertAttention", "SEWAttention", "UniSpeechAttention", "UniSpeechSatAttention",
        "Wav2Vec2Attention", "Data2VecAudioAttention", "MCTCTAttention",
    }
)  # fmt: skip


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _takes_one_sequence(forward: Callable[..., Any], is_encoder_only: bool) -> bool:
    """Whether a layer's forward has no parameter by which another sequence could come in."""
    inputs = _parameters_of(forward)
    return (inputs - _SECOND_SEQUENCE if is_encoder_only else inputs) <= _OWN_SEQUENCE


@functools.cache
def _parameters_of(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def padded_queries_are_idle(module: torch.nn.Module) -> bool:
    """Whether nothing valid depends on the queries that a layer's padding mask calls padding, for certain.

    A mask function cannot tell cross-attention to a sequence of equal length from self-attention; a layer that takes
    nothing but its own hidden states can only be the latter. And some models read the hidden states of padding later.
    Where in doubt, padded queries are kept: slower, right.
    """
    layer = type(module)
    name = layer.__name__
    if (
        name in _PADDING_IS_READ
        or "Conformer" in name
        or getattr(getattr(module, "config", None), "add_adapter", False)
    ):
        return False
    config: PreTrainedConfig | None = getattr(module, "config", None)
    if config is not None and not hasattr(config, "vocab_size"):
        # Vision towers and codecs pool, shuffle and convolve padding too.
        return False
    attends_across = getattr(config, "add_cross_attention", False) or getattr(config, "is_decoder", False)
    alone: bool = _takes_one_sequence(layer.forward, name in _ENCODER_ONLY_LAYERS and not attends_across)
    return alone


def layer_name(module: torch.nn.Module) -> str:
    """Returns what to call a layer in a trace: its class, and its number where it has one."""
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ if index is None else f"{type(module).__name__}[{index}]"
