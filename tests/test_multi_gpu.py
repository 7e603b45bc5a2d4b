"""One model over two GPUs, two models on two GPUs, and layers offloaded to the host.

Every test also runs with the CPU in the place of both GPUs: the same hooks, without the moves.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, dispatch_model
from paired_models import BOS, EOS, PAD, VOCAB_SIZE, build_model, decoder_config, left_padded, right_padded
from torch import Tensor

import hf_flashinfer_attn
from hf_flashinfer_attn.attention import select
from hf_flashinfer_attn.ragged import lazy_mask as lazy


@pytest.fixture(autouse=True)
def _kernels_for_small_batches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "SMALL_LOGITS", 0)


Devices = tuple[torch.device, torch.device]
LAYERS = 4
IMAGE_TOKEN, IMAGE_TOKENS = VOCAB_SIZE - 1, 4
LENGTHS = (16, 13, 16, 9)

two_devices = pytest.mark.parametrize(
    "devices",
    [
        pytest.param((torch.device("cpu"), torch.device("cpu")), id="cpu"),
        pytest.param(
            (torch.device("cuda", 0), torch.device("cuda", 1)),
            id="cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
            ],
        ),
    ],
)


def bert_config() -> Any:
    return transformers.BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=96, num_hidden_layers=LAYERS, num_attention_heads=3, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=PAD,
    )  # fmt: skip


def qwen3_config() -> Any:
    return decoder_config(transformers.Qwen3Config, num_hidden_layers=LAYERS, head_dim=72)


def gemma3_config() -> Any:
    """Tokens of an image see each other both ways: a mask whose function closes over tensors of the first GPU."""
    text = decoder_config(
        transformers.Gemma3TextConfig, num_hidden_layers=LAYERS, query_pre_attn_scalar=8, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
    )  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    return transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE_TOKEN, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip


MODELS = {
    "bert": (transformers.BertModel, bert_config),
    "qwen3": (transformers.Qwen3Model, qwen3_config),
    "gemma3-images": (transformers.Gemma3Model, gemma3_config),
}
each_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, implementation: str, dtype: torch.dtype) -> Any:
    """Builds a model on the CPU, of weights that `dtype` can hold, to be cast on."""
    model_class, config = MODELS[name]
    return build_model(model_class, config(), implementation).to(dtype)


def batch_of(name: str, device: torch.device, *, seed: int = 0) -> dict[str, Tensor]:
    pad = right_padded if name == "bert" else left_padded
    tokens, mask = pad(LENGTHS, seed=seed)
    batch = {"input_ids": tokens, "attention_mask": mask}
    if name == "gemma3-images":
        tokens = tokens.clamp(max=IMAGE_TOKEN - 1)
        for row, start in enumerate((1, 5, 11, 8)):
            tokens[row, start : start + IMAGE_TOKENS] = IMAGE_TOKEN
        pixels = torch.randn(len(LENGTHS), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        # Values that half precision can hold.
        batch |= {"input_ids": tokens, "token_type_ids": (tokens == IMAGE_TOKEN).long(), "pixel_values": pixels.half()}
    return {key: value.to(device) for key, value in batch.items()}


@torch.no_grad()
def output_of(model: Any, batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The hidden states of valid tokens, `(valid tokens, width)`, float64 on the host."""
    valid = batch["attention_mask"].bool()
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    hidden: Tensor = model(**batch).last_hidden_state
    return hidden[valid.to(hidden.device)].double().cpu()


def dtype_of(devices: Devices) -> torch.dtype:
    return torch.float16 if devices[0].type == "cuda" else torch.float32


def layers_of(model: torch.nn.Module) -> Iterator[tuple[str, bool]]:
    """The names of a model's layers, and whether they are in the second half of their stack."""
    names = [name for name, _ in model.named_modules() if re.search(r"\blayers?\.\d+$", name)]
    for name in names:
        stack, _, index = name.rpartition(".")
        yield name, 2 * int(index) >= sum(other.startswith(f"{stack}.") for other in names)


def split_over(model: Any, devices: Devices) -> Any:
    """Puts the second half of every stack of layers on the second device, and all else on the first."""
    device_map = {name: devices[second] for name, second in layers_of(model)}
    owners = {name.rpartition(".")[0] for name, _ in (*model.named_parameters(), *model.named_buffers())}
    others = {name for name in owners if not any(f"{name}.".startswith(f"{layer}.") for layer in device_map)}
    device_map |= dict.fromkeys(others, devices[0])
    return dispatch_model(model, device_map, main_device=devices[0], force_hooks=True)


def assert_as_exact_as_sdpa(name: str, ours: Tensor, devices: Devices) -> None:
    batch, dtype = batch_of(name, devices[0]), dtype_of(devices)
    exact = output_of(build(name, "sdpa", dtype).to(devices[0], torch.float64), batch, torch.float64)
    sdpa = output_of(build(name, "sdpa", dtype).to(devices[0]), batch, dtype)
    error = (ours - exact).norm()
    assert error <= 1.25 * (sdpa - exact).norm(), (error, (sdpa - exact).norm())
    unmasked = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    kinds = batch.get("token_type_ids")
    unmasked |= {} if kinds is None else {"token_type_ids": torch.zeros_like(kinds)}
    valid = batch["attention_mask"].bool().flatten().cpu()
    wrong = output_of(build(name, "sdpa", dtype).to(devices[0]), unmasked, dtype)[valid]
    assert (wrong - exact).norm() > 20 * error


@two_devices
@each_model
def test_layers_over_two_devices(name: str, devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    made_on: list[torch.device] = []
    eager_mask = lazy.eager_mask

    def recorded(**options: Any) -> Tensor:
        made_on.append(options["device"])
        mask: Tensor = eager_mask(**options)
        return mask

    monkeypatch.setattr(lazy, "eager_mask", recorded)
    dtype, on_gpu = dtype_of(devices), devices[0].type == "cuda"
    model = split_over(build(name, "flashinfer", dtype), devices)
    batch = batch_of(name, devices[0])
    halves = {second: str(devices[second]) for _, second in layers_of(model)}
    placed = {second: {str(p.device) for p in model.get_submodule(at).parameters()} for at, second in layers_of(model)}
    assert placed == {second: {device} for second, device in halves.items()}
    output_of(model, batch, dtype)
    made_on.clear()
    with hf_flashinfer_attn.trace() as trace:
        ours = output_of(model, batch, dtype)
    assert_as_exact_as_sdpa(name, ours, devices)
    if name == "gemma3-images":
        text = [call for call in trace.calls if call.kernel == "dense"]
        assert len(text) == LAYERS
        assert all("the mask" in str(call.reason) for call in text)
        # One mask for sliding layers and one for the others, each made once, whatever the devices of the layers.
        assert made_on == [devices[0]] * 2
    else:
        assert len(trace.calls) == LAYERS
        # Without a GPU, the reason is that there is none.
        assert not trace.fallbacks or not on_gpu
        assert all(kernel.startswith("flashinfer-" if on_gpu else "torch") for kernel in trace.kernels)
        assert made_on == []
        assert (trace.layouts, trace.host_copies, trace.plans) == ((1, 1, 2) if on_gpu else (1, 0, 0))


@two_devices
@each_model
def test_half_of_the_layers_on_the_host(name: str, devices: Devices) -> None:
    dtype = dtype_of(devices)
    model = build(name, "flashinfer", dtype).to(devices[0])
    for layer, second in list(layers_of(model)):
        if second:
            cpu_offload(model.get_submodule(layer), execution_device=devices[0])
    assert {parameter.device.type for parameter in model.parameters()} == {devices[0].type, "meta"}
    with hf_flashinfer_attn.trace() as trace:
        ours = output_of(model, batch_of(name, devices[0]), dtype)
    assert_as_exact_as_sdpa(name, ours, devices)
    if name != "gemma3-images":
        assert (len(trace.calls), trace.layouts) == (LAYERS, 1)


@two_devices
def test_two_models_on_two_devices_in_two_threads(devices: Devices) -> None:
    names, rounds, dtype = ("bert", "qwen3"), 10, dtype_of(devices)
    batches = [[batch_of(name, device, seed=seed) for seed in range(rounds)] for name, device in zip(names, devices)]
    expected, results = [], {}
    for name, device, some in zip(names, devices, batches):
        reference = build(name, "sdpa", dtype).to(device)
        expected.append([output_of(reference, batch, dtype) for batch in some])
    models = [build(name, "flashinfer", dtype).to(device) for name, device in zip(names, devices)]
    barrier = threading.Barrier(2)

    def run(index: int) -> None:
        # The current device of a new thread is the first one, whichever the model is on.
        barrier.wait(timeout=60)
        results[index] = [output_of(models[index], batch, dtype) for batch in batches[index]]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for index in range(2):
        for ours, theirs in zip(results[index], expected[index]):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_data_parallel_after_unpad(cuda_graphs: bool) -> None:
    """As Trainer wraps a model on a host with several GPUs; on CPUs, replicas are in test_unpad.py."""
    tokens, mask = right_padded((*LENGTHS, 5, 3, 16, 1))
    inputs = {"input_ids": tokens.cuda(), "attention_mask": mask.cuda()}
    plain = build_model(transformers.BertModel, bert_config(), "eager").cuda()
    model = build_model(transformers.BertModel, bert_config(), "flashinfer").half().cuda()
    parallel = torch.nn.DataParallel(hf_flashinfer_attn.unpad(model, cuda_graphs=cuda_graphs), device_ids=[0, 1])
    with torch.no_grad():
        expected = plain(**inputs).last_hidden_state[mask.bool()]
        for _ in range(3):
            actual = parallel(**inputs)["last_hidden_state"]
            torch.testing.assert_close(actual[mask.bool()].float(), expected, rtol=0, atol=5e-2)
            assert (actual[mask == 0] == 0).all()
