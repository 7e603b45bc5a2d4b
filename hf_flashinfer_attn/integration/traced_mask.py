"""Lazy mask inside compiled graphs: a plain object with a handle, which makes its values on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..ragged.band import MaskFunction
from ..ragged.lazy_mask import RaggedMask
from ..ragged.mask_functions import interpret
from .ops import mask_handle, mask_of_handle, mask_values, unpadded_mask

__all__ = ["GraphMask", "trace_mask"]


class GraphMask:
    """Additive mask `(batch, 1, q_length, kv_length)` while torch.compile traces.

    torch.compile cannot make tensor subclasses inside a graph, so this is a plain object with a tensor's operators. The
    first operation makes the values, which then replace the lazy mask.

    Args:
        handle: Result of `mask_handle`; None for rows without padding, aligned to the last key.
        shape: Rows, and padded lengths of queries and keys.
        left: Number of keys before its own position that a query sees; None for all.
        right: Number of keys after its own position that a query sees; None for all.
        dtype: dtype of the values.
        device: Device of the values.
    """

    def __init__(
        self,
        handle: torch.Tensor | None,
        shape: tuple[int, int, int],
        left: int | None,
        right: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.handle = handle
        self.batch_size, self.q_length, self.kv_length = shape
        self.left = left
        self.right = right
        self.dtype = dtype
        self.device = device
        self.values: torch.Tensor | None = None

    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch_size, 1, self.q_length, self.kv_length)

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if self.values is None:
            # An empty tensor resolves the many signatures of this call.
            probe = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
            if (probe.dtype, probe.device) == (self.dtype, self.device) and not kwargs.get("copy"):
                return self
        return self.dense().to(*args, **kwargs)

    def fits(self, query: torch.Tensor, key: torch.Tensor) -> bool:
        """Whether the mask has the shape of a call; query and key are `(batch, heads, length, head_dim)`."""
        lengths = query.shape[0], key.shape[0], query.shape[2], key.shape[2]
        return lengths == (self.batch_size, self.batch_size, self.q_length, self.kv_length)

    def lazy(self) -> RaggedMask:
        """Returns the lazy mask, for use outside of a graph."""
        if self.handle is not None:
            return mask_of_handle(self.handle)
        lengths = self.batch_size, self.q_length, self.kv_length
        return unpadded_mask(*lengths, self.left, self.right, self.dtype, self.device)

    def dense(self) -> torch.Tensor:
        """Returns the values, shape `(batch, 1, q_length, kv_length)`."""
        if self.values is None:
            lengths = self.batch_size, self.q_length, self.kv_length
            if self.handle is not None:
                self.values = mask_values(self.handle, *lengths, self.dtype)
            else:
                visible = torch.ones(self.q_length, self.kv_length, dtype=torch.bool, device=self.device)
                last = self.kv_length - self.q_length
                if self.right is not None:
                    visible = visible.tril(last + self.right)
                if self.left is not None:
                    visible = visible.triu(last - self.left)
                values = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
                values = values.masked_fill(~visible, torch.finfo(self.dtype).min)
                self.values = values.expand(self.batch_size, 1, -1, -1).contiguous()
        return self.values

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = {name: _values_of(value) for name, value in (kwargs or {}).items()}
        return func(*[_values_of(value) for value in args], **named)


def _values_of(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_values_of(part) for part in value)
    return value.dense() if isinstance(value, GraphMask) else value


def _on_values(name: str) -> Callable[..., Any]:
    def operator(self: GraphMask, *others: Any) -> Any:
        return getattr(self.dense(), name)(*[_values_of(other) for other in others])

    return operator


# Python looks operators up on the class; without an `__eq__`, `==` would compare identities.
for _name in (
    "abs", "add", "and", "bool", "eq", "float", "ge", "getitem", "gt", "int", "invert", "iter", "le", "len", "lt",
    "matmul", "mul", "ne", "neg", "or", "pow", "radd", "rmul", "rsub", "rtruediv", "setitem", "sub", "truediv", "xor",
):  # fmt: skip
    setattr(GraphMask, f"__{_name}__", _on_values(f"__{_name}__"))


def trace_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    mask_function: MaskFunction,
    attention_mask: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str,
    use_vmap: bool,
) -> GraphMask | None:
    """Makes the mask of one forward inside a graph, from the arguments of `lazy_mask`; None unless surely a band."""
    # transformers uses vmap for mask functions of users.
    visible = None if use_vmap else interpret(mask_function)
    if visible is None:
        return None
    left, right = visible.left, visible.right
    if right != 0 and left != right:
        return None
    if visible.packed is not None and (attention_mask is not None or q_length != kv_length):
        return None
    counted = isinstance(q_offset, torch.Tensor)
    aligned = not counted and q_offset + q_length == kv_offset + kv_length
    if right not in (None, 0) and not aligned:
        return None
    handle = None
    if attention_mask is None and visible.packed is None and not isinstance(q_offset, torch.Tensor) and not aligned:
        if right != 0:
            return None
        # A static cache that is not full: its unwritten keys are hidden.
        attention_mask = torch.ones(batch_size, q_offset + q_length, dtype=torch.bool, device=device)
    if attention_mask is not None or visible.packed is not None or counted:
        handle = mask_handle(
            attention_mask,
            visible.packed,
            visible.positions,
            q_offset if isinstance(q_offset, torch.Tensor) else None,
            batch_size,
            q_length,
            kv_length,
            0 if isinstance(q_offset, torch.Tensor) else q_offset,
            kv_offset,
            left,
            right,
            dtype,
        )
    return GraphMask(handle, (batch_size, q_length, kv_length), left, right, dtype, torch.device(device))
