"""Models on "flashinfer" under accelerate's hooks, in threads, and copied, pickled and saved: all on a CPU."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import send_to_device
from paired_models import (
    PAD,
    VOCAB_SIZE,
    build_model,
    decoder_config,
    encoder_decoder_config,
    left_padded,
    right_padded,
)
from torch import Tensor, nn

import hf_flashinfer_attn
from hf_flashinfer_attn.ragged.lazy_mask import RaggedMask

LENGTHS = (9, 5, 7, 3)
TOLERANCE = 1e-5
NOTICEABLE = 1e-3
LAYERS = 2

Batch = dict[str, Tensor]


def bert(implementation: str, *, layers: int = LAYERS, seed: int = 0) -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=PAD,
    )  # fmt: skip
    return build_model(transformers.BertModel, config, implementation, seed=seed)


def mistral(implementation: str) -> Any:
    return build_model(
        transformers.MistralModel, decoder_config(transformers.MistralConfig, sliding_window=4), implementation
    )


def gemma2(implementation: str) -> Any:
    config = decoder_config(
        transformers.Gemma2Config, attn_logit_softcapping=2.0, query_pre_attn_scalar=8, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return build_model(transformers.Gemma2Model, config, implementation)


def bart(implementation: str) -> Any:
    return build_model(transformers.BartModel, encoder_decoder_config(transformers.BartConfig), implementation)


def mpnet(implementation: str) -> Any:
    """Does its own attention, and so makes arithmetic with the mask that it gets."""
    config = transformers.MPNetConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=PAD,
    )  # fmt: skip
    return build_model(transformers.MPNetModel, config, implementation)


MODELS: dict[str, Callable[[str], Any]] = {
    "bert": bert,
    "mistral": mistral,
    "gemma2": gemma2,
    "bart": bart,
    "mpnet": mpnet,
}
CALLS = {"bert": LAYERS, "mistral": LAYERS, "gemma2": LAYERS, "bart": 3 * LAYERS, "mpnet": 0}
each_model = pytest.mark.parametrize("name", MODELS)


def batch_of(name: str, *, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    pad = left_padded if name in ("mistral", "gemma2") else right_padded
    tokens, mask = pad(lengths, seed=seed)
    batch = {"input_ids": tokens, "attention_mask": mask}
    if name == "bart":
        batch["decoder_input_ids"], batch["decoder_attention_mask"] = right_padded(lengths, seed=seed + 1)
    return batch


@torch.no_grad()
def output_of(model: Any, batch: Batch) -> Tensor:
    """The hidden states of valid tokens, `(valid tokens, width)`."""
    valid = batch.get("decoder_attention_mask", batch["attention_mask"]).bool()
    result: Tensor = model(**batch).last_hidden_state[valid]
    return result


def assert_right(name: str, model: Any, *, calls: int | None = None) -> None:
    """The model gives what eager attention gives on a padded batch, by our attention, on one layout per mask."""
    batch, reference = batch_of(name), MODELS[name]("eager")
    expected = output_of(reference, batch)
    unmasked = {key: torch.ones_like(value) if key.endswith("mask") else value for key, value in batch.items()}
    with torch.no_grad():
        valid = batch.get("decoder_attention_mask", batch["attention_mask"]).bool()
        assert (reference(**unmasked).last_hidden_state[valid] - expected).abs().max() > NOTICEABLE
    with hf_flashinfer_attn.trace() as trace:
        actual = output_of(model, batch)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    assert len(trace.calls) == (CALLS[name] if calls is None else calls)
    plain = MODELS[name]("flashinfer")
    with hf_flashinfer_attn.trace() as plain_trace:
        output_of(plain, batch)
    # No hook makes a layout be read again.
    assert (trace.layouts, trace.kernels) == (plain_trace.layouts, plain_trace.kernels)


def hooks_of(model: nn.Module) -> list[Any]:
    return [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]


@each_model
def test_cpu_offload(name: str) -> None:
    """Every submodule gets a hook that brings its weights in, and sends its inputs, the mask too, to a device."""
    model = cpu_offload(MODELS[name]("flashinfer"), execution_device=torch.device("cpu"))
    assert len(hooks_of(model)) > 10
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert_right(name, model)


@each_model
def test_disk_offload(name: str, tmp_path: Path) -> None:
    model = disk_offload(MODELS[name]("flashinfer"), tmp_path, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert_right(name, model)


@each_model
def test_dispatch_to_one_device(name: str) -> None:
    model = dispatch_model(MODELS[name]("flashinfer"), {"": "cpu"}, force_hooks=True)
    assert model.hf_device_map == {"": "cpu"}
    assert hooks_of(model)
    assert_right(name, model)


@each_model
def test_dispatch_by_layer(name: str) -> None:
    model = MODELS[name]("flashinfer")
    layers = [key for key, module in model.named_modules() if type(module).__name__.endswith("Layer")]
    leaves = {key.rpartition(".")[0] for key, _ in model.named_parameters()}
    device_map = dict.fromkeys(layers, "cpu")
    device_map |= {key: "cpu" for key in leaves if not any(key.startswith(f"{layer}.") for layer in layers)}
    model = dispatch_model(model, device_map, main_device="cpu", force_hooks=True)
    assert len(hooks_of(model)) >= len(layers) >= 2
    assert_right(name, model)


@each_model
def test_align_devices_hook_on_every_module(name: str) -> None:
    """`io_same_device` also sends back what a layer returns."""
    model = MODELS[name]("flashinfer")
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert_right(name, model)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=["auto", "cpu"])
def test_from_pretrained_with_a_device_map(device_map: str | dict[str, str], tmp_path: Path) -> None:
    bert("eager").save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="flashinfer", device_map=device_map)
    assert model.config._attn_implementation == "flashinfer"
    assert_right("bert", model.eval())


def mask_of_forward(name: str) -> RaggedMask:
    """The mask that the first attention layer of a model is given."""
    masks: list[RaggedMask] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks.extend(value for value in (*args, *kwargs.values()) if isinstance(value, RaggedMask))

    model = MODELS[name]("flashinfer")
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(keep, with_kwargs=True)
    output_of(model, batch_of(name))
    assert masks
    return masks[0]


@pytest.mark.parametrize("name", ["bert", "mistral", "gemma2"])
def test_send_to_device_keeps_the_mask_lazy(name: str) -> None:
    mask = mask_of_forward(name)
    layout = mask.state.layout()
    sent = send_to_device({"masks": [mask, (mask,)], "other": 1}, torch.device("cpu"), non_blocking=True)
    for copied in (sent["masks"][0], sent["masks"][1][0]):
        assert isinstance(copied, RaggedMask)
        assert copied.state.layout() is layout
    assert torch.equal(sent["masks"][0].dense(), mask.dense())


def test_send_to_device_with_another_device() -> None:
    mask = mask_of_forward("bert")
    sent = send_to_device(mask, "meta")
    assert isinstance(sent, RaggedMask)
    assert (sent.device.type, sent.shape, sent.dtype) == ("meta", mask.shape, mask.dtype)
    assert mask.device.type == "cpu"
    layout = mask.state.layout()
    assert sent.state.layout() is layout


def run_threads(works: list[Callable[[], None]]) -> None:
    """Runs all at once, and raises the first error of any."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        try:
            barrier.wait(timeout=30)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


ROUNDS = 20


def repeated_forwards(name: str, model: Any, reference: Any, seed: int, traces: list[Any]) -> Callable[[], None]:
    """Makes a function that compares `ROUNDS` batches of changing shape to answers computed beforehand."""
    generator = torch.Generator().manual_seed(seed)
    batches, answers = [], []
    for step in range(ROUNDS):
        lengths = tuple(torch.randint(2, 14, (1 + step % 4,), generator=generator).tolist())
        batches.append(batch_of(name, seed=100 * seed + step, lengths=lengths))
        answers.append(output_of(reference, batches[-1]))

    def work() -> None:
        for batch, answer in zip(batches, answers):
            with hf_flashinfer_attn.trace() as trace:
                actual = output_of(model, batch)
            torch.testing.assert_close(actual, answer, rtol=0, atol=TOLERANCE)
            traces.append(trace)

    return work


@pytest.mark.parametrize("names", [("bert", "bart"), ("mistral", "gemma2"), ("bert", "mpnet")], ids="-".join)
def test_two_models_in_two_threads(names: tuple[str, str]) -> None:
    traces: dict[str, list[Any]] = {name: [] for name in names}
    run_threads(
        [
            repeated_forwards(name, MODELS[name]("flashinfer"), MODELS[name]("eager"), seed, traces[name])
            for seed, name in enumerate(names)
        ]
    )
    for name in names:
        assert [len(trace.calls) for trace in traces[name]] == [CALLS[name]] * ROUNDS
        architectures = {call.layer[:4].lower() for trace in traces[name] for call in trace.calls}
        assert architectures <= {name[:4]}


@pytest.mark.parametrize("name", ["bert", "mistral", "bart"])
def test_one_model_in_three_threads(name: str) -> None:
    model, reference = MODELS[name]("flashinfer"), MODELS[name]("eager")
    traces: list[list[Any]] = [[], [], []]
    run_threads([repeated_forwards(name, model, reference, seed, traces[seed]) for seed in range(3)])
    for recorded in traces:
        assert [len(trace.calls) for trace in recorded] == [CALLS[name]] * ROUNDS


def test_traces_of_threads_are_separate() -> None:
    """What one thread does while another records is not in the other's trace, nor is a trace inherited."""
    deep, shallow = bert("flashinfer", layers=5), bert("flashinfer", layers=1)
    inside = threading.Event()
    done = threading.Event()
    counts: dict[str, int] = {}

    def recording() -> None:
        with hf_flashinfer_attn.trace() as trace:
            output_of(shallow, batch_of("bert"))
            inside.set()
            assert done.wait(timeout=30)
        counts["recording"] = len(trace.calls)

    def silent() -> None:
        assert inside.wait(timeout=30)
        output_of(deep, batch_of("bert"))
        done.set()

    with hf_flashinfer_attn.trace() as outer:
        run_threads([recording, silent])
    assert counts == {"recording": 1}
    assert outer.calls == []


def test_training_in_two_threads() -> None:
    """Backward passes run side by side as well."""
    gradients: dict[int, list[Tensor]] = {}

    def train(seed: int, model: Any) -> list[Tensor]:
        for step in range(5):
            batch = batch_of("bert", seed=seed + step)
            model.zero_grad()
            model(**batch).last_hidden_state[batch["attention_mask"].bool()].square().mean().backward()
        return [parameter.grad for parameter in model.encoder.parameters()]

    models = [bert("flashinfer", seed=seed) for seed in range(2)]
    works = [lambda seed=seed: gradients.__setitem__(seed, train(seed, models[seed])) for seed in range(2)]
    run_threads(works)
    for seed in range(2):
        for ours, theirs in zip(gradients[seed], train(seed, bert("eager", seed=seed))):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@each_model
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_model(name: str, how: str, used: bool) -> None:
    model = MODELS[name]("flashinfer")
    if used:
        output_of(model, batch_of(name))
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert copied is not model
    assert copied.config._attn_implementation == "flashinfer"
    assert_right(name, copied)
    assert torch.equal(output_of(copied, batch_of(name)), output_of(model, batch_of(name)))


@each_model
def test_saved_weights(name: str, tmp_path: Path) -> None:
    """Saving says nothing of our attention: the checkpoint loads where this package is not installed."""
    model = MODELS[name]("flashinfer")
    model.save_pretrained(tmp_path)
    assert "flashinfer" not in (tmp_path / "config.json").read_text()
    assert_right(name, type(model).from_pretrained(tmp_path, attn_implementation="flashinfer").eval())


@each_model
def test_saved_outputs(name: str, tmp_path: Path) -> None:
    """Outputs are plain tensors."""
    batch = batch_of(name)
    with torch.no_grad():
        outputs = MODELS[name]("flashinfer")(
            **batch, output_hidden_states=True, output_attentions=True, use_cache=False
        )
    torch.save(dict(outputs), tmp_path / "outputs.pt")
    loaded = torch.load(tmp_path / "outputs.pt", weights_only=True)
    assert loaded.keys() == outputs.keys()
    assert torch.equal(loaded["last_hidden_state"], outputs.last_hidden_state)
    flat: list[Any] = []
    for value in outputs.values():
        flat.extend(value if isinstance(value, tuple) else [value])
    assert len(flat) > 4
    assert {type(value) for value in flat} == {Tensor}
    assert not any(value.is_inference() for value in flat)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_mask(how: str) -> None:
    """A mask that was kept, as a hook of the user's may keep it, can be copied: dense or lazy, its values are right."""
    mask = mask_of_forward("bert")
    copied = copy.deepcopy(mask) if how == "deepcopy" else pickle.loads(pickle.dumps(mask))
    assert torch.equal(copied + 0, mask.dense())
