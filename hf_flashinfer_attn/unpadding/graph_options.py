"""Options, sizes and statistics of CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

__all__ = ["GraphOptions", "GraphStatistics", "row_bucket", "token_bucket"]

_MIN_ROWS, _MIN_TOKENS = 8, 64


@dataclass(frozen=True, slots=True)
class GraphOptions:
    """Options of CUDA graph capture.

    Args:
        max_tokens: Maximum number of tokens in a graph. Larger batches run without graphs: they keep the GPU busy
            anyway.
        max_rows: Maximum number of rows in a graph.
        max_memory_gib: Memory limit of all graphs together, in GiB. A size that would exceed it runs without a graph.
            At most once in 1,000 replays, all graphs are evicted instead and captured again on use.
        compile: Whether to compile the model with `torch.compile` before capture. This takes up to a minute, once for
            all sizes; see `graph_statistics(model).compile_seconds`.

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
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"GraphOptions({name}={value!r}): expected a number above 0.")


@dataclass(slots=True)
class GraphStatistics:
    """Statistics of a model's CUDA graphs.

    Args:
        captured: Number of captured graphs.
        dropped: Number of evicted graphs: out of memory budget, or the model changed.
        replayed: Number of forwards that replayed a graph.
        tokens: Number of tokens in the replayed forwards.
        slots: Number of tokens in the replayed forwards, filler tokens included.
        memory_bytes: Size of the graphs' GPU memory pool.
        compile_seconds: Duration of the first runs with `compile=True`, compilation included.

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
        """Fraction of filler tokens in the replayed forwards, 0 to 1."""
        return 1 - self.tokens / self.slots if self.slots else 0.0

    @classmethod
    def total(cls, parts: Iterable[GraphStatistics]) -> GraphStatistics:
        """Returns the sum of several statistics."""
        return cls(*map(sum, zip(*map(astuple, parts))))


def token_bucket(tokens: int) -> int:
    """Rounds a number of tokens up to a graph size: 8 sizes per power of two, 16 from 2,048 tokens on.

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
    """Rounds a number of rows up to a power of two, at least 8; empty rows cost little.

    Examples:
        >>> from hf_flashinfer_attn.unpadding.graph_options import row_bucket
        >>> [row_bucket(rows) for rows in (1, 8, 9, 200)]
        [8, 8, 16, 256]
    """
    return max(_MIN_ROWS, 1 << (rows - 1).bit_length())
