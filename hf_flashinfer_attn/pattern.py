"""Which attention a transformers mask function asks for: a band around the diagonal, packed sequences, or neither.

Full, causal and sliding-window attention are all bands: a query sees the keys from `left` before to `right` after its
own position. transformers composes mask functions from closures; those that hold nothing but numbers are evaluated on
probe positions and recognised by what they answer, whichever of the many spellings they have.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import CodeType, FunctionType

import torch
from transformers import masking_utils
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

__all__ = ["CAUSAL", "FULL", "Pattern", "PatternKind", "band", "dense_pattern", "recognise"]

MaskFunction = Callable[..., torch.Tensor]


class PatternKind(Enum):
    """Whether a pattern can do without a mask."""

    BAND = "band"
    DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which keys a query may see, padding aside.

    Args:
        kind: A BAND runs on ragged tokens; DENSE needs the whole mask.
        name: What to call it in a message, such as "causal" or "sliding_window_overlay".
        left: How many keys before its own position a query sees; None for all.
        right: How many keys after its own position a query sees; None for all, 0 for causal attention.
    """

    kind: PatternKind
    name: str
    left: int | None = None
    right: int | None = None

    @property
    def is_window(self) -> bool:
        """Whether distances matter, beyond before and after."""
        return self.kind is PatternKind.BAND and (self.left is not None or self.right not in (None, 0))

    @property
    def is_causal(self) -> bool:
        """Whether no query sees a later key."""
        return self.kind is PatternKind.BAND and self.right == 0


FULL = Pattern(PatternKind.BAND, "full")
CAUSAL = Pattern(PatternKind.BAND, "causal", right=0)


def dense_pattern(name: str) -> Pattern:
    """Names what needs the whole mask."""
    return Pattern(PatternKind.DENSE, name)


def band(left: int | None, right: int | None) -> Pattern:
    """Names a band: `left` keys before a query's own position and `right` after; None for all."""
    if left is None and right is None:
        return FULL
    if left is None and right == 0:
        return CAUSAL
    bounds = "{} before".format("all" if left is None else left), "{} after".format("all" if right is None else right)
    return Pattern(PatternKind.BAND, f"window ({', '.join(bounds)})", left, right)


def recognise(mask_function: MaskFunction) -> tuple[Pattern, torch.Tensor | None]:
    """Labels a mask function. What is not known for certain is DENSE: a guess would be a silently wrong number.

    Args:
        mask_function: As transformers' mask helpers hand it to a mask interface.

    Returns:
        The pattern; and, for packed sequences, the sequence that each position belongs to, shape `(batch, tokens)`.
    """
    if mask_function is bidirectional_mask_function:
        return FULL, None
    if mask_function is causal_mask_function:
        return CAUSAL, None
    packed: list[torch.Tensor] = []
    bands: list[Pattern | None] = []
    for term in _terms(mask_function):
        if (sequences := _packed_sequences(term)) is not None:
            packed.append(sequences)
        else:
            structure = _structure(term)
            bands.append(None if structure is None else _probe(structure, _Unhashed(term)))
    known = [band for band in bands if band is not None]
    if len(packed) > 1 or len(known) < len(bands):
        return dense_pattern(_describe(mask_function)), None
    left = min((band.left for band in known if band.left is not None), default=None)
    right = min((band.right for band in known if band.right is not None), default=None)
    return band(left, right), packed[0] if packed else None


def _terms(mask_function: MaskFunction) -> Iterator[MaskFunction]:
    """Takes an intersection of mask functions apart."""
    if _is_made_by(mask_function, "and_masks"):
        for part in _closure(mask_function)["mask_functions"]:  # type: ignore[attr-defined]
            yield from _terms(part)
    elif _is_made_by(mask_function, "remap_positions_for_packed_sequence"):
        # Positions restart at every packed sequence; in a band only differences within one count.
        yield from _terms(_closure(mask_function)["mask_function"])  # type: ignore[arg-type]
    else:
        yield mask_function


def _packed_sequences(mask_function: MaskFunction) -> torch.Tensor | None:
    if not _is_made_by(mask_function, "packed_sequence_mask_function"):
        return None
    sequences = _closure(mask_function)["packed_sequence_mask"]
    return sequences if isinstance(sequences, torch.Tensor) else None


def _is_made_by(mask_function: MaskFunction, maker: str) -> bool:
    """Whether a closure was made by a function of transformers' masking module."""
    return (
        getattr(mask_function, "__module__", None) == masking_utils.__name__
        and getattr(mask_function, "__qualname__", "").split(".<locals>")[0] == maker
    )


def _closure(mask_function: MaskFunction) -> dict[str, object]:
    if not isinstance(mask_function, FunctionType):
        return {}
    cells = mask_function.__closure__ or ()
    return dict(zip(mask_function.__code__.co_freevars, (cell.cell_contents for cell in cells)))


def _structure(mask_function: object) -> Hashable | None:
    """What a function computes, as a value: its code and the numbers and functions it closes over, all transformers'.

    None if it closes over anything else, or is somebody else's: then nothing is known of it.
    """
    if isinstance(mask_function, (bool, int)):
        return mask_function
    if isinstance(mask_function, tuple):
        parts = tuple(_structure(part) for part in mask_function)
        return None if None in parts else parts
    if not isinstance(mask_function, FunctionType):
        return None
    defaults = mask_function.__defaults__ or mask_function.__kwdefaults__
    if not mask_function.__module__.startswith("transformers.") or defaults:
        return None
    closed = tuple(_structure(value) for value in _closure(mask_function).values())
    return None if None in closed else (mask_function.__code__, *closed)


class _Unhashed:
    """Rides along in a cached call without being part of its key."""

    def __init__(self, function: MaskFunction) -> None:
        self.function = function

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unhashed)

    def __hash__(self) -> int:
        return 0


def _numbers(structure: Hashable) -> Iterator[int]:
    """The whole numbers that a structure closes over or spells out in its code."""
    if isinstance(structure, int):
        yield int(structure)
    elif isinstance(structure, CodeType):
        yield from _numbers(structure.co_consts)
    elif isinstance(structure, tuple):
        for part in structure:
            yield from _numbers(part)


# Up to this reach every distance is probed.
_EXHAUSTIVE_REACH = 4096
# A function of so many numbers that it would take more is left unknown.
_MOST_PROBES = 1 << 21


@functools.lru_cache(maxsize=256)
def _probe(structure: Hashable, term: _Unhashed) -> Pattern | None:
    """Evaluates a function around every position where it could change its mind; None if it is no band.

    That these are the positions at multiples of its numbers, and the distances at sums of few of them, is an assumption
    about transformers' code. Where an answer contradicts it, by an edge in between, nothing is known.
    """
    numbers = {abs(number) for number in _numbers(structure)}
    reach = 2 * max(numbers, default=0) + 8
    if reach > torch.iinfo(torch.long).max // 10_000:
        return None
    # Positions next to multiples of its numbers tell a band from blocks, which start at such multiples, and far ones
    # tell it from what grows with the position.
    anchors = {0, 1, 2, 3, reach, reach + 1, 17 * reach + 5, 1000 * reach + 3}
    for number in numbers:
        anchors |= {multiple * number + step for multiple in range(1, 5) for step in (*range(-3, 4), number // 2)}
    queries = torch.tensor(sorted(anchor for anchor in anchors if anchor >= 0), device="cpu")[:, None]
    distances = _distances(numbers, reach)
    if queries.numel() * distances.numel() > _MOST_PROBES:
        return None
    keys = queries + distances
    zero = torch.zeros((), dtype=torch.long, device="cpu")
    answers = term.function(zero, zero, queries, keys).broadcast_to(keys.shape)
    real = keys >= 0
    visible = (answers & real).any(0)
    if not torch.equal(answers & real, visible & real) or not visible[distances == 0]:
        return None
    seen = visible.nonzero().flatten()
    first, last = int(seen[0]), int(seen[-1])
    if last - first + 1 != len(seen):
        return None
    left, right = -int(distances[first]), int(distances[last])
    # The nearest distances that a query does not see must be known, not lie somewhere between two probes.
    if (left < reach and distances[first - 1] != -left - 1) or (right < reach and distances[last + 1] != right + 1):
        return None
    return band(None if left == reach else left, None if right == reach else right)


def _distances(numbers: set[int], reach: int) -> torch.Tensor:
    """Returns the distances to probe, ascending int64 on the host, from `-reach` to `reach`."""
    if reach <= _EXHAUSTIVE_REACH:
        return torch.arange(-reach, reach + 1, device="cpu")
    multiples = {times * number for number in numbers for times in range(-2, 3)}
    sums = {one + other for one in multiples for other in multiples}
    # The next multiples of another number: what repeats shows there, far from zero as well.
    sums |= {total // number * number + step for total in sums for number in numbers - {0} for step in (0, number)}
    # Small distances are all there: short periods show in them.
    known = {-reach, reach, *range(-512, 513), *(total + step for total in sums for step in range(-4, 5))}
    around = sorted(distance for distance in known if abs(distance) <= reach)
    between = ((before + after) // 2 for before, after in itertools.pairwise(around))
    return torch.tensor(sorted({*around, *between}), device="cpu")


def _describe(mask_function: object) -> str:
    name = getattr(mask_function, "__qualname__", type(mask_function).__name__).split(".<locals>")[0]
    closed = _closure(mask_function).values() if isinstance(mask_function, FunctionType) else ()
    parts = [_describe(part) for value in closed if isinstance(value, tuple) for part in value if callable(part)]
    return f"{name}({', '.join(parts)})" if parts else name
