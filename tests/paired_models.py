"""Pairs of tiny models with equal random weights, one on transformers' own attention and one on ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

TRANSFORMERS_VERSION = Version(transformers.__version__)
# Before, T5 adds our mask, made dense, to logits of its own.
T5_IS_ON_THE_INTERFACE = Version("5.15") <= TRANSFORMERS_VERSION

PAD, BOS, EOS, VOCAB_SIZE = 0, 2, 3, 64
TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
    "max_position_embeddings": 64,
    # With tied embeddings a random model repeats the token that it was given.
    "tie_word_embeddings": False,
}  # fmt: skip


def build_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, implementation: str, *, seed: int = 0,
    weight_scale: float = 1.0,
) -> Any:  # fmt: skip
    """Builds a model in eval mode; two calls with different implementations give identical weights."""
    model = random_model(model_class, config, implementation, seed, weight_scale)
    assert implementations_in_use(model) == {implementation}
    return model


def random_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, implementation: str, seed: int, scale: float
) -> Any:
    """Gives every weight the scale at which activations and attention logits have a variance near one.

    As initialised, attention is nearly uniform, and a wrong mask changes next to nothing.
    """
    torch.manual_seed(seed)
    # `_from_config` writes the implementation's name into the config that it is given.
    model = model_class._from_config(copy.deepcopy(config), attn_implementation=implementation)
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            weight = parameter.detach()
            if id(parameter) in seen or not weight.is_floating_point():
                continue
            seen.add(id(parameter))
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
    return model.eval()


def implementations_in_use(model: nn.Module) -> set[str | None]:
    """The attention implementations named by the configs of a model and of all its parts."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return {config._attn_implementation for config in configs if isinstance(config, PreTrainedConfig)}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal within a tolerance of the largest value, or of one."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def decoder_config(config_class: type[PreTrainedConfig], **settings: Any) -> PreTrainedConfig:
    """A config of Llama's descendants: 2 layers, 4 query heads on 2 key heads of width 8."""
    shared: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 32,
    }  # fmt: skip
    return config_class(**{**TOKENS, **shared, **settings})


def encoder_decoder_config(config_class: type[PreTrainedConfig], **settings: Any) -> PreTrainedConfig:
    """A config of BART's descendants: 2 layers a side, 2 heads of width 16."""
    sides = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}
    shared = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    shared |= {"d_model": 32, "decoder_start_token_id": BOS, "forced_eos_token_id": None, "dropout": 0.0}
    return config_class(**{**TOKENS, **shared, **settings})


def t5_config(config_class: type[PreTrainedConfig], **settings: Any) -> PreTrainedConfig:
    shared: dict[str, Any] = {
        "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": BOS,
        "dropout_rate": 0.0,
    }  # fmt: skip
    tokens = {name: value for name, value in TOKENS.items() if name != "max_position_embeddings"}
    return config_class(**{**tokens, **shared, **settings})


def right_padded(lengths: tuple[int, ...], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens and their mask, both `(batch, max(lengths))`, int64."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    tokens = torch.randint(4, VOCAB_SIZE, mask.shape, generator=generator)
    return tokens.masked_fill(mask == 0, PAD), mask


def left_padded(lengths: tuple[int, ...], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens, mask = right_padded(lengths, seed=seed)
    return tokens.flip(1), mask.flip(1)


def record_outputs(module: nn.Module) -> tuple[list[Tensor], Callable[[], None]]:
    """Keeps what a module returns; call the second value to stop."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    return outputs, module.register_forward_hook(keep).remove
