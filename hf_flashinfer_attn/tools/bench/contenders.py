"""Contenders of the benchmark: each prepares a model and batches, runs them, and pools the outputs.

To add a contender, add an entry to `CONTENDERS`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from ...settings import NAME
from ...unpadding import GraphOptions, unpad
from .workload import BenchError, PaddedBatch

__all__ = ["BASELINE", "CONTENDERS", "Contender", "compiled", "first_position", "pool_padded", "run_model", "twin"]

BASELINE = "sdpa"
_VARLEN = "torch_varlen"
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def twin(model: PreTrainedModel, implementation: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Builds a model with another attention implementation; weights are shared, or converted to a wider dtype."""
    dtype = model.dtype if dtype is None else dtype
    with torch.device("meta"):
        copied: PreTrainedModel = type(model)._from_config(
            copy.deepcopy(model.config), attn_implementation=implementation, dtype=dtype
        )
    for name, tensor in _tensors(model).items():
        owner, _, leaf = name.rpartition(".")
        try:
            setattr(copied.get_submodule(owner), leaf, _widen(tensor, dtype))
        except AttributeError:
            raise BenchError(f"{type(model).__name__} with {implementation!r} has no weight {name!r}.") from None
    left = [name for name, tensor in _tensors(copied).items() if tensor.is_meta]
    if left:
        raise BenchError(f"{type(model).__name__} with {implementation!r} has weights of its own: {left}.")
    return copied.eval()


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _widen(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point() or tensor.dtype.itemsize >= dtype.itemsize:
        return tensor
    wide = tensor.detach().to(dtype)
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide


@dataclass(frozen=True, slots=True)
class _PackedBatch:
    """Packed tokens of a batch."""

    inputs: dict[str, Any]
    rows: torch.Tensor  # row of each token, int64, shape `(tokens,)`
    divisors: torch.Tensor  # number of tokens per row, float32, shape `(rows, 1)`


def run_model(model: Any, batch: PaddedBatch | _PackedBatch) -> torch.Tensor:
    """Returns last hidden states, shape `(rows, length, hidden_size)`, or a classifier's logits, `(rows, labels)`."""
    outputs = model(**batch.inputs)
    hidden: torch.Tensor = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    return hidden


def pool_padded(hidden: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
    """Returns the mean of each row's tokens; padding may be NaN. Logits are returned unchanged."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.ndim == 2:
        return hidden.to(wide)
    return hidden.masked_fill(batch.padding, 0).sum(1, dtype=wide) / batch.divisors


def _pool_packed(hidden: torch.Tensor, batch: _PackedBatch) -> torch.Tensor:
    wide = hidden[0].to(torch.promote_types(hidden.dtype, torch.float32))
    return wide.new_zeros(len(batch.divisors), wide.shape[-1]).index_add_(0, batch.rows, wide) / batch.divisors


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run a model. Only `run` and `pool` are timed."""

    name: str
    prepare_model: Callable[[PreTrainedModel], Any]
    ours: bool = False
    # Returns the reason if the contender cannot run on a device in a dtype.
    refuse: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    prepare_batch: Callable[[PaddedBatch, PreTrainedModel], Any] = lambda batch, model: batch
    run: Callable[[Any, Any], torch.Tensor] = run_model
    # Returns the mean of each row's hidden states, shape `(rows, hidden_size)`, float32 or wider.
    pool: Callable[[torch.Tensor, Any], torch.Tensor] = pool_padded


def compiled(model: PreTrainedModel, backend: str = "inductor") -> Any:
    """Compiles the model with sdpa."""
    # Compilations of other models count towards torch's recompile limit.
    torch.compiler.reset()
    return torch.compile(twin(model, BASELINE), dynamic=True, backend=backend)


def _unpadded(model: PreTrainedModel, cuda_graphs: bool | GraphOptions = False) -> PreTrainedModel:
    return unpad(twin(model, NAME), cuda_graphs=cuda_graphs)


def _refuse_graphs(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, not {device.type}"
    return None if dtype.itemsize == 2 else "CUDA graphs are captured in half precision; use --dtype float16"


def _refuse_host(device: torch.device, dtype: torch.dtype) -> str | None:
    return "without a GPU it is the same as unpad" if device.type == "cpu" else None


def _to_host(batch: PaddedBatch, model: PreTrainedModel) -> PaddedBatch:
    return replace(batch, inputs={name: tensor.cpu() for name, tensor in batch.inputs.items()})


def _on_host(contender: Contender, **changes: Any) -> Contender:
    """Returns a contender with inputs on the CPU, as from a tokenizer."""
    return replace(contender, name=f"{contender.name}_host", prepare_batch=_to_host, **changes)


def _pack(batch: PaddedBatch, model: PreTrainedModel) -> _PackedBatch:
    valid = ~batch.padding[:, :, 0]
    cu_seqlens = nn.functional.pad(valid.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    longest = max(batch.lengths)
    packed = {name: tensor[valid][None] for name, tensor in batch.inputs.items() if name != "attention_mask"}
    packed["position_ids"] = (valid.cumsum(1)[valid] - 1 + first_position(model))[None]
    bounds = dict(zip(_BOUNDS, (cu_seqlens, cu_seqlens, longest, longest)))
    return _PackedBatch(packed | bounds, valid.nonzero()[:, 0], batch.divisors)


def first_position(model: PreTrainedModel) -> int:
    """Returns the position id of a row's first token: padding_idx + 1 in RoBERTa-like models, otherwise 0."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _refuse_varlen(device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen; install torch>=2.10"
    if not _takes(varlen_attn, "scale"):
        return f"varlen_attn of torch {torch.__version__} has no scale; install torch>=2.11."
    if device.type != "cuda":
        return f"torch's varlen_attn runs on CUDA only, not on {device.type}"
    if dtype.itemsize != 2:
        return f"torch's varlen_attn takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def _varlen_model(model: PreTrainedModel) -> PreTrainedModel:
    if model.base_model is not model:
        raise BenchError(f"the head of {type(model).__name__} takes rows, not packed tokens; take varlen out.")
    AttentionInterface.register(_VARLEN, _varlen_attention)
    AttentionMaskInterface.register(_VARLEN, lambda *args, **kwargs: None)
    return twin(model, _VARLEN)


def _varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for packed tokens with torch's `varlen_attn`, with the signature of transformers."""
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn
    bounds = [kwargs.get(name) for name in _BOUNDS]
    unknown = any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if unknown or any(bound is None for bound in bounds):
        raise BenchError(f"torch's varlen_attn cannot serve {type(module).__name__}; take varlen out of --against.")
    causal, window = kwargs.get("is_causal"), kwargs.get("sliding_window")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    side = -1 if window is None else window - 1
    options: dict[str, Any] = {"scale": scaling, "window_size": (side, 0 if causal else side)}
    if _takes(attend, "enable_gqa"):
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    tokens = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return attend(*tokens, *bounds, **options)[None], None


@cache
def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


_UNPAD = Contender("unpad", _unpadded, ours=True)
_GRAPHS = Contender("graphs", partial(_unpadded, cuda_graphs=True), ours=True, refuse=_refuse_graphs)
_COMPILED_GRAPHS = replace(
    _GRAPHS, name="compiled_graphs", prepare_model=partial(_unpadded, cuda_graphs=GraphOptions(compile=True))
)
CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender(BASELINE, lambda model: model),
        Contender("eager", partial(twin, implementation="eager")),
        Contender("flex_attention", partial(twin, implementation="flex_attention")),
        # The whole model on packed tokens; packing is not timed.
        Contender("varlen", _varlen_model, refuse=_refuse_varlen, prepare_batch=_pack, pool=_pool_packed),
        Contender("compile", compiled),
        Contender(NAME, partial(twin, implementation=NAME), ours=True),
        _UNPAD,
        _on_host(_UNPAD, refuse=_refuse_host),
        _GRAPHS,
        _on_host(_GRAPHS),
        _COMPILED_GRAPHS,
        _on_host(_COMPILED_GRAPHS),
    )
}
