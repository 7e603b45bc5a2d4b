"""Token ids without padding, from the tokenizers library."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..unpadding.packed_inputs import Numbers

__all__ = ["Budget", "Numbers", "Text", "TextTokenizer", "Tokens", "TypeIds", "limit_of", "strings_of"]

Text: TypeAlias = "str | tuple[str, str]"
TypeIds = Literal["none", "zeros", "own"]

# A tokenizer without a limit has a far larger `model_max_length`.
_UNLIMITED = 1_000_000_000
# Options of the tokenizers library's models, without the vocabulary.
_MODEL_OPTIONS = (
    "byte_fallback", "continuing_subword_prefix", "dropout", "end_of_word_suffix", "fuse_unk", "ignore_merges",
    "max_input_chars_per_word", "unk_token",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Budget:
    """Size of a batch.

    Args:
        tokens: Maximum number of tokens; a longer text is a batch of its own.
        rows: Maximum number of texts.

    Raises:
        ValueError: If a number is not positive.
    """

    tokens: int
    rows: int

    def __post_init__(self) -> None:
        for name, value in (("tokens_per_batch", self.tokens), ("batch_size", self.rows)):
            if not value > 0:
                raise ValueError(f"{name}={value!r}: expected a number above 0.")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Concatenated tokens of several texts.

    Args:
        ids: Token ids, int64, shape `(total_tokens,)`.
        lengths: Length of each text, int64, shape `(texts,)`.
        type_ids: Token type ids, int64, shape `(total_tokens,)`; None if the model takes none.
    """

    ids: Numbers
    lengths: Numbers
    type_ids: Numbers | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def split(self, budget: Budget, *, padded: bool) -> list[Tokens]:
        """Cuts tokens into batches, in order. The longest text is first.

        Args:
            budget: Size of a batch.
            padded: Whether padding counts as tokens.
        """
        if len(self) == 1:
            return [self]
        ends = np.cumsum(self.lengths)
        batches: list[Tokens] = []
        start = 0
        while start < len(self):
            first = int(ends[start - 1]) if start else 0
            if padded:
                fitting = start + budget.tokens // max(int(self.lengths[start]), 1)
            else:
                fitting = int(np.searchsorted(ends, first + budget.tokens, side="right"))
            stop = min(max(min(fitting, start + budget.rows), start + 1), len(self))
            tokens = slice(first, int(ends[stop - 1]))
            types = None if self.type_ids is None else self.type_ids[tokens]
            batches.append(Tokens(self.ids[tokens], self.lengths[start:stop], types))
            start = stop
        return batches

    def pad(self, pad_id: int, pad_type_id: int, *, on_left: bool) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `attention_mask` and, if any, `token_type_ids`, padded as by a tokenizer.

        Each is int64, on the CPU, of shape `(texts, longest)`.
        """
        slots = np.arange(int(self.lengths.max(initial=0)))
        lengths = self.lengths[:, None]
        valid = slots >= len(slots) - lengths if on_left else slots < lengths
        features = {"input_ids": _spread(self.ids, valid, pad_id), "attention_mask": valid.astype(np.int64)}
        if self.type_ids is not None:
            features["token_type_ids"] = _spread(self.type_ids, valid, pad_type_id)
        return {name: torch.from_numpy(value) for name, value in features.items()}


def _spread(values: Numbers, valid: np.ndarray[Any, Any], filler: int) -> Numbers:
    spread = np.full(valid.shape, filler, np.int64)
    spread[valid] = values
    return spread


class TextTokenizer:
    """A private copy of a fast tokenizer that truncates and does not pad. It is thread-safe.

    Args:
        tokenizer: Tokenizer of the tokenizers library.
        max_length: Maximum length of a text in tokens; None for the tokenizer's own limit.
        type_ids: Token type ids to return: none, zeros, or the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, type_ids: TypeIds) -> None:
        # transformers writes truncation and padding into the tokenizer object, which other threads may use.
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._type_ids = type_ids
        self.backend.no_padding()
        if (limit := limit_of(tokenizer, max_length)) is None:
            self.backend.no_truncation()
        else:
            self.backend.enable_truncation(limit, direction=tokenizer.truncation_side)

    @staticmethod
    def state_of(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
        """Returns the state that a copy depends on; of the vocabulary, only its size."""
        backend = tokenizer.backend_tokenizer
        parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
        return (
            id(backend), backend.get_vocab_size(True), len(backend.get_added_tokens_decoder()),
            tokenizer.model_max_length, tokenizer.truncation_side, backend.encode_special_tokens,
            tuple(None if part is None else part.__getstate__() for part in parts),
            tuple(getattr(backend.model, name, None) for name in _MODEL_OPTIONS),
        )  # fmt: skip

    def __call__(self, texts: Sequence[Text]) -> tuple[Tokens, Numbers]:
        """Tokenises texts or pairs of texts. The interpreter lock is released meanwhile.

        Returns:
            Tokens, longest text first, and the index of each text, int64, shape `(texts,)`.

        Raises:
            TypeError: If a text cannot be tokenised, such as one that is not valid Unicode.
        """
        if len(texts) == 1 and isinstance(texts[0], str):
            # Avoids waiting for the thread pool of a batch.
            encodings = [self.backend.encode(texts[0])]
        else:
            encodings = self.backend.encode_batch_fast(texts)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        order = np.argsort(-lengths, kind="stable")
        if len(order) > 1:
            encodings, lengths = [encodings[place] for place in order.tolist()], lengths[order]
        ids = _flat((encoding.ids for encoding in encodings), int(lengths.sum()))
        types = None
        if self._type_ids == "zeros":
            types = np.zeros_like(ids)
        elif self._type_ids == "own":
            types = _flat((encoding.type_ids for encoding in encodings), len(ids))
        return Tokens(ids, lengths, types), order


def limit_of(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int | None:
    """Returns the maximum length of a text in tokens, by default the tokenizer's own; None if there is none."""
    limit: int = tokenizer.model_max_length if max_length is None else max_length
    return limit if limit <= _UNLIMITED else None


def strings_of(text: Text) -> tuple[str, ...]:
    """Returns the one string of a text, or the two of a pair."""
    return (text,) if isinstance(text, str) else text


def _flat(lists: Iterable[list[int]], count: int) -> Numbers:
    return np.fromiter(itertools.chain.from_iterable(lists), np.int64, count)
