"""attn_implementation="flashinfer" gives what eager attention gives, in every family and with every kind of padding.

On a machine without a GPU the torch backend runs: masks, layouts and the choice of a path are the same code.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from paired_models import assert_near
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

import hf_flashinfer_attn
from model_families import FAMILIES, Example, Family, Padding, build_model, find_class, implementations_in_use

TOLERANCE = 1e-5
# What a mask, or attention as such, changes at least.
NOTICEABLE_PADDING, NOTICEABLE_ATTENTION = 1e-4, 1e-3
BY_NAME = {family.name: family for family in FAMILIES}
EQUAL_TO_SDPA = (
    "bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert", "nomic-bert", "eurobert",
    "esm-absolute", "esm-rotary", "vit", "dinov2", "siglip-text", "siglip-vision", "clip-text", "clip-vision",
    "whisper-encoder", "llama", "qwen3",
)  # fmt: skip


def param(family: Family, *padding: Padding) -> Any:
    missing = f"{family.name} is not in transformers {transformers.__version__}"
    marks = () if family.is_in_this_transformers else pytest.mark.skip(reason=missing)
    return pytest.param(family, *padding, marks=marks, id="-".join([family.name, *(case.value for case in padding)]))


CASES = [param(family, padding) for family in FAMILIES for padding in family.paddings]
PADDED_CASES = [case for case in CASES if case.values[1] is not Padding.NO_MASK]
EACH_FAMILY = [param(family) for family in FAMILIES]


@functools.lru_cache(maxsize=8)
def model_of(name: str, implementation: str = "") -> PreTrainedModel:
    """A family's model with the implementation, or with the family's reference."""
    return build_model(BY_NAME[name], implementation or BY_NAME[name].reference)


def example_of(family: Family, padding: Padding) -> Example:
    generator = torch.Generator().manual_seed(family.seed + list(Padding).index(padding))
    return family.make_inputs(model_of(family.name).config, generator, padding)


@torch.no_grad()
def outputs_of(model: PreTrainedModel, family: Family, example: Example) -> dict[str, Tensor]:
    # Copies, so that a model that writes to its inputs does not change those of the next.
    result: Any = model(**{name: tensor.clone() for name, tensor in (example.inputs | example.masks).items()})
    # A few models return a tensor, not an output with names.
    return {name: getattr(result, name, result) for name in family.outputs}


def valid_part(outputs: dict[str, Tensor], example: Example) -> dict[str, Tensor]:
    parts = {name: output[example.valid[name]] if name in example.valid else output for name, output in outputs.items()}
    assert any(part.numel() > 0 for part in parts.values()), "nothing to compare"
    return {name: part for name, part in parts.items() if part.numel() > 0}


def largest_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max(largest(before[name] - after[name]) for name in before)


def largest(values: Tensor) -> float:
    return values.abs().max().item()


@pytest.mark.parametrize(("family", "padding"), CASES)
def test_equals_eager(family: Family, padding: Padding) -> None:
    if not family.takes_any_name:
        refused = r"classes of their own for 'eager'|calls flash-attn itself"
        with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match=refused):
            build_model(family, "flashinfer")
        return
    reference, model = model_of(family.name), model_of(family.name, "flashinfer")
    assert implementations_in_use(reference) == {family.reference}
    assert implementations_in_use(model) == {"flashinfer"}
    example = example_of(family, padding)
    if family.name == "sew" and Version(transformers.__version__) < Version("5.16") and example.masks:
        # Its branch for flash kernels does not squeeze the padding mask as it squeezes the hidden states.
        with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match="2D attention mask of shape"):
            outputs_of(model, family, example)
        return

    expected = outputs_of(reference, family, example)
    with hf_flashinfer_attn.trace() as trace:
        actual = outputs_of(model, family, example)

    assert bool(trace.calls) == family.is_on_the_interface
    expected, actual = valid_part(expected, example), valid_part(actual, example)
    for name, right in expected.items():
        assert_near(actual[name], right, TOLERANCE)


@pytest.mark.parametrize("name", EQUAL_TO_SDPA)
@pytest.mark.parametrize("padding", [Padding.NO_MASK, Padding.RIGHT])
def test_equals_sdpa(name: str, padding: Padding) -> None:
    family = BY_NAME[name]
    if padding in family.paddings:
        example = example_of(family, padding)
        models = build_model(family, "sdpa"), model_of(name, "flashinfer")
        expected, actual = (valid_part(outputs_of(model, family, example), example) for model in models)
        assert largest_change(expected, actual) <= TOLERANCE * max(1.0, *map(largest, expected.values()))


@pytest.mark.parametrize(("family", "padding"), PADDED_CASES)
def test_padding_matters(family: Family, padding: Padding) -> None:
    """Without this, a parity test passes with a mask that nobody looks at."""
    example = example_of(family, padding)
    assert all((mask == 0).any() for mask in example.masks.values())

    model = model_of(family.name)
    with_padding, without = (outputs_of(model, family, one) for one in (example, example.without_padding()))
    change = largest_change(valid_part(with_padding, example), valid_part(without, example))
    if padding in family.harmless:
        assert change <= TOLERANCE * 10
    else:
        assert change > NOTICEABLE_PADDING


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_attention_matters(family: Family) -> None:
    """Attention is far from uniform: an average over all values in its place changes the outputs."""
    if not family.is_on_the_interface or not family.takes_any_name:
        return
    AttentionInterface.register("average_of_values", average_of_values)
    example = example_of(family, Padding.NO_MASK)
    expected = outputs_of(model_of(family.name), family, example)

    model = build_model(family, family.reference)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "average_of_values"

    assert largest_change(expected, outputs_of(model, family, example)) > NOTICEABLE_ATTENTION


def average_of_values(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    mean = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).mean(2, keepdim=True)
    return mean.expand(-1, -1, query.shape[2], -1).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_both_models_have_the_same_weights(family: Family) -> None:
    if not family.takes_any_name:
        return
    weights, others = (model_of(family.name, one).state_dict() for one in ("", "flashinfer"))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_the_registry_is_broad() -> None:
    assert len(BY_NAME) == len(FAMILIES), "two families share a name"
    architectures = {family.model_class.split("For")[0].removesuffix("Model") for family in FAMILIES}
    assert len(architectures) >= 70
    assert sum(not family.uses_interface for family in FAMILIES) >= 20


def test_a_skipped_family_is_really_missing() -> None:
    for family in FAMILIES:
        if not family.is_in_this_transformers:
            with pytest.raises((AttributeError, ModuleNotFoundError)):
                find_class(family.model_class)
