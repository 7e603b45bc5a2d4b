"""Unpadded token ids from the tokenizers library."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..unpadding.packed_inputs import Numbers

__all__ = ["Budget", "Numbers", "Padding", "Text", "TextTokenizer", "Tokens", "TypeIds", "limit_of", "strings_of"]

Text: TypeAlias = "str | tuple[str, str]"
TypeIds = Literal["none", "zeros", "own"]

# `model_max_length` of a tokenizer without a limit is far above this.
_UNLIMITED = 1_000_000_000
# Options of a tokenizer's model, without the vocabulary.
_MODEL_OPTIONS = (
    "byte_fallback", "continuing_subword_prefix", "dropout", "end_of_word_suffix", "fuse_unk", "ignore_merges",
    "max_input_chars_per_word", "unk_token",
)  # fmt: skip


class Padding(NamedTuple):
    """Padding of a tokenizer: token id, token type id, and side."""

    token_id: int
    type_id: int
    on_left: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Padding:
        """Returns the padding of a tokenizer."""
        return cls(tokenizer.pad_token_id or 0, tokenizer.pad_token_type_id, tokenizer.padding_side == "left")


class Budget:
    """Maximum numbers of tokens and of texts in a batch; a longer text is a batch of its own."""

    def __init__(self, tokens: int, rows: int) -> None:
        for name, value in (("tokens_per_batch", tokens), ("batch_size", rows)):
            if not value > 0:
                raise ValueError(f"{name}={value!r}: expected a number above 0.")
        self.tokens, self.rows = tokens, rows

    def cut(self, lengths: Numbers, *, padded: bool) -> Iterator[slice]:
        """Cuts texts, longest first, into batches. `padded`: whether padding counts as tokens."""
        ends, start = np.cumsum(lengths), 0
        while start < len(lengths):
            if padded:
                fitting = start + self.tokens // max(int(lengths[start]), 1)
            else:
                before = int(ends[start] - lengths[start])
                fitting = int(np.searchsorted(ends, before + self.tokens, side="right"))
            stop = max(min(fitting, start + self.rows, len(lengths)), start + 1)
            yield slice(start, stop)
            start = stop


class Tokens(NamedTuple):
    """Concatenated tokens of texts, longest text first, int64; `type_ids` is None if the model takes none."""

    ids: Numbers
    lengths: Numbers
    type_ids: Numbers | None = None

    def split(self, budget: Budget, *, padded: bool) -> list[Tokens]:
        """Cuts tokens into batches, in order. `padded`: whether padding counts as tokens."""
        if len(self.lengths) == 1:
            return [self]
        cu_seqlens = np.concatenate([[0], np.cumsum(self.lengths)])
        batches = []
        for rows in budget.cut(self.lengths, padded=padded):
            tokens = slice(cu_seqlens[rows.start], cu_seqlens[rows.stop])
            types = None if self.type_ids is None else self.type_ids[tokens]
            batches.append(Tokens(self.ids[tokens], self.lengths[rows], types))
        return batches

    def pad(self, padding: Padding) -> dict[str, Any]:
        """Returns a tokenizer's features: int64 tensors on the CPU, of shape `(texts, longest)`."""
        positions, lengths = np.arange(int(self.lengths.max(initial=0))), self.lengths[:, None]
        valid = positions >= len(positions) - lengths if padding.on_left else positions < lengths
        features = {"attention_mask": torch.from_numpy(valid.astype(np.int64))}
        for name, values, filler in (
            ("input_ids", self.ids, padding.token_id), ("token_type_ids", self.type_ids, padding.type_id),
        ):  # fmt: skip
            if values is not None:
                padded = np.full(valid.shape, filler, np.int64)
                padded[valid] = values
                features[name] = torch.from_numpy(padded)
        return features


class TextTokenizer:
    """Private copy of a fast tokenizer that truncates and does not pad. Thread-safe.

    The original is not thread-safe, because transformers sets its truncation and padding in each call.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, type_ids: TypeIds) -> None:
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._type_ids = type_ids
        self.backend.no_padding()
        if (limit := limit_of(tokenizer, max_length)) is None:
            self.backend.no_truncation()
        else:
            self.backend.enable_truncation(limit, direction=tokenizer.truncation_side)

    @staticmethod
    def state_of(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
        """Returns the tokenizer state that a copy depends on; the vocabulary is represented by its size."""
        backend = tokenizer.backend_tokenizer
        parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
        return (
            id(backend), backend.get_vocab_size(True), len(backend.get_added_tokens_decoder()),
            tokenizer.model_max_length, tokenizer.truncation_side, backend.encode_special_tokens,
            *[None if part is None else part.__getstate__() for part in parts],
            *[getattr(backend.model, name, None) for name in _MODEL_OPTIONS],
        )  # fmt: skip

    def __call__(self, texts: Sequence[Text]) -> tuple[Tokens, Numbers]:
        """Tokenises texts or pairs of texts; releases the interpreter lock.

        Returns:
            Tokens, longest text first, and the index of each text, int64, shape `(texts,)`.

        Raises:
            TypeError: If a text cannot be tokenised, such as one that is not valid Unicode.
        """
        if len(texts) == 1 and isinstance(texts[0], str):
            # Without the thread pool of a batch.
            encodings = [self.backend.encode(texts[0])]
        else:
            encodings = self.backend.encode_batch_fast(texts)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        order = np.argsort(-lengths, kind="stable")
        if len(order) > 1:
            encodings, lengths = [encodings[index] for index in order.tolist()], lengths[order]
        ids = _flat((encoding.ids for encoding in encodings), int(lengths.sum()))
        types = np.zeros_like(ids) if self._type_ids == "zeros" else None
        if self._type_ids == "own":
            types = _flat((encoding.type_ids for encoding in encodings), len(ids))
        return Tokens(ids, lengths, types), order


def limit_of(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int | None:
    """Returns the maximum length of a text in tokens, by default the tokenizer's; None without a limit."""
    limit: int = tokenizer.model_max_length if max_length is None else max_length
    return limit if limit <= _UNLIMITED else None


def strings_of(text: Text) -> tuple[str, ...]:
    """Returns the string of a text, or the two strings of a pair."""
    return (text,) if isinstance(text, str) else text


def _flat(lists: Iterable[list[int]], count: int) -> Numbers:
    return np.fromiter(itertools.chain.from_iterable(lists), np.int64, count)
