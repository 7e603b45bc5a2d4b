"""Forward hooks of a backbone: its inputs are packed, its outputs padded again.

No state outlives a forward: the packing is attached to cu_seqlens, which every layer receives.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..attention.recorders import refuse_recording
from ..errors import UnsupportedAttentionError
from ..log import log_once
from ..ragged.forward_state import attached_state, cu_seqlens_of
from ..ragged.host_copy import HostCopy, to_device_async
from ..ragged.layout import RaggedLayout
from ..ragged.mask_state import mask_of_ones
from ..settings import current_settings
from .families import Positions, family_of, required_family
from .graphs import GraphedForward, graphs_of, is_copied_with
from .packing import CALLER, Packing, leave_sizes_open
from .reasons import PER_TOKEN, measure_of_distance, reason_of_head, reason_to_stay

__all__ = [
    "HANDLES", "has_other_hooks", "leave_own_attention", "move_to_head", "pack", "packing_of", "signature_of", "spread",
]  # fmt: skip

Hook = TypeVar("Hook", bound=Callable[..., Any])

# Attribute of a module that holds the handles of its `unpad` hooks.
HANDLES = "_flashinfer_unpadding"
_NOTE = "_flashinfer_head_note"
_READ_ON_THE_HOST = frozenset({*PER_TOKEN, "cu_seq_lens_q", "cu_seq_lens_k"})
# Larger batches without padding are GPU-bound, and torch's kernels are faster than a packed forward.
_MOST_TOKENS_WITHOUT_PADDING = 8_192

signature_of = functools.cache(inspect.signature)


def has_other_hooks(module: torch.nn.Module) -> bool:
    """Whether a module has forward hooks other than those of `unpad`; they expect padded rows."""
    ours = {handle.id for handle in vars(module).get(HANDLES, ())}
    return not ours.issuperset((*module._forward_hooks, *module._forward_pre_hooks))


def _named(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a forward as keyword arguments."""
    if not args:
        return dict(kwargs)
    # The class's forward, since accelerate replaces that of the instance.
    bound = signature_of(type(module).forward).bind(module, *args, **kwargs).arguments
    del bound["self"]
    return {**bound.pop("kwargs", {}), **bound}


def _device_of(module: PreTrainedModel, default: torch.device) -> torch.device:
    # DataParallel replicas have no parameters. Offloaded weights are on "meta" until accelerate loads them.
    weight = next(module.parameters(), None)
    return default if weight is None or weight.device.type == "meta" else weight.device


def _between_graphs(hook: Hook) -> Hook:
    """Makes torch.compile break the graph before a hook, without guards on the values that the hook reads."""
    untraced: Hook = torch.compiler.disable(hook, reason="hf_flashinfer_attn.unpad reads row lengths on the host")
    return untraced


class _HeadNote(NamedTuple):
    """Note from a head's pre-hook to the backbone's, stored as an attribute of the attention mask."""

    # CPU copy of the mask; None if the mask was not moved.
    host_mask: torch.Tensor | None
    # Version of the mask when the note was made, to detect writes.
    version: int
    # Reason if the backbone must stay padded.
    reason: str | None


@_between_graphs
def move_to_head(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-hook of a head: moves labels and masks to its device, but no inputs that are packed or read on the CPU."""
    inputs = _named(module, args, kwargs)
    reason, device = reason_of_head(module, inputs), _device_of(module, torch.device("cpu"))
    if device.type == "cpu" and reason is None:
        return None
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            continue
        moves = value.device.type == "cpu" != device.type
        if name == "attention_mask" and (moves or reason is not None):
            # Inference tensors have no version counter, so a head's writes would not be detected.
            with torch.inference_mode(False), torch.no_grad():
                noted = inputs[name] = to_device_async(value, device) if moves else value.clone()
            setattr(noted, _NOTE, _HeadNote(value if moves else None, noted._version, reason))
        elif moves and name not in _READ_ON_THE_HOST:
            inputs[name] = to_device_async(value, device)
    return (), inputs


def _note_on(mask: torch.Tensor) -> tuple[torch.Tensor, _HeadNote | None]:
    """Returns the mask that a head received, before any reshape, and the note of the head's pre-hook on it."""
    whole = mask if mask._base is None else mask._base
    return whole, getattr(whole, _NOTE, None)


def _read_from(mask: torch.Tensor) -> torch.Tensor:
    """Returns the CPU copy of a mask, with the same reshape, if it is still valid; otherwise the mask."""
    moved, note = _note_on(mask)
    if note is None or note.host_mask is None or note.version != moved._version:
        return mask
    is_whole = mask.numel() == moved.numel() and mask.dtype == moved.dtype
    in_order = mask.is_contiguous() and moved.is_contiguous()
    return note.host_mask.reshape(mask.shape) if is_whole and in_order else mask


@_between_graphs
def pack(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of a backbone: packs its inputs, if they can be packed."""
    refuse_recording()
    inputs = _named(module, args, kwargs)
    if is_copied_with(module):
        # A weak reference, since accelerate would move a module to another device.
        inputs[CALLER] = weakref.ref(module)
    tokens = next((value for name in PER_TOKEN if (value := inputs.get(name)) is not None), None)
    if tokens is not None:
        device = _device_of(module, tokens.device)
        graphs = None if CALLER in inputs else graphs_of(module)
        if (packing := _find_packing(module, inputs, device, graphs)) is not None:
            _pack_inputs(module, inputs, packing, device)
            if graphs is None:
                names = (*packing.packed, "attention_mask")
                leave_sizes_open((inputs[name] for name in names), inputs["cu_seq_lens_q"])
        else:
            for name in (*PER_TOKEN, "attention_mask"):
                if isinstance(value := inputs.get(name), torch.Tensor) and value.device.type == "cpu":
                    inputs[name] = to_device_async(value, device)
    if (own_attention := required_family(module).own_attention) is not None:
        own_attention().enter(inputs.get("cu_seq_lens_q"))
    return (), inputs


def leave_own_attention(module: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Removes the cu_seqlens that `pack` set for a backbone with its own attention code."""
    if (family := family_of(module)) is not None and family.own_attention is not None:
        family.own_attention().leave(inputs.get("cu_seq_lens_q"))


def packing_of(inputs: dict[str, Any]) -> Packing | None:
    """Returns the packing of a backbone's inputs; None if they are padded."""
    state = attached_state(inputs.get("cu_seq_lens_q"))
    return None if state is None else state.packing


@_between_graphs
def spread(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: ModelOutput | None
) -> ModelOutput | tuple[Any, ...] | None:
    """Forward hook of a backbone: pads its outputs again, with zeros."""
    leave_own_attention(module, kwargs)
    # This hook also runs on errors if the backbone has its own attention code.
    if (packing := packing_of(kwargs)) is None or output is None:
        return None
    last = output["last_hidden_state"]
    padded = output["last_hidden_state"] = packing.spread(last)
    if (layers := output.get("hidden_states")) is not None:
        # The last entry of hidden_states is last_hidden_state itself.
        output["hidden_states"] = tuple(
            padded if states is last else states if states is None else packing.spread(states) for states in layers
        )
    if output.get("pooler_output") is not None:
        # The model's pooler read the first position of the packed batch only.
        output["pooler_output"] = _pool(module, padded)
    return output if packing.returns_dict else output.to_tuple()


def _pool(module: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor | None:
    """Computes `pooler_output` from padded hidden states, shape `(rows, padded_length, hidden_size)`."""
    pooler, activation = getattr(module, "pooler", None), getattr(module, "pooler_activation", None)
    pooled: torch.Tensor | None = None
    if pooler is not None:
        # ALBERT's pooler is a linear layer; the model selects the first position of each row itself.
        pooled = pooler(hidden) if activation is None else activation(pooler(hidden[:, 0]))
    return pooled


def _find_packing(
    module: PreTrainedModel, inputs: dict[str, Any], device: torch.device, graphs: GraphedForward | None
) -> Packing | None:
    """Returns the packing of a batch with padding, or of a small one for a graph; None if it runs unchanged."""
    if packing_of(inputs) is not None:
        # Already packed.
        return None
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")

    def has_graph(rows: int, width: int) -> bool:
        return (
            graphs is not None
            and ids is not None
            and rows * width <= _MOST_TOKENS_WITHOUT_PADDING
            and graphs.takes(module, device, rows, rows * width)
        )

    returns_dict = inputs.get("return_dict", getattr(module.config, "return_dict", True)) is not False
    if mask is None:
        # Without padding, packing only helps to use a graph. Explicit position ids may mark packed sequences.
        if ids is None or ids.ndim != 2 or inputs.get("position_ids") is not None or not has_graph(*ids.shape):
            return None
        if reason_to_stay(module, {**inputs, "attention_mask": ids}) is not None:
            return None
        rows, length = ids.shape
        return Packing((rows, length), returns_dict=returns_dict, layout=RaggedLayout.from_lengths((length,) * rows))
    reason = reason_to_stay(module, inputs)
    if reason is None and (note := _note_on(mask)[1]) is not None:
        reason = note.reason
    if reason is None:
        measure = measure_of_distance(module)
        packing = Packing.of(_read_from(mask), returns_dict=returns_dict, find_holes=measure is not None)
        if packing.is_pending:
            # Host work that overlaps the copy of the row lengths.
            _pack_tokens(module, inputs, packing)
            if graphs is not None:
                packing.model_state = graphs.look()
        packing.finish()
        if packing.is_full:
            if has_graph(*packing.shape):
                return packing
            # A mask tagged all-True, so that attention does not copy the row lengths again.
            inputs["attention_mask"] = mask_of_ones(*packing.shape, device)
            return None
        if packing.layout.query.total_tokens == 0:
            return None
        if not packing.has_holes:
            return packing
        reason = f"{measure} over padding with holes"
    message = f"unpad leaves {type(module).__name__} padded: {reason}"
    if not current_settings().strict:
        log_once(message)
    elif not isinstance(mask, torch.Tensor) or mask.ndim != 2 or not HostCopy(_read_from(mask).bool().all()).values:
        raise UnsupportedAttentionError(
            f"{message}, and strict=True forbids it",
            "Use hf_flashinfer_attn.configure(strict=False) to let such forwards run padded.",
        )
    return None


def _pack_inputs(module: PreTrainedModel, inputs: dict[str, Any], packing: Packing, device: torch.device) -> None:
    """Replaces a padded batch by a packed one, in place."""
    family, padded_ids = required_family(module), inputs.get("input_ids")
    if family.embeds_rows and padded_ids is not None:
        names = ("input_ids", "attention_mask", "position_ids")
        rows = {name: value.to(device) for name in names if (value := inputs.get(name)) is not None}
        inputs.update(inputs_embeds=module.embeddings(**rows), input_ids=None)
    _pack_tokens(module, inputs, packing)
    _name_dropped_ids(module, padded_ids, packing.packed.get("input_ids"))
    layout = packing.layout
    cu_seqlens, length = cu_seqlens_of(layout), layout.query.max_length
    state = attached_state(cu_seqlens)
    assert state is not None
    state.packing, state.model_state = packing, packing.model_state
    inputs.update(packing.move(packing.packed, device))
    # A mask of ones stops transformers from detecting packed sequences in the position ids, and models without mask
    # helpers from detecting padding in the input ids.
    has_mask = family.is_causal or family.own_attention is not None
    inputs["attention_mask"] = mask_of_ones(1, layout.query.total_tokens, device) if has_mask else None
    inputs.update(cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=length, max_length_k=length)
    inputs["return_dict"] = True


def _pack_tokens(module: PreTrainedModel, inputs: dict[str, Any], packing: Packing) -> None:
    """Packs the per-token inputs that are not packed yet; if `packing` is pending, only integers on its device."""
    ids, is_pending = inputs.get("input_ids"), packing.is_pending
    if is_pending and (ids is None or ids.device != packing.device or required_family(module).embeds_rows):
        return
    for name in PER_TOKEN:
        value = inputs.get(name)
        if value is None or name in packing.packed:
            continue
        if not is_pending or (name != "inputs_embeds" and value.device == packing.device):
            packing.packed[name] = packing.pack(value)
    if inputs.get("position_ids") is None and "position_ids" not in packing.packed:
        packing.packed["position_ids"] = _positions(module, inputs, packing)


def _positions(module: PreTrainedModel, inputs: dict[str, Any], packing: Packing) -> torch.Tensor:
    """Returns the default position ids of a padded batch, packed, shape `(1, tokens)`."""
    ids = inputs.get("input_ids")
    device = packing.device if ids is None else ids.device
    if required_family(module).positions is Positions.SLOTS:
        return packing.position_ids(device)
    padding_id: int = module.embeddings.padding_idx
    if ids is None:
        return packing.position_ids(device) + padding_id + 1
    is_token: torch.Tensor = ids.ne(padding_id)
    return packing.pack(is_token.cumsum(1) * is_token + padding_id)


def _name_dropped_ids(module: PreTrainedModel, padded: torch.Tensor | None, packed: torch.Tensor | None) -> None:
    """Logs masked ids other than padding (as in ColBERT's queries), if the ids are on the CPU."""
    pad_id = getattr(module.config, "pad_token_id", None)
    if pad_id is None or padded is None or packed is None or padded.device.type != "cpu" or packed.device.type != "cpu":
        return
    if np.count_nonzero(padded.numpy() != pad_id) > np.count_nonzero(packed.numpy() != pad_id):
        log_once(
            f"unpad of {type(module).__name__} drops masked positions whose ids are not pad_token_id={pad_id}; "
            "their hidden states are zeros"
        )
