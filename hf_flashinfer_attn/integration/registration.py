"""Registration of "flashinfer" with transformers."""

from __future__ import annotations

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..settings import NAME, PAGED_NAME
from .flash_api import flash_attn_func, flash_attn_varlen_func
from .functions import attention_forward, attention_mask, refuse_paged
from .transformers_patches import answer_flash_imports, join_compatible_implementations

__all__ = ["register"]


def register() -> None:
    """Registers "flashinfer" with transformers. The import calls it; further calls have no effect.

    Raises:
        RuntimeError: If this version of transformers lacks an interface that the registration needs.

    Examples:
        >>> import hf_flashinfer_attn
        >>> hf_flashinfer_attn.register()
        >>> from transformers import AttentionInterface
        >>> "flashinfer" in AttentionInterface().valid_keys()
        True
    """
    answer_flash_imports((NAME, PAGED_NAME), flash_attn_func, flash_attn_varlen_func)
    join_compatible_implementations(NAME)
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    AttentionInterface.register(PAGED_NAME, refuse_paged)
    AttentionMaskInterface.register(PAGED_NAME, attention_mask)
