"""Exact recognition of mask functions, by calling them with symbolic positions.

A comparison of two symbolic positions returns a band. Bands of the same packed sequences can be joined and intersected.
Any other operation on a symbol makes the result unknown. Closures, globals and helper functions need no inspection, so
this also works while torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["TensorLikePosition", "Visible", "interpret"]


class _Symbol:
    """A symbolic tensor; its operators return unknown symbols unless a subclass defines them."""

    device = None

    def __getattr__(self, name: str) -> Any:
        # Not AttributeError, which `hasattr` would turn into False.
        raise TypeError(f"a mask function that reads {name!r} of a position is not known")

    def to(self, *args: Any, **kwargs: Any) -> _Symbol:
        # transformers moves positions to the device (here None) of other tensors. A dtype may round or wrap around.
        return self if args == (None,) and not kwargs else _Symbol()

    def new_zeros(self, *args: Any, **kwargs: Any) -> _Symbol:
        return Visible(-1, -1)

    def new_ones(self, *args: Any, **kwargs: Any) -> _Symbol:
        return Visible()

    def __bool__(self) -> bool:
        raise TypeError("a mask function that branches on a position is not known")

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> _Symbol:
        return _Symbol()


def _unknown(self: _Symbol, *others: object) -> _Symbol:
    return _Symbol()


for _name in (
    "abs", "add", "and", "eq", "floordiv", "ge", "getitem", "gt", "invert", "le", "lt", "mod", "mul", "ne", "neg", "or",
    "pow", "radd", "rand", "rfloordiv", "rmod", "rmul", "ror", "rsub", "rtruediv", "rxor", "sub", "truediv", "xor",
):  # fmt: skip
    setattr(_Symbol, f"__{_name}__", _unknown)


class _Position(_Symbol):
    """Symbolic position of a query or key plus `shift`: its index, or its entry in `table`, shape `(batch, tokens)`."""

    def __init__(self, is_query: bool, shift: int = 0, table: torch.Tensor | None = None) -> None:
        self.is_query = is_query
        self.shift = shift
        self.table = table

    def __add__(self, other: object) -> _Symbol:
        return _Position(self.is_query, self.shift + other, self.table) if isinstance(other, int) else _Symbol()

    def __sub__(self, other: object) -> _Symbol:
        if isinstance(other, int):
            return _Position(self.is_query, self.shift - other, self.table)
        return _Distance(self.table, self.is_query) if _are_apart(self, other) else _Symbol()

    def __le__(self, other: object) -> _Symbol:
        return self._at_most(other, 0)

    def __lt__(self, other: object) -> _Symbol:
        return self._at_most(other, -1)

    def __ge__(self, other: object) -> _Symbol:
        if isinstance(other, int) and other == 0 and self.shift == 0 and self.table is None:
            return Visible()
        return other._at_most(self, 0) if isinstance(other, _Position) else _Symbol()

    def __gt__(self, other: object) -> _Symbol:
        return other._at_most(self, -1) if isinstance(other, _Position) else _Symbol()

    def _at_most(self, other: object, slack: int) -> _Symbol:
        """Returns the keys that a query sees under `self <= other + slack`."""
        if not isinstance(other, _Position) or not _may_be_compared(self, other):
            return _Symbol()
        reach = other.shift - self.shift + slack
        return Visible(left=reach, positions=self.table) if self.is_query else Visible(None, reach, None, self.table)

    def __eq__(self, other: object) -> Any:
        return Visible(packed=self.table) if self.table is not None and _are_apart(self, other) else _Symbol()

    __hash__ = None  # type: ignore[assignment]


class TensorLikePosition(_Position):
    """A position that passes `isinstance(position, torch.Tensor)`; torch.compile cannot trace it."""

    __class__ = property(lambda self: torch.Tensor)


class _Distance(_Symbol):
    """A query's position minus a key's, the reverse, or the absolute value of either."""

    def __init__(self, table: torch.Tensor | None, of_query: bool, is_absolute: bool = False) -> None:
        self.table = table
        self.of_query = of_query
        self.is_absolute = is_absolute

    def __abs__(self) -> _Distance:
        return _Distance(self.table, self.of_query, is_absolute=True)

    abs = __abs__

    def __neg__(self) -> _Symbol:
        return _Symbol() if self.is_absolute else self._reversed()

    def _reversed(self) -> _Distance:
        return _Distance(self.table, not self.of_query)

    def __le__(self, other: object) -> _Symbol:
        if not isinstance(other, int):
            return _Symbol()
        if self.is_absolute:
            return Visible(other, other, None, self.table)
        return Visible(other, None, None, self.table) if self.of_query else Visible(None, other, None, self.table)

    def __lt__(self, other: object) -> _Symbol:
        return self <= other - 1 if isinstance(other, int) else _Symbol()

    def __ge__(self, other: object) -> _Symbol:
        return self._reversed() <= -other if isinstance(other, int) and not self.is_absolute else _Symbol()

    def __gt__(self, other: object) -> _Symbol:
        return self >= other + 1 if isinstance(other, int) else _Symbol()


class Visible(_Symbol):
    """The keys that a query sees: a band, in one packed sequence. A band of negative bounds is empty.

    Args:
        left: Number of keys before the query's own position; None for all.
        right: Number of keys after it; None for all, 0 for causal attention.
        packed: Sequence index of each token, shape `(batch, tokens)`; None unless packed.
        positions: Positions that the band counts in, shape `(batch, tokens)`; None for token indices.
    """

    def __init__(
        self,
        left: int | None = None,
        right: int | None = None,
        packed: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> None:
        self.left = left
        self.right = right
        self.packed = packed
        self.positions = positions

    def __and__(self, other: object) -> _Symbol:
        if (constant := _constant(other)) is not None:
            return self if constant else Visible(-1, -1)
        if not isinstance(other, Visible) or not (
            _may_be_one(self.packed, other.packed) and _may_be_one(self.positions, other.positions)
        ):
            return _Symbol()
        return Visible(
            _least(self.left, other.left),
            _least(self.right, other.right),
            other.packed if self.packed is None else self.packed,
            other.positions if self.positions is None else self.positions,
        )

    def __or__(self, other: object) -> _Symbol:
        if (constant := _constant(other)) is not None:
            return Visible() if constant else self
        if not isinstance(other, Visible):
            return _Symbol()
        if self.is_empty or other.is_empty:
            return other if self.is_empty else self
        # Two bands around the diagonal overlap, so their union is a band.
        if not (self.is_around and other.is_around and self.packed is other.packed):
            return _Symbol()
        if self.positions is not other.positions:
            return _Symbol()
        return Visible(_most(self.left, other.left), _most(self.right, other.right), self.packed, self.positions)

    @property
    def is_around(self) -> bool:
        """Whether a query sees its own position."""
        return (self.left is None or self.left >= 0) and (self.right is None or self.right >= 0)

    @property
    def is_empty(self) -> bool:
        # With `positions`, one of the two bounds may still count indices.
        if self.positions is not None or self.left is None or self.right is None:
            return False
        return self.left + self.right < 0


def _constant(value: object) -> bool | None:
    """Returns the value of a bool or of a 0-dimensional bool tensor; None for anything else."""
    if isinstance(value, bool):
        return value
    if type(value) is torch.Tensor and value.ndim == 0 and value.dtype == torch.bool and not value.is_meta:
        return bool(value)
    return None


def _may_be_compared(one: _Position, other: _Position) -> bool:
    return one.is_query != other.is_query and one.table is other.table


def _are_apart(one: _Position, other: object) -> bool:
    """Whether two symbols are the unshifted positions of a query and a key in the same table."""
    return isinstance(other, _Position) and _may_be_compared(one, other) and one.shift == 0 and other.shift == 0


def _may_be_one(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is None or other is None or one is other


def _least(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def _most(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else max(one, other)


class _Lookups(TorchFunctionMode):
    """Lets a mask function index a tensor with symbols: `table[batch, position]`."""

    def __init__(self, batch: _Symbol) -> None:
        super().__init__()
        self.batch = batch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if len(args) == 2 and isinstance(args[1], tuple) and len(args[1]) == 2 and args[1][0] is self.batch:
            table, position = args[0], args[1][1]
            if isinstance(position, _Position) and position.shift == 0 and position.table is None and table.ndim == 2:
                return _Position(position.is_query, 0, table)
        for argument in args:
            for part in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(part, _Symbol):
                    return _Symbol()
        return func(*args, **(kwargs or {}))


# Errors that a mask function may raise on symbols.
_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_LARGEST = 2**31 - 1


def interpret(mask_function: Callable[..., Any], position: type[_Position] = _Position) -> Visible | None:
    """Returns the keys that a query sees; None unless they are certainly a band that includes its own position.

    `position` is the class of the symbolic positions.

    Examples:
        >>> from transformers.masking_utils import sliding_window_causal_mask_function
        >>> visible = interpret(sliding_window_causal_mask_function(4))
        >>> visible.left, visible.right
        (3, 0)
    """
    batch = _Symbol()
    try:
        with _Lookups(batch):
            visible = mask_function(batch, _Symbol(), position(is_query=True), position(is_query=False))
    except _FAILURES:
        # Symbols do not support an operation of the mask function.
        return None
    if not isinstance(visible, Visible) or not visible.is_around:
        return None
    # Kernels use 32-bit bounds.
    if max(visible.left or 0, visible.right or 0) > _LARGEST:
        return None
    # Positions restart in each sequence; without sequences their meaning is unknown.
    if visible.positions is not None and visible.packed is None:
        return None
    return visible
