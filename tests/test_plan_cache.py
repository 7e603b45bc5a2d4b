"""Plan reuse: a later layer finds the plan of an earlier one if nothing that a plan depends on differs."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sliding_window_overlay

import hf_flashinfer_attn
from hf_flashinfer_attn.attention.plan import TorchPlan
from hf_flashinfer_attn.attention.plan_cache import Found, find_plan
from hf_flashinfer_attn.attention.spec import AttentionInputs, LayerArguments
from hf_flashinfer_attn.integration.functions import attention_forward, attention_mask
from hf_flashinfer_attn.ragged.forward_state import cu_seqlens_of, uniform_state
from hf_flashinfer_attn.ragged.layout import RaggedLayout
from hf_flashinfer_attn.ragged.lazy_mask import RaggedMask

VALID = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
Sides = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Layer(torch.nn.Module):
    """Has what a plan may depend on."""

    def __init__(self, config: object = None, *, is_causal: bool = False) -> None:
        super().__init__()
        self.config, self.is_causal = config, is_causal

    def forward(self, hidden_states, attention_mask): ...  # type: ignore[no-untyped-def]


class Other(Layer):
    """Of another class."""


class PixtralAttention(Layer):
    """Packs images by their positions."""


def sides(*lengths: int, rows: int = 2, heads: int = 2, dtype: torch.dtype = torch.float32) -> Sides:
    lengths = lengths or (5, 5)
    query, key, value = (torch.randn(rows, heads, n, 8, dtype=dtype) for n in (lengths[0], lengths[1], lengths[1]))
    return query, key, value


def mask_of(function: Callable[..., Any] = bidirectional_mask_function, valid: Any = VALID) -> RaggedMask:
    return attention_mask(2, 5, 5, mask_function=function, attention_mask=valid)


def find(layer: torch.nn.Module, tensors: Sides, mask: torch.Tensor | None = None, **options: Any) -> Found | None:
    given: dict[str, Any] = {**dict.fromkeys(LayerArguments._fields), "dropout": 0.0, "output_attentions": False}
    return find_plan(layer, *tensors, mask, LayerArguments(**{**given, **options}))


@pytest.fixture(autouse=True)
def _no_plans_of_other_tests() -> None:
    uniform_state.cache_clear()


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The layers whose arguments were parsed, since there was no plan for them."""
    layers: list[torch.nn.Module] = []
    parse = AttentionInputs.of_layer

    def of_layer(module: torch.nn.Module, *arguments: Any, **options: Any) -> AttentionInputs:
        layers.append(module)
        return parse(module, *arguments, **options)

    monkeypatch.setattr(AttentionInputs, "of_layer", of_layer)
    return layers


@pytest.mark.parametrize("through", ["nothing", "mask", "cu_seqlens"])
def test_later_layers_run_without_parsing_their_arguments(through: str, parsed: list[torch.nn.Module]) -> None:
    config, rows = object(), 1 if through == "cu_seqlens" else 2
    layers = [Layer(config) for _ in range(3)]
    mask = mask_of() if through == "mask" else None
    options: dict[str, Any] = {}
    if through == "cu_seqlens":
        cu_seqlens = cu_seqlens_of(RaggedLayout.from_lengths([2, 3]))
        options = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    tensors = [sides(rows=rows) for _ in layers]
    with hf_flashinfer_attn.trace() as trace:
        outputs = [attention_forward(layer, *some, mask, **options)[0] for layer, some in zip(layers, tensors)]
    assert parsed == layers[:1]
    assert [(call.layer, call.kernel) for call in trace.calls] == [("Layer", "torch")] * 3
    for some, output in zip(tensors, outputs):
        fresh = {name: torch.tensor([0, 2, 5]) for name in options}
        expected, _ = attention_forward(Other(object()), *some, None if mask is None else mask_of(), **fresh)
        assert torch.equal(output, expected)


CHANGES: dict[str, dict[str, Any]] = {
    "class": {"layer": lambda config: Other(config)},
    "config": {"layer": lambda config: Layer(object())},
    "causal module": {"layer": lambda config: Layer(config, is_causal=True)},
    "query shape": {"tensors": lambda: sides(3, 5)},
    "key shape": {"tensors": lambda: sides(5, 7)},
    "heads": {"tensors": lambda: sides(heads=4)},
    "grouped heads": {"tensors": lambda: (*sides(heads=4)[:1], *sides()[1:])},
    "value shape": {"tensors": lambda: (*sides()[:2], torch.randn(2, 2, 5, 4))},
    "query dtype": {"tensors": lambda: (sides()[0].double(), *sides()[1:])},
    "key dtype": {"tensors": lambda: (sides()[0], sides()[1].double(), sides()[2])},
    "value dtype": {"tensors": lambda: (*sides()[:2], sides()[2].double())},
    "scaling": {"options": {"scaling": 0.5}},
    "causal call": {"options": {"is_causal": True}},
    "softcap": {"options": {"softcap": 2.0}},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_a_field_that_differs_is_another_plan(change: str, masked: bool) -> None:
    config, mask = object(), mask_of() if masked else None
    one, tensors = Layer(config), sides()
    attention_forward(one, *tensors, mask)
    same = find(Layer(config), sides(), mask)
    assert same is not None
    assert isinstance(same.plan, TorchPlan)
    changed = CHANGES[change]
    layer = changed.get("layer", Layer)(config)
    other = find(layer, changed.get("tensors", sides)(), mask, **changed.get("options", {}))
    assert other is not None
    assert other.plan is None
    # The last plan is kept, whose layers come one after another.
    other.keep(same.plan)
    back = find(Layer(config), sides(), mask)
    assert (back is None or back.plan is None) == (other.state is same.state)


@pytest.mark.parametrize(
    "settings", [{"backend": "torch"}, {"strict": True}, {"jit": "never"}, {"padded_queries": "keep"}], ids=str
)
def test_settings_that_differ_are_another_plan(settings: dict[str, Any]) -> None:
    layer, tensors, mask = Layer(), sides(), mask_of()
    attention_forward(layer, *tensors, mask)
    hf_flashinfer_attn.configure(**settings)
    found = find(layer, tensors, mask)
    assert found is not None
    assert found.plan is None


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_threads_share_the_plan_of_a_shared_state_only(masked: bool) -> None:
    layer, tensors, mask = Layer(), sides(), mask_of() if masked else None
    attention_forward(layer, *tensors, mask)
    found: list[Found | None] = []
    thread = threading.Thread(target=lambda: found.append(find(layer, tensors, mask)))
    thread.start()
    thread.join()
    assert found[0] is not None
    assert (found[0].plan is None) == masked
    assert found[0].state.is_shared == (not masked)


def test_masks_of_one_forward_have_plans_of_their_own() -> None:
    """As do the bands of packed sequences, which share a layout."""
    layer = Layer()
    window = sliding_window_overlay(2)
    masks = [attention_mask(1, 5, 5, mask_function=function) for function in (causal_mask_function, window)]
    layout = RaggedLayout.from_lengths([2, 3])
    cu_seqlens = cu_seqlens_of(layout)
    options = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    tensors = sides(rows=1)
    for mask in (None, *masks):
        attention_forward(layer, *tensors, mask, **options)
    found = [find(layer, tensors, mask, **options) for mask in (None, *masks)]
    assert {type(one) for one in found} == {Found}
    assert len({id(one.state) for one in found if one}) == 1
    plans = [one.plan for one in found if one]
    assert len(set(map(id, plans))) == 3
    assert None not in plans
    # A window without a mask, another tensor of the same values, padding that a mask hides.
    assert find(layer, tensors, None, sliding_window=2, **options) is None
    assert find(layer, tensors, None, cu_seq_lens_q=cu_seqlens.clone(), cu_seq_lens_k=cu_seqlens.clone()) is None
    padded = attention_mask(1, 5, 5, mask_function=causal_mask_function, attention_mask=torch.ones(1, 5).bool())
    assert find(layer, tensors, padded, **options) is None
    other = cu_seqlens_of(layout)
    unplanned = find(layer, tensors, None, cu_seq_lens_q=other, cu_seq_lens_k=other)
    assert unplanned is not None
    assert unplanned.plan is None
    cu_seqlens[1] = 3
    assert find(layer, tensors, None, **options) is None


@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.1}, {"output_attentions": True}, {"position_bias": torch.zeros(1, 2, 5, 5)},
     {"s_aux": torch.zeros(2)}, {"scaling": torch.tensor(0.5)}, {"softcap": torch.tensor(0.5)}, {"sliding_window": 9}],
    ids=lambda options: "-".join(options),
)  # fmt: skip
def test_what_is_parsed_in_every_call(options: dict[str, Any]) -> None:
    layer, tensors = Layer(), sides()
    attention_forward(layer, *tensors, None)
    assert find(layer, tensors) is not None
    assert find(layer, tensors, **options) is None


def test_tensors_that_are_looked_at_in_every_call() -> None:
    layer, tensors, mask = Layer(), sides(), mask_of()
    attention_forward(layer, *tensors, mask)
    attention_forward(layer, *tensors, None)
    for place in range(3):
        some = list(tensors)
        some[place] = some[place].clone().requires_grad_()
        assert find(layer, tuple(some)) is None
        with torch.no_grad():
            assert find(layer, tuple(some)) is not None
    assert find(layer, (tensors[0][:1], *tensors[1:])) is None
    # `get_device` does not tell the meta device, where specs are recorded, from the CPU.
    on_meta = tuple(side.to("meta") for side in tensors)
    assert find(layer, on_meta) is None
    assert find(layer, on_meta, mask) is None
    assert find(layer, tensors, VALID) is None
    assert find(layer, tensors, torch.zeros(2, 1, 5, 5)) is None
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    assert find(PixtralAttention(), tensors, position_ids=positions) is None
    assert find(layer, tensors, position_ids=positions) is not None
    mask.add_(0.0)
    assert find(layer, tensors, mask) is None


def test_modes_that_are_looked_at_in_every_call() -> None:
    layer, tensors = Layer(), sides()
    attention_forward(layer, *tensors, None)
    found: list[Found | None] = []

    def look(query: torch.Tensor) -> torch.Tensor:
        found.append(find(layer, (query, *tensors[1:])))
        return query

    with forward_ad.dual_level():
        look(tensors[0])
    make_fx(look)(tensors[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(look, tensors[0], check_trace=False)
    assert set(found) == {None}
    look(tensors[0])
    assert found[-1] is not None


def test_input_that_is_cast_is_parsed_again(monkeypatch: pytest.MonkeyPatch, parsed: list[torch.nn.Module]) -> None:
    """The plan is one of the tensors after the cast."""
    monkeypatch.setattr(
        "hf_flashinfer_attn.attention.spec.is_cast_as_flash", lambda query: query.dtype == torch.float32
    )
    layer, tensors = Layer(), sides()
    layer.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    outputs = [attention_forward(layer, *tensors, None)[0] for _ in range(2)]
    assert parsed == [layer, layer]
    assert {output.dtype for output in outputs} == {torch.bfloat16}


def test_a_softcap_that_is_written_to_is_another_plan() -> None:
    layer, tensors, softcap = Layer(), sides(), torch.tensor(1.0)
    capped = attention_forward(layer, *tensors, None, softcap=softcap)[0]
    softcap.fill_(50.0)
    actual = attention_forward(layer, *tensors, None, softcap=softcap)[0]
    assert torch.equal(actual, attention_forward(layer, *tensors, None, softcap=50.0)[0])
    assert not torch.equal(actual, capped)


def test_the_plan_of_another_state_is_not_kept() -> None:
    """Keys of another length than those of a mask that hides nothing: attention runs as without a mask."""
    mask = mask_of(valid=torch.ones(2, 5, dtype=torch.bool))
    attention_forward(Layer(), *sides(5, 7), mask)
    assert not mask.state.recent


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_another_stream_is_another_plan(masked: bool) -> None:
    layer = Layer()
    query, key, value = (side.cuda() for side in sides(dtype=torch.float16))
    mask = attention_mask(2, 5, 5, attention_mask=VALID.cuda(), device="cuda") if masked else None
    attention_forward(layer, query, key, value, mask)
    found = find(layer, (query, key, value), mask)
    assert found is not None
    assert found.plan is not None
    with torch.cuda.stream(torch.cuda.Stream()):
        other = find(layer, (query, key, value), mask)
    assert other is not None
    assert other.plan is None
