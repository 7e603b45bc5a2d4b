"""Ragged layout: the row lengths of a batch, and gather and scatter between padded and ragged tensors.

A ragged tensor holds the tokens of all rows one after another, shape `(total_tokens, heads, head_dim)`; row `i` is
`[cu_seqlens[i], cu_seqlens[i + 1])`. Kernels plan with lengths on the host and move data with indices on the device.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch

from ..tracing import record_layout
from .host_copy import HostCopy, to_device_async
from .token_map import TokenMap

__all__ = ["RaggedLayout", "RaggedSide", "lengths_of", "uniform_layout"]

T = TypeVar("T")


class RaggedSide:
    """Queries or keys of a batch.

    Args:
        lengths: Number of tokens of each row.
        padded_shape: Rows and length of the padded tensor; `(1, total_tokens)` for packed input.
        valid: True where a padded position holds a token, shape `padded_shape`; None without padding.

    Raises:
        ValueError: If there is padding and `valid` is None.
    """

    def __init__(self, lengths: Sequence[int], padded_shape: tuple[int, int], valid: torch.Tensor | None) -> None:
        self.lengths = tuple(lengths)
        self.padded_shape = padded_shape
        self.offsets = (0, *accumulate(self.lengths))
        self.total_tokens = self.offsets[-1]
        self.max_length = max(self.lengths, default=0)
        self.is_full = self.total_tokens == padded_shape[0] * padded_shape[1]
        self._valid = None if self.is_full else valid
        self._on_device: dict[Hashable, Any] = {}
        if not self.is_full and valid is None:
            raise ValueError(
                f"{self.total_tokens} tokens in {padded_shape} slots need a mask of the valid slots. Pass valid=, "
                f"bool, of shape {padded_shape}; for packed tokens, padded_shape=(1, {self.total_tokens}) needs none."
            )

    @functools.cached_property
    def cu_seqlens_host(self) -> torch.Tensor:
        """Cumulative row lengths on the host, int32, shape `(rows + 1,)`."""
        return torch.tensor(self.offsets, dtype=torch.int32, device="cpu")

    @functools.cached_property
    def lengths_host(self) -> torch.Tensor:
        """Row lengths on the host, int32, shape `(rows,)`."""
        return torch.tensor(self.lengths, dtype=torch.int32, device="cpu")

    def _once_per_stream(self, name: str, device: torch.device, make: Callable[[], T]) -> T:
        # Streams do not wait for each other, so each one makes its own value.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = name, device, stream
        if key not in self._on_device:
            self._on_device[key] = make()
        made: T = self._on_device[key]
        return made

    def cu_seqlens(self, device: torch.device) -> torch.Tensor:
        """Returns the cumulative row lengths on `device`, int32, shape `(rows + 1,)`."""
        return self._once_per_stream("cu_seqlens", device, lambda: self.cu_seqlens_host.to(device, non_blocking=True))

    def token_map(self, device: torch.device) -> TokenMap | None:
        """Returns the token map on `device`; None without padding."""
        valid = self._valid
        if valid is None:
            return None
        return self._once_per_stream(
            "map", device, lambda: TokenMap.of(to_device_async(valid, device), self.total_tokens)
        )

    def positions_in_row(self, device: torch.device) -> torch.Tensor | None:
        """Returns each token's padded position in its row, int32, shape `(total_tokens,)`; None without padding."""
        token_map = self.token_map(device)
        if token_map is None:
            return None
        return self._once_per_stream("in row", device, lambda: token_map.positions % self.padded_shape[1])

    def gather(self, padded: torch.Tensor) -> torch.Tensor:
        """Drops padding: `(*padded_shape, heads, dim)` to `(total_tokens, heads, dim)`; differentiable."""
        flat = padded.reshape(-1, *padded.shape[2:])
        token_map = self.token_map(padded.device)
        return flat if token_map is None else flat.index_select(0, token_map.positions)

    def scatter(self, ragged: torch.Tensor) -> torch.Tensor:
        """Undoes `gather`, with zeros in padding; differentiable."""
        shape = (*self.padded_shape, *ragged.shape[1:])
        token_map = self.token_map(ragged.device)
        if token_map is None:
            # Models call `view` on the output, which fails on a cropped head_dim.
            return ragged.reshape(shape).contiguous()
        padded = ragged.new_zeros(self.padded_shape[0] * self.padded_shape[1], *ragged.shape[1:])
        return padded.index_copy_(0, token_map.positions.long(), ragged).reshape(shape)


class RaggedLayout:
    """Queries and keys of a batch, and the kernel plans for their lengths. In self-attention both sides are one object.

    Args:
        query: The queries.
        key: The keys; the queries by default.

    Examples:
        >>> import torch
        >>> from hf_flashinfer_attn.ragged.layout import RaggedLayout
        >>> layout = RaggedLayout.from_padding_mask(torch.tensor([[1, 1, 0], [1, 1, 1]]))
        >>> layout.query.lengths, layout.query.total_tokens
        ((2, 3), 5)
        >>> padded = torch.arange(6.0).reshape(2, 3, 1, 1)
        >>> layout.query.gather(padded).flatten().tolist()
        [0.0, 1.0, 3.0, 4.0, 5.0]
    """

    def __init__(self, query: RaggedSide, key: RaggedSide | None = None) -> None:
        self.query = query
        self.key = query if key is None else key
        # Kernel plans, and other values that kernels derive from the lengths.
        self.plans: dict[Hashable, Any] = {}
        self.derived: dict[Hashable, Any] = {}
        self.lock = threading.Lock()
        # Memory for plans of captured graphs; each replay plans again.
        self.graph_workspace: Any = None
        record_layout()

    @property
    def keeps_padded_queries(self) -> bool:
        """Whether queries include padding that the keys exclude."""
        return self.query.padded_shape == self.key.padded_shape and self.query.is_full and not self.key.is_full

    @classmethod
    def from_padding_mask(cls, padding_mask: torch.Tensor) -> RaggedLayout:
        """Makes a self-attention layout from a 2D mask of ones and zeros; the host waits for one copy."""
        valid = padding_mask.to(torch.bool)
        lengths = HostCopy(valid.sum(-1, dtype=torch.int32)).values
        return cls(RaggedSide(lengths, (valid.shape[0], valid.shape[1]), valid))

    @classmethod
    def from_lengths(cls, query_lengths: Sequence[int], key_lengths: Sequence[int] | None = None) -> RaggedLayout:
        """Makes a layout of packed input, shape `(1, total_tokens, ...)`."""
        query = RaggedSide(query_lengths, (1, sum(query_lengths)), None)
        return cls(query, None if key_lengths is None else RaggedSide(key_lengths, (1, sum(key_lengths)), None))

    @classmethod
    def for_graph(cls, lengths: Sequence[int], rows: int, tokens: int, workspace: Any) -> RaggedLayout:
        """Makes the layout of a captured graph: packed input with empty rows up to `rows`, and `tokens` tokens.

        Tokens after the last row belong to no row. `workspace` is memory for plans.
        """
        side = RaggedSide([*lengths, *(0,) * (rows - len(lengths))], (1, sum(lengths)), None)
        side.padded_shape = (1, tokens)
        # A replay may have one row of all tokens, so no bound may be dropped.
        side.max_length = tokens
        layout = cls(side)
        layout.graph_workspace = workspace
        return layout

    @classmethod
    def from_cu_seqlens(
        cls,
        query_cu_seqlens: torch.Tensor,
        key_cu_seqlens: torch.Tensor,
        query_shape: tuple[int, int],
        key_shape: tuple[int, int],
    ) -> RaggedLayout:
        """Makes a layout of packed input; the host waits for one copy if cu_seqlens are on a GPU.

        Two tensors of equal values make a self-attention layout, as one tensor does.

        Args:
            query_cu_seqlens: Integers, shape `(sequences + 1,)`.
            key_cu_seqlens: The same for the keys; may be the same tensor.
            query_shape: Shape of the packed queries, `(rows, length)`, usually `(1, total_tokens)`.
            key_shape: The same for the keys.

        Raises:
            ValueError: If cu_seqlens do not start at 0, decrease, or do not end at the number of tokens.
        """
        one = query_cu_seqlens is key_cu_seqlens
        read = HostCopy(query_cu_seqlens[None] if one else torch.stack([query_cu_seqlens, key_cu_seqlens])).values
        sides = dict.fromkeys(zip(map(tuple, read * 2 if one else read), (query_shape, key_shape)))
        return cls(*(RaggedSide(lengths_of(offsets, shape), shape, None) for offsets, shape in sides))


def lengths_of(offsets: Sequence[int], shape: tuple[int, int]) -> list[int]:
    """Returns row lengths from cu_seqlens; raises `ValueError` if they do not describe tokens of `shape`."""
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] != shape[0] * shape[1] or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens from {offsets[0]} to {offsets[-1]} do not describe {shape[0] * shape[1]} packed tokens: "
            "expected offsets that start at 0, never decrease, and end at the number of tokens."
        )
    return lengths


@functools.lru_cache(maxsize=8)
def uniform_layout(batch_size: int, query_length: int, key_length: int) -> RaggedLayout:
    """Returns the layout of a batch without padding, shared by all forwards of this shape."""
    query = RaggedSide((query_length,) * batch_size, (batch_size, query_length), None)
    if query_length == key_length:
        return RaggedLayout(query)
    return RaggedLayout(query, RaggedSide((key_length,) * batch_size, (batch_size, key_length), None))
