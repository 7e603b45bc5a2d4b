"""Texts to embeddings: tokenizer, model and pooling, for bulk embedding and for the server."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

import hf_flashinfer_attn

__all__ = ["Encoder", "Pooling", "Rows"]

Pooling = Literal["mean", "cls"]
# There are no graphs of more.
MAX_GRAPH_ROWS = hf_flashinfer_attn.GraphOptions().max_rows


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokenised texts, one after the other.

    Args:
        ids: Of all tokens, int64, shape `(total_tokens,)`.
        lengths: Tokens of each text, int64, shape `(texts,)`.
    """

    ids: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> Rows:
        """Joins the token ids of texts.

        Examples:
            >>> Rows.of([[5, 6, 7], [8]]).lengths.tolist()
            [3, 1]
        """
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        return cls(np.fromiter(itertools.chain.from_iterable(texts), np.int64, int(lengths.sum())), lengths)

    def padded(self, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids and attention mask on the CPU, int64, shape `(texts, longest)`, padded on the right."""
        mask = np.arange(self.lengths.max()) < self.lengths[:, None]
        ids = np.full(mask.shape, pad_id, np.int64)
        ids[mask] = self.ids
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


class Encoder:
    """A model and its tokenizer, from the local disk or the hub.

    Args:
        model: Path or name of an encoder.
        device: Where it runs.
        pooling: "mean" of all tokens, or "cls", the first one.
        max_length: In tokens; None for the tokenizer's own.
        truncate: Whether longer texts are cut.
        attention: "flashinfer" drops padding in the whole model and, on a GPU, replays CUDA graphs; others, such as
            "sdpa", run the model as transformers has it.
        dtype: Of the weights; None for float16 on a GPU and float32 elsewhere.

    Raises:
        ValueError: For a pooling that is not known, a tokenizer in Python, or a length that nobody gives.
    """

    def __init__(
        self,
        model: str,
        device: torch.device,
        *,
        pooling: Pooling = "mean",
        max_length: int | None = None,
        truncate: bool = True,
        attention: str = "flashinfer",
        dtype: torch.dtype | None = None,
    ) -> None:
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling={pooling!r} is not known; expected one of {list(get_args(Pooling))}.")
        self.device, self.pooling = device, pooling
        tokenizer = AutoTokenizer.from_pretrained(model)
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer of {model} is written in Python; expected one of the tokenizers library.")
        self.max_length: int = max_length if max_length is not None else tokenizer.model_max_length
        if not 1 <= self.max_length <= 1_000_000:
            raise ValueError(f"max_length={self.max_length}: {model} names none of its own; give one, such as 512.")
        self.pad_id: int = tokenizer.pad_token_id or 0
        # Its settings are changed here and never again, so that threads may share it.
        self._tokenizer = tokenizer.backend_tokenizer
        self._tokenizer.no_padding()
        if truncate:
            self._tokenizer.enable_truncation(self.max_length, direction=tokenizer.truncation_side)
        else:
            self._tokenizer.no_truncation()
        if dtype is None:
            dtype = torch.float16 if device.type == "cuda" else torch.float32
        with self._on_device():
            loaded = AutoModel.from_pretrained(model, attn_implementation=attention, dtype=dtype).to(device).eval()
        self.unpadded = attention == "flashinfer"
        if self.unpadded:
            loaded = hf_flashinfer_attn.unpad(loaded, cuda_graphs=True)
        self.model = loaded
        self.hidden_size: int = loaded.config.hidden_size

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        # The current GPU is one per thread, and kernels are launched on it.
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        # From pinned memory, or the host would wait for all that was launched before.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns token ids of each text, special tokens included. Other threads run meanwhile."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def embed(self, rows: Rows) -> torch.Tensor:
        """Embeds a batch: launched on a GPU, not waited for.

        Returns:
            float32, on the encoder's device, shape `(texts, hidden_size)`, of length one.
        """
        with torch.no_grad(), self._on_device():
            ids, mask = rows.padded(self.pad_id)
            if not self.unpadded:
                ids, mask = self._send(ids), self._send(mask)
            hidden: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            if self.pooling == "cls":
                pooled = hidden[:, 0].float()
            else:
                lengths = self._send(torch.from_numpy(rows.lengths))[:, None]
                valid = torch.arange(hidden.shape[1], device=self.device) < lengths
                pooled = (hidden.float() * valid[:, :, None]).sum(1) / lengths
            return F.normalize(pooled, dim=-1)

    def capture(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Captures CUDA graphs of batches to come, by rows and tokens; returns how many there are now.

        A model that runs without graphs runs some of them instead, so that its kernels are compiled.
        """
        if self.device.type != "cuda" or not shapes:
            return 0
        with self._on_device():
            if self.unpadded:
                try:
                    hf_flashinfer_attn.capture_graphs(self.model, shapes)
                except ValueError as error:
                    print(f"no CUDA graphs: {error}", flush=True)
            for texts, tokens in (shapes[0], shapes[-1]):
                self.embed(Rows.of([[self.pad_id + 1] * (tokens // texts)] * texts))
            torch.cuda.synchronize(self.device)
            return hf_flashinfer_attn.graph_statistics(self.model).captured if self.unpadded else 0
