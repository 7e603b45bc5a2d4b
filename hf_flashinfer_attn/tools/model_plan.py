"""What each attention layer of a model would use, from its config alone: the model runs once without values.

Weights and activations stay on the meta device, where tensors have shapes and no memory. The model's own code says
which mask, heads and extras each layer asks for; the rules that serve real calls say what would compute it.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from ..attention.recorded_specs import SpecOfLayer, keep_specs
from ..attention.select import Backend, Choice, fallback_of, kernel_for, may_run_sdpa
from ..attention.spec import WINDOW_KEEPS, AttentionSpec
from ..errors import FlashInferAttentionError, first_line
from ..html_table import html_table
from ..kernels import flashinfer
from ..kernels.modules import KernelModule
from ..ragged.band import FULL, Opaque
from ..settings import NAME, Settings, current_settings
from ..unpadding.families import family_of, reason_against
from ..unpadding.model_state import ModelState

__all__ = ["LayerPlan", "ModelPlan", "modules_of", "plan_of_config"]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What layers that ask for the same attention would use, for batches with padding on the right.

    Args:
        layers: Which, such as "0-11", "0, 3, 6" or "decoder 0-5 EncDecAttention".
        pattern: Which keys a query may see, as a trace calls it.
        left: How many keys before its own position a query sees; None for all.
        right: How many keys after its own position a query sees; None for all, 0 for causal attention.
        head_dim: The widest of the query's and the value's.
        padded_head_dim: What FlashInfer's kernels take it as; `head_dim` where they do not run.
        num_heads: Of the query.
        num_kv_heads: Of key and value.
        softcap: What logits are capped to; None for no cap.
        kernels: What may run: FlashInfer's "fa3", "fa2" or "auto" (its own choice), depending on lengths; "sdpa" for
            small batches; "torch" or "dense" where FlashInfer does not. None where the call would be refused.
        biased: Whether a bias is added to the logits.
        sinks: Whether there are attention sinks.
        reason: Why FlashInfer does not compute it on a GPU that it runs on, or what else there is to know.
        note: Why padded queries are computed; None if they are not.
    """

    layers: str
    pattern: str
    left: int | None
    right: int | None
    head_dim: int
    padded_head_dim: int
    num_heads: int
    num_kv_heads: int
    softcap: float | None
    kernels: tuple[str, ...]
    biased: bool
    sinks: bool
    reason: str | None
    note: str | None = None

    @property
    def remarks(self) -> str:
        """The reason and the note."""
        return "; ".join(filter(None, (self.reason, self.note)))


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What a model would use; `print(plan)` shows a table.

    Args:
        model_type: Model type of the config.
        class_name: Of the model; that of the config where no model could be built.
        dtype: Of the weights.
        capability: Compute capability of the GPU; None for none, where the torch backend runs.
        unpad: Whether `unpad` takes the model.
        unpad_reason: Why not; None if it does.
        cuda_graphs: Whether `unpad(model, cuda_graphs=True)` captures graphs of it, on a GPU.
        cuda_graphs_reason: Why not; None if it does.
        layers: One row for all layers that ask for the same.
        problem: Why `layers` is empty; None if it is not.
    """

    model_type: str
    class_name: str
    dtype: torch.dtype
    capability: tuple[int, int] | None
    unpad: bool
    unpad_reason: str | None
    cuda_graphs: bool
    cuda_graphs_reason: str | None
    layers: tuple[LayerPlan, ...]
    problem: str | None

    def to_dict(self) -> dict[str, object]:
        """Returns plain values, ready for `json.dumps`."""
        plain: dict[str, object] = {name: getattr(self, name) for name in self.__slots__}
        plain["dtype"] = str(self.dtype).removeprefix("torch.")
        plain["capability"] = None if self.capability is None else ".".join(map(str, self.capability))
        plain["layers"] = [{name: getattr(layer, name) for name in layer.__slots__} for layer in self.layers]
        return plain

    def __str__(self) -> str:
        lines = [self._title]
        if self.layers:
            short = [replace(layer, layers=_abbreviated(layer.layers)) for layer in self.layers]
            rows = [_HEADER, *map(_cells, short)]
            widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
            lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
            lines += (f"layers {layer.layers}: {layer.remarks}" for layer in short if layer.remarks)
        return "\n".join([*lines, *self._notes])

    def _repr_html_(self) -> str:
        header = (*_HEADER, "remarks")
        rows = [(*_cells(layer), layer.remarks) for layer in self.layers]
        return html_table(header, rows, title=self._title, note="\n".join(self._notes))

    @property
    def _title(self) -> str:
        where = "without a GPU" if self.capability is None else "compute capability {}.{}".format(*self.capability)
        return f"{self.class_name} ({self.model_type}), {str(self.dtype).removeprefix('torch.')}, {where}"

    @property
    def _notes(self) -> list[str]:
        def answer(name: str, yes: bool, reason: str | None, where: str = "") -> str:
            return f"{name}: yes{where}" if yes else f"{name}: no, {reason}"

        notes = [] if self.problem is None else [f"attention: not known, {self.problem}"]
        notes.append(answer("unpad", self.unpad, self.unpad_reason))
        # Said once.
        if self.unpad or self.cuda_graphs:
            notes.append(
                answer(
                    "CUDA graphs", self.cuda_graphs, self.cuda_graphs_reason, ", on a GPU" * (self.capability is None)
                )
            )
        return notes


_HEADER = ("layers", "pattern", "heads", "head_dim", "kernels", "extras")


def _cells(layer: LayerPlan) -> tuple[str, ...]:
    heads, kv_heads = layer.num_heads, layer.num_kv_heads
    size, padded = layer.head_dim, layer.padded_head_dim
    extras = [] if layer.softcap is None else [f"softcap {layer.softcap:g}"]
    extras += ["position_bias"] * layer.biased + ["sinks"] * layer.sinks
    return (
        layer.layers,
        layer.pattern,
        str(heads) if heads == kv_heads else f"{heads} on {kv_heads}",
        str(size) if size == padded else f"{size} -> {padded}",
        ", ".join(layer.kernels) or "refused",
        ", ".join(extras),
    )


def _abbreviated(layers: str) -> str:
    """Shortens "0, 3, 6, 9, 12" to "0, 3, ..., 12"."""
    parts = layers.split(", ")
    return layers if len(parts) <= 4 else ", ".join([*parts[:2], "...", parts[-1]])


def plan_of_config(
    config: PreTrainedConfig, *, dtype: torch.dtype = torch.float16, capability: tuple[int, int] | None = None
) -> ModelPlan:
    """Says what each attention layer of a model would use, without weights and without a GPU.

    Attention is that of padded batches of the model's main input, text where it takes text, with the settings in force.
    Batches without padding may run on torch's sdpa too.

    Args:
        config: Of a transformers model. It is not changed.
        dtype: Of the weights.
        capability: Compute capability of the GPU to plan for, such as (9, 0); that of the current GPU by default, and
            where FlashInfer does not run on it, the torch backend.

    Examples:
        >>> from hf_flashinfer_attn.tools.model_plan import plan_of_config
        >>> from transformers import BertConfig
        >>> layer, = plan_of_config(BertConfig(num_hidden_layers=3), capability=(9, 0)).layers
        >>> layer.layers, layer.pattern, layer.head_dim, layer.kernels
        ('0-2', 'full', 64, ('fa3', 'fa2', 'sdpa'))
    """
    if capability is None:
        capability = _capability_here()
    config = copy.deepcopy(config)
    known = ModelPlan(
        config.model_type, type(config).__name__, dtype, capability, False, "", False, "", (), "it could not be built"
    )
    try:
        model = _build(config, dtype)
    except FlashInferAttentionError as error:
        return _without_layers(known, str(error))
    except _MODEL_ERRORS as error:
        return _without_layers(known, f"the model cannot be built: {first_line(error)}")
    known = replace(known, class_name=type(model).__name__)
    unpad_reason = _reason_against_unpad(model)
    calls, problem = _run(model, own_attention=unpad_reason is None)
    if calls is None and dtype != torch.bfloat16:
        # On the meta device, grouped matrix products of experts accept bfloat16 only; attention does not depend on it.
        other = _build(config, torch.bfloat16)
        calls, _ = _run(other, own_attention=unpad_reason is None)
        if calls is not None:
            model, problem = other, None
            calls = [
                (layer, replace(spec, dtype=dtype) if spec.dtype == torch.bfloat16 else spec) for layer, spec in calls
            ]
    if calls is None:
        layers: tuple[LayerPlan, ...] = ()
    else:
        layers = tuple(_group(model, calls, capability, current_settings()))
        if not layers:
            problem = "its attention does not go through transformers' attention interface, and runs as with 'eager'"
    graphs_reason = unpad_reason or problem or _reason_against_graphs(model, layers)
    return replace(
        known,
        unpad=unpad_reason is None,
        unpad_reason=unpad_reason,
        cuda_graphs=graphs_reason is None,
        cuda_graphs_reason=graphs_reason,
        layers=layers,
        problem=problem,
    )


# Of the code of models, which may ask tensors for values that they do not have, and of packages that it wants.
_MODEL_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, OSError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


def _capability_here() -> tuple[int, int] | None:
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    return None if flashinfer.unavailable_reason(device) is not None else torch.cuda.get_device_capability(device)


def _without_layers(plan: ModelPlan, problem: str) -> ModelPlan:
    return replace(plan, unpad_reason=problem, cuda_graphs_reason=problem, problem=problem)


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    named = getattr(transformers, (config.architectures or [""])[0], None)
    # The encoder of T5 and its like is a model of its own, which AutoModel does not know of.
    is_known = type(config) in MODEL_MAPPING and not (named is not None and named.__name__.endswith("EncoderModel"))
    with torch.device("meta"):
        build = AutoModel.from_config if is_known or named is None else named._from_config
        model: PreTrainedModel = build(config, attn_implementation=NAME, dtype=dtype)
    return model.eval()


def _reason_against_unpad(model: PreTrainedModel) -> str | None:
    families = {part: family for part in model.modules() if (family := family_of(part)) is not None}
    if not families:
        # Without the list of what is known.
        return reason_against(model).partition(";")[0]
    return next((reason for part, family in families.items() if (reason := family.refuse(part))), None)


def _reason_against_graphs(model: PreTrainedModel, layers: Iterable[LayerPlan]) -> str | None:
    for part in model.modules():
        if (family := family_of(part)) is None:
            continue
        if not family.packs_ids_alone:
            return "capturing this model is not supported"
        if (reason := ModelState(part).refusal) is not None:
            return reason
    for layer in layers:
        if layer.right not in (None, 0):
            return "windows that look ahead change their parts with the lengths"
        if layer.biased:
            return "a position_bias in a captured graph"
        if "auto" in layer.kernels:
            return "kernel 'auto' chooses by lengths"
        if layer.reason is not None and not {"fa2", "fa3"} & set(layer.kernels):
            return layer.reason
    return None


def _run(model: PreTrainedModel, *, own_attention: bool) -> tuple[list[SpecOfLayer] | None, str | None]:
    """Runs a model without values; returns what its layers asked for, or None and why that is not known."""
    if own_attention:
        for part in model.modules():
            if (family := family_of(part)) is not None and family.own_attention is not None:
                family.own_attention().route(part)
    problem: str | None = None
    for inputs in _inputs(model):
        try:
            with torch.no_grad(), keep_specs() as calls:
                try:
                    model(**inputs)
                except _MODEL_ERRORS:
                    # Perhaps it asks for a value on which attention does not depend, such as whether all is finite.
                    of_no, of_yes = (_run_with_answers(model, inputs, answer) for answer in (False, True))
                    if of_no != of_yes:
                        raise
                    calls = of_no
        except FlashInferAttentionError as error:
            return None, str(error)
        except _MODEL_ERRORS as error:
            problem = problem or f"its code asks tensors for values, or for other inputs: {first_line(error)}"
        else:
            return calls, None
    return None, problem


class _Answers(TorchFunctionMode):
    """Answers `.item()` on meta tensors with a constant."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("item", "__bool__", "__int__", "__float__", "__index__") and args[0].is_meta:
            dtype = args[0].dtype
            value: bool | int | float = self._answer
            if name != "__bool__" and dtype != torch.bool:
                value = float(value) if dtype.is_floating_point else int(value)
            return value
        return func(*args, **(kwargs or {}))


def _run_with_answers(model: PreTrainedModel, inputs: dict[str, object], answer: bool) -> list[SpecOfLayer]:
    with keep_specs() as calls, _Answers(answer):
        model(**inputs)
    return calls


_ROWS, _SLOTS = 2, 8


def _inputs(model: PreTrainedModel) -> Iterator[dict[str, object]]:
    """Makes inputs without values: the main ones alone, then all that the model is known to take."""
    config = model.config
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    ids = torch.ones(_ROWS, _SLOTS, dtype=torch.long, device="meta")
    text = {"input_ids": ids, "attention_mask": ids.clone()}

    def values(name: str, *shape: int) -> dict[str, torch.Tensor]:
        return {name: torch.ones(_ROWS, *shape, dtype=model.dtype, device="meta")}

    pixels = values("pixel_values", getattr(vision, "num_channels", 3), height, width)
    frames = 2 * getattr(config, "max_source_positions", 64)
    options: dict[str, object] = {"use_cache": False}
    if config.is_encoder_decoder:
        options |= {"decoder_input_ids": ids.clone(), "decoder_attention_mask": ids.clone()}
    names = inspect.signature(type(model).forward).parameters
    by_main_input: dict[str, Sequence[dict[str, torch.Tensor]]] = {
        "input_ids": (text, {**text, **pixels}),
        "pixel_values": (pixels, {**text, **pixels}),
        "input_values": (values("input_values", 16_000),),
        "input_features": (values("input_features", getattr(config, "num_mel_bins", 80), frames),),
    }
    for tensors in by_main_input.get(model.main_input_name, (text,)):
        yield {name: value for name, value in {**tensors, **options}.items() if name in names}


def _group(
    model: PreTrainedModel, calls: Sequence[SpecOfLayer], capability: tuple[int, int] | None, settings: Settings
) -> Iterator[LayerPlan]:
    """Plans each call, and joins layers that ask for the same."""
    groups: dict[tuple[str, LayerPlan], list[int | None]] = {}
    for (kind, index), call in zip(_places(model, calls), calls):
        layer, spec = call
        plan = _plan(spec, capability, settings)
        if family_of(model) is not None and not type(layer).__module__.startswith("transformers."):
            plan = replace(plan, reason="after unpad; without, the model computes attention by itself")
        groups.setdefault((kind, plan), []).append(index)
    for (kind, plan), indices in groups.items():
        numbers = _ranges([index for index in indices if index is not None])
        yield replace(plan, layers=" ".join(filter(None, kind.format(numbers).split())) or type(model).__name__)


def _places(model: PreTrainedModel, calls: Sequence[SpecOfLayer]) -> list[tuple[str, int | None]]:
    """Returns what kind of layer made each call, with {} in the place of its number, and that number."""
    names = {module: name for name, module in model.named_modules()}
    repeated = len({layer for layer, _ in calls}) < len(calls)
    before, after, numbers = [], [], []
    seen: Counter[tuple[str, str]] = Counter()
    for call in calls:
        name = names.get(call[0], type(call[0]).__name__)
        head, number, tail = [*re.split(r"(?:^|\.)(\d+)(?:\.|$)", name, maxsplit=1), "", ""][:3]
        # A layer that is called more than once, as ALBERT's is, stands for as many.
        numbers.append(seen[head, tail] if repeated and number else int(number) if number else None)
        seen[head, tail] += 1
        before.append(head.split("."))
        after.append([part for part in tail.split(".") if not part.isdecimal()])
    kinds = []
    for head, number, tail in zip(before, numbers, after):
        parts = [*_particular(head, before), "" if number is None else "{}", *_particular(tail, after)]
        kinds.append(" ".join(parts))
    return list(zip(kinds, numbers))


def _particular(parts: Sequence[str], of_all: Iterable[Sequence[str]]) -> list[str]:
    shared = set(parts).intersection(*map(set, of_all))
    return [part for part in parts if part not in shared]


def _ranges(numbers: Sequence[int]) -> str:
    """Writes ascending numbers as "0-3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _plan(spec: AttentionSpec, capability: tuple[int, int] | None, settings: Settings) -> LayerPlan:
    kernels, reason = _kernels(spec, capability, settings)
    head_dim = padded_head_dim = spec.widest_head_dim
    if kernels and kernels[0] in ("fa2", "fa3", "auto"):
        padded_head_dim = flashinfer.padded_head_dim(head_dim)
    band = (None, None) if isinstance(spec.pattern, Opaque) else (spec.pattern.left, spec.pattern.right)
    is_square, fallback = spec.q_length == spec.kv_length, fallback_of(spec)
    is_ragged = fallback is None or fallback.backend is not Backend.DENSE
    keeps = spec.has_lazy_mask and is_square and not spec.pattern.is_causal and is_ragged
    note = spec.padded_queries if keeps or spec.whole_mask == WINDOW_KEEPS else None
    return LayerPlan(
        "", spec.pattern.name, *band, head_dim, padded_head_dim, spec.num_heads, spec.num_kv_heads, spec.softcap,
        kernels, spec.biased, spec.sinks, reason, note,
    )  # fmt: skip


def _kernels(
    spec: AttentionSpec, capability: tuple[int, int] | None, settings: Settings
) -> tuple[tuple[str, ...], str | None]:
    """Returns what may run a spec, and why that is not FlashInfer."""
    fallback = fallback_of(spec)
    blocked = None if capability is None else flashinfer.capability_reason(capability)
    is_forbidden = settings.backend == "flashinfer" or settings.strict
    if capability is None or blocked is not None or settings.backend == "torch":
        if settings.backend != "torch" and is_forbidden:
            return (), blocked or "there is no GPU that FlashInfer supports"
        if fallback is not None and fallback.backend is Backend.DENSE:
            return ("dense",), fallback.reason
        return ("torch",), blocked
    if fallback is None and (reason := flashinfer.dtype_reason(spec.dtype, capability)) is not None:
        fallback = Choice(Backend.TORCH, reason)
    if fallback is not None:
        return () if is_forbidden else (fallback.backend.value,), fallback.reason
    band = spec.pattern
    assert not isinstance(band, Opaque)
    most = float("inf") if band.left is None or band.right is None else band.left + band.right + 1
    # From the longest rows to the shortest.
    names: list[str] = [
        kernel_for(capability, spec.widest_head_dim, min(most, keys), biased=spec.biased, sinks=spec.sinks)
        for keys in (float("inf"), 1.0)
    ]
    if band == FULL and settings.backend == "auto" and may_run_sdpa(spec):
        names.append("sdpa")
    return tuple(dict.fromkeys(names)), None


def modules_of(plan: ModelPlan, dtype: torch.dtype | None = None) -> tuple[KernelModule, ...]:
    """Returns all modules that a model may need, whatever the lengths in its batches.

    Args:
        plan: What each of its layers would use, on GPUs of some compute capability.
        dtype: Of query, key and value; that of the plan by default.

    Returns:
        Without what FlashInfer itself chooses on some Blackwell GPUs, but for what it falls back to there.

    Examples:
        >>> from hf_flashinfer_attn.tools.model_plan import modules_of
        >>> from hf_flashinfer_attn.tools.model_plan import plan_of_config
        >>> from transformers import BertConfig
        >>> print(*modules_of(plan_of_config(BertConfig(), capability=(9, 0))), sep="\\n")
        fa3, float16, head_dim 64
        fa2, float16, head_dim 64
    """
    modules: dict[KernelModule, None] = {}
    for layer in plan.layers:
        for name in layer.kernels:
            if name not in ("fa2", "fa3", "auto"):
                continue
            kernel: Literal["fa2", "fa3"] = "fa3" if name == "fa3" else "fa2"
            # Where no row reaches a window, it is none.
            for window in (False,) if layer.left is None or layer.biased else (False, True):
                module = KernelModule(
                    kernel,
                    plan.dtype if dtype is None else dtype,
                    flashinfer.padded_head_dim(layer.head_dim),
                    window,
                    layer.softcap is not None,
                    layer.biased,
                )
                modules[module] = None
    return tuple(modules)
