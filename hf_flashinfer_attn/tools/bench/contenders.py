"""Who takes part: how each prepares a model and a batch, runs it, and pools what comes out.

A contender more is one entry of `CONTENDERS`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from ...settings import NAME
from ...unpadding import GraphOptions, unpad
from .errors import BenchError
from .workload import PaddedBatch

__all__ = ["BASELINE", "CONTENDERS", "Contender", "PackedBatch", "pool_padded", "run_padded", "twin"]

BASELINE = "sdpa"
_VARLEN = "torch_varlen"


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run a model.

    Args:
        name: As on the command line and in reports.
        summary: One line about it.
        ours: Whether it is of this package; the others are rivals.
        prepare_model: From the model with sdpa to what `run` takes; see [`twin`]. Once per model.
        prepare_batch: From a padded batch to what `run` and `pool` take; outside of the time.
        run: The forward. Inside the time.
        pool: From what `run` gave to the mean of each row's valid hidden states, shape `(rows, hidden_size)`, float32
            or wider. Inside the time.
        refuse: Why it cannot run on a device in a dtype, or None.
    """

    name: str
    summary: str
    ours: bool
    prepare_model: Callable[[PreTrainedModel], Any]
    prepare_batch: Callable[[PaddedBatch, PreTrainedModel], Any]
    run: Callable[[Any, Any], Any]
    pool: Callable[[Any, Any], torch.Tensor]
    refuse: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None


def twin(model: PreTrainedModel, implementation: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Builds the same model with another attention implementation, as if it had been loaded with that one.

    Args:
        model: Any model of transformers'.
        implementation: Any `attn_implementation`.
        dtype: Of the copy's weights; the same weights, shared, by default.

    Raises:
        BenchError: If the implementation gives the model other weights.
    """
    dtype = model.dtype if dtype is None else dtype
    with torch.device("meta"):
        made: PreTrainedModel = type(model)._from_config(
            copy.deepcopy(model.config), attn_implementation=implementation, dtype=dtype
        )
    for store, tensors in (
        ("_parameters", model.named_parameters(remove_duplicate=False)),
        ("_buffers", model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in tensors:
            owner, _, leaf = name.rpartition(".")
            try:
                getattr(made.get_submodule(owner), store)[leaf] = _widen(tensor, dtype)
            except (AttributeError, KeyError):
                raise BenchError(f"{type(model).__name__} with {implementation!r} has no weight {name!r}.") from None
    left = [name for name, tensor in itertools.chain(made.named_parameters(), made.named_buffers()) if tensor.is_meta]
    if left:
        raise BenchError(f"{type(model).__name__} with {implementation!r} has weights of its own: {left}.")
    return made.eval()


def _widen(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point() or tensor.dtype.itemsize >= dtype.itemsize:
        return tensor
    wide = tensor.detach().to(dtype)
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide


def run_padded(model: Any, batch: PaddedBatch) -> torch.Tensor:
    """Calls a model on a padded batch.

    Returns:
        The last hidden states, shape `(rows, slots, hidden_size)`; or of a classifier the logits, shape
        `(rows, labels)`.
    """
    outputs = model(**batch.inputs)
    found: torch.Tensor = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    return found


def pool_padded(hidden: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
    """Returns the mean of each row's valid hidden states; whatever is in padded slots does not count, NaN included.

    Logits of a classifier are returned as they are, in float32 or wider.
    """
    if hidden.ndim == 2:
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    total = hidden.masked_fill(batch.padding, 0).sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return total / batch.divisors


def _padded(
    name: str,
    summary: str,
    prepare_model: Callable[[PreTrainedModel], Any],
    *,
    ours: bool = False,
    refuse: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None,
) -> Contender:
    return Contender(name, summary, ours, prepare_model, lambda batch, _: batch, run_padded, pool_padded, refuse)


def _twin_with(implementation: str) -> Callable[[PreTrainedModel], PreTrainedModel]:
    return functools.partial(twin, implementation=implementation)


def _compiled(model: PreTrainedModel, backend: str = "inductor") -> Any:
    # What was compiled for another model counts against the number of times that a layer may be compiled.
    torch.compiler.reset()
    return torch.compile(twin(model, BASELINE), dynamic=True, backend=backend)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The valid tokens of a batch in one row.

    Args:
        inputs: What the model is called with; ids of shape `(1, total_tokens)`, offsets `cu_seq_lens_q`, int32.
        rows: Which row each token came from, int64, shape `(total_tokens,)`.
        divisors: Valid tokens of each row, float32, shape `(rows, 1)`.
    """

    inputs: dict[str, Any]
    rows: torch.Tensor
    divisors: torch.Tensor


def _pack(batch: PaddedBatch, model: PreTrainedModel) -> PackedBatch:
    valid = ~batch.padding[:, :, 0]
    device = valid.device
    lengths = torch.tensor(batch.lengths, device="cpu")
    offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
    positions = torch.arange(int(offsets[-1]), device="cpu") - offsets[:-1].repeat_interleave(lengths)
    inputs: dict[str, Any] = {
        name: tensor[valid][None] for name, tensor in batch.inputs.items() if name != "attention_mask"
    }
    offsets = offsets.to(device, torch.int32)
    longest = max(batch.lengths)
    inputs |= {
        "position_ids": (positions + _first_position(model)).to(device)[None],
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    rows = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths).to(device)
    return PackedBatch(inputs, rows, batch.divisors)


def _first_position(model: PreTrainedModel) -> int:
    """RoBERTa and its like start to count after the id of padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _run_packed(model: Any, batch: PackedBatch) -> torch.Tensor:
    hidden: torch.Tensor = model(**batch.inputs).last_hidden_state
    return hidden[0]


def _pool_packed(hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    total = wide.new_zeros(len(batch.divisors), wide.shape[-1]).index_add_(0, batch.rows, wide)
    return total / batch.divisors


def _refuse_varlen(device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen; install torch>=2.10"
    if device.type != "cuda":
        return f"torch's varlen_attn runs on CUDA only, not on {device.type}"
    if dtype.itemsize != 2:
        return f"torch's varlen_attn takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def _unpadded(model: PreTrainedModel) -> PreTrainedModel:
    return unpad(twin(model, NAME))


def _graphed(model: PreTrainedModel, compile: bool = False) -> PreTrainedModel:
    return unpad(twin(model, NAME), cuda_graphs=GraphOptions(compile=compile))


def _refuse_graphs(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, not {device.type}"
    return None if dtype.itemsize == 2 else "CUDA graphs are captured in half precision; use --dtype float16"


def _on_the_host(batch: PaddedBatch, model: PreTrainedModel) -> PaddedBatch:
    return replace(batch, inputs={name: tensor.cpu() for name, tensor in batch.inputs.items()})


def _refuse_host(device: torch.device, dtype: torch.dtype) -> str | None:
    return "without a GPU it is the same as unpad" if device.type == "cpu" else None


def _with_inputs_on_the_host(
    contender: Contender, summary: str = "the same, and inputs left on the CPU", **changes: Any
) -> Contender:
    return replace(contender, name=f"{contender.name}_host", summary=summary, prepare_batch=_on_the_host, **changes)


_UNPAD = _padded("unpad", "the same and unpad: padded in and out, computed on tokens alone", _unpadded, ours=True)
_GRAPHS = _padded("graphs", "unpad through CUDA graphs", _graphed, ours=True, refuse=_refuse_graphs)
_COMPILED_GRAPHS = _padded(
    "compiled_graphs",
    "graphs of what torch.compile made",
    functools.partial(_graphed, compile=True),
    ours=True,
    refuse=_refuse_graphs,
)


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
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' signature over packed tokens, in the kernel that comes with torch."""
    from torch.nn.attention import varlen

    # Its parameters differ from version to version.
    attend: Any = varlen.varlen_attn
    unknown = softcap is not None or s_aux is not None or position_bias is not None
    if unknown or cu_seq_lens_q is None or max_length_q is None or max_length_k is None:
        raise BenchError(f"torch's varlen_attn cannot serve {type(module).__name__}; take varlen out of --against.")
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    side = -1 if sliding_window is None else sliding_window - 1
    options: dict[str, Any] = {"scale": scaling, "window_size": (side, 0 if causal else side)}
    known = _parameters(attend)
    if "enable_gqa" in known:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    if "window_size" not in known:
        # torch 2.10.
        if sliding_window is not None:
            raise BenchError(f"varlen_attn of torch {torch.__version__} has no windows; install torch>=2.11.")
        options["is_causal"] = causal
        del options["window_size"]
    if "scale" not in known:
        if scaling is not None and abs(scaling * query.shape[-1] ** 0.5 - 1) > 1e-6:
            raise BenchError(f"varlen_attn of torch {torch.__version__} has no scale; install torch>=2.11.")
        del options["scale"]
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output: torch.Tensor = attend(
        query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **options
    )
    return output[None], None


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        _padded(BASELINE, "transformers' default, padded", lambda model: model),
        _padded("eager", "transformers' reference, padded", _twin_with("eager")),
        _padded("flex_attention", "torch's flex_attention, padded", _twin_with("flex_attention")),
        Contender(
            "varlen",
            "the whole model on packed tokens through torch's varlen_attn, packed before the clock starts",
            False,
            _varlen_model,
            _pack,
            _run_packed,
            _pool_packed,
            _refuse_varlen,
        ),
        _padded("compile", "sdpa under torch.compile, padded", _compiled),
        _padded(NAME, 'attn_implementation="flashinfer" and nothing else, padded', _twin_with(NAME), ours=True),
        _UNPAD,
        _with_inputs_on_the_host(
            _UNPAD, "unpad, and inputs left on the CPU where a tokenizer makes them", refuse=_refuse_host
        ),
        _GRAPHS,
        _with_inputs_on_the_host(_GRAPHS),
        _COMPILED_GRAPHS,
        _with_inputs_on_the_host(_COMPILED_GRAPHS),
    )
}
