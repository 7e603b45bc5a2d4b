"""`unpad`, `repad` and `capture_graphs`: hooks and graphs of a model, added and removed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..errors import UnsupportedAttentionError
from ..kernels import jit
from ..log import log_once
from ..settings import NAME
from .families import family_of, reason_against
from .features import (
    forwards_features,
    is_transformer,
    pack_features,
    resume_flattening,
    spread_features,
    stop_flattening,
)
from .graph_options import GraphOptions, GraphStatistics
from .graphs import GraphedForward, graphs_of, install_graphs, uninstall_graphs
from .hooks import HANDLES, move_to_head, pack, signature_of, spread
from .reasons import implementation_of

__all__ = ["capture_graphs", "graph_statistics", "repad", "unpad"]

Module = TypeVar("Module", bound=torch.nn.Module)

_AS_IT_IS = "Use the model as it is: its attention skips padding where it goes through 'flashinfer'."


def unpad(model: Module, *, cuda_graphs: bool | GraphOptions = False) -> Module:
    """Makes a model skip padding: tokens are packed before the embeddings, and outputs are padded with zeros.

    Calls, output types and output shapes do not change. Batches without padding run unchanged. Forwards that cannot be
    packed run padded: the reason is logged once, or raised with `configure(strict=True)`. Examples:
    `output_attentions=True`, caches (decoders need `use_cache=False`), masks that are not `(batch, length)`,
    cross-attention, losses over padding, and windows over padding with holes.

    Inputs may stay on the CPU while the model is on a GPU: only tokens are copied, asynchronously.

    Args:
        model: A transformers model with `attn_implementation="flashinfer"`, or any module that contains such models.
            Changed in place: hooks are added to its backbones, and MPNet's attention layers get another class.
            Weights and config do not change.
        cuda_graphs: Whether to use CUDA graphs, or their options. They run forwards without gradients, in half
            precision on a GPU. Each size is captured on first use, or ahead of time by `capture_graphs`. Models that
            cannot be captured run without graphs; the reason is logged once.

    Returns:
        The same model.

    Raises:
        TypeError: If `model` is not a module, for example a path.
        UnsupportedAttentionError: If the model cannot be packed, or has another attention implementation. The model is
            then unchanged.

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
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"unpad({model!r}): expected a loaded model, not a {type(model).__name__}. Load it first, say with "
            f"AutoModel.from_pretrained(path, attn_implementation={NAME!r})."
        )
    backbones = {module: family for module in model.modules() if (family := family_of(module)) is not None}
    if not backbones:
        raise UnsupportedAttentionError(f"unpad for {type(model).__name__}: {reason_against(model)}", _AS_IT_IS)
    for backbone, family in backbones.items():
        name, implementation = type(backbone).__name__, implementation_of(backbone)
        if implementation != NAME:
            raise UnsupportedAttentionError(
                f"unpad for {name} with attn_implementation={implementation!r}, which would attend across packed rows",
                f"Load the model with attn_implementation={NAME!r}, or call model.set_attn_implementation({NAME!r}) "
                "first.",
            )
        if (reason := family.refuse(backbone)) is not None:
            raise UnsupportedAttentionError(f"unpad for {name}: {reason}", _AS_IT_IS)
    for module in model.modules():
        if HANDLES not in vars(module) and (handles := _add_hooks(module)) is not None:
            setattr(module, HANDLES, handles)
    for backbone, family in backbones.items():
        uninstall_graphs(backbone)
        if cuda_graphs and family.packs_ids_alone:
            install_graphs(backbone, GraphOptions() if cuda_graphs is True else cuda_graphs)
        elif cuda_graphs:
            log_once(f"no CUDA graphs of {type(backbone).__name__}: capturing this model is not supported")
    return model


def _add_hooks(module: torch.nn.Module) -> list[RemovableHandle] | None:
    """Adds hooks to a module; returns None if it neither is nor contains a backbone."""
    if (family := family_of(module)) is not None:
        if family.own_attention is not None:
            family.own_attention().route(module)
        on_errors = family.own_attention is not None
        return [
            module.register_forward_pre_hook(pack, with_kwargs=True),
            module.register_forward_hook(spread, prepend=True, with_kwargs=True, always_call=on_errors),
        ]
    if not any(map(family_of, module.modules())):
        return None
    if isinstance(module, PreTrainedModel):
        return [module.register_forward_pre_hook(move_to_head, with_kwargs=True)]
    if not is_transformer(module):
        return None
    stop_flattening(module)
    if not forwards_features(module):
        return []
    return [
        module.register_forward_pre_hook(pack_features, with_kwargs=True),
        module.register_forward_hook(spread_features, prepend=True, with_kwargs=True, always_call=True),
    ]


def capture_graphs(model: torch.nn.Module, shapes: Iterable[tuple[int, int]], *, token_type_ids: bool = False) -> None:
    """Captures CUDA graphs for a list of sizes, ahead of time.

    Args:
        model: The model passed to `unpad`, on a GPU.
        shapes: Numbers of rows and of tokens (without padding) of the expected batches, rounded up to graph sizes.
        token_type_ids: Whether batches have `token_type_ids`, such as those of BERT's tokenizer. Forwards with and
            without them use different graphs.

    Raises:
        ValueError: If the model is not on a GPU, was not unpadded with `cuda_graphs`, cannot be captured as it is, or
            takes no `token_type_ids`, or if a size exceeds the options.

    Examples:
        >>> import torch, hf_flashinfer_attn
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> config._attn_implementation = "flashinfer"
        >>> model = hf_flashinfer_attn.unpad(BertModel(config).eval(), cuda_graphs=True)
        >>> if torch.cuda.is_available():
        ...     hf_flashinfer_attn.capture_graphs(model.half().cuda(), [(8, 400), (1, 30)])
    """
    graphed: dict[PreTrainedModel, GraphedForward]
    graphed = {module: graphs for module in model.modules() if (graphs := graphs_of(module)) is not None}
    if not graphed:
        raise ValueError(f"{type(model).__name__} has no CUDA graphs; expected a model after unpad(cuda_graphs=True).")
    for backbone in graphed:
        if token_type_ids and "token_type_ids" not in signature_of(type(backbone).forward).parameters:
            raise ValueError(f"{type(backbone).__name__} takes no token_type_ids; expected token_type_ids=False.")
        if backbone.device.type != "cuda":
            raise ValueError(
                f"{type(backbone).__name__} is on {str(backbone.device)!r}, and CUDA graphs are captured on a GPU. "
                "Move it there first, in half precision, or leave capture_graphs out: without graphs the model runs "
                "as it is."
            )
    for rows, tokens in shapes:
        lengths = torch.full((rows,), tokens // rows, device="cpu")
        lengths[: tokens % rows] += 1
        width = int(lengths.max())
        mask = (torch.arange(width, device="cpu") < lengths[:, None]).long()
        # Zeros as position ids: these rows may be longer than the position table, unlike those of real batches.
        zeros = torch.zeros_like(mask)
        types = {"token_type_ids": zeros} if token_type_ids else {}
        for backbone, graphs in graphed.items():
            # Wait for kernels that are still compiling.
            with torch.no_grad(), jit.waiting():
                _require_graphs(backbone, graphs)
                if tokens < rows or not graphs.takes(backbone, backbone.device, rows, tokens):
                    raise ValueError(
                        f"there is no graph of {tokens} tokens in {rows} rows; expected 1 token a row to "
                        f"{graphs.options.max_tokens} tokens, a model on a GPU, and eval()."
                    )
                backbone(input_ids=zeros, position_ids=zeros, attention_mask=mask, use_cache=False, **types)
                _require_graphs(backbone, graphs)


def _require_graphs(backbone: PreTrainedModel, graphs: GraphedForward) -> None:
    if (reason := graphs.refusal()) is not None:
        raise ValueError(f"no CUDA graphs of {type(backbone).__name__}: {reason}; the model runs without.")


def graph_statistics(model: torch.nn.Module) -> GraphStatistics:
    """Returns statistics of a model's CUDA graphs since `unpad`, summed over its backbones.

    Args:
        model: The model passed to `unpad`.

    Examples:
        >>> import hf_flashinfer_attn
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> config._attn_implementation = "flashinfer"
        >>> model = hf_flashinfer_attn.unpad(BertModel(config).eval(), cuda_graphs=True)
        >>> hf_flashinfer_attn.graph_statistics(model).captured
        0
    """
    parts = (graphs_of(module) for module in model.modules())
    return GraphStatistics.total(graphs.statistics for graphs in parts if graphs is not None)


def repad(model: Module) -> Module:
    """Undoes `unpad`, in place; has no effect on other models.

    Args:
        model: The model passed to `unpad`, or a copy.

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
        if HANDLES in vars(module) and is_transformer(module):
            resume_flattening(module)
        handles, family = vars(module).pop(HANDLES, ()), family_of(module)
        for handle in handles:
            handle.remove()
        if handles and family is not None and family.own_attention is not None:
            family.own_attention().restore(module)
    return model
