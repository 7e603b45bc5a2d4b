"""The hooks into transformers: registration under the name "flashinfer", and two private functions made to know it.

Private names of transformers are replaced here and nowhere else; `tests/test_registration.py` guards them per version.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers import AttentionInterface, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.masking_utils import AttentionMaskInterface

from .integration import NAME, PAGED_NAME, attention_forward, attention_mask, refuse_paged
from .varlen import flash_attn_func, flash_attn_varlen_func

__all__ = ["register"]

_MARK = "_knows_flashinfer"


def register() -> None:
    """Registers "flashinfer" with transformers; done on import, and harmless to repeat.

    Raises:
        RuntimeError: If this version of transformers has no hooks of the known shape.

    Examples:
        >>> import hf_flashinfer_attn
        >>> hf_flashinfer_attn.register()
        >>> from transformers import AttentionInterface
        >>> "flashinfer" in AttentionInterface().valid_keys()
        True
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    AttentionInterface.register(PAGED_NAME, refuse_paged)
    AttentionMaskInterface.register(PAGED_NAME, attention_mask)
    _answer_flash_imports()
    _join_compatible_implementations()


def _hook(owner: Any, name: str, first_parameters: list[str]) -> Callable[..., Any] | None:
    """Returns the function to wrap; None if it is wrapped already."""
    original: Callable[..., Any] | None = getattr(owner, name, None)
    if getattr(original, _MARK, False):
        return None
    parameters = list(inspect.signature(original).parameters) if original is not None else []
    if original is None or parameters[: len(first_parameters)] != first_parameters:
        raise RuntimeError(
            f"transformers {transformers.__version__} is not supported: {owner.__name__}.{name} takes {parameters}, "
            f"expected {first_parameters} first. Install transformers>=5.5,<6."
        )
    return original


def _answer_flash_imports() -> None:
    """Makes transformers' loader of flash kernels answer for our name.

    transformers 5.x takes every name with "flash" in it for a flash-attention kernel, and asks this loader for the
    kernel's functions before it builds a model; for an unknown name the loader looks for a hub repository and raises.
    """
    loader = _hook(flash_utils, "_lazy_imports", ["implementation"])
    if loader is None:
        return

    @functools.wraps(loader)
    def lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation in (NAME, PAGED_NAME):
            pad, unpad = flash_utils._pad_input, flash_utils._unpad_input
            return flash_attn_func, flash_attn_varlen_func, None, pad, unpad
        return loader(implementation, *args, **kwargs)

    setattr(lazy_imports, _MARK, True)
    flash_utils._lazy_imports = lazy_imports


def _join_compatible_implementations() -> None:
    """Keeps models that list the flash kernels they work with from replacing ours by the first of that list.

    Their attention needs features that flash kernels lack, such as sinks; ours has them, or falls back and says so.
    """
    adjust = _hook(PreTrainedModel, "_check_and_adjust_attn_implementation", ["self", "attn_implementation"])
    if adjust is None:
        return

    @functools.wraps(adjust)
    def check_and_adjust(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        listed = getattr(self, "_compatible_flash_implementations", None)
        if attn_implementation == NAME and listed is not None and NAME not in listed:
            self._compatible_flash_implementations = [*listed, NAME]
        return adjust(self, attn_implementation, *args, **kwargs)

    setattr(check_and_adjust, _MARK, True)
    PreTrainedModel._check_and_adjust_attn_implementation = check_and_adjust
