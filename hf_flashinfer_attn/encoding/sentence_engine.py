"""`SentenceTransformer`: packed tokens in its transformer, padded rows in its other modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from ..log import log_once
from ..unpadding.features import admit_packed_inputs, forwards_features
from ..unpadding.hooks import HANDLES, has_other_hooks
from ..unpadding.packed_inputs import PackedTokens, reason_against_packed_inputs
from ..unpadding.reasons import is_asked_for
from .engines import Batch, Features, Output, SentenceTransformersEngine, tokenizer_of
from .tokens import Numbers, Tokens

__all__ = ["SentenceEngine"]

# Features that are padded for the modules after the transformer, or left out.
_PACKED_FEATURES = frozenset(
    {
        "attention_mask", "cu_seq_lens_k", "cu_seq_lens_q", "input_ids", "max_length_k", "max_length_q", "position_ids",
        "return_dict", "token_embeddings", "token_type_ids", "use_cache",
    }
)  # fmt: skip
# Rows form a group if the longest has at most 4 times the tokens of the shortest, or at most 16 tokens.
_MAX_RATIO, _MAX_SHORT = 4, 16


class SentenceEngine(SentenceTransformersEngine):
    """A `SentenceTransformer`.

    If the transformer takes packed tokens, its token embeddings are padded again for the other modules, in groups of
    rows of similar length. The other modules compute the same as in `SentenceTransformer.encode`.

    Args:
        model: The model.
        select: Selects the output from the features that the model returns.
        prompt: Prefix of every text.
        options: Further arguments of its `preprocess` and `forward`.
    """

    def __init__(
        self, model: Any, select: Callable[[Features], Output], *, prompt: str | None, options: Mapping[str, Any]
    ) -> None:
        super().__init__(model, tokenizer_of(model), prompt=prompt, options=options)
        self._select = select
        self._backbone = self._find_backbone()

    @property
    def batches_per_window(self) -> int:
        return 8 if self._backbone is None else 1

    def _batch_of(self, tokens: Tokens) -> Batch:
        backbone = self._backbone
        # The output for a text without tokens depends on padding.
        if backbone is None or not tokens.lengths.all():
            return super()._batch_of(tokens)
        groups = _groups_of(tokens.lengths, self._padding())
        has_padding = not all(group.is_full for group in groups)
        slots = np.concatenate([group.slots for group in groups]) if has_padding else None
        packed = PackedTokens(backbone, self.device, tokens.lengths, tokens.ids, tokens.type_ids, slots)
        return _PackedBatch(packed, groups)

    def _forward(self, batch: Batch) -> Output:
        if not isinstance(batch, _PackedBatch):
            return self._select(self.model(self._moved(batch, self.device), **self.options))
        assert self._fast is not None
        (name, transformer), *others = self.model.named_children()
        inputs = self._fast.constants | batch.tokens.inputs()
        slots = inputs.pop("slots", None)
        features = transformer(inputs, **self._options_of(name, transformer))
        lengths = None if slots is None else features["cu_seq_lens_q"].diff()
        outputs = []
        for group in batch.groups:
            padded = group.pad(features, slots, lengths)
            for name, module in others:
                padded = module(padded, **self._options_of(name, module))
            outputs.append(self._select(padded))
        if all(isinstance(output, torch.Tensor) for output in outputs):
            return torch.cat(cast("list[torch.Tensor]", outputs)) if len(outputs) > 1 else outputs[0]
        return [row for output in outputs for row in output]

    def _options_of(self, name: str, module: torch.nn.Module) -> dict[str, Any]:
        """Returns the options that sentence-transformers passes to a module."""
        if not self.options:
            return {}
        names = {*(cast(Any, self.model).module_kwargs or {}).get(name, ()), *getattr(module, "forward_kwargs", ())}
        return {name: value for name, value in self.options.items() if name in names}

    def _find_backbone(self) -> PreTrainedModel | None:
        """Returns the backbone if it takes packed tokens; None if batches must be padded."""
        if self._fast is None:
            return None
        transformer, *others = self.model.children()
        reason: str | None = None
        if not _runs_as_written(self.model):
            reason = "its forward was replaced or has hooks"
        elif has_other_hooks(transformer):
            reason = f"its {type(transformer).__name__} has hooks"
        elif not forwards_features(transformer):
            reason = f"its first module is a {type(transformer).__name__}"
        elif any(hasattr(module, "sub_modules") for module in others):
            reason = "it routes inputs by task"
        elif is_asked_for("output_hidden_states", cast(Any, transformer).model, {}):
            reason = "output_hidden_states=True"
        else:
            reason = reason_against_packed_inputs(cast(Any, transformer).model)
        if reason is not None:
            if any(HANDLES in vars(module) for module in transformer.modules()):
                log_once(f"batches of {type(self.model).__name__} are padded: {reason}")
            return None
        admit_packed_inputs(transformer)
        backbone: PreTrainedModel = transformer.model
        return backbone


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of a packed batch that are padded together.

    Args:
        rows: Rows of the group.
        tokens: Tokens of the group.
        width: Length of the longest row.
        lengths: Length of each row.
        padding: Padding id, its token type id, and whether padding is on the left.
    """

    rows: slice
    tokens: slice
    width: int
    lengths: Numbers
    padding: tuple[int, int, bool]

    @property
    def is_full(self) -> bool:
        """Whether all rows have the same length."""
        return bool(len(self.lengths) * self.width == self.tokens.stop - self.tokens.start)

    @property
    def slots(self) -> Numbers:
        """Padded position of each row's first token in the group, int64, shape `(rows,)`."""
        starts: Numbers = np.arange(len(self.lengths)) * self.width
        return starts + (self.width - self.lengths) if self.padding[2] else starts

    def pad(self, packed: Features, slots: torch.Tensor | None, lengths: torch.Tensor | None) -> Features:
        """Pads token embeddings (with zeros) and ids, on their device.

        Args:
            packed: Features of the whole batch.
            slots: Padded position of each token in its group, int64, shape `(1, total_tokens)`; None without padding.
            lengths: Lengths of all rows, int64, shape `(rows,)`; None without padding.
        """
        padded = {name: value for name, value in packed.items() if name not in _PACKED_FEATURES}
        pad_id, pad_type_id, on_left = self.padding
        shape = len(self.lengths), self.width
        for name, filler in (("token_embeddings", 0), ("input_ids", pad_id), ("token_type_ids", pad_type_id)):
            if name not in packed:
                continue
            values = packed[name][0, self.tokens]
            if not self.is_full:
                assert slots is not None
                spread = values.new_full((shape[0] * shape[1], *values.shape[1:]), filler)
                values = spread.index_copy_(0, slots[0, self.tokens], values)
            padded[name] = values.view(*shape, *values.shape[1:])
        device = padded["token_embeddings"].device
        if self.is_full:
            padded["attention_mask"] = torch.ones(shape, dtype=torch.long, device=device)
        else:
            assert lengths is not None
            slot, row_lengths = torch.arange(self.width, device=device), lengths[self.rows, None]
            padded["attention_mask"] = (slot >= self.width - row_lengths if on_left else slot < row_lengths).long()
        return padded


@dataclass(frozen=True, slots=True)
class _PackedBatch:
    """Packed tokens, and the groups of rows that are padded together after the transformer."""

    tokens: PackedTokens
    groups: list[_Group]


def _groups_of(lengths: Numbers, padding: tuple[int, int, bool]) -> list[_Group]:
    """Cuts rows, longest first, into groups of similar length."""
    groups = []
    start = token = 0
    while start < len(lengths):
        width = int(lengths[start])
        shortest = 0 if width <= _MAX_SHORT else -(-width // _MAX_RATIO)
        stop = int(np.searchsorted(-lengths, -shortest, side="right"))
        taken = lengths[start:stop]
        end = token + int(taken.sum())
        groups.append(_Group(slice(start, stop), slice(token, end), width, taken, padding))
        start, token = stop, end
    return groups


def _runs_as_written(model: torch.nn.Module) -> bool:
    """Whether the model runs the unmodified sentence-transformers forward, without hooks."""
    is_own = type(model).forward.__module__.startswith("sentence_transformers.") and "forward" not in vars(model)
    has_hooks = model._forward_hooks or model._forward_pre_hooks or model._compiled_call_impl is not None
    return is_own and not has_hooks
