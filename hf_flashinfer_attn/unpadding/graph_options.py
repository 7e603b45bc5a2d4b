"""How CUDA graphs are captured, of which sizes, and what they did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

__all__ = ["GraphOptions", "GraphStatistics", "row_bucket", "token_bucket"]

_MIN_ROWS, _MIN_TOKENS = 8, 64


@dataclass(frozen=True, slots=True)
class GraphOptions:
    """How CUDA graphs are captured.

    Args:
        max_tokens: Larger batches run without a graph; they are not bound by the host.
        max_rows: The same by rows.
        max_memory_gib: GPU memory that graphs share, GiB. A size whose capture needs more runs without a graph; once in
            1,000 replays, all graphs are dropped and captured anew instead.
        compile: Whether `torch.compile` fuses what is captured. The first capture then takes up to a minute, once for
            all sizes; `graph_statistics(model).compile_seconds` says how long.

    Raises:
        ValueError: If a number is not positive, or `compile` is not a bool.

    Examples:
        >>> import hf_flashinfer_attn
        >>> hf_flashinfer_attn.GraphOptions(max_tokens=16_384).max_rows
        1024
    """

    max_tokens: int = 32_768
    max_rows: int = 1_024
    max_memory_gib: float = 4.0
    compile: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.compile, bool):
            raise ValueError(f"GraphOptions(compile={self.compile!r}): expected True or False.")
        for name in ("max_tokens", "max_rows", "max_memory_gib"):
            if not getattr(self, name) > 0:
                raise ValueError(f"GraphOptions({name}={getattr(self, name)!r}): expected a number above 0.")


@dataclass(slots=True)
class GraphStatistics:
    """What the graphs of a model did so far.

    Args:
        captured: Graphs that were captured.
        dropped: Graphs that were dropped, for memory or because the model changed.
        replayed: Forwards that a graph ran.
        tokens: Tokens in those forwards.
        slots: Tokens in those forwards, filler included.
        memory_bytes: GPU memory of the pool that graphs are captured into.
        compile_seconds: Of the first runs of what was compiled, kernels of all sizes so far included.

    Examples:
        >>> from hf_flashinfer_attn import GraphStatistics
        >>> GraphStatistics(replayed=2, tokens=75, slots=100).waste
        0.25
    """

    captured: int = 0
    dropped: int = 0
    replayed: int = 0
    tokens: int = 0
    slots: int = 0
    memory_bytes: int = 0
    compile_seconds: float = 0.0

    @property
    def waste(self) -> float:
        """The share of filler in all tokens that graphs computed, 0 to 1."""
        return 1 - self.tokens / self.slots if self.slots else 0.0

    @classmethod
    def total(cls, parts: Iterable[GraphStatistics]) -> GraphStatistics:
        """Adds up several."""
        whole = cls()
        for part in parts:
            for one in fields(cls):
                setattr(whole, one.name, getattr(whole, one.name) + getattr(part, one.name))
        return whole


def token_bucket(tokens: int) -> int:
    """Returns the size of the graph for so many tokens: 8 sizes per doubling, 16 from 2,048 on.

    Examples:
        >>> from hf_flashinfer_attn.unpadding.graph_options import token_bucket
        >>> [token_bucket(tokens) for tokens in (1, 64, 65, 549, 5_829, 22_024)]
        [64, 64, 72, 576, 5888, 22528]
    """
    if tokens <= _MIN_TOKENS:
        return _MIN_TOKENS
    octave = 1 << ((tokens - 1).bit_length() - 1)
    step = octave // (16 if octave >= 2_048 else 8)
    return -(-tokens // step) * step


def row_bucket(rows: int) -> int:
    """Returns the number of rows of the graph for so many: a power of two, since rows of length zero cost little.

    Examples:
        >>> from hf_flashinfer_attn.unpadding.graph_options import row_bucket
        >>> [row_bucket(rows) for rows in (1, 8, 9, 200)]
        [8, 8, 16, 256]
    """
    return max(_MIN_ROWS, 1 << (rows - 1).bit_length())
