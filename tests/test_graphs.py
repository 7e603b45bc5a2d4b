"""CUDA graphs of packed forwards: sizes and what makes them stale on any machine, the graphs themselves on a GPU."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
)

import hf_flashinfer_attn
from hf_flashinfer_attn import GraphOptions, graph_statistics, repad, unpad
from hf_flashinfer_attn.ragged.layout import RaggedLayout
from hf_flashinfer_attn.tools.bench.workload import REQUEST_SETS
from hf_flashinfer_attn.unpadding.graph_options import row_bucket, token_bucket
from hf_flashinfer_attn.unpadding.graphs import GraphedForward, graphs_of
from hf_flashinfer_attn.unpadding.model_state import ModelState

_SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "num_labels": 2,
}
_CASES = {
    "bert": (BertModel, BertConfig(**_SIZES)),
    "bert-head-dim-64": (BertModel, BertConfig(**{**_SIZES, "num_attention_heads": 2})),
    "classifier": (BertForSequenceClassification, BertConfig(**_SIZES)),
    "roberta": (RobertaModel, RobertaConfig(**_SIZES, max_position_embeddings=514)),
    "qwen3": (Qwen3Model, Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=64, use_cache=False)),
}


def build(name: str = "bert", implementation: str = "flashinfer", device: str = "cpu") -> Any:
    model_class, config = _CASES[name]
    torch.manual_seed(0)
    model = model_class._from_config(copy.deepcopy(config), attn_implementation=implementation)
    return model.eval().to(device, torch.float16 if device == "cuda" else torch.float32)


def batch(rows: int, longest: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    lengths = torch.randint(1, longest + 1, (rows,))
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = torch.randint(3, 199, mask.shape)
    return {"input_ids": (ids * mask + (1 - mask)).to(device), "attention_mask": mask.to(device)}


@given(tokens=st.integers(1, 200_000))
def test_a_bucket_is_large_enough_and_not_much_larger(tokens: int) -> None:
    size = token_bucket(tokens)
    assert size >= tokens
    assert size == token_bucket(size)
    assert size == 64 or (size - tokens) / size < (1 / 9 if size <= 2_048 else 1 / 17)


@given(rows=st.integers(1, 5_000))
def test_rows_go_up_to_a_power_of_two(rows: int) -> None:
    size = row_bucket(rows)
    assert size == max(8, 1 << (rows - 1).bit_length()) == row_bucket(size)
    assert rows <= size


@pytest.mark.parametrize("requests", ["chat", "bulk", "single", "sorted", "uniform"])
def test_waste_of_the_workloads(requests: str) -> None:
    chosen = REQUEST_SETS[requests]
    lengths = chosen.lengths()
    tokens = [sum(lengths[start : start + chosen.batch_size]) for start in range(0, len(lengths), chosen.batch_size)]
    assert 1 - sum(tokens) / sum(map(token_bucket, tokens)) < (0.06 if requests == "single" else 0.04)


@pytest.mark.parametrize("name", ["max_tokens", "max_rows", "max_memory_gib"])
def test_options_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        GraphOptions(**{name: 0})


def test_a_topped_up_layout() -> None:
    layout = RaggedLayout.for_graph([3, 2], 8, 64, None)
    assert layout.query.lengths == (3, 2, 0, 0, 0, 0, 0, 0)
    assert (layout.query.padded_shape, layout.query.total_tokens, layout.query.is_full) == ((1, 64), 5, True)


class _Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        doubled: torch.Tensor = 2 * self.inner(hidden)
        return doubled


def _add_an_adapter(model: Any) -> None:
    model.encoder.layer[0].output.dense = _Doubled(model.encoder.layer[0].output.dense)


def _replace_a_weight(model: Any) -> None:
    dense = model.encoder.layer[1].output.dense
    dense.weight = nn.Parameter(dense.weight.detach() * 2)


def _replace_the_data_of_a_weight(model: Any) -> None:
    dense = model.encoder.layer[1].output.dense
    dense.weight.data = dense.weight.detach() * 2


def _replace_a_forward(model: Any) -> None:
    dense = model.encoder.layer[1].output.dense
    forward = dense.forward
    dense.forward = lambda hidden: 2 * forward(hidden)


def _hook_a_layer(model: Any) -> None:
    model.encoder.layer[1].output.dense.register_forward_hook(lambda module, args, output: 2 * output)


_CHANGES = [_add_an_adapter, _replace_a_weight, _replace_the_data_of_a_weight, _replace_a_forward, _hook_a_layer]


def _swap_a_hook(model: Any) -> None:
    hooks = model.encoder.layer[0].output.dense._forward_hooks
    hooks.clear()
    model.encoder.layer[0].output.dense.register_forward_hook(lambda module, args, output: 3 * output)


def _transpose_a_weight(model: Any) -> None:
    dense = model.encoder.layer[0].attention.output.dense
    dense.weight.data = dense.weight.data.t()


def _patch_a_class(model: Any) -> None:
    model.encoder.layer[0].__class__ = type("Other", (type(model.encoder.layer[0]),), {})


def _scale_attention(model: Any) -> None:
    model.encoder.layer[1].attention.self.scaling *= 2


def _widen_a_norm(model: Any) -> None:
    model.encoder.layer[1].output.LayerNorm.eps = 1.0


def _replace_a_method(model: Any) -> None:
    layer = model.encoder.layer[1]
    layer.feed_forward_chunk = lambda hidden: hidden


def _norm_embeddings(model: Any) -> None:
    model.embeddings.word_embeddings.max_norm = 1.0


_MORE_CHANGES = [
    _swap_a_hook,
    _transpose_a_weight,
    _patch_a_class,
    _scale_attention,
    _widen_a_norm,
    _replace_a_method,
    _norm_embeddings,
]


@pytest.mark.parametrize(
    "change", [*_CHANGES, *_MORE_CHANGES, lambda model: model.train(), lambda model: model.double()]
)
def test_a_changed_model_is_told(change: Callable[[Any], object]) -> None:
    model = build()
    if change is _swap_a_hook:
        _hook_a_layer(model)
        model.encoder.layer[0].output.dense.register_forward_hook(lambda module, args, output: 2 * output)
    state = ModelState(model)
    assert state.holds()
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(2)
        model(**batch(2, 5))
    # Weights may be written to in place.
    assert state.holds()
    change(model)
    assert not state.holds()


class _Quantized(torch.Tensor):
    """A tensor without memory of its own, as those of torchao."""

    @staticmethod
    def __new__(cls) -> _Quantized:
        made: _Quantized = torch.Tensor._make_wrapper_subclass(cls, (128, 128), dtype=torch.bfloat16)  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return _Quantized()
        raise NotImplementedError(func)


def _quantize(model: Any) -> None:
    model.encoder.layer[0].attention.output.dense.weight = nn.Parameter(_Quantized(), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: None, None),
        (_quantize, "weights of type _Quantized"),
        (lambda model: model.float(), "not in half precision"),
        (_add_an_adapter, "_Doubled in it"),
        (_replace_a_forward, "the forward of a Linear"),
        (_hook_a_layer, "a hook on a module"),
        # Transformers' own hooks stay behind.
        (lambda model: model(torch.ones(1, 3, dtype=torch.long), output_hidden_states=True), None),
    ],
)
def test_what_no_graph_can_stand_for(change: Callable[[Any], object], reason: str | None) -> None:
    model = build().to(torch.bfloat16)
    with torch.no_grad():
        change(model)
    refusal = ModelState(model).refusal
    assert (refusal is None) == (reason is None)
    assert reason is None or reason in str(refusal)


def test_shallow_copies_are_themselves() -> None:
    model = unpad(build(), cuda_graphs=True)
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other._modules["encoder"] = copy.deepcopy(model.encoder)
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.mul_(2)
        inputs = batch(3, 9)
        expected = unpad(build())
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected(**inputs).last_hidden_state)
        assert not torch.equal(model(**inputs).last_hidden_state, other(**inputs).last_hidden_state)


def test_on_a_cpu_everything_runs_without() -> None:
    model, padded = unpad(build(), cuda_graphs=True), build()
    inputs = batch(3, 9)
    with torch.no_grad():
        actual, expected = model(**inputs).last_hidden_state, padded(**inputs).last_hidden_state
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[valid], expected[valid], rtol=1e-5, atol=1e-5)
    assert graph_statistics(model).captured == 0
    with pytest.raises(ValueError, match="BertModel is on 'cpu', and CUDA graphs are captured on a GPU"):
        hf_flashinfer_attn.capture_graphs(model, [(8, 40)])
    with pytest.raises(ValueError, match="has no CUDA graphs"):
        hf_flashinfer_attn.capture_graphs(padded, [(8, 40)])
    with pytest.raises(ValueError, match="Qwen3Model takes no token_type_ids"):
        hf_flashinfer_attn.capture_graphs(unpad(build("qwen3"), cuda_graphs=True), [(8, 40)], token_type_ids=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_graphs_of_their_own(duplicate: Callable[[Any], Any]) -> None:
    model = unpad(build(), cuda_graphs=GraphOptions(max_tokens=512))
    other = duplicate(model)
    mine, its = graphs_of(model), graphs_of(other)
    assert mine is not None
    assert its is not None
    assert mine is not its
    assert its.options == mine.options
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.mul_(2)
        inputs = batch(3, 9)
        assert not torch.equal(model(**inputs).last_hidden_state, other(**inputs).last_hidden_state)
    repad(model)
    assert graphs_of(model) is None
    assert "forward" not in vars(model)
    assert graphs_of(other) is its


def test_what_is_known_not_to_be_captured_takes_no_graph() -> None:
    model = unpad(build(), cuda_graphs=True)
    graphs = graphs_of(model)
    assert graphs is not None
    cuda = torch.device("cuda")
    with torch.no_grad():
        assert graphs.takes(model, cuda, 2, 10)
        graphs._state = ModelState(model)
        assert graphs.refusal() == "its weights are not in half precision"
        assert not graphs.takes(model, cuda, 2, 10)
        model.half()
        assert graphs.takes(model, cuda, 2, 10)


def _hook_with_accelerate(model: Any) -> Any:
    return add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def test_copies_beneath_the_hooks_of_accelerate() -> None:
    model = _hook_with_accelerate(unpad(build(), cuda_graphs=True))
    deep, shallow = copy.deepcopy(model), copy.copy(model)
    graphs = graphs_of(deep)
    assert graphs is not None
    assert graphs.module is deep

    def to(*args: object, **kwargs: object) -> None:
        raise AssertionError("a copy was moved as if it were an input")

    shallow.to = to
    shallow._modules = dict(model._modules)
    shallow._modules["encoder"] = copy.deepcopy(model.encoder)
    with torch.no_grad():
        for other in (deep, shallow):
            other.encoder.layer[0].output.dense.weight.mul_(2)
        inputs = batch(3, 9)
        doubled = unpad(build())
        doubled.encoder.layer[0].output.dense.weight.mul_(2)
        for each, expected in ((model, unpad(build())), (deep, doubled), (shallow, doubled)):
            torch.testing.assert_close(each(**inputs).last_hidden_state, expected(**inputs).last_hidden_state)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_a_shallow_copy_alone_says_what_is_missing(duplicate: Callable[[Any], Any]) -> None:
    model = unpad(build(), cuda_graphs=True)
    other = copy.copy(model)
    del model
    gc.collect()
    with torch.no_grad():
        other(**batch(3, 9))
    with pytest.raises(ReferenceError, match="call repad and unpad on its shallow copy"):
        duplicate(other)
    other = unpad(repad(other), cuda_graphs=True)
    duplicate(other)


def test_undoing_a_shallow_copy_leaves_the_graphs_of_the_model() -> None:
    model = unpad(build(), cuda_graphs=True)
    graphs = graphs_of(model)
    assert graphs is not None
    state = graphs._state = ModelState(model)
    other = repad(copy.copy(model))
    assert "forward" not in vars(other)
    assert graphs._state is state
    repad(model)
    assert graphs._state is None


@pytest.mark.parametrize("name", ["bert", "roberta", "qwen3"])
@pytest.mark.parametrize("returns_dict", [True, False, None])
@torch.no_grad()
def test_without_a_mask(name: str, returns_dict: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is packed for a graph although there is no padding, up to the graph itself."""
    monkeypatch.setattr(GraphedForward, "takes", lambda *_: True)
    model, expected = unpad(build(name), cuda_graphs=True), build(name, "eager")
    model.config.return_dict = expected.config.return_dict = False
    ids = torch.randint(3, 199, (3, 8))
    ids[1, 2] = 1  # padding, by its id, which RoBERTa counts by
    for inputs in (ids, ids.int()):
        actual, wanted = (one(inputs, return_dict=returns_dict) for one in (model, expected))
        assert type(actual) is type(wanted)
        wanted = wanted if isinstance(wanted, tuple) else wanted.to_tuple()
        for one, other in zip(actual if isinstance(actual, tuple) else actual.to_tuple(), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_positions_that_start_again_are_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphedForward, "takes", lambda *_: True)
    model, expected = unpad(build("qwen3"), cuda_graphs=True), build("qwen3", "eager")
    ids, positions = torch.randint(3, 199, (1, 8)), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    actual, wanted = (one(ids, position_ids=positions).last_hidden_state for one in (model, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_families_without_graphs_say_so(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import EsmConfig, EsmModel

    config = EsmConfig(**_SIZES, pad_token_id=1, mask_token_id=4)
    model = EsmModel._from_config(config, attn_implementation="flashinfer")
    unpad(model, cuda_graphs=True)
    assert graphs_of(model) is None
    assert "no CUDA graphs of EsmModel" in caplog.text


_MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])


def check(model: Any, inputs: dict[str, torch.Tensor], expected_model: Any, mode: Any = torch.no_grad) -> None:
    with mode():
        actual, expected = model(**inputs), expected_model(**{name: value.cuda() for name, value in inputs.items()})
    assert actual.keys() == expected.keys()
    valid = inputs["attention_mask"].bool().cuda()
    for name, value in expected.items():
        result = actual[name]
        assert result.shape == value.shape
        assert result.isfinite().all()
        if value.ndim == 3:
            assert (result[~valid] == 0).all()
            result, value = result[valid], value[valid]
        assert (result - value).double().norm() <= 2e-3 * value.double().norm()


@pytest.mark.gpu
@_MODES
@pytest.mark.parametrize("inputs_on", ["cuda", "cpu"])
@pytest.mark.parametrize("name", _CASES)
def test_graphs_give_what_the_model_gives(name: str, inputs_on: str, mode: Any) -> None:
    model, expected = unpad(build(name, device="cuda"), cuda_graphs=True), build(name, "sdpa", "cuda")
    sizes = [(5, 40), (64, 90), (1, 17), (6, 33), (200, 60), (5, 40), (64, 100), (3, 300), (30, 7)]
    for rows, longest in sizes:
        check(model, batch(rows, longest, inputs_on), expected, mode)
    # Without padding, and without a mask, there is a graph too.
    whole = batch(4, 24, inputs_on)
    whole["attention_mask"].fill_(1)
    check(model, whole, expected, mode)
    with mode():
        assert model(whole["input_ids"]).to_tuple()[0].isfinite().all()
    statistics = graph_statistics(model)
    assert statistics.replayed == len(sizes) + 2
    assert 0 < statistics.captured < statistics.replayed
    assert statistics.memory_bytes < 2**30


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "mode"), [("bert", torch.inference_mode), ("qwen3", torch.no_grad)])
def test_compiled_once_for_all_sizes(name: str, mode: Any) -> None:
    torch.compiler.reset()
    model = unpad(build(name, device="cuda"), cuda_graphs=GraphOptions(compile=True))
    expected = build(name, "sdpa", "cuda")
    check(model, batch(5, 40, "cpu"), expected, mode)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counted > 0
    first = graph_statistics(model).compile_seconds
    for rows, longest in [(64, 90), (1, 17), (200, 60), (5, 40), (30, 7)]:
        check(model, batch(rows, longest, "cpu"), expected, mode)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted
    statistics = graph_statistics(model)
    assert statistics.replayed == 6
    assert first < statistics.compile_seconds < 2 * first


@pytest.mark.gpu
@pytest.mark.parametrize("change", [*_CHANGES, lambda model: model.encoder.layer[0].output.dense.weight.data.mul_(2)])
@torch.no_grad()
def test_a_stale_graph_is_never_replayed(change: Callable[[Any], object]) -> None:
    model, expected = build(device="cuda"), build(device="cuda")
    unpad(model, cuda_graphs=True)
    inputs = batch(6, 50, "cuda")
    before = model(**inputs).last_hidden_state
    for changed in (model, expected):
        change(changed)
    check(model, inputs, unpad(expected))
    assert not torch.equal(before, model(**inputs).last_hidden_state)


@pytest.mark.gpu
def test_what_no_graph_can_do_runs_without() -> None:
    model, expected = unpad(build(device="cuda"), cuda_graphs=True), unpad(build(device="cuda"))
    inputs = batch(6, 50, "cuda")
    with torch.no_grad():
        model(**inputs)
        states = model(**inputs, output_hidden_states=True).hidden_states
        for actual, wanted in zip(states, expected(**inputs, output_hidden_states=True).hidden_states, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-2, atol=1e-2)
        model.to(torch.bfloat16)
        assert model(**inputs).last_hidden_state.dtype == torch.bfloat16
        model.to("cpu", torch.float32)
        model(**{name: value.cpu() for name, value in inputs.items()})
        model.to("cuda", torch.float16)
        check(model, inputs, expected.to(torch.bfloat16).to(torch.float16))
    model(**inputs).last_hidden_state.float().square().mean().backward()
    assert model.embeddings.word_embeddings.weight.grad.norm() > 0
    assert graph_statistics(model).replayed == 3


@pytest.mark.gpu
@torch.no_grad()
def test_outputs_stay_what_they_were() -> None:
    model = unpad(build(device="cuda"), cuda_graphs=True)
    batches = [batch(8, 50, where) for where in ("cuda", "cpu") * 10]
    outputs = [model(**inputs).last_hidden_state for inputs in batches]
    expected = unpad(build(device="cuda"))
    for inputs, output in zip(batches, outputs):
        torch.testing.assert_close(output, expected(**inputs).last_hidden_state, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("streams", ["one stream", "streams of their own"])
def test_threads_share_a_model(streams: str) -> None:
    model, expected = unpad(build(device="cuda"), cuda_graphs=True), unpad(build(device="cuda"))
    batches = [[batch(7, 60, where) for _ in range(15)] for where in ("cuda", "cpu", "cuda", "cpu")]
    torch.cuda.synchronize()
    results: dict[int, list[torch.Tensor]] = {}

    def run(index: int) -> None:
        stream = torch.cuda.default_stream() if streams == "one stream" else torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            results[index] = [model(**inputs).last_hidden_state for inputs in batches[index]]
            stream.synchronize()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for index, inputs_of_thread in enumerate(batches):
            for inputs, output in zip(inputs_of_thread, results[index], strict=True):
                torch.testing.assert_close(output, expected(**inputs).last_hidden_state, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@torch.no_grad()
def test_memory_is_kept_to_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    model, expected = build(device="cuda"), build(device="cuda")
    unpad(model, cuda_graphs=GraphOptions(max_memory_gib=1e-6, max_tokens=2_048))
    for rows in (3, 30, 3, 30):
        check(model, batch(rows, 40, "cuda"), expected)
    check(model, batch(64, 120, "cuda"), expected)  # too large for a graph
    statistics = graph_statistics(model)
    # The first size keeps its graph, whatever it takes.
    assert (statistics.captured, statistics.dropped, statistics.replayed) == (1, 0, 2)
    assert statistics.memory_bytes > 1e-6 * 2**30
    assert "more than max_memory_gib=1e-06" in caplog.text


@pytest.mark.gpu
@torch.no_grad()
def test_memory_of_other_threads_is_not_counted() -> None:
    model = unpad(build(device="cuda"), cuda_graphs=True)
    kept: list[torch.Tensor] = []
    stop = threading.Event()

    def allocate() -> None:
        while not stop.is_set() and len(kept) < 400:
            kept.append(torch.empty(32 << 20, dtype=torch.uint8, device="cuda"))

    thread = threading.Thread(target=allocate)
    thread.start()
    for rows in (3, 30, 60):
        model(**batch(rows, 40, "cuda"))
    stop.set()
    thread.join()
    assert graph_statistics(model).captured == 3
    assert 0 < graph_statistics(model).memory_bytes < 2**27


@pytest.mark.gpu
@torch.no_grad()
def test_a_failed_capture_leaves_other_graphs_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, expected = unpad(build(device="cuda"), cuda_graphs=True), build("bert", "sdpa", "cuda")
    small, large = batch(3, 40, "cuda"), batch(30, 40, "cuda")
    check(model, small, expected)

    class Exhausted(torch.cuda.CUDAGraph):
        def capture_begin(self, *arguments: object, **options: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "CUDAGraph", Exhausted)
        check(model, large, expected)
    assert "30 rows" not in caplog.text
    assert "in 32 rows: CUDA out of memory. Tried to allocate 2.00 GiB; the next 16 forwards" in caplog.text
    for _ in range(16):
        check(model, large, expected)
        check(model, small, expected)
    statistics = graph_statistics(model)
    assert (statistics.captured, statistics.dropped, statistics.replayed) == (1, 0, 17)
    check(model, large, expected)
    assert (statistics := graph_statistics(model)).captured == 2
    assert statistics.replayed == 18


@pytest.mark.gpu
@torch.no_grad()
def test_captured_ahead() -> None:
    model = unpad(build(device="cuda"), cuda_graphs=True)
    # The last has rows that are longer than there are positions.
    hf_flashinfer_attn.capture_graphs(model, [(8, 400), (64, 2_000), (1, 2 * model.config.max_position_embeddings)])
    captured = graph_statistics(model).captured
    assert captured == 3
    ids = torch.ones(8, 50, dtype=torch.long)
    mask = ids.clone()
    mask[3, 40:] = 0
    model(ids, attention_mask=mask)
    assert graph_statistics(model).captured == captured
    hf_flashinfer_attn.capture_graphs(model, [(8, 400)], token_type_ids=True)
    model(ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids))
    assert graph_statistics(model).captured == captured + 1


@pytest.mark.gpu
@torch.no_grad()
def test_windows_that_look_ahead_run_without(caplog: pytest.LogCaptureFixture) -> None:
    config = ModernBertConfig(**_SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, local_attention=8)
    models = [
        ModernBertModel._from_config(copy.deepcopy(config), attn_implementation="flashinfer").eval().cuda().half()
        for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    model, expected = unpad(models[0], cuda_graphs=True), unpad(models[1])
    for _ in range(2):
        check(model, batch(5, 60, "cuda"), expected)
    assert graph_statistics(model).replayed == 0
    assert "window that looks ahead" in caplog.text
