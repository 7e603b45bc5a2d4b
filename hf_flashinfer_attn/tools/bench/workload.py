"""Workloads: model shapes, request sets, and batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ...errors import FlashInferAttentionError

__all__ = [
    "REQUEST_SETS", "SHAPES", "BenchError", "PaddedBatch", "RequestSet", "chat_lengths", "parse_request_set",
    "shape_config", "shown_name", "synthetic_batches", "text_batches",
]  # fmt: skip

# First id that is not a special token in any shape.
FIRST_ID = 5


class BenchError(FlashInferAttentionError):
    """The benchmark cannot run, or one of its options is invalid."""


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """A padded batch on a device."""

    inputs: dict[str, torch.Tensor]  # `input_ids`, `attention_mask` and other outputs of the tokenizer
    padding: torch.Tensor  # True at padded positions, bool, shape `(rows, padded_length, 1)`
    lengths: tuple[int, ...]  # number of tokens per row
    divisors: torch.Tensor  # the same on the device, float32, shape `(rows, 1)`

    @classmethod
    def from_inputs(cls, inputs: dict[str, torch.Tensor], device: torch.device) -> PaddedBatch:
        """Moves tokenised rows to a device."""
        valid = inputs["attention_mask"].bool()
        lengths = valid.sum(1)
        if int(lengths.min()) < 1:
            raise BenchError("a row without any token cannot be pooled; leave empty texts out.")
        on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
        divisors = lengths.to(device, torch.float32)[:, None]
        return cls(on_device, ~valid.to(device)[:, :, None], tuple(lengths.tolist()), divisors)

    @property
    def slots(self) -> int:
        """Number of positions, padding included."""
        return self.padding.numel()

    def row(self, index: int) -> PaddedBatch:
        """Returns one row, with its padding, as a batch."""
        row = slice(index, index + 1)
        inputs = {name: tensor[row] for name, tensor in self.inputs.items()}
        return PaddedBatch(inputs, self.padding[row], self.lengths[row], self.divisors[row])


Draw = Callable[[int, torch.Generator], torch.Tensor]


@dataclass(frozen=True, slots=True)
class RequestSet:
    """A set of requests; `draw(requests, generator)` draws their lengths."""

    name: str
    draw: Draw
    longest: int
    batch_size: int = 64
    requests: int = 1_280
    sort: bool = False  # longest first

    def lengths(self, limit: int | None = None) -> list[int]:
        """Returns the number of tokens of each request; deterministic, and a smaller limit returns a prefix."""
        lengths: list[int] = self.draw(self.requests, torch.Generator().manual_seed(0)).tolist()[:limit]
        return sorted(lengths, reverse=True) if self.sort else lengths


def chat_lengths(requests: int, generator: torch.Generator) -> torch.Tensor:
    """Draws lengths in tokens, lognormal with median 55, clipped to [4, 512]; int64, shape `(requests,)`."""
    return (torch.randn(requests, generator=generator, device="cpu") * 0.9 + 4.0).exp().round().clamp(4, 512).long()


def _pair_lengths(requests: int, generator: torch.Generator) -> torch.Tensor:
    # Each request is a query of 8 to 32 tokens and a passage.
    queries = torch.randint(8, 33, (requests,), generator=generator, device="cpu")
    return (chat_lengths(requests, generator) + queries).clamp(max=512)


def _uniform(low: int, high: int) -> Draw:
    return lambda requests, generator: torch.randint(low, high + 1, (requests,), generator=generator, device="cpu")


def _cycle(lengths: Sequence[int]) -> Draw:
    return lambda requests, _: torch.tensor(lengths, device="cpu").repeat(-(-requests // len(lengths)))[:requests]


REQUEST_SETS: dict[str, RequestSet] = {
    requests.name: requests
    for requests in (
        RequestSet("chat", chat_lengths, 512, 64, 10_000),
        RequestSet("bulk", chat_lengths, 512, 256, 10_000),
        RequestSet("sorted", chat_lengths, 512, 256, 10_000, sort=True),
        RequestSet("single", chat_lengths, 512, 8, 2_000),
        RequestSet("uniform", _uniform(1, 512), 512, 64, 2_500),
        RequestSet("full", _cycle([512]), 512),
        RequestSet("pairs", _pair_lengths, 512, 128, 10_000),
        RequestSet("long", _uniform(1, 8192), 8192, 16, 160),
    )
}


def parse_request_set(text: str) -> RequestSet:
    """Parses the name of a request set, a length (`128`), alternating lengths (`16+32+128`) or `uniform:LOW:HIGH`.

    Examples:
        >>> from hf_flashinfer_attn.tools.bench.workload import parse_request_set
        >>> parse_request_set("16+32+128").lengths(5), max(parse_request_set("uniform:1:40").lengths())
        ([16, 32, 128, 16, 32], 40)
    """
    if text in REQUEST_SETS:
        return REQUEST_SETS[text]
    lengths = [int(number) for number in re.findall(r"\d+", text)]
    if re.fullmatch(r"uniform:\d+:\d+", text) and 1 <= lengths[0] <= lengths[1]:
        return RequestSet(text, _uniform(*lengths), lengths[1])
    if re.fullmatch(r"\d+(\+\d+)*", text) and min(lengths) >= 1:
        return RequestSet(text, _cycle(lengths), max(lengths))
    raise ValueError(
        f"{text!r} is no request set; expected one of {list(REQUEST_SETS)}, a length (128), lengths that take turns "
        "(16+32+128), or uniform:LOW:HIGH"
    )


def _bert(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "bert", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }  # fmt: skip


# Configurations of published checkpoints; the weights are random.
SHAPES: dict[str, dict[str, Any]] = {
    "gte-small": _bert(12, 384, 12),
    "bge-base": _bert(12, 768, 12),
    "bge-large": _bert(24, 1024, 16),
    "reranker-base": _bert(12, 768, 12) | {"architectures": ["BertForSequenceClassification"], "num_labels": 1},
    "modernbert-base": {
        "model_type": "modernbert", "num_hidden_layers": 22,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    },
    "qwen3-embedding": {
        "model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "max_position_embeddings": 32_768,
        "pad_token_id": 0,
    },
}  # fmt: skip


def shape_config(name: str, layers: int | None = None) -> PreTrainedConfig:
    """Returns the config of a shape; `layers` overrides its number of layers."""
    options = SHAPES[name] if layers is None else SHAPES[name] | {"num_hidden_layers": layers}
    config: PreTrainedConfig = AutoConfig.for_model(**options, vocab_size=30_522)
    # Makes queries and keys of unit variance. At the usual 0.02, attention is almost uniform, which would hide errors.
    config.initializer_range = config.hidden_size**-0.5
    return config


def shown_name(model: str) -> str:
    """Returns the displayed name of a model: the folder's name for an absolute path, otherwise the whole id."""
    return Path(model).name if Path(model).is_absolute() else model


def synthetic_batches(
    lengths: Sequence[int], batch_size: int, config: PreTrainedConfig, device: torch.device
) -> list[PaddedBatch]:
    """Makes right-padded batches of random token ids; deterministic."""
    generator = torch.Generator().manual_seed(0)
    pad_id = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
    batches = []
    for start in range(0, len(lengths), batch_size):
        rows = torch.tensor(lengths[start : start + batch_size], device="cpu")
        shape = (len(rows), int(rows.max()))
        ids = torch.randint(FIRST_ID, config.vocab_size, shape, generator=generator, device="cpu")
        # Some models detect padding by its id.
        ids[ids == pad_id] = FIRST_ID + 1 if pad_id == FIRST_ID else FIRST_ID
        valid = torch.arange(shape[1], device="cpu") < rows[:, None]
        inputs = {"input_ids": ids.masked_fill(~valid, pad_id), "attention_mask": valid.long()}
        batches.append(PaddedBatch.from_inputs(inputs, device))
    return batches


def text_batches(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_length: int,
    device: torch.device,
    sort: bool,
) -> list[PaddedBatch]:
    """Tokenises texts, truncated to `max_length` tokens, in order or longest first, and pads them by batch."""
    cut = {"truncation": True, "max_length": max_length}
    if sort:
        lengths = [-len(ids) for ids in tokenizer(list(texts), **cut)["input_ids"]]
        texts = [texts[at] for at in sorted(range(len(texts)), key=lengths.__getitem__)]
    batches = []
    for start in range(0, len(texts), batch_size):
        rows = tokenizer(
            list(texts[start : start + batch_size]),
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
            **cut,
        )
        batches.append(PaddedBatch.from_inputs(dict(rows), device))
    return batches
