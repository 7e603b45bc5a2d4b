"""Engine of `SentenceTransformer`: its transformer runs on packed tokens, its other modules on padded rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from ..log import log_once
from ..unpadding.features import admit_packed_inputs, forwards_features
from ..unpadding.hooks import HANDLES, has_other_hooks
from ..unpadding.packed_inputs import PackedTokens, reason_against_packed_inputs
from ..unpadding.reasons import is_asked_for
from .engines import Batch, Engine, Features, Output
from .tokens import Numbers, Tokens

__all__ = ["SentenceEngine"]

# Features padded for the modules after the transformer; `_PACKED_FEATURES` also has those that are dropped there.
_PADDED = ("token_embeddings", "attention_mask", "input_ids", "token_type_ids")
_PACKED_FEATURES = frozenset(
    (
        *_PADDED,
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "max_length_k",
        "max_length_q",
        "position_ids",
        "return_dict",
        "use_cache",
    )
)
# Limits of a group: the longest row has at most 4 times the tokens of the shortest one, or at most 16 tokens.
_MAX_RATIO, _MAX_SHORT = 4, 16


class SentenceEngine(Engine):
    """Engine of a `SentenceTransformer`; `finish` selects the output from the features of the last module.

    If the transformer takes packed tokens, its token embeddings are padded for the other modules, in groups of rows of
    similar length. The other modules run as in `SentenceTransformer.encode`.
    """

    def __init__(self, model: Any, finish: Callable[[Features], Output], **arguments: Any) -> None:
        super().__init__(model, finish, **arguments)
        self._backbone = self._find_backbone()
        self.batches_per_window = 8 if self._backbone is None else 1

    def _batch_of(self, tokens: Tokens) -> Batch:
        # The output of a text without tokens depends on padding.
        if self._backbone is None or not tokens.lengths.all():
            return super()._batch_of(tokens)
        groups, row_starts = _groups_of(tokens.lengths), None
        if not all(group.is_full for group in groups):
            widths = np.repeat([group.width for group in groups], [group.rows for group in groups])
            row_starts = np.concatenate([np.arange(group.rows) for group in groups]) * widths
            row_starts = row_starts + widths - tokens.lengths if self._padding.on_left else row_starts
        packed = PackedTokens(self._backbone, self.device, tokens.lengths, tokens.ids, tokens.type_ids, row_starts)
        return _PackedBatch(packed, groups)

    def _forward(self, batch: Batch) -> Output:
        if not isinstance(batch, _PackedBatch):
            return super()._forward(batch)
        (name, transformer), *others = self.model.named_children()
        inputs = self._constants | batch.tokens.inputs()
        positions = inputs.pop("slots", None)
        features = transformer(inputs, **self._options_of(name, transformer))
        constants = {name: value for name, value in features.items() if name not in _PACKED_FEATURES}
        hidden = features["token_embeddings"]
        features["attention_mask"] = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        fillers = (0, 0, self._padding.token_id, self._padding.type_id)
        packed = [(name, features[name][0], filler) for name, filler in zip(_PADDED, fillers) if name in features]
        outputs = []
        for group in batch.groups:
            padded = constants | group.pad(packed, positions)
            for name, module in others:
                padded = module(padded, **self._options_of(name, module))
            outputs.append(self._finish(padded))
        if all(isinstance(output, torch.Tensor) for output in outputs):
            return torch.cat(cast("list[torch.Tensor]", outputs)) if len(outputs) > 1 else outputs[0]
        return [row for output in outputs for row in output]

    def _options_of(self, name: str, module: torch.nn.Module) -> dict[str, Any]:
        """Returns the keyword arguments that sentence-transformers passes to a module."""
        if not self.options:
            return {}
        names = {*(cast(Any, self.model).module_kwargs or {}).get(name, ()), *getattr(module, "forward_kwargs", ())}
        return {name: value for name, value in self.options.items() if name in names}

    def _find_backbone(self) -> PreTrainedModel | None:
        """Returns the backbone if it takes packed tokens; otherwise None."""
        if self.fast_tokenizer is None:
            return None
        transformer, *others = self.model.children()
        reason: str | None = None
        if not _runs_as_written(self.model):
            reason = "its forward was replaced or has hooks"
        elif has_other_hooks(transformer):
            reason = f"its {type(transformer).__name__} has hooks"
        elif not forwards_features(transformer):
            reason = f"its first module is a {type(transformer).__name__}"
        elif any("sub_modules" in module._modules for module in others):
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


class _Group(NamedTuple):
    """Rows of a packed batch that are padded together: number of rows, their tokens, length of the longest row."""

    rows: int
    tokens: slice
    width: int

    @property
    def is_full(self) -> bool:
        """Whether all rows have the same length."""
        return bool(self.rows * self.width == self.tokens.stop - self.tokens.start)

    def pad(self, packed: Iterable[tuple[str, torch.Tensor, int]], positions: torch.Tensor | None) -> Features:
        """Scatters packed features to the padded rows of this group.

        Args:
            packed: Name, values of shape `(total_tokens, ...)` and filler of each feature.
            positions: Padded position of each token in its group, int64, shape `(1, total_tokens)`; None without
                padding.
        """
        targets = None if self.is_full or positions is None else positions[0, self.tokens]
        padded = {}
        for name, values, filler in packed:
            values = values[self.tokens]
            if targets is not None:
                spread = values.new_full((self.rows * self.width, *values.shape[1:]), filler)
                values = spread.index_copy_(0, targets, values)
            padded[name] = values.view(self.rows, self.width, *values.shape[1:])
        return padded


class _PackedBatch(NamedTuple):
    """Packed tokens, and the groups in which their rows are padded after the transformer."""

    tokens: PackedTokens
    groups: list[_Group]


def _groups_of(lengths: Numbers) -> list[_Group]:
    """Cuts rows, longest first, into groups of similar length."""
    groups: list[_Group] = []
    start = token = 0
    while start < len(lengths):
        width = int(lengths[start])
        shortest = 0 if width <= _MAX_SHORT else -(-width // _MAX_RATIO)
        stop = int(np.searchsorted(-lengths, -shortest, side="right"))
        end = token + int(lengths[start:stop].sum())
        groups.append(_Group(stop - start, slice(token, end), width))
        start, token = stop, end
    return groups


def _runs_as_written(model: torch.nn.Module) -> bool:
    """Whether the model runs the unmodified sentence-transformers forward, without hooks."""
    is_own = type(model).forward.__module__.startswith("sentence_transformers.") and "forward" not in vars(model)
    has_hooks = model._forward_hooks or model._forward_pre_hooks or model._compiled_call_impl is not None
    return is_own and not has_hooks
