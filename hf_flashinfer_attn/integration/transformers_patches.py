"""Use of private names of transformers: replaces two functions, calls one, reads variables.

`tests/test_registration.py` checks these names for every supported version of transformers.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.utils import output_capturing

from ..errors import UnsupportedAttentionError
from ..log import log_once

__all__ = ["answer_flash_imports", "block_mask", "join_compatible_implementations", "weights_are_collected"]

# Models that select an attention class by name. An unknown name is a KeyError before transformers 5.23; later versions
# use flash-attn's class with a mask of another implementation.
_OWN_FLASH_CLASSES = frozenset({"falcon", "gpt_neo", "gptj", "semantic", "coarse_acoustics", "fine_acoustics"})
# Models with a table of attention classes in some versions, where any other name is a KeyError. The same files may have
# models of other configs.
_OWN_CLASSES = frozenset(
    {
        "altclip_text_model", "beit", "data2vec-vision", "deepseek_ocr2_sam_vision_model", "diffllama", "git",
        "kyutai_speech_to_text", "mimi", "moshi", "moshi_depth", "nemotron", "sam_hq_vision_model", "sam_vision_model",
        "superglue", "unlimited_ocr_sam_vision_model",
    }
)  # fmt: skip
# Models with their own attention code, which `unpad` replaces.
_REPLACED_BY_UNPAD = frozenset({"mpnet"})
_MARK = "_knows_flashinfer"


def _hook(owner: Any, name: str, first_parameters: list[str]) -> Callable[..., Any] | None:
    """Returns the function to wrap; None if it is already wrapped."""
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


def answer_flash_imports(
    names: tuple[str, ...], dense_function: Callable[..., Any], varlen_function: Callable[..., Any]
) -> None:
    """Makes transformers' loader of flash kernels return our functions for our names.

    transformers 5.x loads a flash kernel for every name that contains "flash" before it builds a model. For an unknown
    name, the loader searches a Hub repository and raises.

    Raises:
        RuntimeError: If this version of transformers has no such loader, or one with other parameters.
    """
    loader = _hook(flash_utils, "_lazy_imports", ["implementation"])
    if loader is None:
        return

    @functools.wraps(loader)
    def lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation in names:
            return dense_function, varlen_function, None, flash_utils._pad_input, flash_utils._unpad_input
        return loader(implementation, *args, **kwargs)

    setattr(lazy_imports, _MARK, True)
    flash_utils._lazy_imports = lazy_imports


def join_compatible_implementations(name: str) -> None:
    """Adds `name` to the flash kernels that a model lists as compatible; else transformers would replace it.

    Such models need features that flash kernels lack, such as sinks. This package supports them, or logs a fallback.

    Raises:
        RuntimeError: If this version of transformers has no such check, or one with other parameters.
    """
    adjust = _hook(PreTrainedModel, "_check_and_adjust_attn_implementation", ["self", "attn_implementation"])
    if adjust is None:
        return

    @functools.wraps(adjust)
    def check_and_adjust(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        model_type = getattr(getattr(self, "config", None), "model_type", None)
        has_own = attn_implementation == name and model_type in _OWN_FLASH_CLASSES | _OWN_CLASSES
        own = _own_classes(type(self), name) if has_own else ()
        if own and model_type in _OWN_FLASH_CLASSES:
            others = "'eager' or 'sdpa'" if self._supports_sdpa else "'eager'"
            raise UnsupportedAttentionError(
                f"{model_type}, which calls flash-attn itself for any name with 'flash' in it",
                f"Use attn_implementation={others} for this model.",
            )
        if own:
            raise UnsupportedAttentionError(
                f"{model_type}, whose layers are classes of their own for {', '.join(map(repr, own))}",
                "Use one of these for this model, or for this part: attn_implementation={'vision_config': 'eager'}.",
            )
        # transformers checks parts with their own configs separately.
        is_whole = not any(isinstance(part, PreTrainedConfig) for part in vars(self.config).values())
        attends = is_whole and hasattr(self.config, "num_attention_heads")
        if attn_implementation == name and attends and not _may_call_interface(self.__class__):
            way_out = "; unpad(model) replaces it" if model_type in _REPLACED_BY_UNPAD else ""
            log_once(
                f"attn_implementation={name!r} has no effect on {model_type}, which computes attention in its own code"
                f"{way_out}"
            )
        listed = getattr(self, "_compatible_flash_implementations", None)
        if attn_implementation == name and listed is not None and name not in listed:
            self._compatible_flash_implementations = [*listed, name]
        return adjust(self, attn_implementation, *args, **kwargs)

    setattr(check_and_adjust, _MARK, True)
    PreTrainedModel._check_and_adjust_attn_implementation = check_and_adjust


def _own_classes(model: type, name: str) -> tuple[str, ...]:
    """Returns the names in a model's tables of attention classes that lack ours."""
    # The table of a user's subclass is in the module of its base.
    modules = dict.fromkeys(sys.modules.get(base.__module__) for base in model.__mro__)
    names = [vars(module) for module in modules if module is not None]
    tables = [value for scope in names for key, value in scope.items() if key.endswith("_ATTENTION_CLASSES")]
    return tuple(dict.fromkeys(own for table in tables if name not in table for own in table))


@functools.cache
def _may_call_interface(model: type) -> bool:
    """Whether a model or a model inside it may use transformers' attention interface."""
    modules = {base.__module__ for base in model.__mro__ if base.__module__.startswith("transformers.models.")}
    return not modules or any(_module_may_call_interface(module, frozenset()) for module in modules)


def _module_may_call_interface(module: str, seen: frozenset[str]) -> bool:
    if not module.startswith("transformers.models.") or module in seen:
        return False
    if module not in sys.modules:
        return True
    values = list(vars(sys.modules[module]).values())
    if any(isinstance(value, AttentionInterface) for value in values):
        return True
    # Auto classes may build any model. Imported classes and functions may use the interface in their own modules.
    sources = {getattr(value, "__module__", None) or "" for value in values if callable(value)}
    return any(
        source.startswith("transformers.models.auto.modeling") or _module_may_call_interface(source, seen | {module})
        for source in sources - {module}
    )


def weights_are_collected() -> bool:
    """Whether transformers collects attention weights in this forward; some models do not pass output_attentions."""
    collector = output_capturing._active_collector
    if torch.compiler.is_compiling() and not collector.compiling:
        # torch.compile cannot read the context variable if it starts inside a forward; the ops check it at run time.
        return False
    collected = collector.get()
    return bool(collected) and any("attentions" in name for name in collected)


def block_mask(
    module: torch.nn.Module,
    block_indices: torch.Tensor,
    mask: torch.Tensor | None,
    kv_length: int,
    dtype: torch.dtype,
    device: torch.device,
    position_ids: torch.Tensor,
) -> torch.Tensor:
    """Calls a layer of block-sparse attention (MiniMax M3) to make its mask for eager attention.

    Args:
        module: The layer.
        block_indices: The selected blocks, shape `(batch, groups, q_length, selected)`.
        mask: Whole additive mask, or None.
        kv_length: Number of keys.
        dtype: dtype of the result.
        device: Device of the result.
        position_ids: Positions of the queries, shape `(batch, q_length)`.

    Raises:
        UnsupportedAttentionError: If the layer has no such function.
    """
    build = getattr(getattr(module, "indexer", None), "build_block_mask", None)
    if build is None:
        raise UnsupportedAttentionError(
            f"blocks of keys chosen by {type(module).__name__}, which has no indexer.build_block_mask",
            "Use attn_implementation='eager' for this model.",
        )
    made: torch.Tensor = build(block_indices, mask, kv_length, dtype, device, position_ids)
    return made
