"""Predicted backend and kernels of each attention layer, from a model's config alone.

The model runs on the meta device, where tensors have shapes and no memory. The attention specs of its layers are
recorded; `select` chooses their backends and kernels as for real calls.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from ..attention.recorded_specs import SpecOfLayer, keep_specs
from ..attention.select import Backend, Choice, fallback_of, kernel_for, may_run_sdpa
from ..attention.spec import WINDOW_KEEPS, AttentionSpec
from ..errors import FlashInferAttentionError, first_line
from ..kernels import flashinfer
from ..kernels.modules import KernelModule
from ..ragged.band import FULL
from ..settings import NAME, current_settings
from ..unpadding.families import Family, family_of, reason_against
from ..unpadding.model_state import ModelState
from .environment import FOREIGN_ERRORS
from .screen import Block, Screen

__all__ = ["LayerPlan", "ModelPlan", "modules_of", "plan_of_config"]

_HEADER = ("layers", "pattern", "heads", "head_dim", "kernels", "extras")


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Kernels of all layers with the same attention spec, for batches with padding on the right."""

    # Such as "0-11", "0, 3, 6" or "decoder 0-5 EncDecAttention".
    layers: str
    pattern: str
    # Number of visible keys before and after a query; None for all.
    left: int | None
    right: int | None
    # Maximum of the query's and the value's head_dim, and its padded size where FlashInfer runs.
    head_dim: int
    padded_head_dim: int
    num_heads: int
    num_kv_heads: int
    softcap: float | None
    # Kernels that may run, depending on lengths: FlashInfer's "fa3", "fa2" or "auto" (FlashInfer chooses), "sdpa" for
    # small batches; "torch" or "dense" as fallbacks. Empty if the call would raise an error.
    kernels: tuple[str, ...]
    biased: bool
    sinks: bool
    # Reason for a fallback on a supported GPU, or another remark.
    reason: str | None
    # Reason to compute padded queries.
    note: str | None = None

    @property
    def remarks(self) -> str:
        """Reason and note."""
        return "; ".join(filter(None, (self.reason, self.note)))

    @property
    def cells(self) -> tuple[str, ...]:
        """Cells of a table row."""
        heads, kv_heads, size, padded = self.num_heads, self.num_kv_heads, self.head_dim, self.padded_head_dim
        extras = [] if self.softcap is None else [f"softcap {self.softcap:g}"]
        extras += ["position_bias"] * self.biased + ["sinks"] * self.sinks
        return (
            self.layers,
            self.pattern,
            str(heads) if heads == kv_heads else f"{heads} on {kv_heads}",
            str(size) if size == padded else f"{size} -> {padded}",
            ", ".join(self.kernels) or "refused",
            ", ".join(extras),
        )


@dataclass(frozen=True, slots=True)
class ModelPlan(Screen):
    """Predicted attention of a model; `print(plan)` shows a table."""

    model_type: str
    # Class of the model, or of the config if the model cannot be built.
    class_name: str
    dtype: torch.dtype
    # Compute capability of the GPU; None without a GPU, where the torch backend runs.
    capability: tuple[int, int] | None
    # Whether `unpad` supports the model, whether it can capture CUDA graphs, and the reasons if not.
    unpad: bool
    unpad_reason: str | None
    cuda_graphs: bool
    cuda_graphs_reason: str | None
    # One row per spec; empty if there is a problem.
    layers: tuple[LayerPlan, ...]
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for `json.dumps`."""
        capability = None if self.capability is None else ".".join(map(str, self.capability))
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch."), "capability": capability}

    def _blocks(self) -> tuple[Block, Block]:
        """Returns two blocks: the layers, and facts about the model."""
        where = "without a GPU" if self.capability is None else "compute capability {}.{}".format(*self.capability)
        title = f"{self.class_name} ({self.model_type}), {str(self.dtype).removeprefix('torch.')}, {where}"
        layers = [replace(layer, layers=_abbreviated(layer.layers)) for layer in self.layers]
        facts = [(f"layers {layer.layers}", layer.remarks) for layer in layers if layer.remarks]
        if self.problem is not None:
            facts.append(("attention", f"not known, {self.problem}"))
        facts.append(("unpad", "yes" if self.unpad else f"no, {self.unpad_reason}"))
        # Without a reason that the line above has.
        if self.cuda_graphs:
            facts.append(("CUDA graphs", "yes" + ", on a GPU" * (self.capability is None)))
        elif self.unpad:
            facts.append(("CUDA graphs", f"no, {self.cuda_graphs_reason}"))
        return Block(title, [layer.cells for layer in layers], _HEADER * bool(layers)), Block("", facts)


def _abbreviated(layers: str) -> str:
    """Shortens "0, 3, 6, 9, 12" to "0, 3, ..., 12"."""
    parts = layers.split(", ")
    return layers if len(parts) <= 4 else ", ".join([*parts[:2], "...", parts[-1]])


def plan_of_config(
    config: PreTrainedConfig, *, dtype: torch.dtype = torch.float16, capability: tuple[int, int] | None = None
) -> ModelPlan:
    """Predicts the kernels of each attention layer, without weights and without a GPU.

    The plan is for padded batches of the model's main input (text if possible) with the current settings; batches
    without padding may also run on torch's sdpa. By default it is for the current GPU, or for the torch backend if
    FlashInfer does not run there.
    """
    if capability is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        if flashinfer.unavailable_reason(device) is None:
            capability = torch.cuda.get_device_capability(device)
    config = copy.deepcopy(config)
    try:
        model = _build(config, dtype)
    except FOREIGN_ERRORS as error:
        name, is_ours = type(config).__name__, isinstance(error, FlashInferAttentionError)
        reason = str(error) if is_ours else f"the model cannot be built: {first_line(error)}"
        return ModelPlan(config.model_type, name, dtype, capability, False, reason, False, reason, (), reason)
    unpad_reason = _reason_against_unpad(model)
    calls, problem = _run(model)
    built = dtype
    if calls is None and dtype != torch.bfloat16:
        # On the meta device, grouped matrix products of experts accept bfloat16 only; attention does not depend on it.
        built = torch.bfloat16
        calls, _ = _run(_build(config, built))
    layers: tuple[LayerPlan, ...] = ()
    if calls is not None:
        layers = _join([(name, _plan(*call, built, dtype, capability)) for name, call in calls], type(model).__name__)
        on_eager = "its attention does not go through transformers' attention interface, and runs as with 'eager'"
        problem = None if layers else on_eager
    graphs_reason = unpad_reason or problem or _reason_against_graphs(model, layers)
    return ModelPlan(
        config.model_type, type(model).__name__, dtype, capability, unpad_reason is None, unpad_reason,
        graphs_reason is None, graphs_reason, layers, problem,
    )  # fmt: skip


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    named = getattr(transformers, (config.architectures or [""])[0], None)
    # AutoModel does not map configs to encoder-only classes such as T5EncoderModel.
    by_config = type(config) in MODEL_MAPPING and not (named is not None and named.__name__.endswith("EncoderModel"))
    with torch.device("meta"):
        build = AutoModel.from_config if by_config or named is None else named._from_config
        model: PreTrainedModel = build(config, attn_implementation=NAME, dtype=dtype)
    return model.eval()


def _backbones(model: PreTrainedModel) -> dict[Any, Family]:
    return {part: family for part in model.modules() if (family := family_of(part)) is not None}


def _reason_against_unpad(model: PreTrainedModel) -> str | None:
    if not (backbones := _backbones(model)):
        # Without the list of supported models.
        return reason_against(model).partition(";")[0]
    return next(filter(None, (family.refuse(part) for part, family in backbones.items())), None)


def _reason_against_graphs(model: PreTrainedModel, layers: Iterable[LayerPlan]) -> str | None:
    for part, family in _backbones(model).items():
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


def _run(model: PreTrainedModel) -> tuple[list[tuple[str, SpecOfLayer]] | None, str | None]:
    """Runs a model on the meta device; returns the names and specs of its layers, or None and the reason."""
    if _reason_against_unpad(model) is None:
        for part, family in _backbones(model).items():
            if family.own_attention is not None:
                family.own_attention().route(part)
    problem: str | None = None
    for inputs in _inputs(model):
        try:
            calls = _calls(model, inputs)
        except FlashInferAttentionError as error:
            return None, str(error)
        except FOREIGN_ERRORS as error:
            problem = problem or f"its code asks tensors for values, or for other inputs: {first_line(error)}"
        else:
            names = {module: name for name, module in model.named_modules()}
            return [(names.get(call[0], type(call[0]).__name__), call) for call in calls], None
    return None, problem


def _calls(model: PreTrainedModel, inputs: dict[str, object]) -> list[SpecOfLayer]:
    with torch.no_grad():
        try:
            with keep_specs() as calls:
                model(**inputs)
        except FOREIGN_ERRORS:
            # The model may read values that do not affect attention, such as a check for finite values. If the specs
            # are the same for two different constants, they do not depend on the values.
            answered = []
            for answer in (False, True):
                with keep_specs() as calls, _Answers(answer):
                    model(**inputs)
                answered.append(calls)
            if answered[0] != answered[1]:
                raise
    return calls


class _Answers(TorchFunctionMode):
    """Answers `.item()` and conversions to Python numbers on meta tensors with a constant."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        names = ("item", "__bool__", "__int__", "__float__", "__index__")
        if getattr(func, "__name__", "") in names and args[0].is_meta:
            args = (torch.full(args[0].shape, self._answer, dtype=args[0].dtype, device="cpu"), *args[1:])
        return func(*args, **(kwargs or {}))


def _inputs(model: PreTrainedModel) -> Iterator[dict[str, object]]:
    """Yields inputs on the meta device: the main input alone, then together with the others."""
    config, main = model.config, model.main_input_name
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    shapes = {
        "pixel_values": (getattr(vision, "num_channels", 3), *((size, size) if isinstance(size, int) else size)),
        "input_values": (16_000,),
        "input_features": (getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 64)),
    }
    text = ("input_ids", "attention_mask")
    tries: list[tuple[str, ...]] = [(main,)] if main in shapes else [text]
    tries += [(*text, "pixel_values")] if main not in ("input_values", "input_features") else []
    others = ("decoder_input_ids", "decoder_attention_mask") if config.is_encoder_decoder else ()
    parameters = inspect.signature(type(model).forward).parameters
    for chosen in tries:
        inputs: dict[str, object] = {"use_cache": False} if "use_cache" in parameters else {}
        for name in parameters.keys() & {*chosen, *others}:
            dtype = model.dtype if name in shapes else torch.long
            inputs[name] = torch.ones(2, *shapes.get(name, (8,)), dtype=dtype, device="meta")
        yield inputs


def _join(plans: Sequence[tuple[str, LayerPlan]], otherwise: str) -> tuple[LayerPlan, ...]:
    """Merges equal plans, and shortens the names of their layers.

    Of "encoder.layer.3.attention" the number remains, and words that not all names share; `otherwise` if none remain.
    """
    paths = [name.split(".") for name, _ in plans]
    shared = set[str]().union(*paths).intersection(*paths)
    # A layer that runs several times, like ALBERT's, counts once per call.
    is_repeated = len({name for name, _ in plans}) < len(plans)
    seen: Counter[str] = Counter()
    groups: dict[tuple[str, LayerPlan], list[int]] = {}
    for path, (_, plan) in zip(paths, plans):
        numbers = [word for word in path if word.isdecimal()]
        if numbers:
            path[path.index(numbers[0])] = "{}"
        kind = " ".join(word for word in path if not (word.isdecimal() or word in shared))
        groups.setdefault((kind, plan), []).extend(seen[kind] if is_repeated else int(first) for first in numbers[:1])
        seen[kind] += 1
    return tuple(
        replace(plan, layers=kind.format(_ranges(group)) or otherwise) for (kind, plan), group in groups.items()
    )


def _ranges(numbers: Iterable[int]) -> str:
    """Formats numbers like "0-3, 7"."""
    runs = itertools.groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for _, pairs in runs if (run := list(pairs))]
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def _plan(
    layer: torch.nn.Module,
    spec: AttentionSpec,
    built: torch.dtype,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
) -> LayerPlan:
    """Plans a spec for `dtype`; it was recorded from a model built in the dtype `built`."""
    spec = replace(spec, dtype=dtype) if spec.dtype == built else spec
    pattern, head_dim, fallback = spec.pattern, spec.widest_head_dim, fallback_of(spec)
    kernels, reason = _kernels(spec, capability, fallback)
    is_flashinfer = bool(kernels) and kernels[0] in _KERNELS
    if type(layer).__module__.startswith("hf_flashinfer_attn."):
        reason = "after unpad; without, the model computes attention by itself"
    is_ragged = fallback is None or fallback.backend is not Backend.DENSE
    keeps = spec.has_lazy_mask and spec.q_length == spec.kv_length and not pattern.is_causal and is_ragged
    return LayerPlan(
        "", pattern.name, pattern.left, pattern.right, head_dim,
        flashinfer.padded_head_dim(head_dim) if is_flashinfer else head_dim, spec.num_heads, spec.num_kv_heads,
        spec.softcap, kernels, spec.biased, spec.sinks, reason,
        spec.padded_queries if keeps or spec.whole_mask == WINDOW_KEEPS else None,
    )  # fmt: skip


def _kernels(
    spec: AttentionSpec, capability: tuple[int, int] | None, fallback: Choice | None
) -> tuple[tuple[str, ...], str | None]:
    """Returns the kernels that may run a spec, and the reason if FlashInfer does not."""
    settings, pattern = current_settings(), spec.pattern
    is_forbidden = settings.backend == "flashinfer" or settings.strict
    no_gpu = None if capability is None else flashinfer.capability_reason(capability)
    if capability is None or no_gpu is not None or settings.backend == "torch":
        if settings.backend != "torch" and is_forbidden:
            return (), no_gpu or "there is no GPU that FlashInfer supports"
        if fallback is not None and fallback.backend is Backend.DENSE:
            return ("dense",), fallback.reason
        return ("torch",), no_gpu
    if fallback is None and (reason := flashinfer.dtype_reason(spec.dtype, capability)) is not None:
        fallback = Choice(Backend.TORCH, reason)
    if fallback is not None:
        return () if is_forbidden else (fallback.backend.value,), fallback.reason
    visible = float("inf") if pattern.left is None or pattern.right is None else pattern.left + pattern.right + 1
    # The kernel of the longest rows first, then that of the shortest.
    names: list[str] = [
        kernel_for(capability, spec.widest_head_dim, min(visible, keys), biased=spec.biased, sinks=spec.sinks)
        for keys in (float("inf"), 1.0)
    ]
    if pattern == FULL and settings.backend == "auto" and may_run_sdpa(spec):
        names.append("sdpa")
    return tuple(dict.fromkeys(names)), None


_KERNELS = ("fa2", "fa3", "auto")


def modules_of(plan: ModelPlan, dtype: torch.dtype | None = None) -> tuple[KernelModule, ...]:
    """Returns all modules that a model may need for any row lengths, by default in the dtype of the plan.

    Where FlashInfer chooses a kernel itself ("auto", on some Blackwell GPUs), only its fallback fa2 is included.
    """
    modules: dict[KernelModule, None] = {}
    for layer in plan.layers:
        # Rows shorter than a window need the kernel without one.
        windows = (False,) if layer.left is None or layer.biased else (False, True)
        names = [name for name in layer.kernels if name in _KERNELS]
        for name, window in itertools.product(names, windows):
            kernel: Literal["fa2", "fa3"] = "fa3" if name == "fa3" else "fa2"
            size = flashinfer.padded_head_dim(layer.head_dim)
            softcap = layer.softcap is not None
            modules[KernelModule(kernel, dtype or plan.dtype, size, window, softcap, layer.biased)] = None
    return tuple(modules)
