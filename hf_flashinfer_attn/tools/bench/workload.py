"""What is measured: shapes of models, request sets, and the batches they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import (
    BertConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from .errors import BenchError

__all__ = [
    "REQUEST_SETS",
    "SHAPES",
    "PaddedBatch",
    "RequestSet",
    "chat_lengths",
    "parse_request_set",
    "shape_config",
    "synthetic_batches",
    "text_batches",
]

VOCABULARY = 30_522
# Ids below are special tokens in every shape.
FIRST_ID = 5
OWN_REQUESTS = 1_280
OWN_BATCH_SIZE = 64


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """One padded batch on the device, as every contender is given it.

    Args:
        inputs: What the model is called with: `input_ids` and `attention_mask` of shape `(rows, slots)`, int64, and
            what else the tokenizer made.
        padding: True at padded slots, bool, shape `(rows, slots, 1)`.
        lengths: Valid tokens of each row, known on the host.
        divisors: The same on the device, float32, shape `(rows, 1)`.
    """

    inputs: dict[str, torch.Tensor]
    padding: torch.Tensor
    lengths: tuple[int, ...]
    divisors: torch.Tensor

    @classmethod
    def from_inputs(cls, inputs: dict[str, torch.Tensor], device: torch.device) -> PaddedBatch:
        """Moves tokenised rows to a device.

        Raises:
            BenchError: If a row has no token.
        """
        valid = inputs["attention_mask"].bool()
        lengths = valid.sum(1)
        if int(lengths.min()) < 1:
            raise BenchError("a row without any token cannot be pooled; leave empty texts out.")
        return cls(
            {name: tensor.to(device) for name, tensor in inputs.items()},
            ~valid.to(device)[:, :, None],
            tuple(lengths.tolist()),
            lengths.to(device, torch.float32)[:, None],
        )

    @property
    def slots(self) -> int:
        """Slots of the batch, padding included."""
        return self.padding.numel()

    def row(self, index: int) -> PaddedBatch:
        """Returns one row, with its padding, as a batch."""
        rows = slice(index, index + 1)
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        return PaddedBatch(inputs, self.padding[rows], self.lengths[rows], self.divisors[rows])


@dataclass(frozen=True, slots=True)
class RequestSet:
    """Requests of known lengths.

    Args:
        name: As on the command line.
        summary: One line for the table.
        batch_size: Rows per forward.
        requests: How many there are.
        draw: Draws so many lengths, int64, with a generator.
        longest: No request is longer.
        sort: Whether the longest come first.
    """

    name: str
    summary: str
    batch_size: int
    requests: int
    draw: Callable[[int, torch.Generator], torch.Tensor]
    longest: int
    sort: bool = False

    def lengths(self, limit: int | None = None) -> list[int]:
        """Returns the length of each request in tokens: always the same, and a smaller limit gives a prefix.

        Examples:
            >>> from hf_flashinfer_attn.tools.bench.workload import REQUEST_SETS
            >>> REQUEST_SETS["chat"].lengths(3) == REQUEST_SETS["bulk"].lengths(5)[:3]
            True
        """
        lengths: list[int] = self.draw(self.requests, torch.Generator().manual_seed(0)).tolist()[:limit]
        return sorted(lengths, reverse=True) if self.sort else lengths


def chat_lengths(requests: int, generator: torch.Generator) -> torch.Tensor:
    """Draws lengths in tokens, lognormal with median 55, clipped to [4, 512]; int64, shape `(requests,)`."""
    return (torch.randn(requests, generator=generator, device="cpu") * 0.9 + 4.0).exp().round().clamp(4, 512).long()


def _pair_lengths(requests: int, generator: torch.Generator) -> torch.Tensor:
    # A query of 8 to 32 tokens before each passage.
    queries = torch.randint(8, 33, (requests,), generator=generator, device="cpu")
    return (chat_lengths(requests, generator) + queries).clamp(max=512)


def _uniform(low: int, high: int) -> Callable[[int, torch.Generator], torch.Tensor]:
    return lambda requests, generator: torch.randint(low, high + 1, (requests,), generator=generator, device="cpu")


def _cycle(lengths: Sequence[int]) -> Callable[[int, torch.Generator], torch.Tensor]:
    return lambda requests, _: torch.tensor(lengths, device="cpu").repeat(-(-requests // len(lengths)))[:requests]


REQUEST_SETS: dict[str, RequestSet] = {
    requests.name: requests
    for requests in (
        RequestSet("chat", "lognormal lengths, median 55, unsorted", 64, 10_000, chat_lengths, 512),
        RequestSet("bulk", "lognormal lengths, median 55, unsorted", 256, 10_000, chat_lengths, 512),
        RequestSet("sorted", "lognormal lengths, median 55, longest first", 256, 10_000, chat_lengths, 512, sort=True),
        RequestSet("single", "lognormal lengths, median 55, unsorted", 8, 2_000, chat_lengths, 512),
        RequestSet("uniform", "uniform lengths in [1, 512], unsorted", 64, 2_500, _uniform(1, 512), 512),
        RequestSet("full", "512 tokens each", 64, 1_280, _cycle([512]), 512),
        RequestSet("pairs", "a query and a passage of chat's lengths, unsorted", 128, 10_000, _pair_lengths, 512),
        RequestSet("long", "uniform lengths in [1, 8192], unsorted", 16, 160, _uniform(1, 8192), 8192),
    )
}


def parse_request_set(text: str) -> RequestSet:
    """Reads a named request set, or one of the user's own.

    Args:
        text: A name; or a length, as `128`; or lengths that take turns, as `16+32+128`; or `uniform:LOW:HIGH`.

    Raises:
        ValueError: If it is none of these.

    Examples:
        >>> from hf_flashinfer_attn.tools.bench.workload import parse_request_set
        >>> parse_request_set("16+32+128").lengths(5)
        [16, 32, 128, 16, 32]
        >>> max(parse_request_set("uniform:1:40").lengths()) <= 40
        True
    """
    if text in REQUEST_SETS:
        return REQUEST_SETS[text]
    kind, *bounds = text.split(":")
    numbers = bounds if bounds else kind.split("+")
    if (not bounds or (kind == "uniform" and len(bounds) == 2)) and all(part.isdecimal() for part in numbers):
        lengths = [int(part) for part in numbers]
        if min(lengths) >= 1 and (not bounds or lengths[0] <= lengths[1]):
            draw = _uniform(*lengths) if bounds else _cycle(lengths)
            summary = f"uniform lengths in {lengths}" if bounds else f"lengths {text}"
            return RequestSet(text, summary, OWN_BATCH_SIZE, OWN_REQUESTS, draw, max(lengths))
    raise ValueError(
        f"{text!r} is no request set; expected one of {list(REQUEST_SETS)}, a length (128), lengths that take turns "
        "(16+32+128), or uniform:LOW:HIGH"
    )


def _bert(layers: int, hidden: int, heads: int) -> PreTrainedConfig:
    config: PreTrainedConfig = BertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )
    return config


def _reranker(layers: int) -> PreTrainedConfig:
    config = _bert(layers, 768, 12)
    config.architectures, config.num_labels = ["BertForSequenceClassification"], 1
    return config


def _modernbert(layers: int) -> PreTrainedConfig:
    config: PreTrainedConfig = ModernBertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return config


def _qwen3(layers: int) -> PreTrainedConfig:
    config: PreTrainedConfig = Qwen3Config(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        hidden_size=1024,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        max_position_embeddings=32_768,
        pad_token_id=0,
    )
    return config


# Shapes of known checkpoints, by a number of layers and what makes a configuration of them; the weights are random.
SHAPES: dict[str, tuple[int, Callable[[int], PreTrainedConfig]]] = {
    "gte-small": (12, lambda layers: _bert(layers, 384, 12)),
    "bge-base": (12, lambda layers: _bert(layers, 768, 12)),
    "bge-large": (24, lambda layers: _bert(layers, 1024, 16)),
    "reranker-base": (12, _reranker),
    "modernbert-base": (22, _modernbert),
    "qwen3-embedding": (28, _qwen3),
}


def shape_config(name: str, layers: int | None = None) -> PreTrainedConfig:
    """Returns the configuration of a named shape.

    Args:
        name: Of `SHAPES`.
        layers: Instead of the shape's own number, for small machines.
    """
    own_layers, make = SHAPES[name]
    config = make(own_layers if layers is None else layers)
    # Queries and keys of unit variance: at the usual 0.02, attention of random weights is all but uniform, and a check
    # of the outputs would see less.
    config.initializer_range = config.hidden_size**-0.5
    return config


def synthetic_batches(
    lengths: Sequence[int], batch_size: int, config: PreTrainedConfig, device: torch.device
) -> list[PaddedBatch]:
    """Makes right-padded batches of random token ids, always the same ones.

    Args:
        lengths: Of the requests, in order.
        batch_size: Rows per batch.
        config: Gives the vocabulary's size and the id of padding.
        device: Where to put them.
    """
    generator = torch.Generator().manual_seed(0)
    pad_id = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
    batches = []
    for start in range(0, len(lengths), batch_size):
        rows = torch.tensor(lengths[start : start + batch_size], device="cpu")
        shape = (len(rows), int(rows.max()))
        ids = torch.randint(FIRST_ID, config.vocab_size, shape, generator=generator, device="cpu")
        # Some models tell padding by its id.
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
    *,
    sort: bool = False,
) -> list[PaddedBatch]:
    """Tokenises texts and pads them batch by batch.

    Args:
        texts: At least one, none empty.
        tokenizer: Of the model.
        batch_size: Rows per batch.
        max_length: Longer texts are cut, in tokens.
        device: Where to put the batches.
        sort: Whether the longest come first.

    Raises:
        BenchError: If a text has no token.
    """
    ordered = list(texts)
    if sort:
        ids = tokenizer(ordered, truncation=True, max_length=max_length)["input_ids"]
        ordered = [text for _, text in sorted(zip(map(len, ids), ordered), key=lambda pair: -pair[0])]
    batches = []
    for start in range(0, len(ordered), batch_size):
        rows = tokenizer(
            ordered[start : start + batch_size], padding=True, truncation=True, max_length=max_length,
            return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        batches.append(PaddedBatch.from_inputs(dict(rows), device))
    return batches
