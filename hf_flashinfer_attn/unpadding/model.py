"""`unpad` and `repad`: hooks around a model's backbone that pack what goes in and spread out what comes out.

Nothing is kept between forwards, and little but the hooks is on the model: what a forward's end has to know about its
beginning rides on the offsets that every layer is handed.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar, cast

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .. import jit
from ..dispatch import log_once
from ..errors import UnsupportedAttentionError
from ..integration import NAME
from ..layout import LengthsRead, offsets_of
from ..mask import mask_of_ones
from ..movement import sent
from ..recording import refuse_recording
from ..settings import current_settings
from .families import Family, Positions, family_of, reason_against
from .features import forwards_features, pack_features, spread_features
from .graphs import (
    CALLER,
    GraphOptions,
    GraphStatistics,
    ModelState,
    carry_state,
    graphs_of,
    install_graphs,
    is_asked_for,
    is_copied_with,
    uninstall_graphs,
)
from .packing import RIDER, Packing, PackingAhead, leave_sizes_open

__all__ = ["capture_graphs", "graph_statistics", "repad", "unpad"]

Module = TypeVar("Module", bound=torch.nn.Module)
Hook = TypeVar("Hook", bound=Callable[..., Any])

_HANDLES = "_flashinfer_unpadding"
_HOST_MASK = "_flashinfer_host_mask"
_NUMBERS = ("input_ids", "token_type_ids", "position_ids")
_PER_TOKEN = (*_NUMBERS, "inputs_embeds")
_READ_ON_THE_HOST = frozenset({*_PER_TOKEN, "cu_seq_lens_q", "cu_seq_lens_k"})


def unpad(model: Module, *, cuda_graphs: bool | GraphOptions = False) -> Module:
    """Makes a model compute tokens only: padding is dropped before its embeddings and is zero in its outputs.

    Calls stay as they are, and so do the types and shapes of outputs. A batch without padding runs as before. So does
    one that packing cannot express, which is logged once with its reason, or raises it after `configure(strict=True)`:
    `output_attentions=True`, caches (decoders need `use_cache=False`), masks that are not `(batch, slots)`,
    cross-attention, a window or a relative position bias over padding with holes.

    Inputs may stay on the CPU while the model is on a GPU: only tokens are copied, and the host does not wait.

    Args:
        model: A transformers model with `attn_implementation="flashinfer"`, or any module with such models in it.
            Changed in place: hooks are added to its backbones, and attention that is MPNet's own changes its class.
            Weights and configuration stay as they are.
        cuda_graphs: Whether forwards without gradients, in half precision on a GPU, go through captured CUDA graphs,
            and with which options. A size is captured when it first comes, or ahead by `capture_graphs`. Models that
            it is not known how to capture run without, which is logged once.

    Returns:
        The same model.

    Raises:
        UnsupportedAttentionError: If tokens of the model cannot be packed, or its attention is not ours. The model is
            then as it was.

    Examples:
        >>> import torch, hf_flashinfer_attn
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> config._attn_implementation = "flashinfer"
        >>> model = hf_flashinfer_attn.unpad(BertModel(config).eval())
        >>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        >>> with torch.no_grad():
        ...     hidden = model(torch.ones(2, 4, dtype=torch.long), attention_mask=mask).last_hidden_state
        >>> hidden.shape, hidden[1, 2:].abs().sum().item()
        (torch.Size([2, 4, 64]), 0.0)
        >>> model = hf_flashinfer_attn.repad(model)
    """
    backbones = [module for module in model.modules() if family_of(module) is not None]
    if not backbones:
        raise UnsupportedAttentionError(
            f"unpad for {type(model).__name__}: {reason_against(model)}",
            "Use the model as it is: its attention skips padding where it goes through 'flashinfer'.",
        )
    for backbone in backbones:
        _require_packable(backbone)
    for module in model.modules():
        if _HANDLES in vars(module):
            continue
        if (family := family_of(module)) is not None:
            handles = [
                module.register_forward_pre_hook(_pack, with_kwargs=True),
                module.register_forward_hook(_spread, with_kwargs=True, prepend=True),
            ]
            if family.own_attention is not None:
                handles += family.own_attention().route(module)
        elif isinstance(module, PreTrainedModel) and any(family_of(part) for part in module.modules()):
            handles = [module.register_forward_pre_hook(_move_to_head, with_kwargs=True)]
        elif forwards_features(module):
            handles = [
                module.register_forward_pre_hook(_pack_features, with_kwargs=True),
                module.register_forward_hook(spread_features, prepend=True),
            ]
            if _family(cast(PreTrainedModel, module.model)).own_attention is not None:
                handles.append(module.register_forward_hook(_leave_features, with_kwargs=True, always_call=True))
        else:
            continue
        setattr(module, _HANDLES, handles)
    for backbone in backbones:
        uninstall_graphs(backbone)
        if cuda_graphs:
            _install_graphs(backbone, GraphOptions() if cuda_graphs is True else cuda_graphs)
    return model


def _install_graphs(backbone: torch.nn.Module, options: GraphOptions) -> None:
    family = _family(backbone)
    if not family.packs_ids_alone:
        log_once(f"no CUDA graphs of {type(backbone).__name__}: it is not known how to capture it")
    else:
        install_graphs(cast(PreTrainedModel, backbone), options)


def capture_graphs(model: torch.nn.Module, shapes: Iterable[tuple[int, int]], *, token_type_ids: bool = False) -> None:
    """Captures the CUDA graphs of some sizes ahead, so that no forward has to.

    Args:
        model: What `unpad` was called with, on a GPU.
        shapes: Rows and tokens, padding aside, of the batches to come; each takes the graph of the next larger size.
        token_type_ids: Whether batches will come with them, as from tokenizers of BERT; forwards without take other
            graphs.

    Raises:
        ValueError: If the model has no graphs, or none of a size that large, or runs without them as it is, or takes no
            `token_type_ids`.

    Examples:
        >>> import torch, hf_flashinfer_attn
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> config._attn_implementation = "flashinfer"
        >>> model = hf_flashinfer_attn.unpad(BertModel(config).eval(), cuda_graphs=True)
        >>> if torch.cuda.is_available():
        ...     hf_flashinfer_attn.capture_graphs(model.half().cuda(), [(8, 400), (1, 30)])
    """
    backbones = [module for module in model.modules() if graphs_of(module) is not None]
    if not backbones:
        raise ValueError(f"{type(model).__name__} has no CUDA graphs; expected a model after unpad(cuda_graphs=True).")
    for backbone in backbones:
        if token_type_ids and "token_type_ids" not in _signature_of(type(backbone).forward).parameters:
            raise ValueError(f"{type(backbone).__name__} takes no token_type_ids; expected token_type_ids=False.")
    for rows, tokens in shapes:
        lengths = torch.full((rows,), tokens // rows, device="cpu")
        lengths[: tokens % rows] += 1
        width = int(lengths.max())
        mask = (torch.arange(width, device="cpu") < lengths[:, None]).long()
        for backbone in backbones:
            graphs = graphs_of(backbone)
            # A graph asked for ahead is worth waiting for its kernels.
            with torch.no_grad(), jit.waiting():
                known = cast(PreTrainedModel, backbone)
                _require_graphs(known)
                if graphs is None or not graphs.takes(known, known.device, rows, tokens) or tokens < rows:
                    raise ValueError(
                        f"there is no graph of {tokens} tokens in {rows} rows; expected 1 token a row to "
                        f"{'0' if graphs is None else graphs.options.max_tokens} tokens, a model on a GPU, and eval()."
                    )
                # The rows of a shape may be longer than the model has positions for; a batch of that size need not be.
                nothing = torch.zeros_like(mask)
                types = {"token_type_ids": nothing} if token_type_ids else {}
                backbone(input_ids=nothing, position_ids=nothing, attention_mask=mask, use_cache=False, **types)
                _require_graphs(known)


def _require_graphs(backbone: PreTrainedModel) -> None:
    graphs = graphs_of(backbone)
    if graphs is not None and (reason := graphs.refusal()) is not None:
        raise ValueError(f"no CUDA graphs of {type(backbone).__name__}: {reason}; the model runs without.")


def graph_statistics(model: torch.nn.Module) -> GraphStatistics:
    """Returns what the CUDA graphs of a model did since `unpad`; of a model with several backbones, of all.

    Args:
        model: What `unpad` was called with.

    Examples:
        >>> import hf_flashinfer_attn
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> config._attn_implementation = "flashinfer"
        >>> model = hf_flashinfer_attn.unpad(BertModel(config).eval(), cuda_graphs=True)
        >>> hf_flashinfer_attn.graph_statistics(model).captured
        0
    """
    found = (graphs_of(module) for module in model.modules())
    return GraphStatistics.total(graphs.statistics for graphs in found if graphs is not None)


def repad(model: Module) -> Module:
    """Undoes `unpad`, in place; harmless where there is nothing to undo.

    Args:
        model: What `unpad` was called with, or a copy.

    Returns:
        The same model.

    Examples:
        >>> import hf_flashinfer_attn
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> config._attn_implementation = "flashinfer"
        >>> model = hf_flashinfer_attn.repad(hf_flashinfer_attn.unpad(BertModel(config)))
        >>> len(model._forward_hooks), len(model._forward_pre_hooks)
        (0, 0)
    """
    for module in model.modules():
        uninstall_graphs(module)
        handles, family = vars(module).pop(_HANDLES, ()), family_of(module)
        for handle in handles:
            handle.remove()
        if handles and family is not None and family.own_attention is not None:
            family.own_attention().restore(module)
    return model


def _require_packable(backbone: torch.nn.Module) -> None:
    family = _family(backbone)
    name, implementation = type(backbone).__name__, _implementation(backbone)
    if implementation != NAME:
        raise UnsupportedAttentionError(
            f"unpad for {name} with attn_implementation={implementation!r}, which would attend across packed rows",
            f"Load the model with attn_implementation={NAME!r}, or call model.set_attn_implementation({NAME!r}) first.",
        )
    if (reason := family.refuse(backbone)) is not None:
        raise UnsupportedAttentionError(
            f"unpad for {name}: {reason}", "Use the model as it is, or a newer version of transformers."
        )


def _family(backbone: torch.nn.Module) -> Family:
    family = family_of(backbone)
    assert family is not None
    return family


def _implementation(module: torch.nn.Module) -> str | None:
    implementation: str | None = getattr(module.config, "_attn_implementation", None)
    return implementation


@functools.cache
def _signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _named(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns all arguments of a forward by name."""
    if not args:
        return dict(kwargs)
    # Not the instance's own forward, which accelerate replaces.
    bound = _signature_of(type(module).forward).bind(module, *args, **kwargs).arguments
    del bound["self"]
    return {**bound.pop("kwargs", {}), **bound}


def _device_of(module: PreTrainedModel, default: torch.device) -> torch.device:
    device: torch.device = module.device
    # Weights that are loaded layer by layer have no place of their own; accelerate moves what they meet.
    return default if device.type == "meta" else device


def _between_graphs(hook: Hook) -> Hook:
    """Has torch.compile end a graph before a hook, and guard nothing of what the hook looks at."""
    untraced: Hook = torch.compiler.disable(hook, reason="hf_flashinfer_attn.unpad reads row lengths on the host")
    return untraced


@_between_graphs
def _move_to_head(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Moves labels and masks to a head's device, and leaves on the CPU what is packed or read there."""
    device = _device_of(module, torch.device("cpu"))
    if device.type == "cpu":
        return None
    inputs = _named(module, args, kwargs)
    for name, value in inputs.items():
        if name not in _READ_ON_THE_HOST and isinstance(value, torch.Tensor) and value.device.type == "cpu":
            if name != "attention_mask":
                inputs[name] = sent(value, device)
                continue
            # Inference tensors count no versions, and a head's writes would go unseen.
            with torch.inference_mode(False), torch.no_grad():
                moved = inputs[name] = sent(value, device)
            setattr(moved, _HOST_MASK, (value, moved._version))
    return (), inputs


def _read_from(mask: torch.Tensor) -> torch.Tensor:
    """Returns where to read a mask: what stayed of it on the CPU, though a head reshaped it since, or the mask."""
    moved = mask if mask._base is None else mask._base
    stayed: tuple[torch.Tensor, int] | None = getattr(moved, _HOST_MASK, None)
    if stayed is None or stayed[1] != moved._version:
        return mask
    is_whole = mask.numel() == moved.numel() and mask.dtype == moved.dtype
    in_order = mask.is_contiguous() and moved.is_contiguous()
    return stayed[0].reshape(mask.shape) if is_whole and in_order else mask


@_between_graphs
def _pack(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a backbone's forward: packs its inputs, or leaves them as they are."""
    refuse_recording()
    inputs = _named(module, args, kwargs)
    if is_copied_with(module):
        # Not the module itself: accelerate moves whatever it can among arguments.
        inputs[CALLER] = weakref.ref(module)
    tokens = next((value for name in _PER_TOKEN if (value := inputs.get(name)) is not None), None)
    if tokens is None:
        return (), inputs
    device = _device_of(module, tokens.device)
    packing = _packing_of(module, inputs, device)
    if packing is None:
        for name in (*_PER_TOKEN, "attention_mask"):
            if isinstance(value := inputs.get(name), torch.Tensor) and value.device.type == "cpu":
                inputs[name] = sent(value, device)
        return (), inputs
    _embed_rows(module, inputs, device)
    packed = _packed_inputs(module, inputs, packing)
    offsets = offsets_of(packing.layout)
    setattr(offsets, RIDER, packing)
    length = packing.layout.query.max_length
    inputs.update(packing.move(packed, device))
    inputs["attention_mask"] = None
    if _family(module).is_causal or _family(module).own_attention is not None:
        # Told that there is no padding, transformers looks neither for packed sequences in the positions nor, where a
        # model has not come to the mask helpers yet, for padding in the tokens.
        inputs["attention_mask"] = mask_of_ones(1, packing.layout.query.total_tokens, device)
    inputs.update(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=length, max_length_k=length)
    inputs["return_dict"] = True
    if graphs_of(module) is not None:
        carry_state(offsets, None if packing.meanwhile is None else packing.meanwhile.state)
        return (), inputs
    leave_sizes_open((inputs[name] for name in (*packed, "attention_mask")), offsets)
    return (), inputs


def _pack_features(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the forward of a module that calls its backbone's past `_pack` and `_spread`."""

    def pack(backbone: PreTrainedModel, inputs: dict[str, Any]) -> tuple[dict[str, Any], Packing | None]:
        _, packed = _pack(backbone, (), inputs)
        if (own_attention := _family(backbone).own_attention) is not None:
            # Its own hooks are passed by, too.
            own_attention().enter(packed.get("cu_seq_lens_q"))
        return packed, _riding_on(packed)

    return pack_features(module, args, kwargs, pack)


def _leave_features(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
    """After the forward of such a module, whose backbone's own hooks were passed by."""
    features: dict[str, Any] = args[0] if args else kwargs["features"]
    own_attention = _family(module.model).own_attention
    assert own_attention is not None
    own_attention().leave(features.get("cu_seq_lens_q"))


def _riding_on(inputs: dict[str, Any]) -> Packing | None:
    packing: Packing | None = getattr(inputs.get("cu_seq_lens_q"), RIDER, None)
    return packing


@_between_graphs
def _spread(
    module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: ModelOutput
) -> ModelOutput | tuple[Any, ...] | None:
    """After a backbone's forward: puts padding back where it was taken from."""
    packing = _riding_on(kwargs)
    if packing is None:
        return None
    last = output["last_hidden_state"]
    padded = packing.spread(last)
    if output.get("hidden_states") is not None:
        # Models return the last hidden state twice.
        output["hidden_states"] = tuple(
            padded if states is last else states if states is None else packing.spread(states)
            for states in output["hidden_states"]
        )
    output["last_hidden_state"] = padded
    if output.get("pooler_output") is not None:
        # Of the packed rows it has seen only the first.
        output["pooler_output"] = _family(module).pool(module, padded)
    return output if packing.returns_dict else output.to_tuple()


def _packing_of(module: PreTrainedModel, inputs: dict[str, Any], device: torch.device) -> Packing | None:
    """Returns where the tokens of a padded batch are; None for a batch that is not padded or has to stay so."""
    mask = inputs.get("attention_mask")
    returns_dict = inputs.get("return_dict", getattr(module.config, "return_dict", True)) is not False
    if mask is None:
        ids = inputs.get("input_ids")
        # Positions that start again tell decoders of packed sequences, where there is no mask.
        if ids is None or ids.ndim != 2 or inputs.get("position_ids") is not None:
            return None
        if not _goes_through_a_graph(module, inputs, device, *ids.shape):
            return None
        # Without padding there is nothing to gain but a graph.
        reason = _reason_to_stay(module, {**inputs, "attention_mask": ids})
        return Packing.full(tuple(ids.shape), returns_dict=returns_dict) if reason is None else None
    reason = _reason_to_stay(module, inputs)
    if reason is None:
        measure = _measure_of_distance(module)
        packing = Packing.of(
            _read_from(mask),
            returns_dict=returns_dict,
            find_holes=measure is not None,
            meanwhile=lambda ahead: _Meanwhile.do(module, inputs, ahead),
        )
        if packing.is_full and _goes_through_a_graph(module, inputs, device, *packing.shape):
            return packing
        if packing.is_full:
            # So that attention does not ask for the lengths again.
            inputs["attention_mask"] = mask_of_ones(*packing.shape, device)
            return None
        if packing.layout.query.total_tokens == 0:
            return None
        if not packing.has_holes:
            return packing
        reason = f"{measure} over padding with holes"
    _tell_why(module, mask, reason)
    return None


# A larger batch without padding is bound by the GPU, and torch's own kernels are faster there than a packed forward.
_MOST_TOKENS_WITHOUT_PADDING = 8_192


def _goes_through_a_graph(
    module: PreTrainedModel, inputs: dict[str, Any], device: torch.device, rows: int, width: int
) -> bool:
    """Whether a batch without padding is packed all the same, for a graph."""
    graphs, tokens = graphs_of(module), rows * width
    return (
        graphs is not None
        and inputs.get("input_ids") is not None
        and tokens <= _MOST_TOKENS_WITHOUT_PADDING
        and graphs.takes(module, device, rows, tokens)
    )


def _tell_why(module: PreTrainedModel, mask: object, reason: str) -> None:
    """Logs why a forward stays padded; with strict=True raises it, if there is padding."""
    message = f"unpad leaves {type(module).__name__} padded: {reason}"
    if not current_settings().strict:
        log_once(message)
    elif not isinstance(mask, torch.Tensor) or mask.ndim != 2 or not LengthsRead(_read_from(mask).bool().all()).values:
        raise UnsupportedAttentionError(
            f"{message}, and strict=True forbids it",
            "Use hf_flashinfer_attn.configure(strict=False) to let such forwards run padded.",
        )


def _reason_to_stay(module: PreTrainedModel, inputs: dict[str, Any]) -> str | None:
    """Says why a forward cannot run on packed tokens, before any length is read."""
    mask = inputs["attention_mask"]
    if _implementation(module) != NAME:
        return f"attn_implementation={_implementation(module)!r}, expected {NAME!r}"
    if is_asked_for("output_attentions", module, inputs):
        return "output_attentions=True"
    if inputs.get("encoder_hidden_states") is not None:
        return "cross-attention"
    if inputs.get("past_key_values") is not None or _makes_cache(module, inputs):
        return "a cache of keys and values; pass use_cache=False where none is needed"
    tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if not isinstance(mask, torch.Tensor) or tokens is None or mask.shape != tokens.shape[:2]:
        return "an attention mask of another shape than the tokens"
    for name in ("token_type_ids", "position_ids"):
        value = inputs.get(name)
        if value is not None and tuple(value.shape) not in (tuple(mask.shape), (1, mask.shape[1])):
            return f"{name} of another shape than the tokens"
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.ndim > 0 and name not in (*_PER_TOKEN, "attention_mask"):
            return f"{name}, of which it is not known how to pack it"
    return None


def _makes_cache(module: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    config = module.config
    if not (_family(module).is_causal or getattr(config, "is_decoder", False)):
        return False
    return is_asked_for("use_cache", module, inputs) and not (
        getattr(module, "gradient_checkpointing", False) and module.training
    )


def _measure_of_distance(module: PreTrainedModel) -> str | None:
    """Names what in a model's attention depends on how far apart two tokens are, padding included; None for nothing."""
    config = module.config
    if _family(module).measures_slots:
        return "a relative position bias"
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        has_window = any(layer_type != "full_attention" for layer_type in layer_types)
    else:
        has_window = getattr(config, "sliding_window", None) is not None
    return "a window" if has_window else None


def _embed_rows(module: PreTrainedModel, inputs: dict[str, Any], device: torch.device) -> None:
    if not _family(module).embeds_rows or inputs.get("input_ids") is None:
        return
    names = ("input_ids", "attention_mask", "position_ids")
    rows = {name: value.to(device) for name in names if (value := inputs.get(name)) is not None}
    inputs["inputs_embeds"] = module.embeddings(**rows)
    inputs["input_ids"] = None


@dataclass(frozen=True, slots=True)
class _Meanwhile:
    """What is done while the host would else wait for lengths.

    Args:
        numbers: Inputs on the mask's device that were packed ahead, by name, shape `(1, room)`.
        state: Of the model, if it is as it was when graphs were captured.
    """

    numbers: dict[str, torch.Tensor]
    state: ModelState | None

    @classmethod
    def do(cls, module: PreTrainedModel, inputs: dict[str, Any], ahead: PackingAhead) -> _Meanwhile:
        device, numbers = ahead.slots.device, {}
        ids = inputs.get("input_ids")
        if ids is not None and ids.device == device and not _family(module).embeds_rows:
            given = {name: inputs.get(name) for name in _NUMBERS}
            numbers = {name: ahead.pack(value) for name, value in given.items() if _is_on(value, device)}
            if inputs.get("position_ids") is None:
                numbers["position_ids"] = _positions(module, inputs, ahead)
        graphs = graphs_of(module)
        return cls(numbers, None if graphs is None else graphs.look())


def _is_on(value: torch.Tensor | None, device: torch.device) -> TypeGuard[torch.Tensor]:
    return value is not None and value.device == device


def _packed_inputs(module: PreTrainedModel, inputs: dict[str, Any], packing: Packing) -> dict[str, torch.Tensor]:
    """Returns the packed inputs per token, shape `(1, total_tokens, ...)`, where the padded ones are."""
    ahead = {} if packing.meanwhile is None else packing.meanwhile.numbers
    total = packing.layout.query.total_tokens
    packed = {name: value[:, :total] for name, value in ahead.items()}
    for name in _PER_TOKEN:
        if name not in packed and (value := inputs.get(name)) is not None:
            packed[name] = packing.pack(value)
    if "position_ids" not in packed:
        packed["position_ids"] = _positions(module, inputs, packing)
    return packed


def _positions(module: PreTrainedModel, inputs: dict[str, Any], packing: Packing | PackingAhead) -> torch.Tensor:
    """Numbers tokens as the model would in a padded batch, shape `(1, tokens)`."""
    ids = inputs.get("input_ids")
    device = packing.device if ids is None else ids.device
    if _family(module).positions is Positions.SLOTS:
        return packing.positions(device)
    padding_id: int = module.embeddings.padding_idx
    if ids is None:
        return packing.positions(device) + padding_id + 1
    is_token: torch.Tensor = ids.ne(padding_id)
    return packing.pack(is_token.cumsum(1) * is_token + padding_id)
