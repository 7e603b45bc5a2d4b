"""Fingerprint of a model, to detect changes that invalidate captured graphs."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch

__all__ = ["ModelState", "numerics"]

# Attributes of `torch.nn.Module`, and a flag of transformers; all others are specific to a layer.
_PRIVATE = frozenset({*vars(torch.nn.Module()), "_is_hf_initialized"})
# Attributes of torch's layers, the most frequent ones, that do not affect a forward in eval mode.
_INERT = frozenset(
    {
        "in_features", "out_features", "num_embeddings", "embedding_dim", "normalized_shape", "elementwise_affine",
        "p", "inplace", "padding_idx", "scale_grad_by_freq", "sparse",
    }
)  # fmt: skip
# Compared properties of each weight.
_READ = (torch.Tensor.data_ptr, torch.Tensor.stride, torch.Tensor.numel, operator.attrgetter("dtype"))


class ModelState:
    """Fingerprint of a model, without the values of its weights, which may be updated in place.

    Detects moved or cast weights (`to`, `half`), replaced modules, parameters and forwards, hooks, changed attributes
    of layers, and calls of `train` and `eval`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        modules = list(model.modules())
        self._dicts = [vars(module) for module in modules]
        stores = [one[name] for one in self._dicts for name in ("_parameters", "_buffers", "_modules")]
        self._stores = [store for store in stores if store]
        # Without the model's own hooks, which run outside of graphs.
        inner = modules[1:]
        hooks = [vars(module)[name] for module in inner for name in ("_forward_hooks", "_forward_pre_hooks")]
        self._hooks = [store for store in hooks if store]
        # Most stores are empty; they must stay so.
        self._empty = [store for store in stores + hooks if not store]
        # References, here and below, so that no new object gets the id of a freed one.
        self._held = list(itertools.chain.from_iterable(map(dict.values, self._stores)))
        tensors = [value for value in self._held if isinstance(value, torch.Tensor)]
        # Other tensor types, such as quantized weights, may have no memory or strides to compare.
        self._tensors = list(filter(_is_plain, tensors))
        self._modules = inner
        attributes = [
            (vars(module), name)
            for module in inner
            for name in vars(module)
            if name not in _PRIVATE and not (name in _INERT and type(module).__module__.startswith("torch.nn."))
        ]
        self._owners, self._names = [owner for owner, _ in attributes], [name for _, name in attributes]
        self._values = list(map(dict.get, self._owners, self._names))
        kinds: set[Any] = set(map(type, modules))
        self._forwards = {kind: kind.forward for kind in kinds}
        others = (type(value) for value in tensors if not _is_plain(value))
        self.refusal = self._refuse(inner, next(others, None))
        self._seen = self._look()

    def _refuse(self, inner: list[torch.nn.Module], other: type[torch.Tensor] | None) -> str | None:
        """Returns the reason if the model cannot be captured in its current state."""
        if other is not None:
            return f"weights of type {other.__name__} are not supported"
        if next((value.dtype.itemsize for value in self._tensors if value.is_floating_point()), 0) != 2:
            return "its weights are not in half precision"
        for module in inner:
            kind = type(module)
            if not kind.__module__.startswith(("torch.nn.", "transformers.")):
                return f"{kind.__module__}.{kind.__qualname__} in it is neither in torch.nn nor in transformers"
            if "forward" in vars(module):
                return f"the forward of a {kind.__name__} in it was replaced"
        for hook in itertools.chain.from_iterable(map(dict.values, self._hooks)):
            # transformers' own hooks do nothing unless hidden states are requested.
            if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
                return f"a hook on a module in it, {getattr(hook, '__qualname__', hook)}, would not be called"
        return None

    def _look(self) -> tuple[Any, ...]:
        # Runs once per forward over hundreds of modules, hence `map` instead of Python loops.
        return (
            *(list(map(read, self._tensors)) for read in _READ),
            any(self._empty),
            list(itertools.chain.from_iterable(self._hooks)),
            list(map(dict.get, self._dicts, itertools.repeat("training"))),
            list(map(type, self._modules)),
            # Detects methods set on an instance.
            sum(map(len, self._dicts[1:])),
        )

    def holds(self) -> bool:
        """Whether the model is unchanged."""
        now = itertools.chain.from_iterable(map(dict.values, self._stores))
        return (
            sum(map(len, self._stores)) == len(self._held)
            and all(map(operator.is_, now, self._held))
            and all(map(operator.is_, map(dict.get, self._owners, self._names), self._values))
            and all(kind.forward is forward for kind, forward in self._forwards.items())
            and self._look() == self._seen
        )


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


def numerics() -> tuple[bool, ...]:
    """Returns torch's global settings of matrix products."""
    matmul = torch.backends.cuda.matmul
    return (
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        getattr(matmul, "allow_fp16_accumulation", False),
        torch.are_deterministic_algorithms_enabled(),
    )
