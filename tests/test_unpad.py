"""`unpad`: the numbers of eager attention on padded batches, computed on tokens alone."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from paired_models import build_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

import hf_flashinfer_attn
from hf_flashinfer_attn import UnsupportedAttentionError, repad, unpad
from hf_flashinfer_attn.ragged.layout import RaggedLayout
from hf_flashinfer_attn.unpadding import hooks
from hf_flashinfer_attn.unpadding.families import family_of
from hf_flashinfer_attn.unpadding.packing import Packing

TOLERANCE = 1e-5
PAD, VOCAB_SIZE, SLOTS, LABELS = 1, 48, 9, 2
LENGTHS = (9, 4, 6, 2)
# Each row starts and ends somewhere else, and has a hole.
HOLES = (
    (1, 1, 0, 1, 1, 0, 1, 1, 1),
    (0, 1, 0, 0, 1, 1, 1, 0, 1),
    (1, 0, 1, 1, 1, 0, 0, 0, 0),
    (0, 0, 1, 1, 0, 1, 1, 1, 1),
)
PADDINGS = ("right", "left", "holes", "one-row", "empty-row", "all-ones", "no-mask")
PACKED_PADDINGS = ("right", "left", "holes", "one-row", "empty-row")

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "num_labels": LABELS,
}
_DECODER_SIZES = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_DISTILBERT = {
    "vocab_size": VOCAB_SIZE, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 32,
    "pad_token_id": PAD, "num_labels": LABELS,
}  # fmt: skip
_SEQUENCE, _TOKENS, _MASKED, _QUESTION, _CHOICE, _CAUSAL = (
    "SequenceClassification", "TokenClassification", "MaskedLM", "QuestionAnswering", "MultipleChoice", "CausalLM",
)  # fmt: skip
_EVERY_HEAD = (_SEQUENCE, _TOKENS, _MASKED, _QUESTION, _CHOICE)
_THREE_HEADS = (_SEQUENCE, _TOKENS, _MASKED)
_DECODER_HEADS = (_CAUSAL, _SEQUENCE, _TOKENS)

# Per family: the prefix of its classes, its config, the settings of that, and its heads.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "bert": ("Bert", "BertConfig", _SIZES, _EVERY_HEAD),
    "roberta": ("Roberta", "RobertaConfig", _SIZES, _EVERY_HEAD),
    "xlm-roberta": ("XLMRoberta", "XLMRobertaConfig", _SIZES, _EVERY_HEAD),
    "camembert": ("Camembert", "CamembertConfig", _SIZES, _EVERY_HEAD),
    "data2vec-text": ("Data2VecText", "Data2VecTextConfig", _SIZES, _EVERY_HEAD),
    "electra": ("Electra", "ElectraConfig", {**_SIZES, "embedding_size": 16}, _EVERY_HEAD),
    "mpnet": ("MPNet", "MPNetConfig", _SIZES, _EVERY_HEAD),
    "distilbert": ("DistilBert", "DistilBertConfig", _DISTILBERT, _EVERY_HEAD),
    "albert": ("Albert", "AlbertConfig", {**_SIZES, "embedding_size": 16}, _EVERY_HEAD),
    "mobilebert": (
        "MobileBert", "MobileBertConfig",
        {**_SIZES, "embedding_size": 16, "intra_bottleneck_size": 32, "trigram_input": False,
         "normalization_type": "layer_norm"}, _EVERY_HEAD,
    ),
    "modernbert": ("ModernBert", "ModernBertConfig", {**_SIZES, "local_attention": 6}, _EVERY_HEAD),
    "modernbert-mean": (
        "ModernBert", "ModernBertConfig", {**_SIZES, "local_attention": 6, "classifier_pooling": "mean"}, (_SEQUENCE,),
    ),
    "nomic-bert": ("NomicBert", "NomicBertConfig", _SIZES, _THREE_HEADS),
    "jina-v3": ("JinaEmbeddingsV3", "JinaEmbeddingsV3Config", _SIZES, (_SEQUENCE, _TOKENS, _MASKED, _QUESTION)),
    "eurobert": (
        "EuroBert", "EuroBertConfig", {**_SIZES, "num_key_value_heads": 2, "mask_token_id": 4}, _THREE_HEADS,
    ),
    "eurobert-mean": (
        "EuroBert", "EuroBertConfig", {**_SIZES, "mask_token_id": 4, "classifier_pooling": "mean"}, (_SEQUENCE,),
    ),
    "esm-absolute": ("Esm", "EsmConfig", {**_SIZES, "mask_token_id": 4}, _THREE_HEADS),
    "esm-rotary": (
        "Esm", "EsmConfig",
        {**_SIZES, "mask_token_id": 4, "position_embedding_type": "rotary", "token_dropout": True}, _THREE_HEADS,
    ),
    "qwen3": ("Qwen3", "Qwen3Config", {**_DECODER_SIZES, "use_cache": False}, _DECODER_HEADS),
    "llama": ("Llama", "LlamaConfig", {**_DECODER_SIZES, "use_cache": False}, _DECODER_HEADS),
    "mistral": (
        "Mistral", "MistralConfig", {**_DECODER_SIZES, "use_cache": False, "sliding_window": 4}, _DECODER_HEADS,
    ),
    "gemma": ("Gemma", "GemmaConfig", {**_DECODER_SIZES, "use_cache": False}, _DECODER_HEADS),
    "gemma3-text": (
        "Gemma3Text", "Gemma3TextConfig",
        {**_DECODER_SIZES, "use_cache": False, "sliding_window": 4, "query_pre_attn_scalar": 8,
         "layer_types": ["sliding_attention", "full_attention"]}, (_SEQUENCE,),
    ),
    "embedding-gemma": (
        "Gemma3Text", "Gemma3TextConfig",
        {**_DECODER_SIZES, "use_cache": False, "sliding_window": 4, "query_pre_attn_scalar": 8,
         "use_bidirectional_attention": True, "layer_types": ["sliding_attention", "full_attention"]}, (),
    ),
}  # fmt: skip
each_mode = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
# Their attention depends on how far apart tokens are.
MEASURING = {"mpnet", "modernbert", "modernbert-mean", "mistral", "gemma3-text", "embedding-gemma"}
CASES = [
    pytest.param(family, head, padding, id=f"{family}-{head or 'base'}-{padding}")
    for family, (_, _, _, heads) in FAMILIES.items()
    for head in ("", *heads)
    if not (family.endswith("-mean") and not head)
    for padding in PADDINGS
]
EACH_FAMILY = [family for family in FAMILIES if not family.endswith("-mean")]
ROBERTA_LIKE = ("roberta", "xlm-roberta", "camembert", "data2vec-text", "mpnet")


def class_of(family: str, head: str) -> type[PreTrainedModel]:
    prefix = FAMILIES[family][0]
    name = f"{prefix}For{head}" if head else f"{prefix}Model"
    model_class: type[PreTrainedModel] = getattr(transformers, name)
    return model_class


def config_of(family: str, **settings: Any) -> PreTrainedConfig:
    _, config, known, _ = FAMILIES[family]
    made: PreTrainedConfig = getattr(transformers, config)(**{**known, **settings})
    return made


def build(family: str, head: str = "", implementation: str = "flashinfer", **settings: Any) -> Any:
    model = build_model(class_of(family, head), config_of(family, **settings), implementation)
    if family == "esm-rotary" and layers_number_tokens(model):
        pytest.skip("ESM's layers number tokens by themselves in this version of transformers")
    return model


def layers_number_tokens(model: Any) -> bool:
    return getattr(model.base_model, "rotary_embeddings", None) is None


@functools.lru_cache(maxsize=2)
def reference(family: str, head: str) -> Any:
    return build(family, head, "eager")


@functools.lru_cache(maxsize=2)
def unpadded(family: str, head: str) -> Any:
    return unpad(build(family, head))


def mask_of(padding: str) -> Tensor | None:
    if padding == "no-mask":
        return None
    if padding == "holes":
        return torch.tensor(HOLES)
    lengths = {"one-row": (5,), "empty-row": (9, 0, 6, 2), "all-ones": (SLOTS,) * 4}.get(padding, LENGTHS)
    mask = (torch.arange(SLOTS)[None] < torch.tensor(lengths)[:, None]).long()
    return mask.flip(1) if padding == "left" else mask


def inputs_of(padding: str, head: str = "", *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = mask_of(padding)
    shape = (4, SLOTS) if mask is None else tuple(mask.shape)
    ids = torch.randint(5, VOCAB_SIZE, shape, generator=generator)
    inputs = {"input_ids": ids if mask is None else ids.masked_fill(mask == 0, PAD)}
    if mask is not None:
        inputs["attention_mask"] = mask
    if head == _CHOICE and shape[0] > 1:
        return {name: value.view(2, 2, SLOTS) for name, value in inputs.items()}
    return {name: value[None] for name, value in inputs.items()} if head == _CHOICE else inputs


def comparable(output: Tensor, name: str, inputs: dict[str, Tensor], family: str, head: str) -> Tensor:
    """The part of an output that padding has no say in."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return output
    mask = mask.flatten(0, -2).bool()
    per_token = output.ndim >= 2 and output.shape[:2] == mask.shape
    if per_token:
        return output[mask]
    if name in ("last_hidden_state", "hidden_states"):
        raise AssertionError(f"{name} has shape {tuple(output.shape)}")
    # What is pooled from the first slot is defined where that slot is a token; other rows end in one or have none.
    reads_first = not family.endswith("-mean") and not family_of_is_causal(family)
    defined = mask[:, 0] if reads_first else mask.any(1)
    return output.flatten()[defined] if head == _CHOICE else output[defined]


def family_of_is_causal(family: str) -> bool:
    found = family_of(reference(family, "").base_model)
    assert found is not None
    return found.is_causal


def tensors_of(output: Any) -> dict[str, Tensor]:
    flat = {}
    for name, value in output.items():
        if isinstance(value, Tensor):
            flat[name] = value
        elif name == "hidden_states":
            flat.update({f"hidden_states {index}": state for index, state in enumerate(value)})
    return flat


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    assert actual.shape == expected.shape, name
    assert expected.numel() > 0, name
    bound = TOLERANCE * max(1.0, expected.abs().max().item())
    difference = (actual - expected).abs().max().item()
    assert difference <= bound, f"{name} is {difference:.1e} off, at most {bound:.1e}"


def record_inputs(model: nn.Module) -> list[tuple[int, ...]]:
    """Keeps the shapes of what attention layers are given."""
    shapes: list[tuple[int, ...]] = []
    projections = ("query", "q_proj", "q_lin", "Wqkv", "q")
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in projections:
            module.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape[:-1])))
    return shapes


@pytest.mark.parametrize(("family", "head", "padding"), CASES)
def test_equals_eager(family: str, head: str, padding: str) -> None:
    inputs = inputs_of(padding, head)
    if head == _CHOICE and getattr(reference(family, head).base_model, "pooler", "a summary of its own") is None:
        with pytest.raises(IndexError):
            reference(family, head)(**inputs)
        pytest.skip("this head reads the output of a pooler that this version of transformers does not give it")
    # Half of the cases the way that most people call a model.
    mode = torch.inference_mode if PADDINGS.index(padding) % 2 == len(head) % 2 else torch.no_grad
    with mode():
        expected = reference(family, head)(**inputs, output_hidden_states=True)
        model = unpadded(family, head)
        with hf_flashinfer_attn.trace() as trace:
            actual = model(**inputs, output_hidden_states=True)

    assert type(actual) is type(expected)
    assert list(actual) == list(expected)
    assert trace.host_copies == 0
    expected, actual = tensors_of(expected), tensors_of(actual)
    for name, right in expected.items():
        right = comparable(right, name, inputs, family, head)
        assert_close(comparable(actual[name], name, inputs, family, head), right, name)


@pytest.mark.parametrize("family", EACH_FAMILY)
@pytest.mark.parametrize("padding", PACKED_PADDINGS)
@each_mode
def test_computes_tokens_only(mode: Any, family: str, padding: str) -> None:
    model = unpad(build(family))
    shapes = record_inputs(model)
    inputs = inputs_of(padding)
    with mode():
        output = model(**inputs)

    mask = inputs["attention_mask"]
    stays = family in MEASURING and padding == "holes"
    expected = tuple(mask.shape) if stays else (1, int(mask.sum()))
    assert len(shapes) >= 2
    assert set(shapes) == {expected}
    if not stays:
        assert (output.last_hidden_state[mask == 0] == 0).all()


@pytest.mark.parametrize("family", ROBERTA_LIKE)
def test_positions_start_after_the_id_of_padding(family: str) -> None:
    model = unpad(build(family))
    seen: list[Tensor] = []
    model.embeddings.position_embeddings.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**inputs_of("right"))
    expected = [position for length in LENGTHS for position in range(PAD + 1, PAD + 1 + length)]
    assert seen[0].tolist() == [expected]


def test_positions_start_at_zero_elsewhere() -> None:
    model = unpad(build("bert"))
    seen: list[Tensor] = []
    model.embeddings.position_embeddings.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(**inputs_of("right"))
    assert seen[0].tolist() == [[position for length in LENGTHS for position in range(length)]]


@pytest.mark.parametrize("family", EACH_FAMILY)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_gradients_equal(family: str, padding: str) -> None:
    inputs = inputs_of(padding)
    models = copy.deepcopy(reference(family, "")), unpad(build(family))
    for model in models:
        hidden = model(**inputs).last_hidden_state
        weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden) * inputs["attention_mask"][..., None]
        (hidden * weights).sum().backward()
    gradients = [{name: weight.grad for name, weight in model.named_parameters()} for model in models]
    compared = 0
    for name, right in gradients[0].items():
        if right is None:
            assert gradients[1][name] is None, name
        else:
            assert_close(gradients[1][name], right, name)
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "modernbert"])
def test_loss_and_its_gradients_equal(family: str) -> None:
    inputs = inputs_of("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    models = copy.deepcopy(reference(family, _MASKED)), unpad(build(family, _MASKED))
    outputs = [model(**inputs, labels=labels) for model in models]
    for output in outputs:
        output.loss.backward()
    assert_close(outputs[1].loss, outputs[0].loss, "loss")
    for (name, expected), actual in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if expected.grad is not None:
            assert_close(actual.grad, expected.grad, name)


@pytest.mark.parametrize("family", ["bert", "roberta", "nomic-bert", "qwen3", "esm-absolute"])
def test_gradient_checkpointing(family: str) -> None:
    no_dropout = {"attention_dropout": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    model, inputs = unpad(build(family, **no_dropout).train()), inputs_of("right")
    shapes = record_inputs(model)
    gradients, calls = [], []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        shapes.clear()
        model(**inputs).last_hidden_state.square().sum().backward()
        assert set(shapes) == {(1, sum(LENGTHS))}
        calls.append(len(shapes))
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    assert calls == [2, 4]
    assert_close(gradients[1], gradients[0], "gradient")


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "albert", "esm-absolute", "modernbert", "llama"])
@each_mode
def test_inputs_embeds(mode: Any, family: str) -> None:
    inputs = inputs_of("right")
    embeds = torch.randn(4, SLOTS, reference(family, "").get_input_embeddings().embedding_dim)
    arguments = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    model = unpad(build(family))
    shapes = record_inputs(model)
    with mode():
        expected, actual = reference(family, "")(**arguments), model(**arguments)
    assert set(shapes) == {(1, sum(LENGTHS))}
    valid = inputs["attention_mask"].bool()
    assert_close(actual.last_hidden_state[valid], expected.last_hidden_state[valid], "last_hidden_state")


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "modernbert", "qwen3", "gemma3-text"])
@pytest.mark.parametrize("rows", [1, 4])
@each_mode
def test_positions_of_the_user(mode: Any, family: str, rows: int) -> None:
    inputs = inputs_of("right")
    inputs["position_ids"] = (torch.arange(SLOTS) * 2 + 5)[None].repeat(rows, 1) + torch.arange(rows)[:, None]
    model = unpad(build(family))
    shapes = record_inputs(model)
    with mode():
        expected, actual = reference(family, "")(**inputs), model(**inputs)
    assert set(shapes) == {(1, sum(LENGTHS))}
    valid = inputs["attention_mask"].bool()
    assert_close(actual.last_hidden_state[valid], expected.last_hidden_state[valid], "last_hidden_state")


@pytest.mark.parametrize("family", ["bert", "electra", "albert", "nomic-bert"])
@each_mode
def test_token_types(mode: Any, family: str) -> None:
    inputs = inputs_of("right")
    inputs["token_type_ids"] = torch.arange(SLOTS).ge(2).long()[None].repeat(4, 1)
    model = unpadded(family, "")
    with mode():
        expected, actual = reference(family, "")(**inputs), model(**inputs)
        other = model(**{**inputs, "token_type_ids": torch.zeros_like(inputs["token_type_ids"])})
    valid = inputs["attention_mask"].bool()
    assert_close(actual.last_hidden_state[valid], expected.last_hidden_state[valid], "last_hidden_state")
    assert (other.last_hidden_state - actual.last_hidden_state).abs().max() > 1e-3


@pytest.mark.parametrize("head", ["", _SEQUENCE])
@each_mode
def test_tuples(mode: Any, head: str) -> None:
    inputs = inputs_of("right")
    model = unpadded("bert", head)
    with mode():
        expected = reference("bert", head)(**inputs, return_dict=False)
        actual = model(**inputs, return_dict=False)
        again = model(*inputs.values())
    assert type(actual) is tuple
    assert len(actual) == len(expected)
    for index, right in enumerate(expected):
        name = f"output {index}"
        right = comparable(right, name, inputs, "bert", head)
        assert_close(comparable(actual[index], name, inputs, "bert", head), right, name)
        assert torch.equal(actual[index], list(again.values())[index])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_dtypes_of_masks(dtype: torch.dtype) -> None:
    inputs = inputs_of("right")
    model = unpad(build("bert"))
    shapes = record_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        actual = model(**{**inputs, "attention_mask": inputs["attention_mask"].to(dtype)}).last_hidden_state
    assert torch.equal(actual, expected)
    assert set(shapes) == {(1, sum(LENGTHS))}


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_padding_is_never_looked_at(family: str) -> None:
    model, inputs = unpad(build(family)), inputs_of("right")
    with torch.no_grad():
        expected = model(**inputs)
        model.get_input_embeddings().weight[PAD] = float("nan")
        actual = model(**inputs)
    for name, right in tensors_of(expected).items():
        assert torch.equal(actual[name], right), name
        assert right.isfinite().all(), name


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_one_layout_and_no_copies(mode: Any) -> None:
    for family in ("bert", "mpnet", "modernbert", "gemma3-text", "qwen3"):
        model = unpadded(family, "")
        with mode(), hf_flashinfer_attn.trace() as trace:
            model(**inputs_of("right"))
        assert (trace.layouts, trace.host_copies, len(trace.calls)) == (1, 0, 2), family


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_the_host_reads_nothing(family: str) -> None:
    model, inputs = unpadded(family, ""), inputs_of("left")
    with torch.no_grad():
        model(**inputs)
        with HostReads() as reads:
            model(**inputs)
    # EmbeddingGemma joins its mask function with a constant, which is on the CPU.
    constants = {"embedding-gemma": ["aten._local_scalar_dense.default"]}
    assert reads.names == constants.get(family, [])
    with HostReads() as reads:
        assert inputs["attention_mask"].sum().item() == sum(LENGTHS)
    assert len(reads.names) == 1


LEARNED_POSITIONS = ("bert", "electra", "albert", "distilbert", "mobilebert", "esm-absolute", *ROBERTA_LIKE)


def test_families_with_learned_positions() -> None:
    others = {family for family in EACH_FAMILY if family not in LEARNED_POSITIONS} - {"esm-rotary"}
    for family in others:
        assert not any(name.endswith("position_embeddings") for name, _ in reference(family, "").named_modules())


@pytest.mark.parametrize("given", ["ids", "embeddings"])
@pytest.mark.parametrize("family", LEARNED_POSITIONS)
def test_rows_longer_than_the_position_table(family: str, given: str) -> None:
    """As an error of the model or as our own, before the table is looked at, where a GPU could only abort."""
    model, plain = unpad(build(family)), reference(family, "")
    mask = (torch.arange(40)[None] < torch.tensor([40, 12])[:, None]).long()
    inputs = {"input_ids": torch.full((2, 40), 7).masked_fill(mask == 0, PAD), "attention_mask": mask}
    if given == "embeddings":
        inputs = inputs_without_ids(inputs) | {"inputs_embeds": plain.get_input_embeddings()(inputs["input_ids"])}
    looked_up: list[Tensor] = []
    table = model.embeddings.position_embeddings
    table.register_forward_hook(lambda module, args, output: looked_up.append(args[0]))
    if family == "esm-absolute" and given == "embeddings":
        assert model(**inputs).last_hidden_state.isfinite().all()
        return
    with pytest.raises((RuntimeError, IndexError)) as ours:
        model(**inputs)
    assert all(int(positions.max()) < table.num_embeddings for positions in looked_up)
    with pytest.raises((RuntimeError, IndexError)) as expected:
        plain(**inputs)
    after_padding_id = family in ROBERTA_LIKE or family == "esm-absolute"
    assert ours.type is (IndexError if after_padding_id else expected.type)
    if after_padding_id:
        assert "a row of 40 tokens" in str(ours.value)
        assert "at most 30" in str(ours.value)


@pytest.mark.parametrize("family", [*ROBERTA_LIKE, "esm-absolute"])
def test_wide_batches_of_short_rows(family: str) -> None:
    """Positions of these families count tokens, and padding may be as wide as it likes."""
    mask = (torch.arange(40)[None] < torch.tensor([30, 12])[:, None]).long()
    inputs = {"input_ids": torch.full((2, 40), 7).masked_fill(mask == 0, PAD), "attention_mask": mask}
    model = unpad(build(family))
    shapes = record_inputs(model)
    with torch.no_grad():
        actual, expected = (part(**inputs).last_hidden_state for part in (model, reference(family, "")))
    assert set(shapes) == {(1, 42)}
    assert_close(actual[mask.bool()], expected[mask.bool()], "last_hidden_state")


def test_wrong_arguments_are_errors_still() -> None:
    model, inputs = unpadded("bert", ""), inputs_of("right")
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(inputs["input_ids"], **inputs)
    with pytest.raises(TypeError, match="too many positional arguments"):
        model(*[None] * 20)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(attention_mask=inputs["attention_mask"])


def test_only_tokens_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model elsewhere is given when its inputs are on the CPU; "meta" stands for elsewhere."""
    elsewhere = torch.device("meta")
    monkeypatch.setattr(hooks, "_device_of", lambda module, default: elsewhere)
    model, inputs = build("roberta", _SEQUENCE), inputs_of("right")
    labels = torch.zeros(4, dtype=torch.long)
    _, of_head = hooks.move_to_head(model, (inputs["input_ids"],), {**inputs_without_ids(inputs), "labels": labels})
    assert of_head["input_ids"].device.type == "cpu"
    assert of_head["attention_mask"].device == of_head["labels"].device == elsewhere

    of_head.pop("labels")
    _, packed = hooks.pack(model.base_model, (), of_head)
    for name in ("input_ids", "position_ids"):
        assert (packed[name].shape, packed[name].device) == ((1, sum(LENGTHS)), elsewhere)
    assert packed["attention_mask"] is None
    assert packed["cu_seq_lens_q"].tolist() == [0, 9, 13, 19, 21]
    assert packed["cu_seq_lens_q"].device.type == "cpu"

    _, whole = hooks.pack(model.base_model, (), inputs_of("all-ones"))
    assert {value.device for value in whole.values()} == {elsewhere}
    assert whole["input_ids"].shape == whole["attention_mask"].shape == (4, SLOTS)


def test_a_mask_that_a_head_reshapes_is_read_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_device_of", lambda module, default: torch.device("meta"))
    model, inputs = build("roberta", _CHOICE), inputs_of("right", _CHOICE)
    mask = inputs["attention_mask"]
    _, of_head = hooks.move_to_head(model, (), inputs)
    moved = of_head["attention_mask"]
    assert (moved.shape, moved.device.type) == ((2, 2, SLOTS), "meta")

    flat = {"input_ids": of_head["input_ids"].view(-1, SLOTS), "attention_mask": moved.view(-1, SLOTS)}
    _, packed = hooks.pack(model.base_model, (), dict(flat))
    assert packed["cu_seq_lens_q"].tolist() == [0, 9, 13, 19, 21]
    assert torch.equal(hooks._read_from(flat["attention_mask"]), mask.view(-1, SLOTS))

    for other in (moved[0], moved.transpose(0, 1), moved.view(-1)[1:], moved.clone(), moved.view(torch.float64)):
        assert hooks._read_from(other) is other
    moved.fill_(1)
    assert hooks._read_from(moved) is moved


def test_a_mask_that_a_head_writes_to_in_inference_mode_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_device_of", lambda module, default: torch.device("meta"))
    model, inputs = build("roberta", _CHOICE), inputs_of("right", _CHOICE)
    with torch.inference_mode():
        _, of_head = hooks.move_to_head(model, (), inputs)
        flat = of_head["attention_mask"].view(-1, SLOTS)
        assert torch.equal(hooks._read_from(flat), inputs["attention_mask"].view(-1, SLOTS))
        flat[:, 0] = 0
        assert hooks._read_from(flat) is flat


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_a_mask_without_padding_that_somebody_writes_to_is_read(family: str, mode: Any) -> None:
    def shorten(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        kwargs["attention_mask"][:, -3:] = 0

    models, inputs = (unpad(build(family)), build(family, implementation="eager")), inputs_of("all-ones")
    for model in models:
        model.register_forward_pre_hook(shorten, with_kwargs=True)
    with mode():
        outputs = [model(**{name: value.clone() for name, value in inputs.items()}) for model in models]
    actual, expected = (output.last_hidden_state[:, :-3] for output in outputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * max(1.0, expected.abs().max().item()))


class _CopiesToTheHost(TorchFunctionMode):
    """Notes whether the host waits for what `to` copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and args[1].type == "cpu":
            self.waited.append(not (kwargs or {}).get("non_blocking", False))
        return func(*args, **(kwargs or {}))


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=6, max_size=6), min_size=1, max_size=5).filter(
        lambda m: any(map(any, m))
    )
)
def test_packed_ahead_is_what_is_packed(rows: list[list[int]]) -> None:
    """What a GPU packs before the host knows how many tokens there are."""
    mask = torch.tensor(rows)
    packing, total, cpu = Packing.of(mask, returns_dict=True, find_holes=False), int(mask.sum()), torch.device("cpu")
    pending = Packing.pending(mask.bool(), returns_dict=True, find_holes=False)
    ids = torch.randint(0, 99, mask.shape)
    for padded in (ids, torch.arange(6)[None], torch.randn(len(rows), 6, 3)):
        assert pending.is_pending
        packed = pending.pack(padded)
        assert packed.shape == (1, mask.numel(), *padded.shape[2:])
        assert torch.equal(packed[:, :total], packing.pack(padded))
    pending.packed["input_ids"] = pending.pack(ids)
    pending.finish()
    assert not pending.is_pending
    assert pending.layout.query.lengths == packing.layout.query.lengths
    assert torch.equal(pending.packed["input_ids"], packing.pack(ids))
    assert torch.equal(pending.position_ids(cpu), packing.position_ids(cpu))


def test_the_host_waits_for_what_it_reads() -> None:
    """A mask on a GPU and tokens on the CPU; a CPU tensor stands for the positions found on the GPU."""
    positions = {torch.device("cuda", 0): torch.tensor([0, 1, 3], dtype=torch.int32)}
    packing = Packing((2, 3), returns_dict=True, layout=RaggedLayout.from_lengths((2, 1)), positions=positions)
    with _CopiesToTheHost() as copies:
        packed = packing.pack(torch.arange(6).view(2, 3))
        packing.move({"input_ids": packed}, torch.device("cpu"))
    assert packed.tolist() == [[0, 1, 3]]
    assert copies.waited == [True, True]


def test_packed_input_of_the_user_passes_through() -> None:
    model, plain = unpadded("bert", ""), build("bert")
    ids = torch.randint(5, VOCAB_SIZE, (1, 7), generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    inputs = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    inputs |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    with torch.no_grad():
        actual, expected = model(**inputs), plain(**inputs)
    assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)


def inputs_without_ids(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "input_ids"}


@pytest.mark.parametrize(("family", "added"), [("bert", 3), ("mpnet", 3)])
def test_repad_restores(family: str, added: int) -> None:
    model, plain = build(family, _SEQUENCE), build(family, _SEQUENCE)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    classes = [type(module) for module in model.modules()]
    assert unpad(model) is model
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    assert hooks == added
    unpad(model)
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert repad(model) is model
    assert [type(module) for module in model.modules()] == classes
    for name, module in model.named_modules():
        assert set(vars(module)) == attributes[name]
        assert not module._forward_hooks
        assert not module._forward_hooks_always_called
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_with_kwargs
        assert not module._forward_pre_hooks_with_kwargs
    shapes = record_inputs(model)
    model(**inputs_of("right"))
    assert set(shapes) == {(4, SLOTS)}
    assert repad(model) is model


@pytest.mark.parametrize("family", ["roberta", "mpnet"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_unpadded_and_apart(how: str, family: str) -> None:
    model = unpad(build(family, _SEQUENCE))
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    inputs = inputs_of("right")
    with torch.no_grad():
        expected = model(**inputs).logits
        shapes = record_inputs(twin)
        assert torch.equal(twin(**inputs).logits, expected)
        assert set(shapes) == {(1, sum(LENGTHS))}
        repad(twin)
        shapes.clear()
        assert_close(twin(**inputs).logits, expected, "logits")
        assert set(shapes) == {(4, SLOTS)}
        mine = record_inputs(model)
        model(**inputs)
        assert set(mine) == {(1, sum(LENGTHS))}


def test_save_pretrained(tmp_path: Path) -> None:
    model = unpad(build("bert", _SEQUENCE))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="flashinfer").eval()
    assert loaded.config.architectures == ["BertForSequenceClassification"]
    inputs = inputs_of("right")
    with torch.no_grad():
        assert_close(unpad(loaded)(**inputs).logits, model(**inputs).logits, "logits")


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_two_threads(family: str) -> None:
    model = unpad(build(family, _SEQUENCE))
    batches = [inputs_of("right", seed=1), inputs_of("left", seed=2)]
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
    failures: list[str] = []

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(**batches[index]).logits, expected[index]):
                    failures.append(f"batch {index}")

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_module_around_a_model() -> None:
    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = build("bert")

        def forward(self, **inputs: Tensor) -> Tensor:
            hidden: Tensor = self.encoder(**inputs).last_hidden_state
            return hidden.sum((1, 2))

    scorer, inputs = unpad(Scorer()), inputs_of("right")
    shapes = record_inputs(scorer)
    with torch.no_grad():
        actual = scorer(**inputs)
        hidden = reference("bert", "")(**inputs).last_hidden_state * inputs["attention_mask"][..., None]
    assert set(shapes) == {(1, sum(LENGTHS))}
    assert_close(actual, hidden.sum((1, 2)), "scores")


STAYING: list[tuple[dict[str, Any], str]] = [
    ({"output_attentions": True}, "output_attentions=True"),
    ({"attention_mask": torch.ones(4, 1, SLOTS, SLOTS).tril()}, "an attention mask of another shape"),
    ({"unknown": torch.ones(4, SLOTS)}, "unknown, which unpad cannot pack"),
]
each_reason = pytest.mark.parametrize(("arguments", "reason"), STAYING, ids=["output-attentions", "4d", "unknown"])


@each_reason
def test_stays_padded(arguments: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    inputs = {**inputs_of("right"), **arguments}
    model = unpad(build("bert"))
    shapes = record_inputs(model)
    expected = reference("bert", "")(**inputs)
    with caplog.at_level(logging.WARNING, "hf_flashinfer_attn"):
        actual = model(**inputs)
        model(**inputs)
    lines = [record.message for record in caplog.records if "unpad leaves BertModel padded" in record.message]
    assert len(lines) == 1
    assert reason in lines[0]
    assert set(shapes) == {(4, SLOTS)}
    valid = mask_of("right").bool()
    assert_close(actual.last_hidden_state[valid], expected.last_hidden_state[valid], "last_hidden_state")


@each_reason
def test_strict_raises_what_else_is_logged(arguments: dict[str, Any], reason: str) -> None:
    model = unpadded("bert", "")
    hf_flashinfer_attn.configure(backend="torch", strict=True)
    with torch.no_grad():
        with pytest.raises(UnsupportedAttentionError, match=f"unpad leaves BertModel padded: {reason}.*strict=False"):
            model(**{**inputs_of("right"), **arguments})
        model(**inputs_of("right"))
        if "output_attentions" in arguments:
            # Without padding there is nothing that could be dropped.
            model(**{**inputs_of("all-ones"), **arguments})
            model(**{**inputs_of("no-mask"), **arguments})


@pytest.mark.parametrize(("family", "measure"), [("mpnet", "a relative position bias"), ("modernbert", "a window")])
def test_strict_and_padding_with_holes(family: str, measure: str) -> None:
    hf_flashinfer_attn.configure(backend="torch", strict=True)
    with pytest.raises(UnsupportedAttentionError, match=f"{measure} over padding with holes, and strict=True"):
        unpadded(family, "")(**inputs_of("holes"))


def test_a_cache_stays_padded(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = unpad(build("qwen3")), inputs_of("left")
    shapes = record_inputs(model)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "hf_flashinfer_attn"):
        cached = model(**inputs, use_cache=True)
        plain = model(**inputs)
    assert cached.past_key_values is not None
    assert plain.past_key_values is None
    assert shapes == [(4, SLOTS)] * 2 + [(1, sum(LENGTHS))] * 2
    assert any("use_cache=False" in record.message for record in caplog.records)
    valid = inputs["attention_mask"].bool()
    assert_close(plain.last_hidden_state[valid], cached.last_hidden_state[valid], "last_hidden_state")


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_of_the_caller_stays_padded(name: str) -> None:
    """Under the name that this version of transformers has for it, or as a deprecated one."""
    if name == "cache" and "cache" not in inspect.signature(transformers.Qwen3Model.forward).parameters:
        pytest.skip("this version of transformers calls it past_key_values")
    inputs, caches = inputs_of("right"), [DynamicCache(), DynamicCache()]
    model = unpad(build("qwen3"))
    shapes = record_inputs(model)
    with torch.no_grad():
        expected = reference("qwen3", "")(**inputs, use_cache=False, **{name: caches[0]}).last_hidden_state
        actual = model(**inputs, use_cache=False, **{name: caches[1]}).last_hidden_state
    assert set(shapes) == {(4, SLOTS)}
    assert caches[1].get_seq_length() == caches[0].get_seq_length() == SLOTS
    valid = inputs["attention_mask"].bool()
    assert_close(actual[valid], expected[valid], "last_hidden_state")


@pytest.mark.parametrize("value", [(torch.ones(4, SLOTS),), {"rows": 4}, object()], ids=["tuple", "dict", "object"])
def test_what_is_neither_a_tensor_nor_a_number_stays_padded(value: object, caplog: pytest.LogCaptureFixture) -> None:
    model = unpad(build("bert"))
    shapes = record_inputs(model)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "hf_flashinfer_attn"):
        model(**inputs_of("right"), something=value)
    assert set(shapes) == {(4, SLOTS)}
    assert "something, which unpad cannot pack" in caplog.text


def test_a_number_of_the_whole_batch_is_passed_on() -> None:
    """Trainer passes `num_items_in_batch` on as a tensor of one element, to replicas with two dimensions."""
    model = unpad(build("bert"))
    shapes = record_inputs(model)
    model(**inputs_of("right"), num_items_in_batch=torch.ones(1, 1))
    assert set(shapes) == {(1, sum(LENGTHS))}


def replicated(model: nn.Module) -> Any:
    """A replica as `torch.nn.parallel.replicate` makes it: parameters and buffers are plain attributes."""
    modules = list(model.modules())
    replicas: dict[nn.Module, Any] = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None
            if child is not None:
                setattr(replica, name, replicas[child])
        for kept, copies in ((module._parameters, replica._parameters), (module._buffers, replica._buffers)):
            for name, value in kept.items():
                copies[name] = None
                if value is not None:
                    del copies[name]
                    setattr(replica, name, value * 1 if value.is_floating_point() else value.clone())
    return replicas[model]


@pytest.mark.parametrize("head", ["", _SEQUENCE])
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_replica_of_data_parallel(family: str, head: str) -> None:
    if head not in ("", *FAMILIES[family][3]):
        pytest.skip("this family has no such head")
    model, inputs = unpadded(family, head), inputs_of("right")
    try:
        replicated(reference(family, head))(**inputs)
    except StopIteration:
        pytest.skip("this version of transformers asks this model for a dtype, which a replica does not have")
    replica = replicated(model)
    assert not list(replica.parameters())
    expected, shapes = model(**inputs), record_inputs(replica)
    actual = replica(**inputs)
    for name, right in tensors_of(expected).items():
        assert torch.equal(actual[name], right), name
    assert set(shapes) == {(1, sum(LENGTHS))}
    actual[0].sum().backward()
    assert model.get_input_embeddings().weight.grad is not None
    model.zero_grad()


@pytest.mark.parametrize("use_cache", [False, True])
def test_generate(use_cache: bool) -> None:
    inputs = inputs_of("left")
    settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": use_cache}
    expected = reference("llama", _CAUSAL).generate(**inputs, **settings)
    assert torch.equal(unpadded("llama", _CAUSAL).generate(**inputs, **settings), expected)


def test_a_path_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"unpad\('some/model'\): expected a loaded model.*from_pretrained\(path"):
        unpad("some/model")  # type: ignore[type-var]


def test_another_attention_than_ours_is_refused() -> None:
    model = build("bert", _SEQUENCE, "sdpa")
    with pytest.raises(UnsupportedAttentionError, match=r"'sdpa'.*set_attn_implementation\('flashinfer'\)"):
        unpad(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_another_attention_set_later_stays_padded() -> None:
    model, inputs = unpad(build("bert")), inputs_of("right")
    model.set_attn_implementation("sdpa")
    shapes = record_inputs(model)
    with torch.no_grad():
        actual, expected = model(**inputs), reference("bert", "")(**inputs)
    assert set(shapes) == {(4, SLOTS)}
    valid = inputs["attention_mask"].bool()
    assert_close(actual.last_hidden_state[valid], expected.last_hidden_state[valid], "last_hidden_state")


_T5 = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}


@pytest.mark.parametrize(
    ("model_class", "config", "reason"),
    [
        ("MobileBertModel", "MobileBertConfig", "neighbours"),
        ("T5EncoderModel", "T5Config", "position bias"),
        ("DebertaV2Model", "DebertaV2Config", "computes attention by itself"),
        ("GPT2Model", "GPT2Config", "nothing is known about packing it; known are Albert"),
    ],
)
def test_what_cannot_be_packed_says_why(model_class: str, config: str, reason: str) -> None:
    settings = {**_SIZES, "embedding_size": 16, "intra_bottleneck_size": 32, "num_attention_heads": 4}
    settings = (
        _T5 if config == "T5Config" else {"n_embd": 32, "n_layer": 1, "n_head": 2} if "GPT2" in config else settings
    )
    model = build_model(getattr(transformers, model_class), getattr(transformers, config)(**settings), "flashinfer")
    with pytest.raises(UnsupportedAttentionError, match=reason):
        unpad(model)
    assert repad(model) is model
    model(input_ids=inputs_of("right")["input_ids"], attention_mask=mask_of("right"))


def test_packed_input_to_mobilebert_without_trigrams() -> None:
    model, plain = build("mobilebert"), reference("mobilebert", "")
    ids, offsets = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([0, 2, 5], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 0, 1, 2]])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)
        for start, end in ((0, 2), (2, 5)):
            expected = plain(input_ids=ids[:, start:end]).last_hidden_state
            assert_close(packed.last_hidden_state[:, start:end], expected, "last_hidden_state")


def test_esm_whose_layers_number_tokens_is_refused() -> None:
    model = build_model(class_of("esm-rotary", ""), config_of("esm-rotary"), "flashinfer")
    if not layers_number_tokens(model):
        assert unpad(model) is model
        return
    with pytest.raises(UnsupportedAttentionError, match="its layers number tokens by themselves"):
        unpad(model)
