"""Training on "flashinfer": gradients, checkpointing, dropout, mixed precision, and attention weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from paired_models import (
    PAD,
    T5_IS_ON_THE_INTERFACE,
    TRANSFORMERS_VERSION,
    VOCAB_SIZE,
    build_model,
    decoder_config,
    encoder_decoder_config,
    record_outputs,
    right_padded,
    t5_config,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers import PreTrainedConfig

import hf_flashinfer_attn
from hf_flashinfer_attn.integration.functions import attention_forward

LENGTHS, DECODER_LENGTHS = (9, 5, 7, 3), (4, 6, 3, 5)
DROPOUT = 0.3

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model to train.

    Args:
        model_class: Name in transformers.
        make_config: Makes its config, given a probability of attention dropout.
        reference: The implementation to compare with.
        calls: Attention calls of one forward.
        attention: The path of a module whose output is linear in its attention weights, for the tests of dropout.
        is_encoder_decoder: Whether it has two sides, and calls of cross-attention.
    """

    model_class: str
    make_config: Callable[[float], PreTrainedConfig]
    reference: str
    calls: int
    attention: str
    is_encoder_decoder: bool = False


def bert_config(dropout: float = 0.0) -> PreTrainedConfig:
    return transformers.BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=PAD, hidden_dropout_prob=0.0, attention_probs_dropout_prob=dropout,
    )  # fmt: skip


def modernbert_config(dropout: float = 0.0) -> PreTrainedConfig:
    tokens = {f"{name}_token_id": index for index, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    return transformers.ModernBertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=64, layer_types=["full_attention", "sliding_attention"], local_attention=6,
        attention_dropout=dropout, **tokens,
    )  # fmt: skip


def of_llama(config_class: str, **settings: Any) -> Callable[[float], PreTrainedConfig]:
    return lambda dropout: decoder_config(getattr(transformers, config_class), attention_dropout=dropout, **settings)


CASES = {
    "bert": Case("BertModel", bert_config, "sdpa", 2, "encoder.layer.0.attention.self"),
    "modernbert": Case("ModernBertModel", modernbert_config, "sdpa", 2, ""),
    "llama": Case("LlamaModel", of_llama("LlamaConfig"), "sdpa", 2, "layers.0.self_attn"),
    # Softcap, which sdpa lacks: attention with all weights in memory.
    "gemma2": Case(
        "Gemma2Model",
        of_llama("Gemma2Config", attn_logit_softcapping=2.0, query_pre_attn_scalar=8, sliding_window=64),
        "eager",
        2,
        "layers.0.self_attn",
    ),
    # Not sdpa, which T5 does not have before 5.15.
    "t5": Case(
        "T5Model",
        # Smooth, where finite differences would meet the kinks of relu.
        lambda dropout: t5_config(transformers.T5Config, dropout_rate=dropout, feed_forward_proj="gated-gelu"),
        "eager",
        6,
        "encoder.block.0.layer.0.SelfAttention",
        is_encoder_decoder=True,
    ),
    "bart": Case(
        "BartModel",
        lambda dropout: encoder_decoder_config(transformers.BartConfig, attention_dropout=dropout),
        "sdpa",
        6,
        "",
        is_encoder_decoder=True,
    ),
}


def model_of(name: str, implementation: str, dropout: float = 0.0) -> Any:
    case = CASES[name]
    model = build_model(getattr(transformers, case.model_class), case.make_config(dropout), implementation)
    if name == "t5":
        # Its config knows one probability for all places: keep the one in attention alone.
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return model


def calls_of(name: str) -> int:
    return 0 if name == "t5" and not T5_IS_ON_THE_INTERFACE else CASES[name].calls


def batch_of(name: str) -> Batch:
    tokens, mask = right_padded(LENGTHS)
    if name in ("llama", "gemma2"):
        # Padded on the left, where a causal query sees padding unless a mask hides it.
        tokens, mask = tokens.flip(1), mask.flip(1)
    batch = {"input_ids": tokens, "attention_mask": mask}
    if CASES[name].is_encoder_decoder:
        batch["decoder_input_ids"], batch["decoder_attention_mask"] = right_padded(DECODER_LENGTHS, seed=1)
    return batch


def valid_positions(batch: Batch) -> Tensor:
    return batch.get("decoder_attention_mask", batch["attention_mask"]).bool()


def without_padding(batch: Batch) -> Batch:
    return {name: torch.ones_like(value) if name.endswith("mask") else value for name, value in batch.items()}


def loss_of(model: Any, batch: Batch, valid: Tensor) -> Tensor:
    hidden = model(**batch).last_hidden_state[valid].double()
    target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2), dtype=hidden.dtype)
    return (hidden - target).square().mean()


def gradients_of(model: Any, batch: Batch, *, seed: int = 0, valid: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    loss_of(model, batch, valid_positions(batch) if valid is None else valid).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_close_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    # Some gradients are sums that cancel, such as those of BERT's key biases: what is left is rounding.
    rounding = 1e-5 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-4, atol=rounding, msg=lambda text, name=name: f"{name}: {text}"
        )


def root_mean_square(difference: Tensor) -> float:
    return difference.double().square().mean().sqrt().item()


def flattened(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten().double() for gradient in gradients.values()])


TRAINED = ["bert", "llama", "t5", "modernbert", "gemma2", "bart"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", TRAINED)
def test_gradients(name: str, training: bool) -> None:
    batch = batch_of(name)
    reference, model = (model_of(name, which).train(training) for which in (CASES[name].reference, "flashinfer"))
    expected = gradients_of(reference, batch)
    with hf_flashinfer_attn.trace() as trace:
        actual = gradients_of(model, batch)
    assert len(trace.calls) == calls_of(name)
    assert_close_gradients(actual, expected)
    # Attention learns, and the mask matters to what it learns.
    projections = [
        key for key in expected if key.endswith((".q.weight", "query.weight", "q_proj.weight", "Wqkv.weight"))
    ]
    assert len(projections) == CASES[name].calls
    unmasked = gradients_of(reference, without_padding(batch), valid=valid_positions(batch))
    for projection in projections:
        size = expected[projection].norm()
        assert size > 1e-3
        assert (unmasked[projection] - expected[projection]).norm() > 1e-2 * size


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "gemma2"])
def test_gradients_beside_a_row_of_padding(name: str) -> None:
    """Queries without any key give zeros, and no NaN on the way back."""
    batch = batch_of(name)
    batch["attention_mask"][1] = 0
    if CASES[name].is_encoder_decoder:
        batch["decoder_attention_mask"][1] = 0
    expected = gradients_of(model_of(name, CASES[name].reference).train(), batch)
    actual = gradients_of(model_of(name, "flashinfer").train(), batch)
    assert all(gradient.isfinite().all() for gradient in actual.values())
    assert_close_gradients(actual, expected)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_gradients_of_a_part(name: str) -> None:
    """Only value projections are trained, as with an adapter: query and key need no gradient, the output does."""
    batch, results = batch_of(name), []
    for implementation in (CASES[name].reference, "flashinfer"):
        model = model_of(name, implementation).train()
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name.endswith((".value.weight", ".v_proj.weight", ".v.weight")))
        results.append(gradients_of(model, batch))
    assert len(results[0]) == CASES[name].calls
    assert_close_gradients(results[1], results[0])


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
@pytest.mark.parametrize("name", TRAINED)
def test_gradient_checkpointing(name: str, dropout: float, use_reentrant: bool) -> None:
    batch = batch_of(name)
    expected = gradients_of(model_of(name, "flashinfer", dropout).train(), batch)
    model = model_of(name, "flashinfer", dropout).train()
    # The name of the method changes in v6.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    with hf_flashinfer_attn.trace() as trace:
        actual = gradients_of(model, batch)
    # Every layer once in the forward, and once more in the backward.
    assert len(trace.calls) == 2 * calls_of(name)
    assert_close_gradients(actual, expected)


DROPPED = ["bert", "llama", "gemma2", "t5"]


def require_interface(name: str) -> None:
    if calls_of(name) == 0:
        pytest.skip(f"T5 of transformers {TRANSFORMERS_VERSION} is not on the attention interface")


@torch.no_grad()
def attention_output(model: Any, name: str, batch: Batch) -> Tensor:
    """What the first attention layer returns at valid positions of the encoder, `(valid tokens, ...)`."""
    outputs, stop = record_outputs(model.get_submodule(CASES[name].attention))
    model(**batch)
    stop()
    return outputs[0][batch["attention_mask"].bool()]


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_keeps_the_mean(name: str) -> None:
    """Over many draws, outputs average to those without dropout, and spread as those of eager attention do."""
    require_interface(name)
    batch, draws = batch_of(name), 500
    repeated = {key: value.repeat(draws, 1) for key, value in batch.items()}
    expected = attention_output(model_of(name, "eager", DROPOUT).eval(), name, batch)
    spreads = {}
    for implementation in ("eager", "flashinfer"):
        torch.manual_seed(0)
        model = model_of(name, implementation, DROPOUT).train()
        with hf_flashinfer_attn.trace() as trace:
            outputs = attention_output(model, name, repeated).unflatten(0, (draws, -1))
        assert len(trace.calls) == (calls_of(name) if implementation == "flashinfer" else 0)
        spreads[implementation] = outputs.std(0)
        standard_error = outputs.std(0) / draws**0.5
        assert ((outputs.mean(0) - expected).abs() <= 6 * standard_error).all()
    assert (spreads["flashinfer"] > 0).all()
    ratio = (spreads["flashinfer"] / spreads["eager"]).square()
    assert abs(ratio.mean() - 1) < 0.05
    assert (ratio.log().abs() < 1).all()


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_follows_the_seed_and_the_mode(name: str) -> None:
    require_interface(name)
    batch, model = batch_of(name), model_of(name, "flashinfer", DROPOUT).train()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(attention_output(model, name, batch))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-2)
    torch.testing.assert_close(
        attention_output(model.eval(), name, batch), attention_output(model_of(name, "flashinfer"), name, batch)
    )


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_is_differentiable(name: str) -> None:
    """The gradient is the slope of the loss while the same weights stay dropped."""
    require_interface(name)
    batch = batch_of(name)
    model = model_of(name, "flashinfer", DROPOUT).double().train()
    gradients = gradients_of(model, batch, seed=3)
    slope = flattened(gradients).norm().item()
    assert slope > 1e-2

    def loss_at(step: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for key, weight in moved.named_parameters():
                if key in gradients:
                    weight.add_(gradients[key] * (step / slope))
            torch.manual_seed(3)
            return loss_of(moved, batch, valid_positions(batch)).item()

    # Norms compute in float32 whatever the model's dtype, so that the step cannot be tiny; T5 curves.
    assert (loss_at(1e-4) - loss_at(-1e-4)) / 2e-4 == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("name", ["bert", "llama", "modernbert"])
def test_autocast(name: str) -> None:
    """In bfloat16, errors and those of the gradients are no larger than sdpa's."""
    batch, valid = batch_of(name), valid_positions(batch_of(name))
    exact = model_of(name, "eager")
    expected, gradients = exact(**batch).last_hidden_state[valid].detach(), gradients_of(exact, batch)
    errors: dict[str, tuple[float, float]] = {}
    dtypes = set()
    for implementation in ("sdpa", "flashinfer"):
        model = model_of(name, implementation)
        with torch.autocast("cpu", dtype=torch.bfloat16), hf_flashinfer_attn.trace() as trace:
            output = model(**batch).last_hidden_state
            found = gradients_of(model, batch)
        assert len(trace.calls) == (2 * calls_of(name) if implementation == "flashinfer" else 0)
        assert found.keys() == gradients.keys()
        dtypes.add(output.dtype)
        errors[implementation] = (
            root_mean_square(output[valid].detach() - expected),
            root_mean_square(flattened(found) - flattened(gradients)),
        )
    assert len(dtypes) == 1
    for ours, theirs in zip(errors["flashinfer"], errors["sdpa"]):
        assert 0 < ours <= 1.25 * theirs


class QuantisedLinear(nn.Linear):
    """Computes in the dtype of its weight and answers in that of its input, as the layers of bitsandbytes do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


def prepared_as_by_peft(model: nn.Module, *, quantised: bool) -> nn.Module:
    """Linear layers in bfloat16, all else in float32: what `prepare_model_for_kbit_training` leaves behind."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.to(torch.bfloat16)
            if quantised:
                module.__class__ = QuantisedLinear
    return model


@pytest.mark.parametrize("weights", ["autocast", "quantised"])
@pytest.mark.parametrize("name", ["bert", "llama", "modernbert"])
def test_float32_norms_in_a_bfloat16_model(name: str, weights: str) -> None:
    """Hidden states reach attention in float32, and leave it in the dtype that sdpa gives them."""
    quantised = weights == "quantised"
    batch, valid = batch_of(name), valid_positions(batch_of(name))
    # The same rounded weights, computed in float32.
    exact = prepared_as_by_peft(model_of(name, "eager"), quantised=False).float()
    with torch.no_grad():
        expected = exact(**batch).last_hidden_state[valid]
    errors, attention_dtypes = {}, {}
    for implementation in ("sdpa", "flashinfer"):
        model = prepared_as_by_peft(model_of(name, implementation), quantised=quantised)
        context: Any = contextlib.nullcontext() if quantised else torch.autocast("cpu", dtype=torch.bfloat16)
        attention = next(module for module in model.modules() if type(module).__name__.endswith("Attention"))
        outputs, stop = record_outputs(attention)
        with torch.no_grad(), context, hf_flashinfer_attn.trace() as trace:
            output = model(**batch).last_hidden_state
        stop()
        assert len(trace.calls) == (calls_of(name) if implementation == "flashinfer" else 0)
        attention_dtypes[implementation] = outputs[0].dtype
        errors[implementation] = root_mean_square(output[valid] - expected)
    assert attention_dtypes["flashinfer"] == attention_dtypes["sdpa"]
    assert attention_dtypes["sdpa"] == torch.float32 or not quantised
    assert 0 < errors["flashinfer"] <= 1.25 * errors["sdpa"]


def kinds_of_weights(name: str) -> tuple[str, ...]:
    if CASES[name].is_encoder_decoder:
        return ("encoder_attentions", "decoder_attentions", "cross_attentions")
    return ("attentions",)


@pytest.mark.parametrize("name", TRAINED)
def test_attention_weights(name: str) -> None:
    batch = batch_of(name)
    encoder_valid, decoder_valid = batch["attention_mask"].bool(), valid_positions(batch)
    with torch.no_grad():
        expected = model_of(name, "eager")(**batch, output_attentions=True)
        unmasked = model_of(name, "eager")(**without_padding(batch), output_attentions=True)
        with hf_flashinfer_attn.trace() as trace:
            actual = model_of(name, "flashinfer")(**batch, output_attentions=True)
    assert len(trace.calls) == calls_of(name)
    assert {call.reason for call in trace.calls} <= {"output_attentions=True"}
    torch.testing.assert_close(
        actual.last_hidden_state[decoder_valid], expected.last_hidden_state[decoder_valid], rtol=0, atol=1e-5
    )
    for kind in kinds_of_weights(name):
        assert len(actual[kind]) == len(expected[kind]) == 2
        valid = encoder_valid if kind == "encoder_attentions" else decoder_valid
        changes = []
        for ours, theirs, without in zip(actual[kind], expected[kind], unmasked[kind]):
            assert ours.shape == theirs.shape
            ours, theirs, without = (weights.transpose(1, 2)[valid] for weights in (ours, theirs, without))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]))
            # The weights are far from uniform.
            assert theirs.amax(-1).mean() > 0.3
            changes.append((theirs - without).abs().max())
        assert max(changes) > 1e-2


def test_attention_weights_in_training() -> None:
    """Weights carry gradients: a loss may be made of them."""
    batch, gradients = batch_of("bert"), []
    for implementation in ("eager", "flashinfer"):
        model = model_of("bert", implementation).train()
        weights = model(**batch, output_attentions=True).attentions[-1]
        weights.transpose(1, 2)[batch["attention_mask"].bool()].square().sum().backward()
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert gradients[0]["encoder.layer.1.attention.self.query.weight"].norm() > 1e-3
    assert_close_gradients(gradients[1], gradients[0])


def test_attention_weights_cannot_be_asked_for_in_the_config() -> None:
    """transformers refuses it for every name but "eager"."""
    model = model_of("bert", "flashinfer")
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    assert model.config.output_attentions is False


def test_attention_weights_that_nobody_asks_attention_for() -> None:
    """Where transformers collects weights without telling attention so, sdpa has none to give; ours are eager's."""
    batch = batch_of("bert")
    gpt2 = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=2, eos_token_id=3
    )
    asking_config = bert_config()
    asking_config.output_attentions = True
    for model_class, config, asked in (
        (transformers.GPT2Model, gpt2, {"output_attentions": True}),
        (transformers.BertModel, asking_config, {}),
    ):
        with torch.no_grad():
            ours = build_model(model_class, config, "flashinfer")(**batch, **asked).attentions
            config.output_attentions = False
            theirs = build_model(model_class, config, "eager")(**batch, output_attentions=True).attentions
        assert len(ours) == len(theirs) == 2
        valid = batch["attention_mask"].bool()
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine.transpose(1, 2)[valid], other.transpose(1, 2)[valid], rtol=0, atol=1e-5)


@torch.no_grad()
def test_tangents_are_refused_not_lost() -> None:
    """Kernels called past autograd would return numbers without them."""
    module, inputs = nn.Module(), torch.randn(3, 1, 2, 5, 8)

    def attention(query: Tensor) -> Tensor:
        output, _ = attention_forward(module, query, inputs[1], inputs[2], None)
        return output

    expected = attention(inputs[0])
    for differentiate in (lambda: torch.func.jvp(attention, (inputs[0],), (inputs[0],)), lambda: _dual(attention)):
        with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match="forward-mode"):
            differentiate()
    with forward_ad.dual_level():
        assert torch.equal(attention(inputs[0]), expected)


def _dual(attention: Callable[[Tensor], Tensor]) -> Tensor:
    with forward_ad.dual_level():
        return attention(forward_ad.make_dual(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)))
