"""The contenders: how each prepares a model and a batch, runs it, and pools its output.

A new contender is one entry of `CONTENDERS`.
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
    """Builds the same model as if loaded with another attention implementation; weights are shared, or widened."""
    dtype = model.dtype if dtype is None else dtype
    with torch.device("meta"):
        made: PreTrainedModel = type(model)._from_config(
            copy.deepcopy(model.config), attn_implementation=implementation, dtype=dtype
        )
    for name, tensor in _tensors(model).items():
        owner, _, leaf = name.rpartition(".")
        try:
            setattr(made.get_submodule(owner), leaf, _widen(tensor, dtype))
        except AttributeError:
            raise BenchError(f"{type(model).__name__} with {implementation!r} has no weight {name!r}.") from None
    left = [name for name, tensor in _tensors(made).items() if tensor.is_meta]
    if left:
        raise BenchError(f"{type(model).__name__} with {implementation!r} has weights of its own: {left}.")
    return made.eval()


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _widen(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point() or tensor.dtype.itemsize >= dtype.itemsize:
        return tensor
    wide = tensor.detach().to(dtype)
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide


@dataclass(frozen=True, slots=True)
class _PackedBatch:
    """The tokens of a batch in one row."""

    inputs: dict[str, Any]
    rows: torch.Tensor  # row that each token came from, int64, `(tokens,)`
    divisors: torch.Tensor  # tokens of each row, float32, `(rows, 1)`


def run_model(model: Any, batch: PaddedBatch | _PackedBatch) -> torch.Tensor:
    """Returns the last hidden states, shape `(rows, length, hidden_size)`; a classifier's logits, `(rows, labels)`."""
    outputs = model(**batch.inputs)
    found: torch.Tensor = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    return found


def pool_padded(hidden: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
    """Returns the mean of each row's tokens, whatever padding holds, NaN included; logits are returned as they are."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.ndim == 2:
        return hidden.to(wide)
    return hidden.masked_fill(batch.padding, 0).sum(1, dtype=wide) / batch.divisors


def _pool_packed(hidden: torch.Tensor, batch: _PackedBatch) -> torch.Tensor:
    wide = hidden[0].to(torch.promote_types(hidden.dtype, torch.float32))
    return wide.new_zeros(len(batch.divisors), wide.shape[-1]).index_add_(0, batch.rows, wide) / batch.divisors


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run a model: `run` and `pool` are timed, what prepares is not."""

    name: str
    prepare_model: Callable[[PreTrainedModel], Any]
    ours: bool = False
    # Why it cannot run on a device in a dtype.
    refuse: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    prepare_batch: Callable[[PaddedBatch, PreTrainedModel], Any] = lambda batch, model: batch
    run: Callable[[Any, Any], torch.Tensor] = run_model
    # Mean of each row's hidden states, shape `(rows, hidden_size)`, float32 or wider.
    pool: Callable[[torch.Tensor, Any], torch.Tensor] = pool_padded


def compiled(model: PreTrainedModel, backend: str = "inductor") -> Any:
    """Returns the model with sdpa under torch.compile."""
    # Compilations of other models count against the limit per layer.
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
    """The same, with inputs left on the CPU, where a tokenizer makes them."""
    return replace(contender, name=f"{contender.name}_host", prepare_batch=_to_host, **changes)


def _pack(batch: PaddedBatch, model: PreTrainedModel) -> _PackedBatch:
    valid = ~batch.padding[:, :, 0]
    offsets = nn.functional.pad(valid.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    longest = max(batch.lengths)
    packed = {name: tensor[valid][None] for name, tensor in batch.inputs.items() if name != "attention_mask"}
    packed["position_ids"] = (valid.cumsum(1)[valid] - 1 + first_position(model))[None]
    bounds = dict(zip(_BOUNDS, (offsets, offsets, longest, longest)))
    return _PackedBatch(packed | bounds, valid.nonzero()[:, 0], batch.divisors)


def first_position(model: PreTrainedModel) -> int:
    """Returns the position of a row's first token: RoBERTa-like models count from the id of padding plus 1."""
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
    """Attention of transformers' signature over packed tokens, in the kernel that comes with torch."""
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
        # The whole model on packed tokens, packed before the clock starts.
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
