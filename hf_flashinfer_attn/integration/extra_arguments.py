"""Extra keyword arguments of the attention function: refused, ignored with a log line, or harmless."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UnsupportedAttentionError
from ..log import log_once
from ..settings import current_settings

__all__ = ["check_extra_arguments"]

# Arguments of other attention kernels and models that change the result.
_CHANGES_RESULT = frozenset(
    {
        # Added to the logits, or multiplied with the weights.
        "alibi", "alibi_bias", "alibi_slopes", "attention_bias", "attn_bias", "bias", "head_mask", "layer_head_mask",
        "rel_pos_bias", "relative_position_bias",
        # Other logits.
        "attention_sinks", "attn_sinks", "learnable_sink", "logit_softcapping", "logits_soft_cap", "score_mod", "sink",
        "soft_cap", "softmax_scale",
        # Other keys.
        "attn_mask", "block_mask", "block_table", "block_tables", "key_padding_mask", "kv_indices", "kv_indptr",
        "leftpad_k", "mask_mod", "page_table", "seqused_k", "seqused_q", "topk_indices", "window_size",
        # A cache that the kernel reads or writes.
        "cache_batch_idx", "cache_seqlens", "k_cache", "v_cache",
        # Quantized inputs.
        "k_descale", "k_scale", "q_descale", "q_scale", "v_descale", "v_scale",
    }
)  # fmt: skip
# Arguments of a model's forward that reach attention layers through **kwargs without affecting attention.
_HARMLESS = frozenset(
    {
        "cache_position", "encoder_attention_mask", "encoder_hidden_states", "input_ids", "inputs_embeds", "labels",
        "logits_indices", "logits_processor_args", "logits_to_keep", "max_seqlen_k", "max_seqlen_q",
        "mm_token_type_ids", "num_items_in_batch", "position_embeddings", "seq_idx", "token_type_ids",
    }
)  # fmt: skip


def check_extra_arguments(arguments: dict[str, Any]) -> None:
    """Raises on arguments that would change the result, and logs unknown tensors once.

    transformers' sdpa attention ignores both. While torch.compile traces, the log line is written once per graph.

    Raises:
        UnsupportedAttentionError: If an argument that changes the result is neither None nor False, or strict=True and
            a tensor is unknown.
    """
    for name, value in arguments.items():
        if value is None or value is False or name in _HARMLESS:
            continue
        if name in _CHANGES_RESULT:
            raise UnsupportedAttentionError(
                f"the argument {name} of the attention function, which would change its result",
                "Use attn_implementation='eager' for this model.",
            )
        if isinstance(value, torch.Tensor):
            # Sizes are symbolic while torch.compile traces.
            shape = f"{value.ndim} dimensions" if torch.compiler.is_compiling() else f"shape {tuple(value.shape)}"
            _ignore_or_refuse(name, shape)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _ignore_or_refuse(name: str, shape: str) -> None:
    if current_settings().strict:
        raise UnsupportedAttentionError(
            f"the argument {name} of the attention function, an unknown tensor of {shape}, and strict=True forbids to "
            "ignore it",
            "Leave it out, or use hf_flashinfer_attn.configure(strict=False) to ignore it, as sdpa does.",
        )
    log_once(
        f"ignoring the argument {name} of the attention function, an unknown tensor of {shape}, as sdpa does",
        key=f"unknown argument {name}",
    )
