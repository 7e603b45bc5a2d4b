"""All that touches transformers: registration, the mask function, the attention function.

Private names of transformers are used here and nowhere else; `tests/test_registration.py` guards them per version.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, eager_mask

from .attention import RaggedCall, attend_ragged, needs_grad
from .backends import dense
from .dispatch import AttentionRequest, Decision, Path, decide
from .errors import UnsupportedAttentionError
from .layout import RaggedLayout, uniform_layout
from .mask import MaskSpec, RaggedMask
from .pattern import CAUSAL, FULL, Pattern, PatternKind, recognise
from .settings import current_settings
from .trace import AttentionCall, is_tracing, record_call
from .varlen import flash_attn_func, flash_attn_varlen_func

__all__ = ["NAME", "attention_forward", "attention_mask", "register"]

NAME = "flashinfer"
PAGED_NAME = f"paged|{NAME}"


def register() -> None:
    """Registers "flashinfer" with transformers; done on import, and harmless to repeat.

    Raises:
        RuntimeError: If this version of transformers has no hook of the known shape.

    Examples:
        >>> import hf_flashinfer_attn
        >>> hf_flashinfer_attn.register()
        >>> from transformers import AttentionInterface
        >>> "flashinfer" in AttentionInterface().valid_keys()
        True
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    AttentionInterface.register(PAGED_NAME, _paged_forward)
    AttentionMaskInterface.register(PAGED_NAME, attention_mask)
    _answer_flash_imports()


def _answer_flash_imports() -> None:
    """Makes transformers' loader of flash kernels answer for our name.

    transformers 5.x takes every name with "flash" in it for a flash-attention kernel, and asks this loader for the
    kernel's functions before it builds a model; for an unknown name the loader looks for a hub repository and raises.
    """
    original = getattr(flash_utils, "_lazy_imports", None)
    if getattr(original, "_answers_flashinfer", False):
        return
    parameters = list(inspect.signature(original).parameters) if callable(original) else []
    if parameters[:1] != ["implementation"] or not callable(original):
        import transformers

        raise RuntimeError(
            f"transformers {transformers.__version__} is not supported: modeling_flash_attention_utils._lazy_imports "
            f"takes {parameters}, expected 'implementation' first. Install transformers>=5.5,<6."
        )
    loader: Callable[..., Any] = original

    @functools.wraps(loader)
    def lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation in (NAME, PAGED_NAME):
            pad, unpad = flash_utils._pad_input, flash_utils._unpad_input
            return flash_attn_func, flash_attn_varlen_func, None, pad, unpad
        return loader(implementation, *args, **kwargs)

    lazy_imports._answers_flashinfer = True  # type: ignore[attr-defined]
    flash_utils._lazy_imports = lazy_imports


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., torch.Tensor] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **kwargs: Any,
) -> RaggedMask:
    """Makes the lazy mask of one forward; called by transformers' mask helpers.

    Args:
        batch_size: Rows.
        q_length: Query slots per row.
        kv_length: Key slots per row.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        mask_function: Which keys a query may see, padding aside.
        attention_mask: Valid positions, bool, shape `(batch, tokens seen so far)`.
        dtype: Of the additive mask.
        device: Of the additive mask.
        use_vmap: Whether the mask function needs vmap to be evaluated.

    Returns:
        A mask of shape `(batch, 1, q_length, kv_length)` without memory.
    """
    padding_mask = attention_mask
    if padding_mask is not None and (missing := kv_length + kv_offset - padding_mask.shape[-1]) > 0:
        padding_mask = torch.nn.functional.pad(padding_mask, (0, missing))

    def densify(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        mask: torch.Tensor = eager_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask if attention_mask is None else attention_mask.to(device),
            dtype=dtype,
            use_vmap=use_vmap,
            device=device,
        )
        return mask

    spec = MaskSpec(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=int(q_offset),
        kv_offset=kv_offset,
        padding_mask=padding_mask,
        pattern=recognise(mask_function),
        densify=densify,
    )
    return RaggedMask(spec, dtype, torch.device(device))


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    cache: object | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as transformers' layers call it.

    Args:
        module: The attention layer.
        query: Shape `(batch, heads, q_length, head_dim)`.
        key: Shape `(batch, kv_heads, kv_length, head_dim)`.
        value: Shape `(batch, kv_heads, kv_length, value_head_dim)`.
        attention_mask: The lazy mask of `attention_mask`; or a 4D mask of the user's, bool or additive; or a 2D padding
            mask; or None.
        dropout: Probability of dropping an attention weight.
        scaling: What logits are multiplied with; `head_dim ** -0.5` by default.
        is_causal: Causality where there is no mask; the module's own by default.
        sliding_window: Carried by the mask; refused where there is none to carry it.
        softcap: Caps logits to `softcap * tanh(logits / softcap)`.
        s_aux: Attention sinks, shape `(heads,)`.
        position_bias: Added to the logits, broadcastable to `(batch, heads, q_length, kv_length)`.
        output_attentions: Whether to return the weights.
        cu_seq_lens_q: Offsets of packed sequences.
        cu_seq_lens_k: The same of the keys.
        cache: The paged cache of continuous batching.

    Returns:
        The output, shape `(batch, q_length, heads, value_head_dim)`, padded rows zero; and the weights, or None.

    Raises:
        BackendUnavailableError: If the backend asked for by name cannot run.
        UnsupportedAttentionError: If the request is not supported, or needs a fallback that was forbidden.
    """
    if cache is not None:
        _paged_forward()
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        raise UnsupportedAttentionError(
            "packed sequences (cu_seq_lens_q, cu_seq_lens_k)",
            "Pass padded input with an attention_mask, or use attn_implementation='sdpa' or 'eager' with a 4D mask.",
        )
    sm_scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    causal = _is_causal(module, is_causal)
    mask = attention_mask
    if mask is None and sliding_window is not None and key.shape[2] > sliding_window:
        raise UnsupportedAttentionError(
            f"sliding_window={sliding_window} without a mask over {key.shape[2]} keys",
            "Use attn_implementation='eager' for this model.",
        )
    if isinstance(mask, RaggedMask):
        pattern = mask.spec.pattern
    elif mask is None or mask.ndim == 2:
        pattern = CAUSAL if causal else FULL
    elif mask.ndim == 4:
        pattern = Pattern(PatternKind.DENSE, "given as a 4D tensor")
    else:
        raise UnsupportedAttentionError(
            f"an attention mask of shape {tuple(mask.shape)}, expected 2 or 4 dimensions",
            "Use attn_implementation='eager' for this model.",
        )
    request = AttentionRequest(
        pattern=pattern,
        device=query.device,
        dtype=query.dtype,
        head_dim=max(query.shape[-1], value.shape[-1]),
        needs_grad=needs_grad(query, key, value, position_bias, s_aux),
        dropout=dropout,
        output_attentions=bool(output_attentions),
        softcap=softcap is not None,
        sinks=s_aux is not None,
        position_bias=position_bias is not None,
        mask_shape_differs=isinstance(mask, RaggedMask) and not _fits(mask.spec, query, key),
        mask_modified=isinstance(mask, RaggedMask) and mask.was_modified,
    )
    decision = decide(request, current_settings())
    layer = _layer_name(module)
    if decision.path is Path.DENSE:
        bias = _dense_mask(mask, position_bias, query, key, causal)
        output, weights = dense.attend(
            query,
            key,
            value,
            bias,
            sm_scale=sm_scale,
            softcap=softcap,
            sinks=s_aux,
            dropout=dropout,
            return_weights=bool(output_attentions),
        )
        if is_tracing():
            head_dim = request.head_dim
            record_call(AttentionCall(layer, pattern.name, "dense", head_dim, head_dim, decision.reason))
        return output, weights
    return _attend_padded(module, query, key, value, mask, pattern, sm_scale, dropout, layer, decision), None


def _attend_padded(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    pattern: Pattern,
    sm_scale: float,
    dropout: float,
    layer: str,
    decision: Decision,
) -> torch.Tensor:
    """Gathers padded tensors, attends on ragged ones, and scatters the result."""
    if isinstance(mask, RaggedMask):
        layout = mask.layout_of_forward(keep_padded_queries=not _attends_to_itself(module))
    elif mask is None:
        layout = uniform_layout(query.shape[0], query.shape[2], key.shape[2])
    else:
        layout = _layout_of_2d_mask(mask, query, key)
    call = RaggedCall(
        query=layout.query.gather(query.transpose(1, 2)),
        key=layout.key.gather(key.transpose(1, 2)),
        value=layout.key.gather(value.transpose(1, 2)),
        layout=layout,
        causal=pattern.is_causal,
        sm_scale=sm_scale,
        dropout=dropout,
        layer=layer,
    )
    return layout.query.scatter(attend_ragged(call, decision))


def _layout_of_2d_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> RaggedLayout:
    # A few models hand a flash kernel the 2D mask itself, in every layer.
    expected = (key.shape[0], key.shape[2])
    if tuple(mask.shape) != expected or query.shape[2] != key.shape[2]:
        raise UnsupportedAttentionError(
            f"a 2D attention mask of shape {tuple(mask.shape)} for {query.shape[2]} queries, expected {expected}",
            "Use attn_implementation='eager' for this model.",
        )
    return RaggedLayout.from_padding_mask(mask)


def _dense_mask(
    mask: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    causal: bool,
) -> torch.Tensor | None:
    """Returns the whole mask of a call, bool or additive, with the bias in it."""
    if isinstance(mask, RaggedMask):
        mask = mask.dense()
    elif mask is None and causal and query.shape[2] > 1:
        q_length, kv_length = query.shape[2], key.shape[2]
        mask = torch.ones(q_length, kv_length, dtype=torch.bool, device=query.device).tril(kv_length - q_length)
    elif mask is not None and mask.ndim == 2:
        mask = mask.to(torch.bool)[:, None, None, :]
    if mask is not None and not mask.is_floating_point() and mask.dtype != torch.bool:
        mask = mask.to(torch.bool)
    if position_bias is None or mask is None:
        return mask if position_bias is None else position_bias
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, torch.finfo(position_bias.dtype).min)
    return position_bias + mask


def _fits(spec: MaskSpec, query: torch.Tensor, key: torch.Tensor) -> bool:
    return (spec.batch_size, spec.q_length, spec.kv_length) == (query.shape[0], query.shape[2], key.shape[2])


def _is_causal(module: torch.nn.Module, is_causal: bool | None) -> bool:
    # Only asked where no mask helper was called: a mask knows better than a module (UMT5's decoder says False).
    return bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)


def _layer_name(module: torch.nn.Module) -> str:
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ if index is None else f"{type(module).__name__}[{index}]"


# What the forward of an attention layer may take without attending to another sequence than its own.
_OWN_SEQUENCE = frozenset(
    {
        "self", "hidden_states", "attention_mask", "position_embeddings", "position_ids", "past_key_values",
        "layer_past", "use_cache", "output_attentions", "cu_seqlens", "max_seqlen", "mask", "position_bias", "kwargs",
        "relative_position_embeddings", "layer_idx", "cache_position", "value_embeds", "freqs_ci", "position_mask",
        "codebook_idx", "cycle_offset", "sliding_window", "rotary_pos_emb", "deterministic",
    }
)  # fmt: skip
# Takes for a second sequence that these encoder-only models never give.
_SECOND_SEQUENCE = frozenset({"key_value_states", "encoder_hidden_states", "encoder_attention_mask"})
_ENCODER_ONLY_LAYERS = frozenset(
    {
        "EsmSelfAttention", "HubertAttention", "SEWAttention", "UniSpeechAttention", "UniSpeechSatAttention",
        "Wav2Vec2Attention", "Data2VecAudioAttention", "MCTCTAttention",
    }
)  # fmt: skip


@functools.cache
def _inputs_of(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _attends_to_itself(module: torch.nn.Module) -> bool:
    """Whether the queries of a layer are the tokens that its padding mask speaks of, for certain.

    A mask function cannot tell cross-attention to a sequence of equal length from self-attention; a layer that takes
    nothing but its own hidden states can only be the latter. Where in doubt, padded queries are kept: slower, right.
    """
    layer = type(module)
    inputs = _inputs_of(layer.forward)
    if layer.__name__ in _ENCODER_ONLY_LAYERS:
        config: PreTrainedConfig | None = getattr(module, "config", None)
        if not getattr(config, "add_cross_attention", False) and not getattr(config, "is_decoder", False):
            inputs = inputs - _SECOND_SEQUENCE
    return inputs <= _OWN_SEQUENCE


def _paged_forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    raise UnsupportedAttentionError(
        f"continuous batching (attn_implementation={PAGED_NAME!r})",
        "Use attn_implementation='paged|sdpa' for continuous batching.",
    )
