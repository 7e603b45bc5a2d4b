"""Lazy mask: a tensor without memory, returned by the mask function and passed to every layer.

It has the shape, dtype and device of eager attention's additive mask. The attention function takes the ragged layout
from it. Any other operation gets the real values: transformers' own `eager_mask` makes them on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers.masking_utils import eager_mask

from ..errors import UnsupportedAttentionError
from ..tracing import record_host_copy
from .band import Opaque, recognise
from .mask_state import MaskSpec, MaskState, is_mask_of_ones

__all__ = ["RaggedMask", "lazy_mask"]

# Methods that only read metadata; the mask stays lazy.
_METADATA_METHODS = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "element_size",
        "is_floating_point", "is_complex", "is_signed", "get_device", "requires_grad_", "__len__", "__hash__",
        "__repr__", "__format__", "is_inference", "has_names",
    }
)  # fmt: skip
_DATA_PROPERTIES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
_NO_OP_METHODS = frozenset({"detach", "contiguous"})
# Methods that return memory; writes to it are not counted as versions.
_MEMORY_METHODS = frozenset({"numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage"})
_MOVE_METHODS = frozenset({"to", "cuda", "cpu", "half", "bfloat16", "float", "double", "type_as"})


def _is_metadata(function: Callable[..., Any]) -> bool:
    if (name := _property_of(function)) is not None:
        return name not in _DATA_PROPERTIES
    return getattr(function, "__name__", "") in _METADATA_METHODS


def _property_of(function: Callable[..., Any]) -> str | None:
    """Returns the name of the property that a function gets or sets; None if it is a method."""
    if getattr(function, "__name__", "") not in ("__get__", "__set__"):
        return None
    return getattr(getattr(function, "__self__", None), "__name__", "")


class RaggedMask(torch.Tensor):
    """Lazy additive attention mask, shape `(batch, 1, q_length, kv_length)`, with the state of its forward.

    Values are 0 where a query sees a key and the dtype's minimum elsewhere, as in eager attention. They are made when
    an operation needs them. An in-place write makes the mask dense for good.
    """

    state: MaskState
    _dense: torch.Tensor | None
    _dense_version: int

    @staticmethod
    def __new__(cls, state: MaskState, dtype: torch.dtype, device: torch.device) -> RaggedMask:
        spec = state.spec
        mask: RaggedMask = torch.Tensor._make_wrapper_subclass(
            cls, (spec.batch_size, 1, spec.q_length, spec.kv_length), dtype=dtype, device=device
        )
        mask.state = state
        mask._dense = None
        mask._dense_version = 0
        return mask

    def __init__(self, state: MaskState, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()

    @property
    def spec(self) -> MaskSpec:
        """Arguments of the mask function."""
        return self.state.spec

    @property
    def was_modified(self) -> bool:
        """Whether the dense values were written to, which makes the layout invalid."""
        return self._dense is not None and self._dense._version != self._dense_version

    @property
    def hides_nothing(self) -> bool:
        """Whether every query sees every key, so that eager attention would need no mask; reads row lengths."""
        pattern, length = self.spec.pattern, self.spec.kv_length
        if isinstance(pattern, Opaque) or pattern.is_causal or self.spec.packed is not None:
            return False
        reaches_all = all(reach is None or reach > length for reach in (pattern.left, pattern.right))
        return reaches_all and not self.state.has_padding and not self.was_modified

    def dense(self) -> torch.Tensor:
        """Returns the additive mask as a plain tensor, shape `(batch, 1, q_length, kv_length)`."""
        if self._dense is None:
            with torch._C.DisableTorchFunctionSubclass():
                dtype, device = self.dtype, self.device
            self._dense = self.state.dense(dtype, device)
            self._dense_version = self._dense._version
        return self._dense

    def _moved(self, dtype: torch.dtype, device: torch.device) -> RaggedMask:
        return RaggedMask(self.state, dtype, device)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return (
                f"RaggedMask(shape={tuple(self.shape)}, pattern={self.spec.pattern.name!r}, dtype={self.dtype}, "
                f"device={str(self.device)!r})"
            )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _is_metadata(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        mask = args[0] if args and isinstance(args[0], RaggedMask) else None
        name = getattr(func, "__name__", "")
        if mask is not None and _property_of(func) == "data" and name == "__set__":
            raise UnsupportedAttentionError(
                "assigning to the data of a lazy mask", "Write in place: mask.copy_(values)."
            )
        if mask is not None and name in _MEMORY_METHODS:
            torch.autograd.graph.increment_version(mask.dense())
        if mask is not None and not mask.was_modified:
            # `data` too: writes to the alias that a plain tensor returns are not counted.
            if name in _NO_OP_METHODS or _property_of(func) == "data":
                return mask
            if name in _MOVE_METHODS and (moved := _move(mask, func, args, kwargs)) is not None:
                return moved
            if name in ("__getitem__", "expand") and _keeps_everything(mask, name, args, kwargs):
                return mask
        return func(*tree_map(_to_dense, args), **tree_map(_to_dense, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Calls from C++ bypass __torch_function__.
        return func(*tree_map(_to_dense, args), **tree_map(_to_dense, kwargs or {}))


def _to_dense(value: Any) -> Any:
    return value.dense() if isinstance(value, RaggedMask) else value


def _move(
    mask: RaggedMask, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> RaggedMask | None:
    """Returns the lazy mask with the dtype and device of a call such as `mask.to(...)`; None if it cannot stay lazy."""
    if kwargs.get("copy"):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        dtype, device = mask.dtype, mask.device
        # An empty tensor resolves the many signatures of these calls.
        probe: torch.Tensor = func(torch.empty(0, dtype=dtype, device=device), *args[1:], **kwargs)
    if not probe.dtype.is_floating_point:
        return None
    return mask if (probe.dtype, probe.device) == (dtype, device) else mask._moved(probe.dtype, probe.device)


def _keeps_everything(mask: RaggedMask, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a slice such as `mask[:, :, :, :kv_length]`, or an expand, returns the whole mask."""
    spec = mask.spec
    shape = (spec.batch_size, 1, spec.q_length, spec.kv_length)
    if name == "expand":
        sizes = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list, torch.Size)) else args[1:]
        return not kwargs and len(sizes) == 4 and all(size in (-1, full) for size, full in zip(sizes, shape))
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(part is Ellipsis for part in index):
        ellipses = [at for at, part in enumerate(index) if part is Ellipsis]
        if len(ellipses) > 1:
            return False
        at = ellipses[0]
        index = (*index[:at], *(slice(None),) * (4 - len(index) + 1), *index[at + 1 :])
    return len(index) <= 4 and all(
        isinstance(part, slice)
        and all(bound is None or isinstance(bound, int) for bound in (part.start, part.stop, part.step))
        and part.indices(full) == (0, full, 1)
        for part, full in zip(index, shape)
    )


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str,
    use_vmap: bool,
) -> RaggedMask:
    """Makes the lazy mask of one forward; the arguments are those of transformers' mask interfaces.

    Raises:
        UnsupportedAttentionError: If `attention_mask` has another number of rows than the batch.
    """
    if attention_mask is not None and attention_mask.shape[0] != batch_size:
        raise UnsupportedAttentionError(
            f"an attention_mask of shape {tuple(attention_mask.shape)} for a batch of {batch_size} rows of "
            f"{kv_length} keys",
            "Pass one mask row for each row of the batch; attention_mask.expand(rows, -1) repeats a single one.",
        )
    if isinstance(q_offset, torch.Tensor) and q_offset.is_cuda:
        record_host_copy()
    # A static cache counts its tokens on the device, in place: a later read would return a later position.
    first_query = int(q_offset)
    padding_mask = None
    if attention_mask is not None:
        # A meta tensor has no values, hence no padding.
        is_ones = is_mask_of_ones(attention_mask) or attention_mask.is_meta
        attention_mask = attention_mask.to(torch.bool)
        padding_mask = None if is_ones else attention_mask
    if padding_mask is not None and (missing := kv_length + kv_offset - padding_mask.shape[-1]) > 0:
        padding_mask = torch.nn.functional.pad(padding_mask, (0, missing))

    def densify(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        mask: torch.Tensor = eager_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=first_query,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask if attention_mask is None else attention_mask.to(device),
            dtype=dtype,
            use_vmap=use_vmap,
            device=device,
        )
        return mask

    pattern, packed, positions = recognise(mask_function)
    if packed is not None and (padding_mask is not None or q_length != kv_length):
        pattern, packed = Opaque("packed sequences with padding"), None
    tables = [table for table in (packed, positions) if table is not None]
    # Other dtypes may overflow or hold NaN.
    dtypes = {torch.bool, torch.int32, torch.int64}
    if any(table.shape != (batch_size, q_length) or table.dtype not in dtypes for table in tables):
        pattern, packed = Opaque("packed sequences of another shape than the batch"), None
    # Ragged attention aligns the last query with the last key. If causal, `MaskState` drops later keys.
    aligned = first_query + q_length == kv_offset + kv_length
    if pattern.is_window and not pattern.is_causal and not aligned:
        pattern = Opaque("a window over keys of another sequence")
    spec = MaskSpec(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=first_query,
        kv_offset=kv_offset,
        padding_mask=padding_mask,
        pattern=pattern,
        packed=packed,
        positions=positions,
        densify=densify,
    )
    device = torch.device(device)
    return RaggedMask(MaskState(spec, device), dtype, device)
