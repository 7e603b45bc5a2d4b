"""Tiny random-weight models of many families: what the parity tests run attn_implementation="flashinfer" on.

Each `Family` builds its model from a config, without network, with weights that make attention matter: under the usual
initialisation (std 0.02) attention is nearly uniform, and a wrong mask changes next to nothing.
"""

from __future__ import annotations

import copy
import importlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["FAMILIES", "Example", "Family", "Padding", "build_model", "find_class", "implementations_in_use"]

TRANSFORMERS_VERSION = Version(transformers.__version__)

BATCH_SIZE, SEQUENCE_LENGTH, SHORT_LENGTH = 4, 13, 7
RIGHT_LENGTHS = (13, 9, 7, 11)
# Valid in every row of every padding case, so that a model that pools at its end-of-sequence token finds it there.
ALWAYS_VALID = 6
PAD, BOS, EOS, VOCAB_SIZE = 1, 2, 3, 96
SPECIAL_TOKENS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


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


NO_PADDING = (Padding.NO_MASK,)
EVERY_PADDING = tuple(Padding)
# Audio front ends count the samples of a row and take them for a prefix.
PREFIX_PADDING = (Padding.NO_MASK, Padding.RIGHT, Padding.BATCH_OF_ONE)
# Before 5.15 state-space layers ignore the mask of a single row, and take in whatever attention left in its padding.
HYBRID_PADDING = tuple(
    case for case in Padding if case is not Padding.BATCH_OF_ONE or Version("5.15") <= TRANSFORMERS_VERSION
)
# A causal query does not see what comes after it; but before 5.15 the scan of Zamba2 does.
CAUSAL_HARMLESS = frozenset({Padding.RIGHT})
ZAMBA2_HARMLESS: frozenset[Padding] = CAUSAL_HARMLESS if Version("5.15") <= TRANSFORMERS_VERSION else frozenset()


class Valid(Enum):
    """Where an output of a model is defined, given a padding mask."""

    TOKENS = "positions that hold a token"
    FIRST = "rows whose first position holds a token"
    ROWS = "everywhere"
    DECODER = "positions of the decoder that hold a token"


@dataclass(frozen=True)
class Example:
    """Random inputs of one forward.

    Args:
        inputs: Keyword arguments, masks aside.
        masks: Padding masks, by keyword argument; int64, 1 where a token is.
        valid: Per output, which of its leading positions are defined; those of an output not named here all are.
    """

    inputs: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    valid: dict[str, Tensor] = field(default_factory=dict)

    def without_padding(self) -> Example:
        """The same inputs, with masks that call every position valid."""
        return Example(self.inputs, {name: torch.ones_like(mask) for name, mask in self.masks.items()}, self.valid)


MakeInputs = Callable[[PreTrainedConfig, torch.Generator, Padding], Example]


@dataclass(frozen=True)
class Family:
    """One model class with a tiny config.

    Args:
        name: How tests call it.
        kind: Of input: "text", "pixels", "audio", "encoder-decoder", ...
        model_class: Name in transformers.
        make_config: Makes a fresh config.
        make_inputs: Makes random inputs for a padding case.
        outputs: Names of the outputs to compare.
        paddings: The cases that apply.
        harmless: Cases where padding is out of every valid query's sight even without a mask.
        uses_interface: Whether attention goes through transformers' attention interface.
        interface_since: The version of transformers that moved the family to the interface.
        takes_names_since: The version of transformers before which the family looks implementations up in a dictionary
            of its own.
        since: The version of transformers that has the family.
        reference: The implementation that defines the right answer.
        weight_scale: What random weights are multiplied with, for families whose activations would explode.
    """

    name: str
    kind: str
    model_class: str
    make_config: Callable[[], PreTrainedConfig]
    make_inputs: MakeInputs
    outputs: tuple[str, ...]
    paddings: tuple[Padding, ...] = NO_PADDING
    harmless: frozenset[Padding] = frozenset()
    uses_interface: bool = True
    interface_since: str = "5.5"
    takes_names_since: str = "5.5"
    since: str = "5.5"
    reference: str = "eager"
    weight_scale: float = 1.0

    @property
    def is_in_this_transformers(self) -> bool:
        return Version(self.since) <= TRANSFORMERS_VERSION

    @property
    def takes_any_name(self) -> bool:
        return Version(self.takes_names_since) <= TRANSFORMERS_VERSION

    @property
    def is_on_the_interface(self) -> bool:
        return self.uses_interface and Version(self.interface_since) <= TRANSFORMERS_VERSION

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())


def build_model(family: Family, attn_implementation: str) -> PreTrainedModel:
    """Builds a model in eval mode; two calls with different implementations give identical weights."""
    # Each model needs a config of its own: `_from_config` writes the implementation's name into the one it is given.
    config = copy.deepcopy(family.make_config())
    torch.manual_seed(family.seed)
    model: PreTrainedModel = find_class(family.model_class, "modeling")._from_config(
        config, attn_implementation=attn_implementation
    )
    randomise_weights(model, family.seed, family.weight_scale)
    return model.eval()


def find_class(name: str, file: str) -> Any:
    """Resolves "BertModel", or "whisper.WhisperEncoder" for a class that transformers does not export."""
    if "." not in name:
        return getattr(transformers, name)
    package, class_name = name.split(".")
    return getattr(importlib.import_module(f"transformers.models.{package}.{file}_{package}"), class_name)


def implementations_in_use(model: nn.Module) -> set[str | None]:
    """The attention implementations named by the configs of a model and of all its parts."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return {config._attn_implementation for config in configs if isinstance(config, PreTrainedConfig)}


@torch.no_grad()
def randomise_weights(model: nn.Module, seed: int, scale: float) -> None:
    """Gives every weight the scale at which activations and attention logits have a variance near one."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen or not weight.is_floating_point():
                continue
            seen.add(id(weight))
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2:
                # Biases start at zero, norms and gates where their family wants them.
                weight.add_(0.1 * noise)
            elif isinstance(module, nn.Embedding) or weight.shape[0] == 1:
                weight.copy_(noise)
            elif "original" not in name:
                # Not the two factors of a normalised weight, which torch initialises to fit each other.
                fan_in = weight.shape[0] if type(module).__name__ == "Conv1D" else weight[0].numel()
                weight.copy_(scale * noise * (1.5 / fan_in) ** 0.5)


def padding_mask(padding: Padding, generator: torch.Generator, length: int = SEQUENCE_LENGTH) -> Tensor | None:
    """Makes a padding mask, int64, shape `(batch, length)`, or None for no mask."""
    if padding is Padding.NO_MASK:
        return None
    if padding is Padding.BATCH_OF_ONE:
        lengths = torch.tensor([length - 4])
    else:
        lengths = torch.tensor(RIGHT_LENGTHS) - SEQUENCE_LENGTH + length
        lengths = lengths.clamp(min=2)
    mask = torch.arange(length)[None] < lengths[:, None]
    if padding is Padding.LEFT:
        mask = mask.flip(1)
    if padding is Padding.HOLES:
        mask = torch.rand(BATCH_SIZE, length, generator=generator) < 0.6
        # Each row has a token and a hole, whatever the draw.
        mask[:, min(ALWAYS_VALID, length - 1)] = True
        mask[:, ALWAYS_VALID - 2] = False
        mask[1, 0] = mask[2, -1] = True
    return mask.long()


def random_tokens(generator: torch.Generator, batch_size: int, length: int, mask: Tensor | None = None) -> Tensor:
    tokens = torch.randint(8, VOCAB_SIZE - 6, (batch_size, length), generator=generator)
    if length > ALWAYS_VALID:
        tokens[:, ALWAYS_VALID] = EOS
    return tokens if mask is None else tokens.masked_fill(mask == 0, PAD)


def valid_positions(
    outputs: Mapping[str, Valid], mask: Tensor | None, decoder: Tensor | None = None
) -> dict[str, Tensor]:
    """Which leading positions of each output are defined, bool."""
    valid: dict[str, Tensor] = {}
    for name, where in outputs.items():
        side = decoder if where is Valid.DECODER else mask
        if side is None or where is Valid.ROWS:
            continue
        valid[name] = side[:, 0].bool() if where is Valid.FIRST else side.bool()
    return valid


def text_inputs(
    outputs: Mapping[str, Valid],
    *,
    causal: bool = False,
    position_ids: bool = False,
    extra: Callable[[torch.Generator, int, int], dict[str, Tensor]] | None = None,
) -> MakeInputs:
    """Token ids, with padding on the left in a batch of one for a causal model, which does not see it on the right."""

    def make(config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
        mask = padding_mask(padding, generator)
        if mask is not None and causal and padding is Padding.BATCH_OF_ONE:
            mask = mask.flip(1)
        inputs = {"input_ids": random_tokens(generator, padding.batch_size, SEQUENCE_LENGTH, mask)}
        if extra is not None:
            inputs |= extra(generator, padding.batch_size, SEQUENCE_LENGTH)
        if mask is None:
            return Example(inputs)
        if position_ids:
            # As `generate` numbers them.
            inputs["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        return Example(inputs, {"attention_mask": mask}, valid_positions(outputs, mask))

    return make


def encoder_decoder_inputs(outputs: Mapping[str, Valid], *, decoder_length: int = SEQUENCE_LENGTH) -> MakeInputs:
    """Token ids of both sides, each padded in its own way: a decoder must not borrow its encoder's padding."""

    def make(config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
        mask = padding_mask(padding, generator)
        # The decoder is whole where the encoder is padded on the right, as in translation.
        of_decoder = {Padding.LEFT: Padding.RIGHT, Padding.HOLES: Padding.LEFT}.get(padding, Padding.NO_MASK)
        decoder_mask = padding_mask(of_decoder, generator, decoder_length)
        inputs = {
            "input_ids": random_tokens(generator, padding.batch_size, SEQUENCE_LENGTH, mask),
            "decoder_input_ids": random_tokens(generator, padding.batch_size, decoder_length, decoder_mask),
        }
        masks = {} if mask is None else {"attention_mask": mask}
        if decoder_mask is not None:
            masks["decoder_attention_mask"] = decoder_mask
        return Example(inputs, masks, valid_positions(outputs, mask, decoder_mask))

    return make


def pixel_inputs(shape: tuple[int, ...] = (3, 32, 32), name: str = "pixel_values", **extra: Tensor) -> MakeInputs:
    def make(config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
        return Example({name: torch.randn(padding.batch_size, *shape, generator=generator), **extra})

    return make


def box_inputs(config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
    """Boxes of a page, whose pairwise order is asked for: rows and columns of the output are boxes."""
    mask = padding_mask(padding, generator)
    corners = torch.randint(0, 400, (padding.batch_size, SEQUENCE_LENGTH, 2), generator=generator)
    sizes = torch.randint(1, 400, corners.shape, generator=generator)
    inputs = {"boxes": torch.cat([corners, corners + sizes], -1).float()}
    if mask is None:
        return Example({**inputs, "mask": torch.ones(corners.shape[:2], dtype=torch.long)})
    return Example(inputs, {"mask": mask}, {"logits": (mask[:, :, None] * mask[:, None]).bool()})


def patch_mask_inputs(name: str, outputs: Mapping[str, Valid], *, pixels_per_entry: int = 1) -> MakeInputs:
    """Images of 32 x 32 in patches of 8 x 8, where a mask tells which part of the frame each image fills."""

    def make(config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
        pixels = torch.randn(padding.batch_size, 3, 32, 32, generator=generator)
        if padding is Padding.NO_MASK:
            return Example({"pixel_values": pixels})
        sizes = torch.tensor([(4, 4), (3, 4), (4, 2), (2, 3)] if padding is Padding.RIGHT else [(3, 2)])
        rows, columns = torch.arange(4)[None, :, None], torch.arange(4)[None, None, :]
        mask = (rows < sizes[:, :1, None]) & (columns < sizes[:, 1:, None])
        entries = mask.repeat_interleave(pixels_per_entry, 1).repeat_interleave(pixels_per_entry, 2)
        return Example({"pixel_values": pixels}, {name: entries}, valid_positions(outputs, mask.flatten(1)))

    return make


def halved(lengths: Tensor) -> Tensor:
    """Length after a convolution with kernel 3, stride 2 and padding 1."""
    return (lengths - 1) // 2 + 1


def moonshine_frames(lengths: Tensor) -> Tensor:
    # It looks at every 384th sample of the mask; the convolutions have fewer frames for it than that.
    return ((lengths + 383) // 384).clamp(max=11)


def audio_inputs(
    outputs: Mapping[str, Valid], *, samples: int = 60, frames: Callable[[Tensor], Tensor] | None = None
) -> MakeInputs:
    """Raw audio, `input_values`; padding is silence that the front end shortens along with the sound."""

    def make(config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
        audio = torch.randn(padding.batch_size, samples, generator=generator)
        mask = padding_mask(padding, generator)
        if mask is None:
            return Example({"input_values": audio})
        lengths = mask.sum(-1) * samples // SEQUENCE_LENGTH
        sample_mask = (torch.arange(samples)[None] < lengths[:, None]).long()
        total = torch.tensor([samples])
        for kernel, stride in zip(getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ()), strict=True):
            lengths, total = (lengths - kernel) // stride + 1, (total - kernel) // stride + 1
        if frames is not None:
            lengths, total = frames(lengths), frames(total)
        valid = (torch.arange(int(total))[None] < lengths[:, None]).long()
        inputs = {"input_values": audio * sample_mask}
        return Example(inputs, {"attention_mask": sample_mask}, valid_positions(outputs, valid))

    return make


def feature_inputs(
    outputs: Mapping[str, Valid],
    *,
    size: int = 16,
    length: int = SEQUENCE_LENGTH,
    name: str = "input_features",
    subsampling: Callable[[Tensor], Tensor] | None = None,
) -> MakeInputs:
    """Filter-bank features, shape `(batch, length, size)`."""

    def make(config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
        features = torch.randn(padding.batch_size, length, size, generator=generator)
        mask = padding_mask(padding, generator, length)
        if mask is None:
            return Example({name: features})
        valid = mask
        if subsampling is not None:
            total = int(subsampling(torch.tensor([length])))
            valid = (torch.arange(total)[None] < subsampling(mask.sum(-1))[:, None]).long()
        return Example({name: features}, {"attention_mask": mask}, valid_positions(outputs, valid))

    return make


def speech_with_text_inputs(outputs: Mapping[str, Valid]) -> MakeInputs:
    """Padded features for the encoder, and token ids without padding for the decoder."""

    def make(config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
        # Two convolutions with stride 2: as many encoder states as decoder tokens.
        length = 4 * SEQUENCE_LENGTH
        example = feature_inputs(outputs, length=length, subsampling=lambda lengths: halved(halved(lengths)))
        made = example(config, generator, padding)
        tokens = random_tokens(generator, padding.batch_size, SEQUENCE_LENGTH)
        return Example({**made.inputs, "decoder_input_ids": tokens}, made.masks, made.valid)

    return make


def speech_to_text_inputs(outputs: Mapping[str, Valid], *, size: int = 16, length: int = 24) -> MakeInputs:
    """Features for the encoder, which knows no padding, and token ids for the decoder."""

    def make(config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
        mask = padding_mask(padding, generator)
        if mask is not None and padding is Padding.BATCH_OF_ONE:
            mask = mask.flip(1)
        inputs = {
            "input_features": torch.randn(padding.batch_size, size, length, generator=generator),
            "decoder_input_ids": random_tokens(generator, padding.batch_size, SEQUENCE_LENGTH, mask),
        }
        masks = {} if mask is None else {"decoder_attention_mask": mask}
        return Example(inputs, masks, valid_positions(outputs, mask, mask))

    return make


def naflex_inputs(outputs: Mapping[str, Valid], *, patch_values: int = 48) -> MakeInputs:
    """Flattened patches of images with different aspect ratios, padded on the right."""

    def make(config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
        shapes = torch.tensor([(3, 4)] if padding is Padding.BATCH_OF_ONE else [(4, 4), (3, 4), (2, 4), (5, 3)])
        if padding is Padding.NO_MASK:
            shapes = torch.tensor([(4, 4)] * BATCH_SIZE)
        mask = (torch.arange(16)[None] < shapes.prod(-1)[:, None]).long()
        inputs = {
            "pixel_values": torch.randn(len(shapes), 16, patch_values, generator=generator),
            "spatial_shapes": shapes,
        }
        return Example(inputs, {"pixel_attention_mask": mask}, valid_positions(outputs, mask))

    return make


def qformer_inputs() -> MakeInputs:
    """As many learned queries as there are padded image features, which no mask can tell from self-attention."""

    def make(config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
        shape = (padding.batch_size, SEQUENCE_LENGTH)
        mask = padding_mask(padding, generator)
        inputs = {
            "query_embeds": torch.randn(*shape, config.hidden_size, generator=generator),
            "encoder_hidden_states": torch.randn(*shape, config.encoder_hidden_size, generator=generator),
        }
        return Example(inputs, {} if mask is None else {"encoder_attention_mask": mask})

    return make


def random_boxes(generator: torch.Generator, batch_size: int, length: int) -> dict[str, Tensor]:
    corners = torch.randint(0, 28, (batch_size, length, 2), generator=generator)
    return {"bbox": torch.cat([corners, corners + torch.randint(1, 4, corners.shape, generator=generator)], dim=-1)}


def grid_pixel_inputs() -> MakeInputs:
    """Patches of two images one after another, as the vision towers of the Qwen-VL family take them."""

    def make(config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
        grid = torch.tensor([[1, 4, 4], [1, 2, 6]])
        size = config.in_channels * config.temporal_patch_size * config.patch_size**2
        pixels = torch.randn(int(grid.prod(-1).sum()), size, generator=generator)
        return Example({"hidden_states": pixels, "grid_thw": grid})

    return make


def configured(config_class: str, **settings: Any) -> Callable[[], PreTrainedConfig]:
    # By name, so that a family that this transformers lacks costs nothing.
    def make() -> PreTrainedConfig:
        made: PreTrainedConfig = find_class(config_class, "configuration")(**settings)
        return made

    return make


def tiny(heads: int = 4, width: int = 16, /, **settings: Any) -> dict[str, Any]:
    """Settings that most configs share."""
    return {
        "hidden_size": heads * width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "intermediate_size": 64,
        **settings,
    }


def tiny_text(heads: int = 4, width: int = 16, /, **settings: Any) -> dict[str, Any]:
    shared = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 64, **SPECIAL_TOKENS}
    return tiny(heads, width, **(shared | settings))


TOKENS_ONLY = {"last_hidden_state": Valid.TOKENS}
TOKENS_AND_FIRST = {"last_hidden_state": Valid.TOKENS, "pooler_output": Valid.FIRST}
WHOLE = {"last_hidden_state": Valid.ROWS}
WHOLE_AND_POOLED = {"last_hidden_state": Valid.ROWS, "pooler_output": Valid.ROWS}


def encoder(
    name: str,
    model_class: str,
    make_config: Callable[[], PreTrainedConfig],
    outputs: Mapping[str, Valid] = TOKENS_ONLY,
    *,
    extra: Callable[[torch.Generator, int, int], dict[str, Tensor]] | None = None,
    **about: Any,
) -> Family:
    inputs = text_inputs(outputs, extra=extra)
    if set(outputs.values()) == {Valid.FIRST}:
        # What is padded on the left has no first token to pool.
        about.setdefault("paddings", tuple(case for case in Padding if case is not Padding.LEFT))
    about.setdefault("paddings", EVERY_PADDING)
    return Family(name, "text", model_class, make_config, inputs, tuple(outputs), **about)


def decoder(
    name: str,
    model_class: str,
    make_config: Callable[[], PreTrainedConfig],
    outputs: Mapping[str, Valid] = TOKENS_ONLY,
    *,
    position_ids: bool = True,
    **about: Any,
) -> Family:
    inputs = text_inputs(outputs, causal=True, position_ids=position_ids)
    about = {"paddings": EVERY_PADDING, "harmless": CAUSAL_HARMLESS} | about
    return Family(name, "text", model_class, make_config, inputs, tuple(outputs), **about)


def vision(
    name: str,
    model_class: str,
    make_config: Callable[[], PreTrainedConfig],
    outputs: Mapping[str, Valid] = WHOLE,
    *,
    inputs: MakeInputs | None = None,
    **about: Any,
) -> Family:
    return Family(name, "pixels", model_class, make_config, inputs or pixel_inputs(), tuple(outputs), **about)


def audio(
    name: str,
    model_class: str,
    make_config: Callable[[], PreTrainedConfig],
    inputs: Callable[[Mapping[str, Valid]], MakeInputs],
    outputs: Mapping[str, Valid] = TOKENS_ONLY,
    *,
    paddings: tuple[Padding, ...] = PREFIX_PADDING,
    **about: Any,
) -> Family:
    return Family(name, "audio", model_class, make_config, inputs(outputs), tuple(outputs), paddings, **about)


def encoder_decoder(
    name: str,
    model_class: str,
    make_config: Callable[[], PreTrainedConfig],
    *,
    decoder_length: int = SEQUENCE_LENGTH,
    output: str = "last_hidden_state",
    **about: Any,
) -> Family:
    outputs = {output: Valid.DECODER, "encoder_last_hidden_state": Valid.TOKENS}
    inputs = encoder_decoder_inputs(outputs, decoder_length=decoder_length)
    return Family(name, "encoder-decoder", model_class, make_config, inputs, tuple(outputs), EVERY_PADDING, **about)


def causal(
    config_class: str, heads: int = 4, width: int = 16, kv_heads: int = 2, **settings: Any
) -> Callable[[], PreTrainedConfig]:
    return configured(config_class, **tiny_text(heads, width, num_key_value_heads=kv_heads, **settings))


def two_sided(config_class: str, heads: int = 4, head_dim: int = 8, **settings: Any) -> Callable[[], PreTrainedConfig]:
    """The settings of BART's descendants."""
    sides = {"layers": 2, "attention_heads": heads, "ffn_dim": 64}
    shared = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    shared |= {"vocab_size": VOCAB_SIZE, "d_model": heads * head_dim, "max_position_embeddings": 64, **SPECIAL_TOKENS}
    return configured(config_class, **(shared | {"decoder_start_token_id": EOS} | settings))


def t5(config_class: str, head_dim: int = 16, **settings: Any) -> Callable[[], PreTrainedConfig]:
    shared = {
        "d_model": 64,
        "d_kv": head_dim,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": PAD,
    }
    return configured(config_class, vocab_size=VOCAB_SIZE, **SPECIAL_TOKENS, **shared, **settings)


def t5gemma() -> PreTrainedConfig:
    module = transformers.T5GemmaModuleConfig(
        **tiny_text(4, 8),
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=4,
        attn_logit_softcapping=2.0,
        **ALTERNATING,
    )
    return transformers.T5GemmaConfig(
        encoder=module.to_dict(), decoder=module.to_dict(), vocab_size=VOCAB_SIZE, **SPECIAL_TOKENS
    )


def blt() -> PreTrainedConfig:
    level = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    made: PreTrainedConfig = find_class("BltConfig", "configuration")(
        vocab_size=VOCAB_SIZE,
        patch_in_forward=False,
        patch_size=4,
        cross_attn_k=2,
        encoder_hash_byte_group_size=[2, 3],
        encoder_hash_byte_group_vocab=64,
        encoder_hash_byte_group_nb_functions=1,
        patcher_config=level,
        encoder_config=level,
        decoder_config={**level, "vocab_size": VOCAB_SIZE, "hidden_size_global": 64},
        global_config={**level, "hidden_size": 64},
        rope_parameters=level["rope_parameters"],
        tie_word_embeddings=False,
    )
    # Asked for by the cache.
    made.num_hidden_layers = 1
    return made


def t5gemma_encoder() -> PreTrainedConfig:
    made = t5gemma()
    made.is_encoder_decoder = False
    return made


def bert_to_bert() -> PreTrainedConfig:
    return transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**tiny_text(2, 16)),
        transformers.BertConfig(**tiny_text(2, 16), is_decoder=True, add_cross_attention=True),
        pad_token_id=PAD,
        decoder_start_token_id=BOS,
    )


SLIDING: dict[str, Any] = {"sliding_window": 5}
ALTERNATING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
CLASSES: dict[str, Any] = {"num_labels": 3}
# SigLIP pools its last position, which is padding in all but the longest text: so it was trained.
SIGLIP_TEXT = {"last_hidden_state": Valid.TOKENS, "pooler_output": Valid.ROWS}
SEQUENCE_LOGITS = {"logits": Valid.FIRST}
TOKEN_LOGITS = {"logits": Valid.TOKENS}
EOS_POOLED = {"last_hidden_state": Valid.TOKENS, "pooler_output": Valid.ROWS}

BERT = configured("BertConfig", **tiny_text(2, 32), **CLASSES)
ROBERTA = configured("RobertaConfig", **tiny_text(4, 8), **CLASSES)
XLM_ROBERTA = configured("XLMRobertaConfig", **tiny_text(2, 24), **CLASSES)
CAMEMBERT = configured("CamembertConfig", **tiny_text(2, 16), **CLASSES)
# fmt: off
DISTILBERT = configured("DistilBertConfig", vocab_size=VOCAB_SIZE, max_position_embeddings=64, dim=48, n_layers=2,
    n_heads=2, hidden_dim=64, **SPECIAL_TOKENS, **CLASSES)
# fmt: on
ELECTRA = configured("ElectraConfig", **tiny_text(4, 16), embedding_size=32, **CLASSES)
ALBERT = configured("AlbertConfig", **tiny_text(2, 24), embedding_size=16, **CLASSES)
MODERNBERT = configured(
    "ModernBertConfig", **tiny_text(2, 32), local_attention=6, cls_token_id=BOS, sep_token_id=EOS, **CLASSES
)
EUROBERT = configured("EuroBertConfig", **tiny_text(4, 16), num_key_value_heads=2, mask_token_id=4, **CLASSES)
ESM_ROTARY = configured("EsmConfig", **tiny_text(4, 8), position_embedding_type="rotary", mask_token_id=4, **CLASSES)

# fmt: off
TEXT_ENCODERS = (
    encoder("bert", "BertModel", BERT, TOKENS_AND_FIRST),
    encoder("roberta", "RobertaModel", ROBERTA, TOKENS_AND_FIRST),
    encoder("xlm-roberta", "XLMRobertaModel", XLM_ROBERTA, TOKENS_AND_FIRST),
    encoder("camembert", "CamembertModel", CAMEMBERT, TOKENS_AND_FIRST),
    encoder("distilbert", "DistilBertModel", DISTILBERT),
    encoder("electra", "ElectraModel", ELECTRA),
    encoder("albert", "AlbertModel", ALBERT, TOKENS_AND_FIRST),
    encoder("modernbert", "ModernBertModel", MODERNBERT),
    encoder("eurobert", "EuroBertModel", EUROBERT),
    encoder("esm-rotary", "EsmModel", ESM_ROTARY, TOKENS_AND_FIRST),
    encoder("esm-absolute", "EsmModel", configured("EsmConfig", **tiny_text(2, 24), mask_token_id=4), TOKENS_AND_FIRST),
    encoder("nomic-bert", "NomicBertModel", configured("NomicBertConfig", **tiny_text(2, 32))),
    encoder("jina-v3", "JinaEmbeddingsV3Model", configured("JinaEmbeddingsV3Config", **tiny_text(4, 16)),
        TOKENS_AND_FIRST),
    encoder("mobilebert", "MobileBertModel",
        configured("MobileBertConfig", **tiny_text(4, 8), embedding_size=16, intra_bottleneck_size=32),
        TOKENS_AND_FIRST, weight_scale=0.5),
    encoder("ernie", "ErnieModel", configured("ErnieConfig", **tiny_text(4, 8)), TOKENS_AND_FIRST),
    encoder("data2vec-text", "Data2VecTextModel", configured("Data2VecTextConfig", **tiny_text(2, 16)),
        TOKENS_AND_FIRST),
    encoder("roberta-prelayernorm", "RobertaPreLayerNormModel",
        configured("RobertaPreLayerNormConfig", **tiny_text(2, 24)), TOKENS_AND_FIRST),
    encoder("xlm-roberta-xl", "XLMRobertaXLModel", configured("XLMRobertaXLConfig", **tiny_text(2, 32)),
        TOKENS_AND_FIRST),
    encoder("xmod", "XmodModel",
        configured("XmodConfig", **tiny_text(4, 8), languages=("en_XX", "de_DE"), default_language="en_XX"),
        TOKENS_AND_FIRST),
    encoder("bert-generation", "BertGenerationEncoder", configured("BertGenerationConfig", **tiny_text(2, 16))),
    encoder("layoutlm", "LayoutLMModel",
        configured("LayoutLMConfig", **tiny_text(2, 24), max_2d_position_embeddings=32), TOKENS_AND_FIRST,
        extra=random_boxes),
    encoder("markuplm", "MarkupLMModel",
        configured("MarkupLMConfig", **tiny_text(2, 16), max_depth=4, xpath_unit_hidden_size=8), TOKENS_AND_FIRST),
    encoder("roc-bert", "RoCBertModel",
        configured("RoCBertConfig", **tiny_text(2, 16), enable_pronunciation=False, enable_shape=False),
        TOKENS_AND_FIRST),
    encoder("splinter", "SplinterModel", configured("SplinterConfig", **tiny_text(4, 8))),
    encoder("dpr-question", "DPRQuestionEncoder", configured("DPRConfig", **tiny_text(2, 16)),
        {"pooler_output": Valid.FIRST}),
    encoder("siglip-text", "SiglipTextModel", configured("SiglipTextConfig", **tiny_text(4, 8)), SIGLIP_TEXT),
    encoder("siglip2-text", "Siglip2TextModel", configured("Siglip2TextConfig", **tiny_text(2, 24)), SIGLIP_TEXT),
    encoder("altclip-text", "AltCLIPTextModel", configured("AltCLIPTextConfig", **tiny_text(2, 16), project_dim=16),
        TOKENS_AND_FIRST, takes_names_since="5.6"),
    encoder("chinese-clip-text", "ChineseCLIPTextModel", configured("ChineseCLIPTextConfig", **tiny_text(2, 16)),
        TOKENS_AND_FIRST),
    encoder("align-text", "AlignTextModel", configured("AlignTextConfig", **tiny_text(2, 16)), TOKENS_AND_FIRST),
    encoder("clap-text", "ClapTextModel", configured("ClapTextConfig", **tiny_text(2, 16)), TOKENS_AND_FIRST),
    encoder("bridgetower-text", "bridgetower.BridgeTowerTextModel",
        configured("BridgeTowerTextConfig", **tiny_text(2, 16)), TOKENS_AND_FIRST),
    encoder("embedding-gemma", "Gemma3TextModel",
        configured("Gemma3TextConfig", **tiny_text(4, 16), num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32,
            sliding_window=6, layer_types=["sliding_attention", "full_attention"], use_bidirectional_attention=True)),
    encoder("esmc", "EsmcModel", configured("EsmcConfig", **tiny_text(2, 16)), since="5.16"),
    encoder("gte", "GteModel", configured("GteConfig", **tiny_text(2, 32)), since="5.18"),
    encoder("ultrabert", "UltrabertModel",
        configured("UltrabertConfig", **tiny_text(4, 16), num_key_value_heads=2, sliding_window=6,
            layer_types=["sliding_attention", "full_attention"]), since="5.20"),
    encoder("embedding-gemma2", "EmbeddingGemma2TextModel",
        configured("EmbeddingGemma2TextConfig", **tiny_text(4, 16), num_key_value_heads=2, head_dim=16,
            sliding_window=6, layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=16,
            embedding_dim=32), since="5.19"),
    encoder("neomme", "NeoMMEModel",
        configured("NeoMMEConfig", vocab_size=VOCAB_SIZE, embedding_rank=16, num_key_value_heads=2, head_dim=16,
            patch_size=8, embedding_dim=16, pad_token_id=PAD, sliding_window=6, **tiny(4, 16)), since="5.17"),
    encoder("t5gemma-encoder", "T5GemmaEncoderModel", t5gemma_encoder),
    encoder("t5-encoder", "T5EncoderModel", t5("T5Config"), interface_since="5.15"),
    encoder("mt5-encoder", "MT5EncoderModel", t5("MT5Config", 24), interface_since="5.15"),
    encoder("umt5-encoder", "UMT5EncoderModel", t5("UMT5Config"), interface_since="5.15"),
)

HEADS = (
    encoder("bert-sequence-classification", "BertForSequenceClassification", BERT, SEQUENCE_LOGITS),
    encoder("bert-token-classification", "BertForTokenClassification", BERT, TOKEN_LOGITS),
    encoder("roberta-sequence-classification", "RobertaForSequenceClassification", ROBERTA, SEQUENCE_LOGITS),
    encoder("roberta-token-classification", "RobertaForTokenClassification", ROBERTA, TOKEN_LOGITS),
    encoder("xlm-roberta-sequence-classification", "XLMRobertaForSequenceClassification", XLM_ROBERTA, SEQUENCE_LOGITS),
    encoder("xlm-roberta-token-classification", "XLMRobertaForTokenClassification", XLM_ROBERTA, TOKEN_LOGITS),
    encoder("camembert-sequence-classification", "CamembertForSequenceClassification", CAMEMBERT, SEQUENCE_LOGITS),
    encoder("camembert-token-classification", "CamembertForTokenClassification", CAMEMBERT, TOKEN_LOGITS),
    encoder("distilbert-sequence-classification", "DistilBertForSequenceClassification", DISTILBERT, SEQUENCE_LOGITS),
    encoder("distilbert-token-classification", "DistilBertForTokenClassification", DISTILBERT, TOKEN_LOGITS),
    encoder("electra-sequence-classification", "ElectraForSequenceClassification", ELECTRA, SEQUENCE_LOGITS),
    encoder("electra-token-classification", "ElectraForTokenClassification", ELECTRA, TOKEN_LOGITS),
    encoder("albert-sequence-classification", "AlbertForSequenceClassification", ALBERT, SEQUENCE_LOGITS),
    encoder("albert-token-classification", "AlbertForTokenClassification", ALBERT, TOKEN_LOGITS),
    encoder("modernbert-sequence-classification", "ModernBertForSequenceClassification", MODERNBERT, SEQUENCE_LOGITS),
    encoder("modernbert-token-classification", "ModernBertForTokenClassification", MODERNBERT, TOKEN_LOGITS),
    encoder("modernbert-mean-pooling", "ModernBertForSequenceClassification",
        configured("ModernBertConfig", **tiny_text(2, 32), local_attention=6, classifier_pooling="mean",
            cls_token_id=BOS, sep_token_id=EOS, **CLASSES), {"logits": Valid.ROWS}),
    encoder("eurobert-sequence-classification", "EuroBertForSequenceClassification", EUROBERT, SEQUENCE_LOGITS),
    encoder("eurobert-token-classification", "EuroBertForTokenClassification", EUROBERT, TOKEN_LOGITS),
    encoder("eurobert-mean-pooling", "EuroBertForSequenceClassification",
        configured("EuroBertConfig", **tiny_text(2, 16), classifier_pooling="mean", mask_token_id=4, **CLASSES),
        {"logits": Valid.ROWS}),
    encoder("eurobert-late-pooling", "EuroBertForSequenceClassification",
        configured("EuroBertConfig", **tiny_text(2, 16), classifier_pooling="late", mask_token_id=4, **CLASSES),
        {"logits": Valid.ROWS}),
    encoder("esm-sequence-classification", "EsmForSequenceClassification", ESM_ROTARY, SEQUENCE_LOGITS),
    encoder("esm-token-classification", "EsmForTokenClassification", ESM_ROTARY, TOKEN_LOGITS),
    encoder("t5-token-classification", "T5ForTokenClassification", t5("T5Config", **CLASSES), TOKEN_LOGITS,
        interface_since="5.15"),
    encoder("bart-sequence-classification", "BartForSequenceClassification", two_sided("BartConfig", **CLASSES),
        {"logits": Valid.ROWS}),
    decoder("blt", "BltModel", blt, position_ids=False),
    decoder("gpt2-sequence-classification", "GPT2ForSequenceClassification",
        configured("GPT2Config", vocab_size=VOCAB_SIZE, n_embd=48, n_layer=2, n_head=2, n_positions=64,
            **SPECIAL_TOKENS, **CLASSES), {"logits": Valid.ROWS}),
    encoder("bert-masked-lm", "BertForMaskedLM", BERT, TOKEN_LOGITS),
)

OFF_INTERFACE = (
    encoder("mpnet", "MPNetModel", configured("MPNetConfig", **tiny_text(2, 16)), TOKENS_AND_FIRST,
        uses_interface=False),
    encoder("deberta-v2", "DebertaV2Model",
        configured("DebertaV2Config", **tiny_text(2, 16), relative_attention=True, pos_att_type=["p2c", "c2p"]),
        uses_interface=False),
    encoder("deberta", "DebertaModel",
        configured("DebertaConfig", **tiny_text(2, 16), relative_attention=True, pos_att_type=["p2c", "c2p"]),
        uses_interface=False),
    encoder("longformer", "LongformerModel", configured("LongformerConfig", **tiny_text(2, 16), attention_window=4),
        TOKENS_AND_FIRST, uses_interface=False),
    encoder("rembert", "RemBertModel", configured("RemBertConfig", **tiny_text(2, 24), input_embedding_size=16),
        TOKENS_AND_FIRST, uses_interface=False),
    encoder("roformer", "RoFormerModel", configured("RoFormerConfig", **tiny_text(2, 16), embedding_size=16),
        uses_interface=False),
    encoder("megatron-bert", "MegatronBertModel", configured("MegatronBertConfig", **tiny_text(2, 32)),
        TOKENS_AND_FIRST, uses_interface=False),
    encoder("convbert", "ConvBertModel", configured("ConvBertConfig", **tiny_text(4, 16), embedding_size=16),
        uses_interface=False),
    encoder("layoutlmv3", "LayoutLMv3Model",
        configured("LayoutLMv3Config", **tiny_text(2, 36), coordinate_size=12, shape_size=12,
            max_2d_position_embeddings=32, input_size=32, visual_embed=False), interface_since="5.24",
        extra=random_boxes),
    encoder("lilt", "LiltModel",
        configured("LiltConfig", **tiny_text(2, 24), max_2d_position_embeddings=32, channel_shrink_ratio=2),
        TOKENS_AND_FIRST, uses_interface=False, extra=random_boxes),
    encoder("big-bird", "BigBirdModel",
        configured("BigBirdConfig", **tiny_text(2, 16), attention_type="block_sparse", block_size=4,
            num_random_blocks=1), TOKENS_AND_FIRST, uses_interface=False),
    encoder("ibert", "IBertModel", configured("IBertConfig", **tiny_text(2, 16)), TOKENS_AND_FIRST,
        uses_interface=False),
    encoder("squeezebert", "SqueezeBertModel",
        configured("SqueezeBertConfig", **tiny_text(2, 16), embedding_size=32, q_groups=2, k_groups=2, v_groups=2,
            post_attention_groups=1, intermediate_groups=2, output_groups=2), TOKENS_AND_FIRST, uses_interface=False),
    encoder("nystromformer", "NystromformerModel",
        configured("NystromformerConfig", **tiny_text(2, 16), num_landmarks=13, segment_means_seq_len=13),
        uses_interface=False),
    encoder("bros", "BrosModel", configured("BrosConfig", **tiny_text(2, 16), dim_bbox=4), TOKENS_AND_FIRST,
        extra=random_boxes, uses_interface=False),
    encoder("visual-bert", "VisualBertModel",
        configured("VisualBertConfig", **tiny_text(2, 16), visual_embedding_dim=16), TOKENS_AND_FIRST,
        uses_interface=False),
    encoder("xlnet", "XLNetModel",
        configured("XLNetConfig", vocab_size=VOCAB_SIZE, d_model=32, n_layer=2, n_head=2, d_inner=64, **SPECIAL_TOKENS),
        uses_interface=False),
    encoder("flaubert", "FlaubertModel",
        configured("FlaubertConfig", vocab_size=VOCAB_SIZE, emb_dim=32, n_layers=2, n_heads=2, pad_index=PAD,
            max_position_embeddings=64), uses_interface=False),
    encoder("tapas", "TapasModel", configured("TapasConfig", **tiny_text(2, 16)), TOKENS_AND_FIRST,
        uses_interface=False),
    encoder("canine", "CanineModel",
        configured("CanineConfig", **tiny_text(2, 16), local_transformer_stride=4, num_hash_buckets=64),
        TOKENS_AND_FIRST, uses_interface=False),
    encoder("blip-text", "BlipTextModel", configured("BlipTextConfig", **tiny_text(2, 16), encoder_hidden_size=32),
        TOKENS_AND_FIRST, uses_interface=False),
    encoder("luke", "LukeModel", configured("LukeConfig", **tiny_text(2, 16), entity_vocab_size=16, entity_emb_size=16),
        TOKENS_AND_FIRST, uses_interface=False),
    decoder("bloom", "BloomModel",
        configured("BloomConfig", vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=2, **SPECIAL_TOKENS),
        uses_interface=False, position_ids=False),
    decoder("mpt", "MptModel",
        configured("MptConfig", vocab_size=VOCAB_SIZE, d_model=32, n_layers=2, n_heads=2, max_seq_len=64),
        uses_interface=False, position_ids=False),
    decoder("codegen", "CodeGenModel",
        configured("CodeGenConfig", vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64,
            **SPECIAL_TOKENS), interface_since="5.24"),
    decoder("gptj", "GPTJModel",
        configured("GPTJConfig", vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64,
            **SPECIAL_TOKENS), interface_since="5.24", takes_names_since="5.24"),
)

DECODERS = (
    decoder("llama", "LlamaModel", causal("LlamaConfig")),
    decoder("llama-sequence-classification", "LlamaForSequenceClassification", causal("LlamaConfig", **CLASSES),
        {"logits": Valid.ROWS}),
    decoder("mistral-sliding", "MistralModel", causal("MistralConfig", **SLIDING)),
    decoder("mistral-full", "MistralModel", causal("MistralConfig", head_dim=8, sliding_window=None)),
    decoder("qwen2", "Qwen2Model", causal("Qwen2Config", 2, 24)),
    decoder("qwen2-sliding", "Qwen2Model",
        causal("Qwen2Config", 2, 24, use_sliding_window=True, max_window_layers=1, **SLIDING)),
    decoder("qwen3", "Qwen3Model", causal("Qwen3Config", 4, 16)),
    decoder("qwen3-sequence-classification", "Qwen3ForSequenceClassification", causal("Qwen3Config", 4, 16, **CLASSES),
        {"logits": Valid.ROWS}),
    encoder("qwen3-bidirectional", "Qwen3Model", causal("Qwen3Config", 4, 16, is_causal=False)),
    decoder("qwen3-moe", "Qwen3MoeModel",
        causal("Qwen3MoeConfig", 4, 8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)),
    decoder("mixtral", "MixtralModel", causal("MixtralConfig", 4, 8, num_local_experts=4, **SLIDING)),
    decoder("gemma", "GemmaModel", configured("GemmaConfig", **tiny_text(2, 16), num_key_value_heads=1, head_dim=32)),
    decoder("gemma2", "Gemma2Model",
        configured("Gemma2Config", **tiny_text(4, 16), num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16,
            attn_logit_softcapping=2.0, **SLIDING, **ALTERNATING)),
    decoder("gemma3-text", "Gemma3TextModel",
        configured("Gemma3TextConfig", **tiny_text(4, 8), num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16,
            **SLIDING, **ALTERNATING)),
    decoder("olmo", "OlmoModel", causal("OlmoConfig", 2, 16)),
    decoder("olmo2", "Olmo2Model", causal("Olmo2Config", 2, 32)),
    decoder("olmo3", "Olmo3Model", causal("Olmo3Config", 2, 16, **SLIDING, **ALTERNATING)),
    decoder("phi", "PhiModel", causal("PhiConfig", 2, 32)),
    decoder("phi3", "Phi3Model", causal("Phi3Config", 4, 8, **SLIDING)),
    decoder("gpt2", "GPT2Model",
        configured("GPT2Config", vocab_size=VOCAB_SIZE, n_embd=48, n_layer=2, n_head=2, n_positions=64,
            **SPECIAL_TOKENS)),
    decoder("gpt-neox", "GPTNeoXModel", configured("GPTNeoXConfig", **tiny_text(2, 32))),
    decoder("gpt-bigcode", "GPTBigCodeModel",
        configured("GPTBigCodeConfig", vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=64,
            **SPECIAL_TOKENS)),
    decoder("opt", "OPTModel",
        configured("OPTConfig", vocab_size=VOCAB_SIZE, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2,
            num_attention_heads=4, ffn_dim=64, max_position_embeddings=64, **SPECIAL_TOKENS)),
    decoder("biogpt", "BioGptModel", configured("BioGptConfig", **tiny_text(2, 16))),
    decoder("cohere", "CohereModel", causal("CohereConfig", 4, 8)),
    decoder("cohere2", "Cohere2Model", causal("Cohere2Config", 4, 16, **SLIDING, **ALTERNATING)),
    decoder("starcoder2", "Starcoder2Model", causal("Starcoder2Config", 4, 16, **SLIDING)),
    decoder("stablelm", "StableLmModel", causal("StableLmConfig", 2, 32)),
    decoder("granite", "GraniteModel", causal("GraniteConfig", 4, 8, attention_multiplier=0.3)),
    decoder("smollm3", "SmolLM3Model",
        causal("SmolLM3Config", 4, 16, use_sliding_window=True, no_rope_layer_interval=2, **SLIDING, **ALTERNATING)),
    decoder("helium", "HeliumModel",
        configured("HeliumConfig", **tiny_text(2, 16), num_key_value_heads=1, head_dim=16)),
    decoder("glm", "GlmModel", configured("GlmConfig", **tiny_text(4, 8), num_key_value_heads=2, head_dim=8)),
    decoder("glm4", "Glm4Model", configured("Glm4Config", **tiny_text(4, 8), num_key_value_heads=2, head_dim=8)),
    decoder("exaone4", "Exaone4Model", causal("Exaone4Config", 4, 8, **SLIDING, **ALTERNATING)),
    decoder("ernie4.5", "Ernie4_5Model",
        configured("Ernie4_5Config", **tiny_text(4, 8), num_key_value_heads=2, head_dim=16)),
    decoder("nemotron", "NemotronModel", causal("NemotronConfig", 4, 8), takes_names_since="5.13"),
    decoder("persimmon", "PersimmonModel", causal("PersimmonConfig", 2, 16, kv_heads=2)),
    decoder("seed-oss", "SeedOssModel",
        configured("SeedOssConfig", **tiny_text(4, 8), num_key_value_heads=2, head_dim=8)),
    decoder("arcee", "ArceeModel", causal("ArceeConfig", 4, 8)),
    decoder("apertus", "ApertusModel", causal("ApertusConfig", 4, 8)),
    decoder("ministral", "MinistralModel", causal("MinistralConfig", 4, 8, head_dim=8, **SLIDING, **ALTERNATING)),
    decoder("diffllama", "DiffLlamaModel", causal("DiffLlamaConfig", 4, 8), takes_names_since="5.13"),
    decoder("doge", "DogeModel", causal("DogeConfig", 4, 8)),
    decoder("bitnet", "BitNetModel", causal("BitNetConfig", 4, 8)),
    decoder("nanochat", "NanoChatModel", causal("NanoChatConfig", 4, 8)),
    decoder("vaultgemma", "VaultGemmaModel",
        configured("VaultGemmaConfig", **tiny_text(4, 8), num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
            attn_logit_softcapping=2.0, **SLIDING, **ALTERNATING)),
    decoder("modernbert-decoder", "ModernBertDecoderModel",
        configured("ModernBertDecoderConfig", **tiny_text(2, 16), local_attention=6, global_attn_every_n_layers=2,
            cls_token_id=BOS, sep_token_id=EOS)),
    decoder("xglm", "XGLMModel",
        configured("XGLMConfig", vocab_size=VOCAB_SIZE, max_position_embeddings=64, d_model=32, num_layers=2,
            attention_heads=2, ffn_dim=64, **SPECIAL_TOKENS), uses_interface=False),
    decoder("lfm2", "Lfm2Model", causal("Lfm2Config", 4, 8, layer_types=["full_attention", "conv"]),
        paddings=HYBRID_PADDING),
    decoder("recurrent-gemma", "RecurrentGemmaModel",
        configured("RecurrentGemmaConfig", **tiny_text(2, 16), lru_width=32, attention_window_size=16,
            num_key_value_heads=1, block_types=["attention", "recurrent"]), interface_since="5.13"),
    decoder("bamba", "BambaModel",
        causal("BambaConfig", 2, 16, attn_layer_indices=[0], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
            mamba_chunk_size=8), paddings=HYBRID_PADDING),
    decoder("jamba", "JambaModel",
        causal("JambaConfig", 2, 16, attn_layer_period=2, attn_layer_offset=0, num_experts=2, mamba_d_state=8,
            mamba_dt_rank=4, use_mamba_kernels=False)),
    decoder("zamba2", "Zamba2Model",
        causal("Zamba2Config", 2, 16, kv_heads=2, layers_block_type=["hybrid", "mamba"], mamba_d_state=8,
            mamba_headdim=16, n_mamba_heads=4, mamba_ngroups=1, chunk_size=8, num_mem_blocks=1, adapter_rank=4,
            hybrid_layer_ids=[0]),
        harmless=ZAMBA2_HARMLESS),
    decoder("falcon-h1", "FalconH1Model",
        causal("FalconH1Config", 2, 16, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
            mamba_chunk_size=8, head_dim=16), paddings=HYBRID_PADDING),
    decoder("granite-moe-hybrid", "GraniteMoeHybridModel",
        causal("GraniteMoeHybridConfig", 2, 16, layer_types=["attention", "mamba"], num_local_experts=2,
            num_experts_per_tok=1, shared_intermediate_size=32, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
            mamba_chunk_size=8), paddings=HYBRID_PADDING),
    decoder("qwen3-next", "Qwen3NextModel",
        causal("Qwen3NextConfig", 2, 16, head_dim=16, layer_types=["full_attention", "linear_attention"], num_experts=2,
            num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32,
            linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16),
        paddings=HYBRID_PADDING),
    decoder("bert-causal", "BertModel", configured("BertConfig", **tiny_text(2, 16), is_decoder=True)),
    decoder("clip-text", "CLIPTextModel", configured("CLIPTextConfig", **tiny_text(4, 8) | {"eos_token_id": EOS}),
        EOS_POOLED),
    decoder("metaclip2-text", "MetaClip2TextModel", configured("MetaClip2TextConfig", **tiny_text(2, 16)), EOS_POOLED),
    decoder("clipseg-text", "clipseg.CLIPSegTextModel", configured("CLIPSegTextConfig", **tiny_text(2, 16)),
        EOS_POOLED),
    decoder("owlvit-text", "OwlViTTextModel", configured("OwlViTTextConfig", **tiny_text(2, 16))),
    decoder("aimv2-text", "Aimv2TextModel", configured("Aimv2TextConfig", **tiny_text(2, 16)), EOS_POOLED),
)

# T5 does not scale its logits: smaller weights keep them from blowing up the rounding errors of both sides.
UNSCALED = 0.7

ENCODER_DECODERS = (
    encoder_decoder("bart", "BartModel", two_sided("BartConfig")),
    encoder_decoder("bart-short-decoder", "BartModel", two_sided("BartConfig"), decoder_length=SHORT_LENGTH),
    encoder_decoder("mbart", "MBartModel", two_sided("MBartConfig", 2, 24)),
    encoder_decoder("marian", "MarianModel", two_sided("MarianConfig", 2, 16), decoder_length=SHORT_LENGTH),
    encoder_decoder("pegasus", "PegasusModel", two_sided("PegasusConfig", 4, 16)),
    encoder_decoder("m2m-100", "M2M100Model", two_sided("M2M100Config", 2, 32), decoder_length=SHORT_LENGTH),
    encoder_decoder("blenderbot", "BlenderbotModel", two_sided("BlenderbotConfig", 2, 16)),
    encoder_decoder("blenderbot-small", "BlenderbotSmallModel", two_sided("BlenderbotSmallConfig", 2, 16)),
    encoder_decoder("plbart", "PLBartModel", two_sided("PLBartConfig", 2, 16)),
    encoder_decoder("nllb-moe", "NllbMoeModel",
        two_sided("NllbMoeConfig", 2, 16, num_experts=2, encoder_sparse_step=2, decoder_sparse_step=2)),
    encoder_decoder("bigbird-pegasus", "BigBirdPegasusModel",
        two_sided("BigBirdPegasusConfig", 2, 16, attention_type="original_full")),
    encoder_decoder("mvp", "MvpModel", two_sided("MvpConfig", 2, 16), uses_interface=False),
    encoder_decoder("led", "LEDModel",
        two_sided("LEDConfig", 2, 16, attention_window=4, max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64), uses_interface=False),
    encoder_decoder("t5", "T5Model", t5("T5Config"), interface_since="5.15", weight_scale=UNSCALED),
    encoder_decoder("t5-short-decoder", "T5Model", t5("T5Config", 8), decoder_length=SHORT_LENGTH,
        interface_since="5.15", weight_scale=UNSCALED),
    encoder_decoder("mt5", "MT5Model", t5("MT5Config", 24), interface_since="5.15", weight_scale=UNSCALED),
    encoder_decoder("umt5", "UMT5Model", t5("UMT5Config"), interface_since="5.15", weight_scale=UNSCALED),
    encoder_decoder("longt5-local", "LongT5Model", t5("LongT5Config", local_radius=3), interface_since="5.15",
        weight_scale=UNSCALED),
    encoder_decoder("switch", "SwitchTransformersModel",
        t5("SwitchTransformersConfig", num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=2),
        interface_since="5.15", weight_scale=UNSCALED),
    encoder_decoder("t5gemma", "T5GemmaModel", t5gemma),
    encoder_decoder("t5gemma-short-decoder", "T5GemmaModel", t5gemma, decoder_length=SHORT_LENGTH),
    encoder_decoder("bert2bert", "EncoderDecoderModel", bert_to_bert, output="logits"),
    Family("blip2-qformer", "encoder-decoder", "Blip2QFormerModel",
        configured("Blip2QFormerConfig", **tiny_text(2, 16), encoder_hidden_size=32, cross_attention_frequency=1),
        qformer_inputs(), tuple(WHOLE_AND_POOLED), EVERY_PADDING, interface_since="5.13"),
)
# fmt: on

SQUARE = {"image_size": 32, "patch_size": 8}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "out_features": ["stage2"],
}
DETR: dict[str, Any] = {
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_config": RESNET,
    "d_model": 32,
    "num_queries": 5,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
DETR_OUTPUTS = {"last_hidden_state": Valid.ROWS, "encoder_last_hidden_state": Valid.TOKENS}
DETR_INPUTS = patch_mask_inputs("pixel_mask", DETR_OUTPUTS, pixels_per_entry=8)
SIGLIP2 = configured("Siglip2VisionConfig", **tiny(4, 8), num_patches=16, patch_size=4)

# fmt: off
VISION = (
    vision("vit", "ViTModel", configured("ViTConfig", **tiny(4, 16), **SQUARE), WHOLE_AND_POOLED),
    vision("vit-image-classification", "ViTForImageClassification",
        configured("ViTConfig", **tiny(2, 40), **SQUARE, **CLASSES), {"logits": Valid.ROWS}),
    vision("deit", "DeiTModel", configured("DeiTConfig", **tiny(2, 24), **SQUARE), WHOLE_AND_POOLED),
    vision("vit-msn", "ViTMSNModel", configured("ViTMSNConfig", **tiny(2, 16), **SQUARE)),
    vision("yolos", "YolosModel",
        configured("YolosConfig", **tiny(2, 16), image_size=[32, 32], patch_size=8, num_detection_tokens=4),
        WHOLE_AND_POOLED),
    vision("dinov2", "Dinov2Model", configured("Dinov2Config", **tiny(4, 16), **SQUARE), WHOLE_AND_POOLED),
    vision("dinov2-with-registers", "Dinov2WithRegistersModel",
        configured("Dinov2WithRegistersConfig", **tiny(2, 32), **SQUARE), WHOLE_AND_POOLED),
    vision("dinov3-vit", "DINOv3ViTModel",
        configured("DINOv3ViTConfig", **tiny(2, 16), **SQUARE, num_register_tokens=2), WHOLE_AND_POOLED),
    vision("siglip-vision", "SiglipVisionModel", configured("SiglipVisionConfig", **tiny(4, 9), **SQUARE),
        WHOLE_AND_POOLED),
    vision("siglip2-vision", "Siglip2VisionModel", SIGLIP2,
        {"last_hidden_state": Valid.TOKENS, "pooler_output": Valid.ROWS},
        inputs=naflex_inputs({"last_hidden_state": Valid.TOKENS}), paddings=PREFIX_PADDING),
    vision("clip-vision", "CLIPVisionModel", configured("CLIPVisionConfig", **tiny(4, 8), **SQUARE), WHOLE_AND_POOLED),
    vision("metaclip2-vision", "MetaClip2VisionModel", configured("MetaClip2VisionConfig", **tiny(2, 16), **SQUARE),
        WHOLE_AND_POOLED),
    vision("chinese-clip-vision", "ChineseCLIPVisionModel",
        configured("ChineseCLIPVisionConfig", **tiny(2, 16), **SQUARE), WHOLE_AND_POOLED),
    vision("mlcd", "MLCDVisionModel", configured("MLCDVisionConfig", **tiny(2, 16), **SQUARE), WHOLE_AND_POOLED),
    vision("aimv2-vision", "Aimv2VisionModel", configured("Aimv2VisionConfig", **tiny(2, 16), **SQUARE),
        WHOLE_AND_POOLED),
    vision("owlvit-vision", "OwlViTVisionModel", configured("OwlViTVisionConfig", **tiny(2, 16), **SQUARE),
        WHOLE_AND_POOLED),
    vision("beit", "BeitModel", configured("BeitConfig", **tiny(2, 16), **SQUARE, use_relative_position_bias=True),
        WHOLE_AND_POOLED, takes_names_since="5.9"),
    vision("swin", "SwinModel",
        configured("SwinConfig", image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
            window_size=4), WHOLE_AND_POOLED, interface_since="5.9"),
    vision("i-jepa", "IJepaModel", configured("IJepaConfig", **tiny(4, 8), **SQUARE)),
    vision("dpt", "DPTModel", configured("DPTConfig", **tiny(2, 32), **SQUARE, backbone_out_indices=[0, 1]),
        WHOLE_AND_POOLED),
    vision("pixio", "PixioModel", configured("PixioConfig", **tiny(2, 16), **SQUARE), WHOLE_AND_POOLED),
    vision("vit-mae", "ViTMAEModel", configured("ViTMAEConfig", **tiny(2, 16), **SQUARE, mask_ratio=0.25),
        inputs=pixel_inputs(noise=torch.linspace(0, 1, BATCH_SIZE * 16).reshape(BATCH_SIZE, 16))),
    vision("videomae", "VideoMAEModel", configured("VideoMAEConfig", **tiny(2, 24), **SQUARE, num_frames=2),
        inputs=pixel_inputs((2, 3, 32, 32))),
    vision("vivit", "VivitModel",
        configured("VivitConfig", **tiny(2, 16), image_size=32, tubelet_size=[2, 8, 8], num_frames=2), WHOLE_AND_POOLED,
        inputs=pixel_inputs((2, 3, 32, 32))),
    vision("vjepa2", "VJEPA2Model",
        configured("VJEPA2Config", **tiny(2, 24), crop_size=32, patch_size=8, frames_per_clip=2, pred_hidden_size=48,
            pred_num_attention_heads=2, pred_num_hidden_layers=1, mlp_ratio=2),
        inputs=pixel_inputs((2, 3, 32, 32), "pixel_values_videos")),
    vision("ast", "ASTModel",
        configured("ASTConfig", **tiny(2, 16), max_length=24, num_mel_bins=16, patch_size=8, frequency_stride=4,
            time_stride=8), WHOLE_AND_POOLED, inputs=pixel_inputs((24, 16), "input_values")),
    vision("layoutlmv3-vision", "LayoutLMv3Model",
        configured("LayoutLMv3Config", **tiny_text(2, 36), coordinate_size=12, shape_size=12,
            max_2d_position_embeddings=32, input_size=32, patch_size=8), interface_since="5.24"),
    vision("pp-doclayout-v2-reading-order", "pp_doclayout_v2.PPDocLayoutV2ReadingOrder",
        configured("pp_doclayout_v2.PPDocLayoutV2ReadingOrderConfig", hidden_size=32, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=64, coordinate_size=6, shape_size=4, global_pointer_head_size=8),
        {"logits": Valid.TOKENS}, inputs=box_inputs, interface_since="5.24", paddings=(Padding.NO_MASK, Padding.RIGHT)),
    vision("qwen2-vl-vision", "qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        configured("qwen2_vl.Qwen2VLVisionConfig", depth=2, embed_dim=64, hidden_size=32, num_heads=2, patch_size=4,
            mlp_ratio=1), inputs=grid_pixel_inputs()),
    vision("qwen2.5-vl-vision", "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
        configured("qwen2_5_vl.Qwen2_5_VLVisionConfig", depth=2, hidden_size=64, out_hidden_size=32,
            intermediate_size=64, num_heads=2, patch_size=4, window_size=16, fullatt_block_indexes=[1]),
        inputs=grid_pixel_inputs()),
    vision("qwen3-vl-vision", "Qwen3VLVisionModel",
        configured("qwen3_vl.Qwen3VLVisionConfig", depth=2, hidden_size=64, out_hidden_size=32, intermediate_size=64,
            num_heads=2, patch_size=4, num_position_embeddings=16, deepstack_visual_indexes=[0]),
        inputs=grid_pixel_inputs()),
    vision("glm4v-vision", "Glm4vVisionModel",
        configured("glm4v.Glm4vVisionConfig", depth=2, hidden_size=64, out_hidden_size=32, intermediate_size=64,
            num_heads=2, patch_size=4, image_size=16), inputs=grid_pixel_inputs()),
    vision("pixtral-vision", "PixtralVisionModel", configured("PixtralVisionConfig", **tiny(2, 16), **SQUARE),
        inputs=pixel_inputs(image_sizes=torch.tensor([(32, 32), (24, 32), (16, 32), (32, 24)]))),
    vision("idefics2-vision", "idefics2.Idefics2VisionTransformer",
        configured("idefics2.Idefics2VisionConfig", **tiny(2, 16), **SQUARE), TOKENS_ONLY,
        inputs=patch_mask_inputs("patch_attention_mask", TOKENS_ONLY), paddings=PREFIX_PADDING),
    vision("idefics3-vision", "Idefics3VisionTransformer", configured("Idefics3VisionConfig", **tiny(2, 16), **SQUARE),
        TOKENS_ONLY, inputs=patch_mask_inputs("patch_attention_mask", TOKENS_ONLY), paddings=PREFIX_PADDING),
    vision("smolvlm-vision", "SmolVLMVisionTransformer", configured("SmolVLMVisionConfig", **tiny(2, 16), **SQUARE),
        TOKENS_ONLY, inputs=patch_mask_inputs("patch_attention_mask", TOKENS_ONLY), paddings=PREFIX_PADDING),
    vision("internvl-vision", "InternVLVisionModel",
        configured("InternVLVisionConfig", **tiny(2, 16), image_size=[32, 32], patch_size=[8, 8])),
    vision("instructblip-vision", "InstructBlipVisionModel",
        configured("InstructBlipVisionConfig", **tiny(2, 16), **SQUARE), WHOLE_AND_POOLED),
    vision("blip2-vision", "Blip2VisionModel", configured("Blip2VisionConfig", **tiny(2, 16), **SQUARE),
        WHOLE_AND_POOLED),
    vision("blip-vision", "BlipVisionModel", configured("BlipVisionConfig", **tiny(2, 16), **SQUARE), WHOLE_AND_POOLED,
        uses_interface=False),
    vision("kosmos2-vision", "kosmos2.Kosmos2VisionModel",
        configured("kosmos2.Kosmos2VisionConfig", **tiny(2, 16), **SQUARE), WHOLE_AND_POOLED),
    vision("llama4-vision", "Llama4VisionModel",
        configured("Llama4VisionConfig", **tiny(2, 16) | {"intermediate_size": 128}, **SQUARE, vision_output_dim=32,
            projector_input_dim=32, projector_output_dim=32)),
    vision("detr", "DetrModel", configured("DetrConfig", **DETR), DETR_OUTPUTS, inputs=DETR_INPUTS,
        paddings=PREFIX_PADDING),
    vision("conditional-detr", "ConditionalDetrModel", configured("ConditionalDetrConfig", **DETR), DETR_OUTPUTS,
        inputs=DETR_INPUTS, paddings=PREFIX_PADDING),
)
# fmt: on

STEPS = {"conv_dim": (32, 32), "conv_kernel": (4, 3), "conv_stride": (2, 2)}
CONVOLUTIONS = STEPS | {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
WHISPER = two_sided("WhisperConfig", 2, 16, num_mel_bins=16, max_source_positions=12, max_target_positions=32)
SEAMLESS_SETTINGS: dict[str, Any] = {
    "hidden_size": 32,
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 2,
    "speech_encoder_intermediate_size": 64,
    "feature_projection_input_dim": 16,
    "conv_depthwise_kernel_size": 3,
    "num_adapter_layers": 1,
    "adaptor_kernel_size": 3,
    "adaptor_stride": 2,
    "max_source_positions": 32,
    "left_max_position_embeddings": 4,
    "right_max_position_embeddings": 3,
}
SEAMLESS = configured("SeamlessM4TConfig", **SEAMLESS_SETTINGS)
# Its eager attention adds a bool mask, 0 and 1, to the logits, and so attends to padding.
SEAMLESS_V2_REFERENCE = "sdpa" if Version("5.16") <= TRANSFORMERS_VERSION else "eager"
# Before 5.18 every implementation gives NaN for padded input.
PARAKEET_PADDING = PREFIX_PADDING if Version("5.18") <= TRANSFORMERS_VERSION else NO_PADDING
SEAMLESS_V2 = configured("SeamlessM4Tv2Config", **SEAMLESS_SETTINGS)

# fmt: off
AUDIO = (
    audio("wav2vec2", "Wav2Vec2Model", configured("Wav2Vec2Config", **tiny(2, 16), **CONVOLUTIONS), audio_inputs),
    audio("wav2vec2-large", "Wav2Vec2Model", configured("Wav2Vec2Config", **tiny(2, 24), **CONVOLUTIONS, **STABLE),
        audio_inputs),
    audio("wav2vec2-sequence-classification", "Wav2Vec2ForSequenceClassification",
        configured("Wav2Vec2Config", **tiny(2, 16), **CONVOLUTIONS, **STABLE, **CLASSES), audio_inputs,
        {"logits": Valid.ROWS}),
    audio("hubert", "HubertModel", configured("HubertConfig", **tiny(4, 8), **CONVOLUTIONS), audio_inputs),
    audio("unispeech", "UniSpeechModel",
        configured("UniSpeechConfig", **tiny(2, 16), **CONVOLUTIONS, num_codevectors_per_group=4), audio_inputs),
    audio("unispeech-sat", "UniSpeechSatModel",
        configured("UniSpeechSatConfig", **tiny(2, 16), **CONVOLUTIONS, num_codevectors_per_group=4), audio_inputs),
    audio("sew", "SEWModel", configured("SEWConfig", **tiny(2, 16), **CONVOLUTIONS, squeeze_factor=2), audio_inputs),
    audio("data2vec-audio", "Data2VecAudioModel",
        configured("Data2VecAudioConfig", **tiny(2, 16), **STEPS, num_feat_extract_layers=2, num_conv_pos_embeddings=2,
            conv_pos_kernel_size=3, num_conv_pos_embedding_groups=2), audio_inputs),
    audio("wav2vec2-conformer", "Wav2Vec2ConformerModel",
        configured("Wav2Vec2ConformerConfig", **tiny(2, 16), **CONVOLUTIONS, conv_depthwise_kernel_size=3,
            position_embeddings_type="relative"), audio_inputs, interface_since="5.16"),
    audio("wav2vec2-conformer-rotary", "Wav2Vec2ConformerModel",
        configured("Wav2Vec2ConformerConfig", **tiny(2, 16), **CONVOLUTIONS, conv_depthwise_kernel_size=3,
            position_embeddings_type="rotary"), audio_inputs, interface_since="5.16"),
    audio("wav2vec2-bert", "Wav2Vec2BertModel",
        configured("Wav2Vec2BertConfig", **tiny(2, 16), feature_projection_input_dim=16, conv_depthwise_kernel_size=3,
            position_embeddings_type="relative_key", left_max_position_embeddings=4, right_max_position_embeddings=3),
        feature_inputs, interface_since="5.16"),
    audio("wav2vec2-adapter", "Wav2Vec2Model",
        configured("Wav2Vec2Config", **tiny(2, 16), **CONVOLUTIONS, **STABLE, add_adapter=True, num_adapter_layers=1),
        partial(audio_inputs, frames=halved)),
    audio("wav2vec2-bert-rotary", "Wav2Vec2BertModel",
        configured("Wav2Vec2BertConfig", **tiny(2, 16), feature_projection_input_dim=16, conv_depthwise_kernel_size=3,
            position_embeddings_type="rotary"), feature_inputs, interface_since="5.16"),
    audio("seamless-m4t-speech", "seamless_m4t.SeamlessM4TSpeechEncoder", SEAMLESS,
        partial(feature_inputs, subsampling=halved), interface_since="5.16"),
    audio("seamless-m4t-v2-speech", "seamless_m4t_v2.SeamlessM4Tv2SpeechEncoder", SEAMLESS_V2,
        partial(feature_inputs, subsampling=halved), interface_since="5.16",
        reference=SEAMLESS_V2_REFERENCE),
    audio("parakeet", "ParakeetEncoder",
        configured("ParakeetEncoderConfig", **tiny(2, 16), num_mel_bins=16, subsampling_factor=2,
            subsampling_conv_channels=8, conv_kernel_size=3), partial(feature_inputs, subsampling=halved),
        paddings=PARAKEET_PADDING),
    audio("speech-to-text", "Speech2TextModel",
        two_sided("Speech2TextConfig", 2, 16, input_feat_per_channel=16, max_source_positions=64,
            max_target_positions=64, conv_channels=16), speech_with_text_inputs,
        {"last_hidden_state": Valid.ROWS, "encoder_last_hidden_state": Valid.TOKENS}),
    audio("moonshine-encoder", "moonshine.MoonshineEncoder",
        configured("MoonshineConfig", vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64,
            encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, encoder_num_attention_heads=2,
            decoder_num_attention_heads=2), partial(audio_inputs, samples=13 * 384, frames=moonshine_frames)),
    audio("wavlm", "WavLMModel",
        configured("WavLMConfig", **tiny(2, 16), **CONVOLUTIONS, num_buckets=8, max_bucket_distance=16), audio_inputs,
        uses_interface=False),
    audio("sew-d", "SEWDModel", configured("SEWDConfig", **tiny(2, 16), **CONVOLUTIONS, squeeze_factor=2), audio_inputs,
        uses_interface=False),
    Family("whisper-encoder", "audio", "whisper.WhisperEncoder", WHISPER, pixel_inputs((16, 24), "input_features"),
        tuple(WHOLE)),
    Family("whisper", "audio to text", "WhisperModel", WHISPER,
        speech_to_text_inputs({"last_hidden_state": Valid.DECODER}), ("last_hidden_state", "encoder_last_hidden_state"),
        EVERY_PADDING, harmless=CAUSAL_HARMLESS),
)
# fmt: on

IMAGE_TOKEN = VOCAB_SIZE - 2
TOWER = {**tiny(2, 16), **SQUARE}


def image_text_inputs(outputs: Mapping[str, Valid], image_tokens: int, *, kinds: bool = False) -> MakeInputs:
    """An image inside a prompt that is padded on the left."""

    def make(config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
        length = image_tokens + 9
        mask = padding_mask(padding, generator, length)
        if mask is not None and padding is Padding.BATCH_OF_ONE:
            mask = mask.flip(1)
        tokens = random_tokens(generator, padding.batch_size, length, mask)
        image = slice(length - image_tokens - 2, length - 2)
        tokens[:, image] = IMAGE_TOKEN
        inputs = {
            "input_ids": tokens,
            "pixel_values": torch.randn(padding.batch_size, 3, 32, 32, generator=generator),
        }
        if kinds:
            inputs["token_type_ids"] = (tokens == IMAGE_TOKEN).long()
        masks = {"attention_mask": torch.ones_like(tokens) if mask is None else mask}
        return Example(inputs, masks, valid_positions(outputs, mask))

    return make


def two_tower_inputs(outputs: Mapping[str, Valid], *, causal: bool = False) -> MakeInputs:
    def make(config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
        text = text_inputs(outputs, causal=causal)(config, generator, padding)
        pixels = torch.randn(padding.batch_size, 3, 32, 32, generator=generator)
        return Example({**text.inputs, "pixel_values": pixels}, text.masks, text.valid)

    return make


def image_prefix_inputs(outputs: Mapping[str, Valid], image_tokens: int) -> MakeInputs:
    """Kosmos' text after an image, whose places a mask of its own tells."""

    def make(config: PreTrainedConfig, generator: torch.Generator, padding: Padding) -> Example:
        text = two_tower_inputs(outputs, causal=True)(config, generator, padding)
        is_image = torch.zeros_like(text.inputs["input_ids"])
        is_image[:, ALWAYS_VALID - image_tokens : ALWAYS_VALID] = 1
        return Example({**text.inputs, "image_embeds_position_mask": is_image}, text.masks, text.valid)

    return make


LEFT_PADDING = (Padding.NO_MASK, Padding.LEFT, Padding.BATCH_OF_ONE)
EMBEDDINGS = {"text_embeds": Valid.ROWS, "image_embeds": Valid.ROWS}
BRIDGED = {"text_features": Valid.TOKENS, "image_features": Valid.ROWS}
TOKENS_AND_IMAGES = {"last_hidden_state": Valid.TOKENS, "image_embeds": Valid.ROWS}
KOSMOS_TEXT = {
    "vocab_size": VOCAB_SIZE, "embed_dim": 32, "layers": 2, "attention_heads": 2, "ffn_dim": 64,
    "max_position_embeddings": 64, **SPECIAL_TOKENS,
}  # fmt: skip

# fmt: off
MULTIMODAL = (
    Family("clip", "text and pixels", "CLIPModel",
        configured("CLIPConfig", text_config=tiny_text(2, 16) | {"eos_token_id": EOS},
            vision_config={**tiny(2, 24), **SQUARE}, projection_dim=16), two_tower_inputs(EMBEDDINGS, causal=True),
        tuple(EMBEDDINGS), LEFT_PADDING),
    Family("siglip", "text and pixels", "SiglipModel",
        configured("SiglipConfig", text_config=tiny_text(2, 16), vision_config=TOWER), two_tower_inputs(EMBEDDINGS),
        tuple(EMBEDDINGS), EVERY_PADDING),
    Family("gemma3", "text and pixels", "Gemma3Model",
        configured("Gemma3Config",
            text_config={**tiny_text(4, 8), "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16,
                **SLIDING, **ALTERNATING}, vision_config=TOWER, mm_tokens_per_image=4, image_token_index=IMAGE_TOKEN),
        image_text_inputs(TOKENS_ONLY, 4, kinds=True), tuple(TOKENS_ONLY), LEFT_PADDING),
    Family("paligemma", "text and pixels", "PaliGemmaModel",
        configured("PaliGemmaConfig",
            text_config={**tiny_text(2, 16), "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16},
            vision_config={**TOWER, "model_type": "siglip_vision_model", "projection_dim": 32}, projection_dim=32,
            hidden_size=32, image_token_index=IMAGE_TOKEN), image_text_inputs(TOKENS_ONLY, 16, kinds=True),
        tuple(TOKENS_ONLY), LEFT_PADDING),
    Family("llava", "text and pixels", "LlavaModel",
        configured("LlavaConfig", text_config={**tiny_text(2, 16), "model_type": "llama"},
            vision_config={**TOWER, "model_type": "clip_vision_model"}, image_token_index=IMAGE_TOKEN),
        image_text_inputs(TOKENS_ONLY, 16), tuple(TOKENS_ONLY), LEFT_PADDING),
    # Hands layers of cross-attention masks of other lengths than theirs, which eager attention does not get.
    Family("bridgetower", "text and pixels", "BridgeTowerModel",
        configured("BridgeTowerConfig", text_config=tiny_text(2, 32), hidden_size=64, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=64,
            vision_config={"hidden_size": 64, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}),
        two_tower_inputs(BRIDGED), tuple(BRIDGED), EVERY_PADDING),
    # Its projection of images says that it is causal, and is not.
    Family("kosmos2", "text and pixels", "Kosmos2Model",
        configured("Kosmos2Config", latent_query_num=3, vision_config=TOWER, text_config=KOSMOS_TEXT),
        image_prefix_inputs(TOKENS_AND_IMAGES, 3), tuple(TOKENS_AND_IMAGES), EVERY_PADDING,
        frozenset({Padding.RIGHT})),
)
# fmt: on

FAMILIES: tuple[Family, ...] = (
    *TEXT_ENCODERS,
    *HEADS,
    *DECODERS,
    *ENCODER_DECODERS,
    *VISION,
    *AUDIO,
    *MULTIMODAL,
    *OFF_INTERFACE,
)
