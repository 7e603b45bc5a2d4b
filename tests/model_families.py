"""Tiny random-weight models of many families: what the parity tests run attn_implementation="flashinfer" on.

A `Family` builds its model from a config, without network, with weights that make attention matter.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any

import torch
import transformers
from packaging.version import Version
from paired_models import TRANSFORMERS_VERSION, implementations_in_use, random_model
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["FAMILIES", "Example", "Family", "Padding", "build_model", "find_class", "implementations_in_use"]

BATCH_SIZE, SEQUENCE_LENGTH, SHORT_LENGTH = 4, 13, 7
RIGHT_LENGTHS = (13, 9, 7, 11)
# Valid in every row of every padding case, so that a model that pools at its end-of-sequence token finds it there.
ALWAYS_VALID = 6
PAD, BOS, EOS, VOCAB_SIZE = 1, 2, 3, 96
IMAGE_TOKEN = VOCAB_SIZE - 2
TOKEN_IDS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip


class Padding(str, Enum):
    """Which positions of a batch hold padding."""

    NO_MASK = "no-mask"
    RIGHT = "right"
    LEFT = "left"
    HOLES = "holes"
    BATCH_OF_ONE = "batch-of-1"

    @property
    def batch_size(self) -> int:
        return 1 if self is Padding.BATCH_OF_ONE else BATCH_SIZE


class Valid(Enum):
    """Where an output of a model is defined, given a padding mask."""

    TOKENS = "positions that hold a token"
    FIRST = "rows whose first position holds a token"
    ROWS = "everywhere"
    DECODER = "positions of the decoder that hold a token"


@dataclass(frozen=True)
class Example:
    """Random inputs of one forward."""

    # Keyword arguments, masks aside.
    inputs: dict[str, Tensor]
    # Padding masks, by keyword argument; int64, 1 where a token is.
    masks: dict[str, Tensor] = field(default_factory=dict)
    # Per output, which of its leading positions are defined; those of an output not named here all are.
    valid: dict[str, Tensor] = field(default_factory=dict)

    def without_padding(self) -> Example:
        """The same inputs, with masks that call every position valid."""
        return Example(self.inputs, {name: torch.ones_like(mask) for name, mask in self.masks.items()}, self.valid)


@dataclass(frozen=True)
class Draw:
    """Draws the tensors of one batch, for a config and a padding case."""

    config: PreTrainedConfig
    generator: torch.Generator
    padding: Padding

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.padding.batch_size, *shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, (self.padding.batch_size, *shape), generator=self.generator)

    def mask(self, length: int = SEQUENCE_LENGTH, *, causal: bool = False) -> Tensor | None:
        """A padding mask, int64, `(batch, length)`; a causal model sees none on the right, so one row has it left."""
        if self.padding is Padding.NO_MASK:
            return None
        if self.padding is Padding.HOLES:
            mask = torch.rand(BATCH_SIZE, length, generator=self.generator) < 0.6
            # Each row has a token and a hole, whatever the draw.
            mask[:, min(ALWAYS_VALID, length - 1)] = True
            mask[:, ALWAYS_VALID - 2] = False
            mask[1, 0] = mask[2, -1] = True
            return mask.long()
        is_one = self.padding is Padding.BATCH_OF_ONE
        lengths = torch.tensor([length - 4] if is_one else RIGHT_LENGTHS)
        mask = prefix(length, lengths if is_one else (lengths - SEQUENCE_LENGTH + length).clamp(min=2))
        return mask.flip(1) if self.padding is Padding.LEFT or (is_one and causal) else mask

    def tokens(self, length: int = SEQUENCE_LENGTH, mask: Tensor | None = None) -> Tensor:
        tokens = self.integers(8, VOCAB_SIZE - 6, length)
        if length > ALWAYS_VALID:
            tokens[:, ALWAYS_VALID] = EOS
        return tokens if mask is None else tokens.masked_fill(mask == 0, PAD)


Frames = Callable[[Tensor], Tensor]
# Keyword arguments, padding masks by keyword argument, and where the tokens of the first output are; None for no mask.
Drawn = tuple[dict[str, Tensor], dict[str, "Tensor | None"], "Tensor | None"]


@dataclass(frozen=True)
class Family:
    """One model class with a tiny config, made from settings or by a function."""

    name: str
    model_class: str  # in transformers
    settings: dict[str, Any] | Callable[[], PreTrainedConfig]
    kind: str  # of input: "text", "pixels", "audio", "encoder-decoder", ...
    draw: Callable[[Draw], Drawn]
    outputs: Mapping[str, Valid]  # to compare, and where they are defined
    paddings: tuple[Padding, ...] = (Padding.NO_MASK,)  # that apply
    # Cases where padding is out of every valid query's sight even without a mask.
    harmless: frozenset[Padding] = frozenset()
    # Whether attention goes through transformers' attention interface, and from which version on.
    uses_interface: bool = True
    interface_since: str = "5.5"
    # Before this version, the family looks implementations up in a dictionary of its own.
    takes_names_since: str = "5.5"
    since: str = "5.5"
    reference: str = "eager"  # the implementation that defines the right answer
    weight_scale: float = 1.0  # of random weights, for families whose activations would explode

    @property
    def is_in_this_transformers(self) -> bool:
        return is_since(self.since)

    @property
    def takes_any_name(self) -> bool:
        return is_since(self.takes_names_since)

    @property
    def is_on_the_interface(self) -> bool:
        return self.uses_interface and is_since(self.interface_since)

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    def make_config(self) -> PreTrainedConfig:
        if callable(self.settings):
            return self.settings()
        made: PreTrainedConfig = find_class(self.model_class).config_class(**self.settings)
        return made

    def make_inputs(self, config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
        inputs, masks, tokens = self.draw(Draw(config, generator, padding))
        sides = {Valid.TOKENS: tokens, Valid.DECODER: masks.get("decoder_attention_mask")}
        sides[Valid.FIRST] = None if tokens is None else tokens[:, 0]
        known = {name: sides.get(where) for name, where in self.outputs.items()}
        valid = {name: side.bool() for name, side in known.items() if side is not None}
        return Example(inputs, {name: mask for name, mask in masks.items() if mask is not None}, valid)


def is_since(version: str) -> bool:
    return Version(version) <= TRANSFORMERS_VERSION


def build_model(family: Family, attn_implementation: str) -> PreTrainedModel:
    """Builds a model in eval mode; two calls with different implementations give identical weights."""
    model_class = find_class(family.model_class)
    return random_model(model_class, family.make_config(), attn_implementation, family.seed, family.weight_scale)


def find_class(name: str) -> Any:
    """Resolves "BertModel", or "whisper.WhisperEncoder" for a class that transformers does not export."""
    package, _, class_name = name.rpartition(".")
    if not package:
        return getattr(transformers, name)
    file = "configuration" if name.endswith("Config") else "modeling"
    return getattr(importlib.import_module(f"transformers.models.{package}.{file}_{package}"), class_name)


def prefix(width: int, lengths: Tensor) -> Tensor:
    return (torch.arange(width)[None] < lengths[:, None]).long()


def text_inputs(
    draw: Draw,
    *,
    causal: bool = False,
    position_ids: bool = False,
    extra: Callable[[Draw], dict[str, Tensor]] = lambda draw: {},
) -> Drawn:
    mask = draw.mask(causal=causal)
    inputs = {"input_ids": draw.tokens(mask=mask), **extra(draw)}
    if position_ids and mask is not None:
        # As `generate` numbers them.
        inputs["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    return inputs, {"attention_mask": mask}, mask


def random_boxes(draw: Draw) -> dict[str, Tensor]:
    corners = draw.integers(0, 28, SEQUENCE_LENGTH, 2)
    return {"bbox": torch.cat([corners, corners + draw.integers(1, 4, SEQUENCE_LENGTH, 2)], dim=-1)}


def encoder_decoder_inputs(draw: Draw, *, decoder_length: int = SEQUENCE_LENGTH) -> Drawn:
    """Token ids of both sides, each padded in its own way: a decoder must not borrow its encoder's padding."""
    mask = draw.mask()
    # The decoder is whole where the encoder is padded on the right, as in translation.
    of_decoder = {Padding.LEFT: Padding.RIGHT, Padding.HOLES: Padding.LEFT}.get(draw.padding, Padding.NO_MASK)
    decoder_mask = replace(draw, padding=of_decoder).mask(decoder_length)
    tokens, decoder_tokens = draw.tokens(mask=mask), draw.tokens(decoder_length, decoder_mask)
    masks = {"attention_mask": mask, "decoder_attention_mask": decoder_mask}
    return {"input_ids": tokens, "decoder_input_ids": decoder_tokens}, masks, mask


def pixel_inputs(
    draw: Draw, *, shape: tuple[int, ...] = (3, 32, 32), name: str = "pixel_values", **extra: Tensor
) -> Drawn:
    return {name: draw.normal(*shape), **extra}, {}, None


def box_inputs(draw: Draw) -> Drawn:
    """Boxes of a page, whose pairwise order is asked for: rows and columns of the output are boxes."""
    mask, corners = draw.mask(), draw.integers(0, 400, SEQUENCE_LENGTH, 2)
    sizes = draw.integers(1, 400, SEQUENCE_LENGTH, 2)
    inputs = {"boxes": torch.cat([corners, corners + sizes], -1).float()}
    if mask is None:
        return {**inputs, "mask": torch.ones(corners.shape[:2], dtype=torch.long)}, {}, None
    return inputs, {"mask": mask}, mask[:, :, None] * mask[:, None]


def patch_mask_inputs(draw: Draw, *, name: str = "patch_attention_mask", pixels_per_entry: int = 1) -> Drawn:
    """Images of 32 x 32 in patches of 8 x 8, where a mask tells which part of the frame each image fills."""
    pixels = draw.normal(3, 32, 32)
    if draw.padding is Padding.NO_MASK:
        return {"pixel_values": pixels}, {}, None
    sizes = torch.tensor([(4, 4), (3, 4), (4, 2), (2, 3)] if draw.padding is Padding.RIGHT else [(3, 2)])
    rows, columns = torch.arange(4)[None, :, None], torch.arange(4)[None, None, :]
    mask = (rows < sizes[:, :1, None]) & (columns < sizes[:, 1:, None])
    entries = mask.repeat_interleave(pixels_per_entry, 1).repeat_interleave(pixels_per_entry, 2)
    return {"pixel_values": pixels}, {name: entries}, mask.flatten(1)


def naflex_inputs(draw: Draw) -> Drawn:
    """Flattened patches of images with different aspect ratios, padded on the right."""
    shapes = [(4, 4), (3, 4), (2, 4), (5, 3)] if draw.padding is Padding.RIGHT else [(3, 4)]
    shapes = torch.tensor([(4, 4)] * BATCH_SIZE if draw.padding is Padding.NO_MASK else shapes)
    mask = prefix(16, shapes.prod(-1))
    return {"pixel_values": draw.normal(16, 48), "spatial_shapes": shapes}, {"pixel_attention_mask": mask}, mask


def grid_pixel_inputs(draw: Draw) -> Drawn:
    """Patches of two images one after another, as the vision towers of the Qwen-VL family take them."""
    grid, config = torch.tensor([[1, 4, 4], [1, 2, 6]]), draw.config
    size = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(int(grid.prod(-1).sum()), size, generator=draw.generator)
    return {"hidden_states": pixels, "grid_thw": grid}, {}, None


def halved(lengths: Tensor) -> Tensor:
    """Length after a convolution with kernel 3, stride 2 and padding 1."""
    return (lengths - 1) // 2 + 1


def moonshine_frames(lengths: Tensor) -> Tensor:
    # It looks at every 384th sample of the mask; the convolutions have fewer frames for it than that.
    return ((lengths + 383) // 384).clamp(max=11)


def audio_inputs(draw: Draw, *, samples: int = 60, frames: Frames = lambda lengths: lengths) -> Drawn:
    """Raw audio, `input_values`; padding is silence that the front end shortens along with the sound."""
    audio, mask, config = draw.normal(samples), draw.mask(), draw.config
    if mask is None:
        return {"input_values": audio}, {}, None
    lengths, total = mask.sum(-1) * samples // SEQUENCE_LENGTH, torch.tensor([samples])
    sample_mask = prefix(samples, lengths)
    for kernel, stride in zip(getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ()), strict=True):
        lengths, total = (lengths - kernel) // stride + 1, (total - kernel) // stride + 1
    valid = prefix(int(frames(total)), frames(lengths))
    return {"input_values": audio * sample_mask}, {"attention_mask": sample_mask}, valid


def feature_inputs(draw: Draw, *, length: int = SEQUENCE_LENGTH, frames: Frames = lambda lengths: lengths) -> Drawn:
    """Filter-bank features, shape `(batch, length, 16)`."""
    features, mask = draw.normal(length, 16), draw.mask(length)
    valid = None if mask is None else prefix(int(frames(torch.tensor([length]))), frames(mask.sum(-1)))
    return {"input_features": features}, {"attention_mask": mask}, valid


def speech_with_text_inputs(draw: Draw) -> Drawn:
    """Padded features for the encoder, and token ids without padding for the decoder."""
    # Two convolutions with stride 2: as many encoder states as decoder tokens.
    inputs, masks, valid = feature_inputs(draw, length=4 * SEQUENCE_LENGTH, frames=lambda full: halved(halved(full)))
    return {**inputs, "decoder_input_ids": draw.tokens()}, masks, valid


def speech_to_text_inputs(draw: Draw) -> Drawn:
    """Features for the encoder, which knows no padding, and token ids for the decoder."""
    mask = draw.mask(causal=True)
    inputs = {"input_features": draw.normal(16, 24), "decoder_input_ids": draw.tokens(mask=mask)}
    return inputs, {"decoder_attention_mask": mask}, None


def qformer_inputs(draw: Draw) -> Drawn:
    """As many learned queries as there are padded image features, which no mask can tell from self-attention."""
    mask = draw.mask()
    queries = draw.normal(SEQUENCE_LENGTH, draw.config.hidden_size)
    features = draw.normal(SEQUENCE_LENGTH, draw.config.encoder_hidden_size)
    inputs = {"query_embeds": queries, "encoder_hidden_states": features}
    return inputs, {"encoder_attention_mask": mask}, None


def image_text_inputs(draw: Draw, *, image_tokens: int, kinds: bool = False) -> Drawn:
    """An image inside a prompt that is padded on the left."""
    length = image_tokens + 9
    mask = draw.mask(length, causal=True)
    tokens = draw.tokens(length, mask)
    tokens[:, length - image_tokens - 2 : length - 2] = IMAGE_TOKEN
    inputs = {"input_ids": tokens, "pixel_values": draw.normal(3, 32, 32)}
    if kinds:
        inputs["token_type_ids"] = (tokens == IMAGE_TOKEN).long()
    return inputs, {"attention_mask": torch.ones_like(tokens) if mask is None else mask}, mask


def two_tower_inputs(draw: Draw, *, causal: bool = False) -> Drawn:
    inputs, masks, tokens = text_inputs(draw, causal=causal)
    return {**inputs, "pixel_values": draw.normal(3, 32, 32)}, masks, tokens


def image_prefix_inputs(draw: Draw, *, image_tokens: int) -> Drawn:
    """Kosmos' text after an image, whose places a mask of its own tells."""
    inputs, masks, tokens = two_tower_inputs(draw, causal=True)
    is_image = torch.zeros_like(inputs["input_ids"])
    is_image[:, ALWAYS_VALID - image_tokens : ALWAYS_VALID] = 1
    return {**inputs, "image_embeds_position_mask": is_image}, masks, tokens


EVERY_PADDING = tuple(Padding)
LEFT_PADDING = (Padding.NO_MASK, Padding.LEFT, Padding.BATCH_OF_ONE)
# Audio front ends count the samples of a row and take them for a prefix.
PREFIX_PADDING = (Padding.NO_MASK, Padding.RIGHT, Padding.BATCH_OF_ONE)
# What is padded on the left has no first token to pool.
FIRST_PADDING = tuple(case for case in Padding if case is not Padding.LEFT)
# Before 5.15 state-space layers ignore the mask of a single row, and take in whatever attention left in its padding.
HYBRID_PADDING = EVERY_PADDING if is_since("5.15") else EVERY_PADDING[:-1]
# Before 5.18 every implementation gives NaN for padded input.
PARAKEET_PADDING = PREFIX_PADDING if is_since("5.18") else (Padding.NO_MASK,)
# A causal query does not see what comes after it; but before 5.15 the scan of Zamba2 does.
CAUSAL_HARMLESS = frozenset({Padding.RIGHT})
ZAMBA2_HARMLESS: frozenset[Padding] = CAUSAL_HARMLESS if is_since("5.15") else frozenset()
# Its eager attention adds a bool mask, 0 and 1, to the logits, and so attends to padding.
SEAMLESS_V2_REFERENCE = "sdpa" if is_since("5.16") else "eager"
# T5 does not scale its logits: smaller weights keep them from blowing up the rounding errors of both sides.
UNSCALED = 0.7

TOKENS_ONLY = {"last_hidden_state": Valid.TOKENS}
TOKENS_AND_FIRST = {"last_hidden_state": Valid.TOKENS, "pooler_output": Valid.FIRST}
# SigLIP pools its last position, which is padding in all but the longest text: so it was trained. CLIP pools at EOS.
TOKENS_AND_ROWS = {"last_hidden_state": Valid.TOKENS, "pooler_output": Valid.ROWS}
WHOLE = {"last_hidden_state": Valid.ROWS}
WHOLE_AND_POOLED = {"last_hidden_state": Valid.ROWS, "pooler_output": Valid.ROWS}
ROW_LOGITS, TOKEN_LOGITS = {"logits": Valid.ROWS}, {"logits": Valid.TOKENS}
BOTH_SIDES = {"last_hidden_state": Valid.DECODER, "encoder_last_hidden_state": Valid.TOKENS}
EMBEDDINGS = {"text_embeds": Valid.ROWS, "image_embeds": Valid.ROWS}

encoder = partial(Family, kind="text", draw=text_inputs, outputs=TOKENS_ONLY, paddings=EVERY_PADDING)
BOXED = partial(text_inputs, extra=random_boxes)
pooled = partial(encoder, outputs=TOKENS_AND_FIRST)
decoder = partial(encoder, draw=partial(text_inputs, causal=True, position_ids=True), harmless=CAUSAL_HARMLESS)
unnumbered = partial(decoder, draw=partial(text_inputs, causal=True))
two_sided = partial(
    Family, kind="encoder-decoder", draw=encoder_decoder_inputs, outputs=BOTH_SIDES, paddings=EVERY_PADDING
)
vision = partial(Family, kind="pixels", draw=pixel_inputs, outputs=WHOLE_AND_POOLED)
audio = partial(Family, kind="audio", draw=audio_inputs, outputs=TOKENS_ONLY, paddings=PREFIX_PADDING)
both = partial(Family, kind="text and pixels", outputs=TOKENS_ONLY, paddings=LEFT_PADDING)


def all_of(families: Iterable[Family], **about: Any) -> tuple[Family, ...]:
    return tuple(replace(family, **about) for family in families)


def with_heads(base: Family) -> tuple[Family, ...]:
    """An encoder, and the classifiers of its sequences and tokens."""
    name, prefix = base.name.removesuffix("-rotary"), base.model_class.removesuffix("Model")
    classifiers = (
        replace(base, name=f"{name}-{kind}-classification", model_class=f"{prefix}For{kind.title()}Classification",
            outputs={"logits": where}, paddings=paddings)
        for kind, where, paddings in (("sequence", Valid.FIRST, FIRST_PADDING), ("token", Valid.TOKENS, EVERY_PADDING))
    )  # fmt: skip
    return base, *classifiers


def tiny(heads: int = 2, width: int = 16, **settings: Any) -> dict[str, Any]:
    """Settings that most configs share."""
    sizes = {"hidden_size": heads * width, "num_attention_heads": heads, "intermediate_size": 64}
    return {"num_hidden_layers": 2, **sizes, **settings}


def text(heads: int = 2, width: int = 16, **settings: Any) -> dict[str, Any]:
    return tiny(heads, width, **{**TOKEN_IDS, "max_position_embeddings": 64, **settings})


def llama(heads: int = 4, width: int = 8, **settings: Any) -> dict[str, Any]:
    return text(heads, width, **{"num_key_value_heads": 2, **settings})


def gpt(heads: int = 2, width: int = 16, **settings: Any) -> dict[str, Any]:
    return {**TOKEN_IDS, "n_embd": heads * width, "n_layer": 2, "n_head": heads, "n_positions": 64, **settings}


def bart(heads: int = 2, width: int = 16, **settings: Any) -> dict[str, Any]:
    sides = {"layers": 2, "attention_heads": heads, "ffn_dim": 64}
    shared = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    shared |= {**TOKEN_IDS, "d_model": heads * width, "max_position_embeddings": 64, "decoder_start_token_id": EOS}
    return shared | settings


def t5(width: int = 16, **settings: Any) -> dict[str, Any]:
    sizes = {"d_model": 64, "d_kv": width, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return {**TOKEN_IDS, **sizes, "decoder_start_token_id": PAD, **settings}


def square(heads: int = 2, width: int = 16, **settings: Any) -> dict[str, Any]:
    return tiny(heads, width, **{"image_size": 32, "patch_size": 8, **settings})


def wave(heads: int = 2, width: int = 16, **settings: Any) -> dict[str, Any]:
    return tiny(heads, width, **STEPS, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **settings)


def gemma(heads: int = 4, width: int = 8, head_dim: int = 16, **settings: Any) -> dict[str, Any]:
    """Windows in the first of two layers."""
    return llama(heads, width, head_dim=head_dim, query_pre_attn_scalar=head_dim, **{**WINDOWS, **settings})


def t5gemma(*, is_encoder_decoder: bool = True) -> PreTrainedConfig:
    side = transformers.T5GemmaModuleConfig(**gemma(attn_logit_softcapping=2.0, sliding_window=4))
    made = transformers.T5GemmaConfig(encoder=side.to_dict(), decoder=side.to_dict(), **TOKEN_IDS)
    made.is_encoder_decoder = is_encoder_decoder
    return made


def blt() -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    level = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 64, "rope_parameters": rope,
    }  # fmt: skip
    made: PreTrainedConfig = transformers.BltConfig(
        vocab_size=VOCAB_SIZE, patch_in_forward=False, patch_size=4, cross_attn_k=2, tie_word_embeddings=False,
        encoder_hash_byte_group_size=[2, 3], encoder_hash_byte_group_vocab=64, encoder_hash_byte_group_nb_functions=1,
        patcher_config=level, encoder_config=level, global_config={**level, "hidden_size": 64}, rope_parameters=rope,
        decoder_config={**level, "vocab_size": VOCAB_SIZE, "hidden_size_global": 64},
    )  # fmt: skip
    # Asked for by the cache.
    made.num_hidden_layers = 1
    return made


def bert_to_bert() -> PreTrainedConfig:
    sides = (
        transformers.BertConfig(**text()),
        transformers.BertConfig(**text(is_decoder=True, add_cross_attention=True)),
    )
    return transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        *sides, pad_token_id=PAD, decoder_start_token_id=BOS
    )


WINDOWS: dict[str, Any] = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
WIDER_WINDOWS: dict[str, Any] = WINDOWS | {"sliding_window": 6}
MAMBA: dict[str, Any] = {"mamba_d_state": 8, "mamba_chunk_size": 8}
STEPS = {"conv_dim": (32, 32), "conv_kernel": (4, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
PAGE = {"coordinate_size": 12, "shape_size": 12, "max_2d_position_embeddings": 32, "input_size": 32}
RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage2"],
}  # fmt: skip
DETR: dict[str, Any] = {
    "use_timm_backbone": False, "backbone": None, "backbone_config": RESNET, "d_model": 32, "num_queries": 5,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
ENCODER_TOKENS = {"last_hidden_state": Valid.ROWS, "encoder_last_hidden_state": Valid.TOKENS}
DETR_INPUTS = partial(patch_mask_inputs, name="pixel_mask", pixels_per_entry=8)
CONFORMER = {"feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3}
NEAR = {"left_max_position_embeddings": 4, "right_max_position_embeddings": 3}
SEAMLESS: dict[str, Any] = {
    "hidden_size": 32, "speech_encoder_layers": 2, "speech_encoder_attention_heads": 2,
    "speech_encoder_intermediate_size": 64, "num_adapter_layers": 1, "adaptor_kernel_size": 3, "adaptor_stride": 2,
    "max_source_positions": 32, **CONFORMER, **NEAR,
}  # fmt: skip
HALVED = partial(feature_inputs, frames=halved)
WHISPER = bart(num_mel_bins=16, max_source_positions=12, max_target_positions=32)
CLIPS = partial(pixel_inputs, shape=(2, 3, 32, 32))
QWEN_VISION: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4}
WIDE = {"hidden_size": 64, "out_hidden_size": 32, "intermediate_size": 64}
KOSMOS_TEXT = {
    **TOKEN_IDS, "embed_dim": 32, "layers": 2, "attention_heads": 2, "ffn_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip

# fmt: off
TEXT_ENCODERS = (
    *with_heads(pooled("bert", "BertModel", text(2, 32, num_labels=3))),
    *with_heads(pooled("roberta", "RobertaModel", text(4, 8, num_labels=3))),
    *with_heads(pooled("xlm-roberta", "XLMRobertaModel", text(2, 24, num_labels=3))),
    *with_heads(pooled("camembert", "CamembertModel", text(num_labels=3))),
    *with_heads(pooled("albert", "AlbertModel", text(2, 24, embedding_size=16, num_labels=3))),
    *with_heads(pooled("esm-rotary", "EsmModel",
        text(4, 8, position_embedding_type="rotary", mask_token_id=4, num_labels=3))),
    *with_heads(encoder("electra", "ElectraModel", text(4, 16, embedding_size=32, num_labels=3))),
    *with_heads(encoder("eurobert", "EuroBertModel", llama(4, 16, mask_token_id=4, num_labels=3))),
    *with_heads(encoder("modernbert", "ModernBertModel",
        text(2, 32, local_attention=6, cls_token_id=BOS, sep_token_id=EOS, num_labels=3))),
    *with_heads(encoder("distilbert", "DistilBertModel", {**TOKEN_IDS, "max_position_embeddings": 64, "dim": 48,
        "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "num_labels": 3})),
    pooled("esm-absolute", "EsmModel", text(2, 24, mask_token_id=4)),
    encoder("nomic-bert", "NomicBertModel", text(2, 32)),
    pooled("jina-v3", "JinaEmbeddingsV3Model", text(4, 16)),
    pooled("mobilebert", "MobileBertModel", text(4, 8, embedding_size=16, intra_bottleneck_size=32), weight_scale=0.5),
    pooled("ernie", "ErnieModel", text(4, 8)),
    pooled("data2vec-text", "Data2VecTextModel", text()),
    pooled("roberta-prelayernorm", "RobertaPreLayerNormModel", text(2, 24)),
    pooled("xlm-roberta-xl", "XLMRobertaXLModel", text(2, 32)),
    pooled("xmod", "XmodModel", text(4, 8, languages=("en_XX", "de_DE"), default_language="en_XX")),
    encoder("bert-generation", "BertGenerationEncoder", text()),
    pooled("layoutlm", "LayoutLMModel", text(2, 24, max_2d_position_embeddings=32), draw=BOXED),
    pooled("markuplm", "MarkupLMModel", text(max_depth=4, xpath_unit_hidden_size=8)),
    pooled("roc-bert", "RoCBertModel", text(enable_pronunciation=False, enable_shape=False)),
    encoder("splinter", "SplinterModel", text(4, 8)),
    encoder("dpr-question", "DPRQuestionEncoder", text(), outputs={"pooler_output": Valid.FIRST},
        paddings=FIRST_PADDING),
    encoder("siglip-text", "SiglipTextModel", text(4, 8), outputs=TOKENS_AND_ROWS),
    encoder("siglip2-text", "Siglip2TextModel", text(2, 24), outputs=TOKENS_AND_ROWS),
    pooled("altclip-text", "AltCLIPTextModel", text(project_dim=16), takes_names_since="5.6"),
    pooled("chinese-clip-text", "ChineseCLIPTextModel", text()),
    pooled("align-text", "AlignTextModel", text()),
    pooled("clap-text", "ClapTextModel", text()),
    pooled("bridgetower-text", "bridgetower.BridgeTowerTextModel", text()),
    encoder("embedding-gemma", "Gemma3TextModel",
        gemma(4, 16, 32, num_key_value_heads=1, use_bidirectional_attention=True, **WIDER_WINDOWS)),
    encoder("esmc", "EsmcModel", text(), since="5.16"),
    encoder("gte", "GteModel", text(2, 32), since="5.18"),
    encoder("ultrabert", "UltrabertModel", llama(4, 16, **WIDER_WINDOWS), since="5.20"),
    encoder("embedding-gemma2", "EmbeddingGemma2TextModel",
        llama(4, 16, head_dim=16, hidden_size_per_layer_input=16, embedding_dim=32, **WIDER_WINDOWS), since="5.19"),
    encoder("neomme", "NeoMMEModel", tiny(4, 16, vocab_size=VOCAB_SIZE, embedding_rank=16, num_key_value_heads=2,
        head_dim=16, patch_size=8, embedding_dim=16, pad_token_id=PAD, sliding_window=6), since="5.17"),
    encoder("t5gemma-encoder", "T5GemmaEncoderModel", partial(t5gemma, is_encoder_decoder=False)),
    *all_of((
        encoder("t5-encoder", "T5EncoderModel", t5()),
        encoder("mt5-encoder", "MT5EncoderModel", t5(24)),
        encoder("umt5-encoder", "UMT5EncoderModel", t5()),
        encoder("t5-token-classification", "T5ForTokenClassification", t5(num_labels=3), outputs=TOKEN_LOGITS),
    ), interface_since="5.15"),
    encoder("bert-masked-lm", "BertForMaskedLM", text(2, 32, num_labels=3), outputs=TOKEN_LOGITS),
    *all_of((
        encoder("modernbert-mean-pooling", "ModernBertForSequenceClassification", text(2, 32, local_attention=6,
            cls_token_id=BOS, sep_token_id=EOS, classifier_pooling="mean", num_labels=3)),
        encoder("eurobert-mean-pooling", "EuroBertForSequenceClassification",
            text(classifier_pooling="mean", mask_token_id=4, num_labels=3)),
        encoder("eurobert-late-pooling", "EuroBertForSequenceClassification",
            text(classifier_pooling="late", mask_token_id=4, num_labels=3)),
        encoder("bart-sequence-classification", "BartForSequenceClassification", bart(4, 8, num_labels=3)),
        decoder("gpt2-sequence-classification", "GPT2ForSequenceClassification", gpt(2, 24, num_labels=3)),
        decoder("llama-sequence-classification", "LlamaForSequenceClassification", llama(4, 16, num_labels=3)),
        decoder("qwen3-sequence-classification", "Qwen3ForSequenceClassification", llama(4, 16, num_labels=3)),
    ), outputs=ROW_LOGITS),
)

OFF_INTERFACE = all_of((
    pooled("mpnet", "MPNetModel", text()),
    encoder("deberta-v2", "DebertaV2Model", text(**RELATIVE)),
    encoder("deberta", "DebertaModel", text(**RELATIVE)),
    pooled("longformer", "LongformerModel", text(attention_window=4)),
    pooled("rembert", "RemBertModel", text(2, 24, input_embedding_size=16)),
    encoder("roformer", "RoFormerModel", text(embedding_size=16)),
    pooled("megatron-bert", "MegatronBertModel", text(2, 32)),
    encoder("convbert", "ConvBertModel", text(4, 16, embedding_size=16)),
    pooled("lilt", "LiltModel", text(2, 24, max_2d_position_embeddings=32, channel_shrink_ratio=2), draw=BOXED),
    pooled("big-bird", "BigBirdModel", text(attention_type="block_sparse", block_size=4, num_random_blocks=1)),
    pooled("ibert", "IBertModel", text()),
    pooled("squeezebert", "SqueezeBertModel", text(embedding_size=32, q_groups=2, k_groups=2, v_groups=2,
        post_attention_groups=1, intermediate_groups=2, output_groups=2)),
    encoder("nystromformer", "NystromformerModel", text(num_landmarks=13, segment_means_seq_len=13)),
    pooled("bros", "BrosModel", text(dim_bbox=4), draw=BOXED),
    pooled("visual-bert", "VisualBertModel", text(visual_embedding_dim=16)),
    encoder("xlnet", "XLNetModel", {**TOKEN_IDS, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}),
    encoder("flaubert", "FlaubertModel", {"vocab_size": VOCAB_SIZE, "emb_dim": 32, "n_layers": 2, "n_heads": 2,
        "pad_index": PAD, "max_position_embeddings": 64}),
    pooled("tapas", "TapasModel", text()),
    pooled("canine", "CanineModel", text(local_transformer_stride=4, num_hash_buckets=64)),
    pooled("blip-text", "BlipTextModel", text(encoder_hidden_size=32)),
    pooled("luke", "LukeModel", text(entity_vocab_size=16, entity_emb_size=16)),
    unnumbered("bloom", "BloomModel", {**TOKEN_IDS, "hidden_size": 32, "n_layer": 2, "n_head": 2}),
    unnumbered("mpt", "MptModel",
        {"vocab_size": VOCAB_SIZE, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}),
    decoder("xglm", "XGLMModel", {**TOKEN_IDS, "max_position_embeddings": 64, "d_model": 32, "num_layers": 2,
        "attention_heads": 2, "ffn_dim": 64}),
    two_sided("mvp", "MvpModel", bart()),
    two_sided("led", "LEDModel",
        bart(attention_window=4, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64)),
    vision("blip-vision", "BlipVisionModel", square()),
    audio("wavlm", "WavLMModel", wave(num_buckets=8, max_bucket_distance=16)),
    audio("sew-d", "SEWDModel", wave(squeeze_factor=2)),
), uses_interface=False)

DECODERS = (
    decoder("llama", "LlamaModel", llama(4, 16)),
    decoder("mistral-sliding", "MistralModel", llama(4, 16, sliding_window=5)),
    decoder("mistral-full", "MistralModel", llama(4, 16, head_dim=8, sliding_window=None)),
    decoder("qwen2", "Qwen2Model", llama(2, 24)),
    decoder("qwen2-sliding", "Qwen2Model",
        llama(2, 24, use_sliding_window=True, max_window_layers=1, sliding_window=5)),
    decoder("qwen3", "Qwen3Model", llama(4, 16)),
    encoder("qwen3-bidirectional", "Qwen3Model", llama(4, 16, is_causal=False)),
    decoder("qwen3-moe", "Qwen3MoeModel", llama(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)),
    decoder("mixtral", "MixtralModel", llama(num_local_experts=4, sliding_window=5)),
    decoder("gemma", "GemmaModel", text(num_key_value_heads=1, head_dim=32)),
    decoder("gemma2", "Gemma2Model", gemma(4, 16, attn_logit_softcapping=2.0)),
    decoder("gemma3-text", "Gemma3TextModel", gemma()),
    decoder("vaultgemma", "VaultGemmaModel", gemma(4, 8, 8, attn_logit_softcapping=2.0)),
    decoder("olmo", "OlmoModel", llama(2, 16)),
    decoder("olmo2", "Olmo2Model", llama(2, 32)),
    decoder("olmo3", "Olmo3Model", llama(2, 16, **WINDOWS)),
    decoder("phi", "PhiModel", llama(2, 32)),
    decoder("phi3", "Phi3Model", llama(sliding_window=5)),
    decoder("gpt2", "GPT2Model", gpt(2, 24)),
    decoder("gpt-neox", "GPTNeoXModel", text(2, 32)),
    decoder("gpt-bigcode", "GPTBigCodeModel", gpt()),
    decoder("codegen", "CodeGenModel", gpt(4, 8, rotary_dim=4), interface_since="5.24"),
    decoder("gptj", "GPTJModel", gpt(4, 8, rotary_dim=4), interface_since="5.24", takes_names_since="5.24"),
    decoder("opt", "OPTModel", {**TOKEN_IDS, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64}),
    decoder("biogpt", "BioGptModel", text()),
    decoder("cohere", "CohereModel", llama()),
    decoder("cohere2", "Cohere2Model", llama(4, 16, **WINDOWS)),
    decoder("starcoder2", "Starcoder2Model", llama(4, 16, sliding_window=5)),
    decoder("stablelm", "StableLmModel", llama(2, 32)),
    decoder("granite", "GraniteModel", llama(attention_multiplier=0.3)),
    decoder("smollm3", "SmolLM3Model", llama(4, 16, use_sliding_window=True, no_rope_layer_interval=2, **WINDOWS)),
    decoder("helium", "HeliumModel", text(num_key_value_heads=1, head_dim=16)),
    decoder("glm", "GlmModel", llama(head_dim=8)),
    decoder("glm4", "Glm4Model", llama(head_dim=8)),
    decoder("exaone4", "Exaone4Model", llama(**WINDOWS)),
    decoder("ernie4.5", "Ernie4_5Model", llama(head_dim=16)),
    decoder("nemotron", "NemotronModel", llama(), takes_names_since="5.13"),
    decoder("persimmon", "PersimmonModel", llama(2, 16)),
    decoder("seed-oss", "SeedOssModel", llama(head_dim=8)),
    decoder("arcee", "ArceeModel", llama()),
    decoder("apertus", "ApertusModel", llama()),
    decoder("ministral", "MinistralModel", llama(head_dim=8, **WINDOWS)),
    decoder("diffllama", "DiffLlamaModel", llama(), takes_names_since="5.13"),
    decoder("doge", "DogeModel", llama()),
    decoder("bitnet", "BitNetModel", llama()),
    decoder("nanochat", "NanoChatModel", llama()),
    decoder("modernbert-decoder", "ModernBertDecoderModel",
        text(local_attention=6, global_attn_every_n_layers=2, cls_token_id=BOS, sep_token_id=EOS)),
    decoder("lfm2", "Lfm2Model", llama(layer_types=["full_attention", "conv"]), paddings=HYBRID_PADDING),
    decoder("recurrent-gemma", "RecurrentGemmaModel", text(lru_width=32, attention_window_size=16,
        num_key_value_heads=1, block_types=["attention", "recurrent"]), interface_since="5.13"),
    decoder("bamba", "BambaModel", llama(2, 16, attn_layer_indices=[0], mamba_n_heads=4, mamba_d_head=16, **MAMBA),
        paddings=HYBRID_PADDING),
    decoder("jamba", "JambaModel", llama(2, 16, attn_layer_period=2, attn_layer_offset=0, num_experts=2,
        mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False)),
    decoder("zamba2", "Zamba2Model", llama(2, 16, layers_block_type=["hybrid", "mamba"], mamba_d_state=8,
        mamba_headdim=16, n_mamba_heads=4, mamba_ngroups=1, chunk_size=8, num_mem_blocks=1, adapter_rank=4,
        hybrid_layer_ids=[0]), harmless=ZAMBA2_HARMLESS),
    decoder("falcon-h1", "FalconH1Model",
        llama(2, 16, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, head_dim=16, **MAMBA), paddings=HYBRID_PADDING),
    decoder("granite-moe-hybrid", "GraniteMoeHybridModel",
        llama(2, 16, layer_types=["attention", "mamba"], num_local_experts=2, num_experts_per_tok=1,
            shared_intermediate_size=32, mamba_n_heads=4, mamba_d_head=16, **MAMBA), paddings=HYBRID_PADDING),
    decoder("qwen3-next", "Qwen3NextModel", llama(2, 16, head_dim=16, num_experts=2, num_experts_per_tok=1,
        layer_types=["full_attention", "linear_attention"], moe_intermediate_size=32,
        shared_expert_intermediate_size=32, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16), paddings=HYBRID_PADDING),
    unnumbered("blt", "BltModel", blt),
    decoder("bert-causal", "BertModel", text(is_decoder=True)),
    decoder("owlvit-text", "OwlViTTextModel", text()),
    *all_of((
        decoder("clip-text", "CLIPTextModel", text(4, 8)),
        decoder("metaclip2-text", "MetaClip2TextModel", text()),
        decoder("clipseg-text", "clipseg.CLIPSegTextModel", text()),
        decoder("aimv2-text", "Aimv2TextModel", lambda: transformers.Aimv2TextConfig(**text())),
    ), outputs=TOKENS_AND_ROWS),
)

ENCODER_DECODERS = (
    two_sided("bart", "BartModel", bart(4, 8)),
    two_sided("mbart", "MBartModel", bart(2, 24)),
    two_sided("pegasus", "PegasusModel", bart(4, 16)),
    two_sided("blenderbot", "BlenderbotModel", bart()),
    two_sided("blenderbot-small", "BlenderbotSmallModel", bart()),
    two_sided("plbart", "PLBartModel", bart()),
    two_sided("nllb-moe", "NllbMoeModel", bart(num_experts=2, encoder_sparse_step=2, decoder_sparse_step=2)),
    two_sided("bigbird-pegasus", "BigBirdPegasusModel", bart(attention_type="original_full")),
    two_sided("t5gemma", "T5GemmaModel", t5gemma),
    *all_of((
        two_sided("bart-short-decoder", "BartModel", bart(4, 8)),
        two_sided("marian", "MarianModel", bart()),
        two_sided("m2m-100", "M2M100Model", bart(2, 32)),
        two_sided("t5-short-decoder", "T5Model", t5(8), interface_since="5.15", weight_scale=UNSCALED),
        two_sided("t5gemma-short-decoder", "T5GemmaModel", t5gemma),
    ), draw=partial(encoder_decoder_inputs, decoder_length=SHORT_LENGTH)),
    *all_of((
        two_sided("t5", "T5Model", t5()),
        two_sided("mt5", "MT5Model", t5(24)),
        two_sided("umt5", "UMT5Model", t5()),
        two_sided("longt5-local", "LongT5Model", t5(local_radius=3)),
        two_sided("switch", "SwitchTransformersModel",
            t5(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=2)),
    ), interface_since="5.15", weight_scale=UNSCALED),
    two_sided("bert2bert", "EncoderDecoderModel", bert_to_bert,
        outputs={"logits": Valid.DECODER, "encoder_last_hidden_state": Valid.TOKENS}),
    two_sided("blip2-qformer", "Blip2QFormerModel", text(encoder_hidden_size=32, cross_attention_frequency=1),
        draw=qformer_inputs, outputs=WHOLE_AND_POOLED, interface_since="5.13"),
)

VISION = (
    vision("vit", "ViTModel", square(4, 16)),
    vision("vit-image-classification", "ViTForImageClassification", square(2, 40, num_labels=3), outputs=ROW_LOGITS),
    vision("deit", "DeiTModel", square(2, 24)),
    vision("yolos", "YolosModel", square(image_size=[32, 32], num_detection_tokens=4)),
    vision("dinov2", "Dinov2Model", square(4, 16)),
    vision("dinov2-with-registers", "Dinov2WithRegistersModel", square(2, 32)),
    vision("dinov3-vit", "DINOv3ViTModel", square(num_register_tokens=2)),
    vision("siglip-vision", "SiglipVisionModel", square(4, 9)),
    vision("siglip2-vision", "Siglip2VisionModel", tiny(4, 8, num_patches=16, patch_size=4), draw=naflex_inputs,
        outputs=TOKENS_AND_ROWS, paddings=PREFIX_PADDING),
    vision("clip-vision", "CLIPVisionModel", square(4, 8)),
    vision("metaclip2-vision", "MetaClip2VisionModel", square()),
    vision("chinese-clip-vision", "ChineseCLIPVisionModel", square()),
    vision("mlcd", "MLCDVisionModel", square()),
    vision("aimv2-vision", "Aimv2VisionModel", square()),
    vision("owlvit-vision", "OwlViTVisionModel", square()),
    vision("beit", "BeitModel", square(use_relative_position_bias=True), takes_names_since="5.9"),
    vision("swin", "SwinModel", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
        "num_heads": [2, 4], "window_size": 4}, interface_since="5.9"),
    vision("dpt", "DPTModel", square(2, 32, backbone_out_indices=[0, 1])),
    vision("pixio", "PixioModel", square()),
    vision("instructblip-vision", "InstructBlipVisionModel", square()),
    vision("blip2-vision", "Blip2VisionModel", square()),
    vision("kosmos2-vision", "kosmos2.Kosmos2VisionModel", square()),
    vision("vivit", "VivitModel", tiny(image_size=32, tubelet_size=[2, 8, 8], num_frames=2), draw=CLIPS),
    vision("ast", "ASTModel", tiny(max_length=24, num_mel_bins=16, patch_size=8, frequency_stride=4, time_stride=8),
        draw=partial(pixel_inputs, shape=(24, 16), name="input_values")),
    *all_of((
        vision("vit-msn", "ViTMSNModel", square()),
        vision("i-jepa", "IJepaModel", square(4, 8)),
        vision("internvl-vision", "InternVLVisionModel", square(image_size=[32, 32], patch_size=[8, 8])),
        vision("layoutlmv3-vision", "LayoutLMv3Model", text(2, 36, patch_size=8, **PAGE), interface_since="5.24"),
        vision("vit-mae", "ViTMAEModel", square(mask_ratio=0.25),
            draw=partial(pixel_inputs, noise=torch.linspace(0, 1, BATCH_SIZE * 16).reshape(BATCH_SIZE, 16))),
        vision("videomae", "VideoMAEModel", square(2, 24, num_frames=2), draw=CLIPS),
        vision("vjepa2", "VJEPA2Model",
            tiny(2, 24, crop_size=32, patch_size=8, frames_per_clip=2, pred_hidden_size=48, pred_num_attention_heads=2,
                pred_num_hidden_layers=1, mlp_ratio=2), draw=partial(CLIPS, name="pixel_values_videos")),
        vision("llama4-vision", "Llama4VisionModel",
            square(intermediate_size=128, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)),
        vision("pixtral-vision", "PixtralVisionModel", square(),
            draw=partial(pixel_inputs, image_sizes=torch.tensor([(32, 32), (24, 32), (16, 32), (32, 24)]))),
    ), outputs=WHOLE),
    *all_of((
        vision("qwen2-vl-vision", "qwen2_vl.Qwen2VisionTransformerPretrainedModel",
            {**QWEN_VISION, "embed_dim": 64, "hidden_size": 32, "mlp_ratio": 1}),
        vision("qwen2.5-vl-vision", "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
            {**QWEN_VISION, **WIDE, "window_size": 16, "fullatt_block_indexes": [1]}),
        vision("qwen3-vl-vision", "Qwen3VLVisionModel",
            {**QWEN_VISION, **WIDE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
        vision("glm4v-vision", "Glm4vVisionModel", {**QWEN_VISION, **WIDE, "image_size": 16}),
    ), outputs=WHOLE, draw=grid_pixel_inputs),
    *all_of((
        vision("idefics2-vision", "idefics2.Idefics2VisionTransformer", square()),
        vision("idefics3-vision", "Idefics3VisionTransformer", square()),
        vision("smolvlm-vision", "SmolVLMVisionTransformer", square()),
    ), outputs=TOKENS_ONLY, draw=patch_mask_inputs, paddings=PREFIX_PADDING),
    vision("detr", "DetrModel", DETR, outputs=ENCODER_TOKENS, draw=DETR_INPUTS, paddings=PREFIX_PADDING),
    vision("conditional-detr", "ConditionalDetrModel", DETR, outputs=ENCODER_TOKENS, draw=DETR_INPUTS,
        paddings=PREFIX_PADDING),
    vision("pp-doclayout-v2-reading-order", "pp_doclayout_v2.PPDocLayoutV2ReadingOrder",
        lambda: find_class("pp_doclayout_v2.PPDocLayoutV2ReadingOrderConfig")(
            **tiny(coordinate_size=6, shape_size=4, global_pointer_head_size=8)),
        draw=box_inputs, outputs=TOKEN_LOGITS, interface_since="5.24", paddings=(Padding.NO_MASK, Padding.RIGHT)),
    encoder("layoutlmv3", "LayoutLMv3Model", text(2, 36, visual_embed=False, **PAGE), interface_since="5.24",
        draw=BOXED),
)

AUDIO = (
    audio("wav2vec2", "Wav2Vec2Model", wave()),
    audio("wav2vec2-large", "Wav2Vec2Model", wave(2, 24, **STABLE)),
    audio("wav2vec2-sequence-classification", "Wav2Vec2ForSequenceClassification", wave(num_labels=3, **STABLE),
        outputs=ROW_LOGITS),
    audio("wav2vec2-adapter", "Wav2Vec2Model", wave(add_adapter=True, num_adapter_layers=1, **STABLE),
        draw=partial(audio_inputs, frames=halved)),
    audio("hubert", "HubertModel", wave(4, 8)),
    audio("unispeech", "UniSpeechModel", wave(num_codevectors_per_group=4)),
    audio("unispeech-sat", "UniSpeechSatModel", wave(num_codevectors_per_group=4)),
    audio("sew", "SEWModel", wave(squeeze_factor=2)),
    audio("data2vec-audio", "Data2VecAudioModel",
        tiny(num_conv_pos_embeddings=2, conv_pos_kernel_size=3, num_conv_pos_embedding_groups=2, **STEPS)),
    *all_of((
        audio("wav2vec2-conformer", "Wav2Vec2ConformerModel",
            wave(conv_depthwise_kernel_size=3, position_embeddings_type="relative")),
        audio("wav2vec2-conformer-rotary", "Wav2Vec2ConformerModel",
            wave(conv_depthwise_kernel_size=3, position_embeddings_type="rotary")),
        audio("wav2vec2-bert", "Wav2Vec2BertModel",
            tiny(position_embeddings_type="relative_key", **CONFORMER, **NEAR), draw=feature_inputs),
        audio("wav2vec2-bert-rotary", "Wav2Vec2BertModel", tiny(position_embeddings_type="rotary", **CONFORMER),
            draw=feature_inputs),
        audio("seamless-m4t-speech", "seamless_m4t.SeamlessM4TSpeechEncoder", SEAMLESS, draw=HALVED),
        audio("seamless-m4t-v2-speech", "seamless_m4t_v2.SeamlessM4Tv2SpeechEncoder", SEAMLESS, draw=HALVED,
            reference=SEAMLESS_V2_REFERENCE),
    ), interface_since="5.16"),
    audio("parakeet", "ParakeetEncoder", tiny(num_mel_bins=16, subsampling_factor=2, subsampling_conv_channels=8,
        conv_kernel_size=3), draw=HALVED, paddings=PARAKEET_PADDING),
    audio("speech-to-text", "Speech2TextModel", bart(input_feat_per_channel=16, max_source_positions=64,
        max_target_positions=64, conv_channels=16), draw=speech_with_text_inputs, outputs=ENCODER_TOKENS),
    audio("moonshine-encoder", "moonshine.MoonshineEncoder",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2},
        draw=partial(audio_inputs, samples=13 * 384, frames=moonshine_frames)),
    audio("whisper-encoder", "whisper.WhisperEncoder", WHISPER, outputs=WHOLE, paddings=(Padding.NO_MASK,),
        draw=partial(pixel_inputs, shape=(16, 24), name="input_features")),
    audio("whisper", "WhisperModel", WHISPER, kind="audio to text", draw=speech_to_text_inputs,
        outputs={"last_hidden_state": Valid.DECODER, "encoder_last_hidden_state": Valid.ROWS}, paddings=EVERY_PADDING,
        harmless=CAUSAL_HARMLESS),
)

MULTIMODAL = (
    both("clip", "CLIPModel", {"text_config": text(), "vision_config": square(2, 24), "projection_dim": 16},
        draw=partial(two_tower_inputs, causal=True), outputs=EMBEDDINGS),
    both("siglip", "SiglipModel", {"text_config": text(), "vision_config": square()}, draw=two_tower_inputs,
        outputs=EMBEDDINGS, paddings=EVERY_PADDING),
    both("gemma3", "Gemma3Model", {"text_config": gemma(), "vision_config": square(), "mm_tokens_per_image": 4,
        "image_token_index": IMAGE_TOKEN}, draw=partial(image_text_inputs, image_tokens=4, kinds=True)),
    both("paligemma", "PaliGemmaModel",
        {"text_config": text(model_type="gemma", num_key_value_heads=1, head_dim=16), "projection_dim": 32,
            "vision_config": square(model_type="siglip_vision_model", projection_dim=32), "hidden_size": 32,
            "image_token_index": IMAGE_TOKEN}, draw=partial(image_text_inputs, image_tokens=16, kinds=True)),
    both("llava", "LlavaModel",
        {"text_config": text(model_type="llama"), "vision_config": square(model_type="clip_vision_model"),
            "image_token_index": IMAGE_TOKEN}, draw=partial(image_text_inputs, image_tokens=16)),
    # Hands layers of cross-attention masks of other lengths than theirs, which eager attention does not get.
    both("bridgetower", "BridgeTowerModel", tiny(2, 32, text_config=text(2, 32), vision_config={"hidden_size": 64,
        "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}), draw=two_tower_inputs, paddings=EVERY_PADDING,
        outputs={"text_features": Valid.TOKENS, "image_features": Valid.ROWS}),
    # Its projection of images says that it is causal, and is not.
    both("kosmos2", "Kosmos2Model", {"latent_query_num": 3, "vision_config": square(), "text_config": KOSMOS_TEXT},
        draw=partial(image_prefix_inputs, image_tokens=3), paddings=EVERY_PADDING, harmless=CAUSAL_HARMLESS,
        outputs={"last_hidden_state": Valid.TOKENS, "image_embeds": Valid.ROWS}),
)
# fmt: on

FAMILIES: tuple[Family, ...] = (
    *TEXT_ENCODERS, *DECODERS, *ENCODER_DECODERS, *VISION, *AUDIO, *MULTIMODAL, *OFF_INTERFACE,
)  # fmt: skip
