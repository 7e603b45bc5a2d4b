"""What only a CUDA GPU can show: FlashInfer's numbers, plans, host copies, streams, threads."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

import hf_flashinfer_attn
from hf_flashinfer_attn.attention import select
from hf_flashinfer_attn.integration.functions import attention_forward
from hf_flashinfer_attn.kernels import flashinfer
from hf_flashinfer_attn.kernels import torch_ragged as reference
from hf_flashinfer_attn.ragged.layout import RaggedLayout, RaggedSide, uniform_layout
from hf_flashinfer_attn.tools.accuracy import measure_kernel_error

pytestmark = pytest.mark.gpu

HEAD_DIMS = (8, 16, 24, 26, 32, 48, 64, 72, 80, 96, 112, 120, 128, 192, 256)
HALF = (torch.float16, torch.bfloat16)
BERT = BertConfig(
    hidden_size=96, num_hidden_layers=12, num_attention_heads=3, intermediate_size=128, vocab_size=100
)  # head_dim 32
MODERNBERT = ModernBertConfig(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=100, local_attention=8,
    global_attn_every_n_layers=3, pad_token_id=0, deterministic_flash_attn=False,
)  # fmt: skip
MPNET = MPNetConfig(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=100,
    max_position_embeddings=80,
)  # fmt: skip
T5 = T5Config(d_model=64, d_kv=24, d_ff=64, num_layers=3, num_heads=4, vocab_size=100)
QWEN = Qwen3Config(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=72,
    intermediate_size=64, vocab_size=100,
)  # fmt: skip


def kernels() -> list[flashinfer.Kernel]:
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return ["fa2", "fa3"] if hopper else ["fa2"]


@pytest.fixture(autouse=True)
def _kernels_for_small_batches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "SMALL_LOGITS", 0)


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """Fills every fresh buffer with NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        yield
        torch.use_deterministic_algorithms(False)


def build(model: type[PreTrainedModel], config, implementation: str, dtype=torch.float16) -> PreTrainedModel:
    torch.manual_seed(0)
    built = model._from_config(copy.deepcopy(config), attn_implementation=implementation)
    for parameter in built.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4)
    return built.to("cuda", dtype).eval()


def batch(rows: int = 4, width: int = 50) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, width, dtype=torch.long)
    for row in range(1, rows):
        mask[row, torch.randint(1, width, ()) :] = 0
    mask[rows // 2] = mask[rows // 2].flip(0)
    return {"input_ids": torch.randint(0, 100, (rows, width)).cuda(), "attention_mask": mask.cuda()}


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("right", [None, 0], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kernel", kernels())
def test_kernels_against_float64(kernel, head_dim: int, dtype: torch.dtype, right: int | None) -> None:
    error = measure_kernel_error(
        kernel, head_dim, dtype=dtype, right=right, device=torch.device("cuda"), num_kv_heads=2
    )
    assert error.ratio <= 1.25, error


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize(
    ("left", "right", "softcap"),
    [(7, 0, None), (64, 64, None), (5, 3, None), (None, 9, None), (12, None, None), (None, 0, 2.0)],
)
@pytest.mark.parametrize("kernel", kernels())
def test_windows_and_softcap_against_float64(kernel, left, right, softcap) -> None:
    error = measure_kernel_error(
        kernel, 32, dtype=torch.float16, left=left, right=right, softcap=softcap, device=torch.device("cuda"),
        num_kv_heads=2,
    )  # fmt: skip
    assert error.ratio <= 1.25, error


def random_sides(query_valid: torch.Tensor, key_valid: torch.Tensor) -> RaggedLayout:
    sides = (RaggedSide(side.sum(1).tolist(), tuple(side.shape), side.cuda()) for side in (query_valid, key_valid))
    return RaggedLayout(*sides)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("right", [None, 0], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [24, 64])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shared", [(1, 4), (5, 1), (5, 4)], ids=str)
def test_a_bias_is_as_exact_as_sdpas(shared, dtype: torch.dtype, head_dim: int, right: int | None) -> None:
    rows, width = 5, 150
    valid = torch.rand(rows, width) < 0.7  # holes
    valid[0], valid[1, 40:], valid[2, :60], valid[3] = True, False, False, False
    layout = random_sides(valid, valid)
    query, key, value = torch.randn(3, rows, width, 4, head_dim, device="cuda").to(dtype)
    # The strides of T5, whose heads come last, in another dtype than the rest where they are shared.
    bias = torch.randn(shared[0], width, width, shared[1], device="cuda").permute(0, 3, 1, 2)
    given = bias.to(torch.float32 if shared[0] == 1 else dtype).expand(rows, 4, width, width)
    rounded = given.to(dtype)
    sides = [layout.query.gather(tensor.masked_fill(~valid.cuda()[:, :, None, None], float("nan")))
             for tensor in (query, key, value)]  # fmt: skip
    ours = flashinfer.attend(*sides, layout, sm_scale=0.2, right=right, bias=given)
    exact = reference.attend(
        *(side.double() for side in sides), layout, sm_scale=0.2, right=right, bias=rounded.double()
    )
    mask = valid.cuda()[:, None, None, :].expand(rows, 1, width, width)
    if right == 0:
        ranks = valid.cuda().cumsum(1)
        mask = mask & (ranks[:, None, :, None] >= ranks[:, None, None, :])
    additive = rounded.masked_fill(~mask, torch.finfo(dtype).min)
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)), attn_mask=additive, scale=0.2
    )
    sdpa_error = (layout.query.gather(sdpa.transpose(1, 2)).double() - exact).norm()
    assert (ours.double() - exact).norm() <= 1.25 * sdpa_error


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (7, 0), (6, 6)])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kernel", kernels())
def test_sinks_are_as_exact_as_attention_without(kernel, dtype: torch.dtype, left, right) -> None:
    # More queries than keys in one row, so that some see none, and a row without any key.
    layout = RaggedLayout.from_lengths([90, 33, 5, 60], [90, 20, 0, 64])
    query, key, value = (torch.randn(n, 4, 40, device="cuda").to(dtype) for n in (188, 174, 174))
    sinks = torch.randn(4, device="cuda").to(dtype) * 2
    options = {"sm_scale": 0.3, "left": left, "right": right}
    exact_sides = [side.double() for side in (query, key, value)]

    def error(sinks) -> float:
        exact = reference.attend(*exact_sides, layout, sinks=None if sinks is None else sinks.double(), **options)
        ours = flashinfer.attend(query, key, value, layout, kernel=kernel, sinks=sinks, **options)
        assert ours.isfinite().all()
        return float((ours.double() - exact).norm() / exact.norm())

    # One more rounding, of an output that was rounded already.
    assert error(sinks) <= 1.5 * error(None)


@pytest.mark.parametrize("kernel", kernels())
def test_value_may_be_narrower_and_keys_of_another_length(kernel) -> None:
    layout = RaggedLayout.from_lengths([3, 5, 2], [7, 0, 2])
    query, key, value = (torch.randn(n, 2, d).cuda().half() for n, d in ((10, 40), (9, 40), (9, 24)))
    options = {"sm_scale": 0.3}
    output = flashinfer.attend(query, key, value, layout, kernel=kernel, **options)
    expected = reference.attend(query.double(), key.double(), value.double(), layout, **options)
    assert output.shape == (10, 2, 24)
    assert output[3:8].abs().sum() == 0
    torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("model", "config"), [(BertModel, BERT), (Qwen3Model, QWEN), (ModernBertModel, MODERNBERT), (T5EncoderModel, T5)]
)
def test_models_are_as_exact_as_sdpa(model, config, dtype: torch.dtype) -> None:
    inputs = batch()
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        # Not eager: in float64 its additive mask overflows to -inf, and rows without any key become NaN.
        exact = build(model, config, "sdpa", torch.float64)(**inputs).last_hidden_state[valid]
        sdpa = build(model, config, "sdpa", dtype)(**inputs).last_hidden_state[valid].double()
        with hf_flashinfer_attn.trace() as trace:
            ours = build(model, config, "flashinfer", dtype)(**inputs).last_hidden_state[valid].double()
    assert all(kernel.startswith("flashinfer-") for kernel in trace.kernels)
    assert not trace.fallbacks
    assert (ours - exact).norm() <= 1.25 * (sdpa - exact).norm()


def test_one_layout_one_host_copy_one_plan_per_forward() -> None:
    model = build(BertModel, BERT, "flashinfer")
    with torch.no_grad():
        model(**batch())
        inputs = batch()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with hf_flashinfer_attn.trace() as trace:
                model(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(trace.calls) == 12
    assert (trace.layouts, trace.host_copies, trace.plans) == (1, 1, 1)


def test_without_padding_nothing_is_planned_twice() -> None:
    hf_flashinfer_attn.configure(backend="flashinfer")
    model = build(BertModel, BERT, "flashinfer")
    ids = torch.randint(0, 100, (3, 20)).cuda()
    with torch.no_grad():
        model(ids)
        with hf_flashinfer_attn.trace() as trace:
            model(ids)
    assert (trace.layouts, trace.host_copies, trace.plans) == (0, 0, 0)


@pytest.mark.parametrize("config", [BERT, QWEN], ids=["full", "causal"])
def test_without_padding_heads_that_need_none_stay_as_they_are(config) -> None:
    model_class = BertModel if config is BERT else Qwen3Model
    ids = torch.randint(0, 100, (3, 20)).cuda()
    outputs = {}
    with torch.no_grad():
        exact = build(model_class, config, "sdpa", torch.float64)(ids).last_hidden_state
        for backend, name in (("auto", "sdpa"), ("flashinfer", "flashinfer-fa2" if "fa3" not in kernels() else None)):
            hf_flashinfer_attn.configure(backend=backend)
            with hf_flashinfer_attn.trace() as trace:
                outputs[backend] = build(model_class, config, "flashinfer")(ids).last_hidden_state
            assert all(kernel == name if name else kernel.startswith("flashinfer") for kernel in trace.kernels)
        sdpa = build(model_class, config, "sdpa")(ids).last_hidden_state
    for output in outputs.values():
        assert (output.double() - exact).norm() <= 1.25 * (sdpa.double() - exact).norm()


def test_without_padding_the_faster_kernel_runs() -> None:
    """By length, with heads that need no padding: torch's own on Hopper, where it is cuDNN's."""
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    config = BertConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, vocab_size=100
    )
    for length, is_torch in ((20, False), (130, is_hopper)):
        ids = torch.randint(0, 100, (3, length)).cuda()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            exact = build(BertModel, config, "sdpa", torch.float64)(**inputs).last_hidden_state
            sdpa = build(BertModel, config, "sdpa")(**inputs).last_hidden_state
            with hf_flashinfer_attn.trace() as trace, pytest.MonkeyPatch.context() as patch:
                patch.setattr(select, "SMALL_LOGITS", 0)
                output = build(BertModel, config, "flashinfer")(**inputs).last_hidden_state
        assert [kernel == "sdpa" for kernel in trace.kernels] == [is_torch]
        assert (output.double() - exact).norm() <= 1.25 * (sdpa.double() - exact).norm()


def test_a_small_batch_asks_for_no_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(6, 37)
    inputs["attention_mask"][2] = 0  # a row of padding only
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        exact = build(BertModel, BERT, "sdpa", torch.float64)(**inputs).last_hidden_state[valid]
        sdpa = build(BertModel, BERT, "sdpa")(**inputs).last_hidden_state[valid]
        for logits, kernels, copies in ((0, ("flashinfer-fa2",), 1), (1 << 26, ("sdpa",), 0)):
            monkeypatch.setattr(select, "SMALL_LOGITS", logits)
            with hf_flashinfer_attn.trace() as trace:
                output = build(BertModel, BERT, "flashinfer")(**inputs).last_hidden_state
            assert (trace.kernels, trace.host_copies, trace.plans) == (kernels, copies, copies)
            assert output.isfinite().all()
            assert (output[valid].double() - exact).norm() <= 1.25 * (sdpa.double() - exact).norm()


@pytest.mark.parametrize("inputs_on", ["cpu", "cuda"])
def test_an_unpadded_model_copies_lengths_at_most_once(inputs_on: str) -> None:
    models = (BertModel, BERT), (ModernBertModel, MODERNBERT), (Qwen3Model, QWEN), (MPNetModel, MPNET)
    for model, config in models:
        padded = model._from_config(copy.deepcopy(config), attn_implementation="flashinfer")
        padded = padded.to("cuda", torch.float16).eval()
        unpadded = hf_flashinfer_attn.unpad(copy.deepcopy(padded))
        mask = (torch.arange(64)[None] < torch.tensor([64, 3, 20, 41])[:, None]).long()
        ids = torch.randint(3, 99, mask.shape) * mask
        with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
            actual = unpadded(ids.to(inputs_on), attention_mask=mask.to(inputs_on), use_cache=False).last_hidden_state
        copies = 0 if inputs_on == "cpu" else 1
        # A window that looks ahead is two parts, with a layout and a plan each.
        made = 3 if model is ModernBertModel else 1
        assert (trace.layouts, trace.host_copies, trace.plans) == (made, copies, made)
        assert all(kernel.startswith("flashinfer") for kernel in trace.kernels)
        with torch.no_grad():
            expected = padded(ids.cuda(), attention_mask=mask.cuda(), use_cache=False).last_hidden_state
        valid = mask.bool().cuda()
        torch.testing.assert_close(actual[valid], expected[valid], rtol=1e-2, atol=1e-2)
        assert (actual[~valid] == 0).all()


@pytest.mark.parametrize("inputs_on", ["cuda", "cpu"])
def test_a_compiled_unpadded_model_has_one_graph(inputs_on: str) -> None:
    torch.compiler.reset()
    counters.clear()
    uncompiled = BertModel._from_config(copy.deepcopy(BERT), attn_implementation="flashinfer")
    uncompiled = hf_flashinfer_attn.unpad(uncompiled.to("cuda", torch.float16).eval())
    compiled = torch.compile(copy.deepcopy(uncompiled))
    for lengths in ((64, 3, 20, 41), (7, 50), (33, 90, 12, 5, 64)):
        mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
        inputs = {"input_ids": torch.randint(3, 99, mask.shape) * mask, "attention_mask": mask}
        inputs = {name: value.to(inputs_on) for name, value in inputs.items()}
        with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
            actual = compiled(**inputs).last_hidden_state
        copies = 0 if inputs_on == "cpu" else 1
        assert (trace.layouts, trace.host_copies, trace.plans) == (1, copies, 1)
        assert len(trace.calls) == BERT.num_hidden_layers
        assert all(kernel.startswith("flashinfer") for kernel in trace.kernels)
        with torch.no_grad():
            expected = uncompiled(**inputs).last_hidden_state
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
        assert (actual[mask == 0] == 0).all()
        # Lengths, rows and tokens are other ones each time, and there is nothing to compile for that.
        assert counters["stats"]["unique_graphs"] == 1


def test_plans_in_flight_are_not_overwritten() -> None:
    # The host runs far ahead of a busy GPU: a pinned buffer that is filled too early would corrupt earlier plans.
    model, expected_model = build(BertModel, BERT, "flashinfer"), build(BertModel, BERT, "sdpa")
    batches = [batch(8, 120) for _ in range(24)]
    blocker = torch.randn(8192, 8192, device="cuda")
    with torch.no_grad():
        for _ in range(20):
            blocker @ blocker
        outputs = [model(**inputs).last_hidden_state for inputs in batches]
        for inputs, output in zip(batches, outputs):
            valid = inputs["attention_mask"].bool()
            expected = expected_model(**inputs).last_hidden_state
            torch.testing.assert_close(output[valid], expected[valid], rtol=1e-2, atol=1e-2)


def test_threads_with_streams_of_their_own() -> None:
    configs = [(BertModel, BERT), (Qwen3Model, QWEN), (ModernBertModel, MODERNBERT), (T5EncoderModel, T5)]
    models = [build(model, config, "flashinfer") for model, config in configs]
    expected_models = [build(model, config, "sdpa") for model, config in configs]
    batches = [batch(6, 90) for _ in range(10)]
    with torch.no_grad():
        expected = [[model(**inputs).last_hidden_state for inputs in batches] for model in expected_models]
    torch.cuda.synchronize()
    results: dict[int, list[torch.Tensor]] = {}

    def run(index: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            results[index] = [models[index](**inputs).last_hidden_state for inputs in batches]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(len(models)):
        for inputs, output, reference_output in zip(batches, results[index], expected[index]):
            valid = inputs["attention_mask"].bool()
            difference = (output[valid] - reference_output[valid]).double().norm()
            assert difference <= 0.03 * reference_output[valid].double().norm()


@pytest.mark.parametrize(("model", "config"), [(BertModel, BERT), (ModernBertModel, MODERNBERT), (T5EncoderModel, T5)])
@pytest.mark.parametrize("backend", ["auto", "flashinfer"])
def test_a_captured_graph_keeps_its_plan(model, config, backend: str) -> None:
    hf_flashinfer_attn.configure(backend=backend)
    model = build(model, config, "flashinfer")
    ids = torch.randint(0, 100, (3, 20)).cuda()
    stream = torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            model(ids)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = model(ids).last_hidden_state
        for length in range(1, 20):  # pushes the shape out of the cache of uniform layouts
            model(ids[:, :length])
        uniform_layout.cache_clear()
        ids.copy_(torch.randint(0, 100, (3, 20)))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(output, model(ids).last_hidden_state, rtol=1e-2, atol=1e-2)


def test_gradients_take_the_torch_backend() -> None:
    inputs = batch()
    gradients = []
    for implementation in ("sdpa", "flashinfer"):
        model = build(BertModel, BERT, implementation, torch.float32)
        with hf_flashinfer_attn.trace() as trace:
            output = model(**inputs).last_hidden_state
        output[inputs["attention_mask"].bool()].square().mean().backward()
        gradients.append(model.embeddings.word_embeddings.weight.grad)
    assert trace.kernels == ("torch",)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_head_dims_above_256_are_an_error_by_name() -> None:
    hf_flashinfer_attn.configure(backend="flashinfer")
    config = BertConfig(hidden_size=320, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = build(BertModel, config, "flashinfer")
    with torch.no_grad(), pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match=r"head_dim 320.*256"):
        model(torch.ones(1, 3, dtype=torch.long, device="cuda"))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(("model", "config"), [(BertModel, BERT), (Qwen3Model, QWEN)], ids=["bert", "qwen3"])
@torch.no_grad()
def test_a_compiled_model_plans_once_per_forward(model: type[PreTrainedModel], config, mode: str) -> None:
    torch.compiler.reset()
    built = build(model, config, "flashinfer")
    compiled = torch.compile(built, fullgraph=True, mode=mode)
    for rows, width in ((4, 50), (6, 30), (5, 40)):
        inputs = batch(rows, width)
        valid = inputs["attention_mask"].bool()
        expected = built(**inputs).last_hidden_state[valid]
        with hf_flashinfer_attn.trace() as trace:
            result = compiled(**inputs).last_hidden_state[valid]
        torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
        assert all(kernel.startswith("flashinfer") for kernel in trace.kernels)
        assert (len(trace.calls), trace.layouts, trace.plans, trace.host_copies) == (config.num_hidden_layers, 1, 1, 1)


@torch.no_grad()
def test_a_compiled_model_casts_float32_as_flash_kernels_do() -> None:
    torch.compiler.reset()
    built = build(BertModel, BERT, "flashinfer", torch.float32)
    compiled = torch.compile(built, fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16), hf_flashinfer_attn.trace() as trace:
        compiled(**batch())
    assert all(kernel.startswith("flashinfer") for kernel in trace.kernels)


@pytest.mark.parametrize("head_dim", [32, 64])
def test_causality_of_a_module_is_looked_at_in_every_call(head_dim: int) -> None:
    query, key, value = torch.randn(3, 2, 4, 30, head_dim, device="cuda").half()
    layer = torch.nn.Module()
    for is_causal in (False, True, False):
        layer.is_causal = is_causal
        for _ in range(2):
            output = attention_forward(layer, query, key, value, None)[0].transpose(1, 2)
            expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
            torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("head_dim", "backend"), [(64, "flashinfer"), (32, "flashinfer"), (32, "auto")])
def test_views_that_kernels_cannot_read_are_copied(head_dim: int, backend: str) -> None:
    # A fused projection with a column too many: no head starts at a multiple of 16 bytes. In float64, since torch's
    # own kernels get these wrong.
    whole = torch.randn(2, 30, 3 * 2 * head_dim + 1, device="cuda").half()[..., 1:]
    query, key, value = (side.unflatten(-1, (2, head_dim)).transpose(1, 2) for side in whole.chunk(3, dim=-1))
    layer = torch.nn.Module()
    layer.is_causal = False
    hf_flashinfer_attn.configure(backend=backend)
    for _ in range(2):
        output = attention_forward(layer, query, key, value, None)[0].transpose(1, 2)
        expected = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
        torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=1e-2)
