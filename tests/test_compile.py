"""torch.compile: one graph for what runs on ragged tokens, a graph break by name for the rest, the same numbers."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    CodeGenConfig,
    CodeGenModel,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    Qwen3Config,
    Qwen3Model,
    StaticCache,
    T5Config,
    T5EncoderModel,
)
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, create_chunked_causal_mask

import hf_flashinfer_attn
from hf_flashinfer_attn.integration import functions as integration
from hf_flashinfer_attn.integration.traced_mask import GraphMask

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODER = SMALL | {"num_key_value_heads": 2, "head_dim": 16, "use_cache": False}
BERT = BertModel, BertConfig(**SMALL)
MODERNBERT = (
    ModernBertModel,
    ModernBertConfig(**SMALL | {"num_hidden_layers": 4}, local_attention=4, cls_token_id=1, sep_token_id=2),
)
LLAMA = LlamaModel, LlamaConfig(**DECODER)
QWEN = Qwen3Model, Qwen3Config(**DECODER)
MISTRAL = MistralModel, MistralConfig(**DECODER, sliding_window=3)
GEMMA = Gemma2Model, Gemma2Config(**DECODER, sliding_window=3, attn_logit_softcapping=2.0)
BLOOM = BloomModel, BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4, use_cache=False)
CODEGEN = (
    CodeGenModel,
    CodeGenConfig(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, use_cache=False),
)
MPNET = MPNetModel, MPNetConfig(**SMALL)
T5 = T5EncoderModel, T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
FAMILIES = {
    "bert": BERT, "modernbert": MODERNBERT, "llama": LLAMA, "qwen3": QWEN, "mistral": MISTRAL, "gemma2": GEMMA,
}  # fmt: skip
EACH_FAMILY = pytest.mark.parametrize("family", [pytest.param(family, id=name) for name, family in FAMILIES.items()])
DECODERS = pytest.mark.parametrize(
    "family", [pytest.param(FAMILIES[name], id=name) for name in ("llama", "qwen3", "mistral", "gemma2")]
)

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
PADDINGS = {
    "right": torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]),
    "left": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]),
    "holes": torch.tensor([[1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1]]),
    "none": torch.ones(2, 7, dtype=torch.long),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()
    counters.clear()


def build(family, implementation: str = "flashinfer") -> torch.nn.Module:
    torch.manual_seed(0)
    model = family[0]._from_config(copy.deepcopy(family[1]), attn_implementation=implementation).eval()
    with torch.no_grad():
        # Under the usual initialisation attention is nearly uniform, and a wrong mask changes little.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model


def packed(lengths: list[int]) -> dict[str, Any]:
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {
        "input_ids": torch.randint(3, 50, (1, sum(lengths))),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def one_by_one(model: torch.nn.Module, inputs: dict[str, Any], lengths: list[int]) -> torch.Tensor:
    """What a model says of packed sequences when it gets them one at a time."""
    sequences = inputs["input_ids"].split(lengths, dim=1)
    return torch.cat([model(input_ids=sequence).last_hidden_state for sequence in sequences], dim=1)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@EACH_FAMILY
@torch.no_grad()
def test_packed_input_is_one_graph(family) -> None:
    reference, compiled = build(family, "eager"), torch.compile(build(family), fullgraph=True, backend="aot_eager")
    for lengths in ([4, 5], [2, 1, 9]):
        inputs = packed(lengths)
        with hf_flashinfer_attn.trace() as trace:
            result = compiled(**inputs).last_hidden_state
        assert_close(result, one_by_one(reference, inputs, lengths))
        assert len(trace.calls) == family[1].num_hidden_layers
        # One per kind of layer: an encoder's offsets carry the layout, a decoder's masks do.
        assert trace.layouts <= 2


@EACH_FAMILY
@torch.no_grad()
def test_input_without_padding_is_one_graph(family) -> None:
    reference, compiled = build(family, "eager"), torch.compile(build(family), fullgraph=True, backend="aot_eager")
    for shape in ((3, 7), (2, 9)):
        ids = torch.randint(3, 50, shape)
        assert_close(compiled(ids).last_hidden_state, reference(ids).last_hidden_state)


@pytest.mark.parametrize("padding", PADDINGS)
@EACH_FAMILY
@torch.no_grad()
def test_padded_input_is_one_graph(family, padding: str) -> None:
    mask = PADDINGS[padding]
    reference, compiled = build(family, "eager"), torch.compile(build(family), fullgraph=True, backend="aot_eager")
    ids = torch.randint(3, 50, mask.shape)
    expected = reference(ids, attention_mask=mask).last_hidden_state
    with hf_flashinfer_attn.trace() as trace:
        result = compiled(ids, attention_mask=mask).last_hidden_state
    assert_close(result[mask.bool()], expected[mask.bool()])
    assert trace.layouts <= 2
    has_windows = family in (MISTRAL, GEMMA, MODERNBERT)
    assert ("dense" in trace.kernels) == (padding == "holes" and has_windows)


@DECODERS
@torch.no_grad()
def test_positions_that_restart_are_sequences(family) -> None:
    """Without offsets the sequences are those that transformers finds in the positions."""
    reference, compiled = build(family, "eager"), torch.compile(build(family), fullgraph=True, backend="aot_eager")
    for lengths in ([4, 5], [2, 1, 9]):
        inputs = packed(lengths)
        result = compiled(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"]).last_hidden_state
        assert_close(result, one_by_one(reference, inputs, lengths))


@EACH_FAMILY
@torch.no_grad()
def test_sizes_do_not_compile_again(family) -> None:
    reference, compiled = build(family, "eager"), torch.compile(build(family), fullgraph=True, backend="eager")
    for lengths in ([4, 5], [2, 1, 9], [7], [3, 3, 3, 3, 5], [12, 1], [2, 2]):
        inputs = packed(lengths)
        assert_close(compiled(**inputs).last_hidden_state, one_by_one(reference, inputs, lengths))
    assert counters["stats"]["unique_graphs"] <= 2


@torch.no_grad()
def test_padded_sizes_do_not_compile_again() -> None:
    reference, compiled = build(QWEN, "eager"), torch.compile(build(QWEN), fullgraph=True, backend="eager")
    for rows, length in ((2, 7), (3, 9), (5, 4), (4, 12), (7, 5), (6, 6)):
        mask = torch.arange(length) >= torch.randint(0, length, (rows, 1))
        ids = torch.randint(3, 50, mask.shape)
        expected = reference(ids, attention_mask=mask.long()).last_hidden_state
        assert_close(compiled(ids, attention_mask=mask.long()).last_hidden_state[mask], expected[mask])
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_static_cache_is_one_graph(padded: bool) -> None:
    ids, mask = torch.randint(3, 50, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[0, :2] = 0
    outputs = []
    for implementation in ("eager", "flashinfer"):
        model = build(QWEN, implementation)
        cache = StaticCache(config=model.config, max_cache_len=10)
        run = model if implementation == "eager" else torch.compile(model, fullgraph=True, backend="aot_eager")
        parts = []
        for start, end in ((0, 6), (6, 7), (7, 8)):
            seen = {"attention_mask": mask[:, :end]} if padded else {}
            result = run(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **seen)
            parts.append(result.last_hidden_state)
        outputs.append(torch.cat(parts, dim=1))
    valid = mask.bool() if padded else slice(None)
    assert_close(outputs[1][valid], outputs[0][valid])


@pytest.mark.parametrize("family", [BLOOM, MPNET])
@pytest.mark.parametrize("padding", ["right", "left", "unpadded"])
@torch.no_grad()
def test_a_model_off_the_interface_gets_values(family, padding: str) -> None:
    mask = PADDINGS.get(padding, PADDINGS["none"])
    inputs = {} if padding == "unpadded" else {"attention_mask": mask}
    ids = torch.randint(3, 50, mask.shape)
    expected = build(family, "eager")(ids, **inputs).last_hidden_state
    with hf_flashinfer_attn.trace() as trace:
        result = torch.compile(build(family), backend="eager")(ids, **inputs).last_hidden_state
    assert trace.calls == []
    assert_close(result[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_a_packed_decoder_gets_values() -> None:
    inputs = packed([4, 3, 5])
    inputs = {name: inputs[name] for name in ("input_ids", "position_ids")}
    expected = build(CODEGEN, "eager")(**inputs).last_hidden_state
    assert_close(torch.compile(build(CODEGEN), backend="eager")(**inputs).last_hidden_state, expected)


@torch.no_grad()
def test_a_position_bias_is_added() -> None:
    ids, mask = torch.randint(3, 50, (2, 7)), PADDINGS["left"]
    # In float32, roundings of large logits exceed the tolerance for one batch of a hundred.
    expected = build(T5, "eager").double()(ids, attention_mask=mask).last_hidden_state
    result = torch.compile(build(T5).double(), backend="eager")(ids, attention_mask=mask).last_hidden_state
    assert_close(result[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_attention_weights_are_those_of_eager_attention() -> None:
    ids, mask = torch.randint(3, 50, (2, 7)), PADDINGS["right"]
    expected = build(QWEN, "eager")(ids, attention_mask=mask, output_attentions=True).attentions
    model = build(QWEN)
    compiled = torch.compile(model, backend="eager")
    compiled(ids, attention_mask=mask)
    weights = compiled(ids, attention_mask=mask, output_attentions=True).attentions
    assert len(weights) == len(expected) == 2
    for actual, right in zip(weights, expected):
        assert_close(actual, right)


@torch.no_grad()
def test_layers_may_be_compiled_one_by_one() -> None:
    ids, mask = torch.randint(3, 50, (2, 7)), PADDINGS["right"]
    expected = build(QWEN, "eager")(ids, attention_mask=mask, output_attentions=True)
    model = build(QWEN)
    for layer in model.layers:
        layer.compile(backend="eager")
    result = model(ids, attention_mask=mask)
    assert_close(result.last_hidden_state[mask.bool()], expected.last_hidden_state[mask.bool()])
    with_weights = model(ids, attention_mask=mask, output_attentions=True)
    assert len(with_weights.attentions) == 2
    assert_close(with_weights.attentions[1], expected.attentions[1])


@pytest.mark.parametrize("family", [BERT, QWEN])
def test_gradients_flow_through_a_compiled_model(family) -> None:
    gradients = []
    for compiled in (False, True):
        model = build(family)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        ids = torch.arange(10).reshape(MASK.shape)
        with hf_flashinfer_attn.trace() as trace:
            hidden = run(ids, attention_mask=MASK).last_hidden_state[MASK.bool()]
        assert len(trace.calls) == 2
        assert trace.layouts == 1
        hidden.square().sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert_close(gradients[1], gradients[0])
    # Every layer breaks the graph, and nothing else does.
    assert all("_untraced_attend" in reason for reason in counters["graph_break"])


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_inductor_gives_the_same() -> None:
    reference, compiled = build(MISTRAL, "eager"), torch.compile(build(MISTRAL), fullgraph=True)
    lengths = [4, 5, 6]
    inputs = packed(lengths)
    assert_close(compiled(**inputs).last_hidden_state, one_by_one(reference, inputs, lengths))
    mask = PADDINGS["right"]
    ids = torch.randint(3, 50, mask.shape)
    expected = reference(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert_close(compiled(ids, attention_mask=mask).last_hidden_state[mask.bool()], expected)


# --- the mask itself ---

CONFIG = LlamaConfig(**DECODER)
CONFIG._attn_implementation = "flashinfer"
EMBEDDED = torch.randn(2, 5, 64)


def mask_of(attention_mask: torch.Tensor | None = MASK) -> Any:
    return create_causal_mask(
        config=CONFIG, inputs_embeds=EMBEDDED, attention_mask=attention_mask, past_key_values=None
    )


ARITHMETIC: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "mask + x": lambda mask, x: mask + x,
    "x + mask": lambda mask, x: x + mask,
    "x += mask": lambda mask, x: x.clone().add_(mask),
    "x - mask": lambda mask, x: x - mask,
    "1.0 - mask": lambda mask, x: 1.0 - mask,
    "-mask": lambda mask, x: -mask,
    "mask == 0": lambda mask, x: mask == 0,
    "mask != 0": lambda mask, x: mask != 0,
    "mask < 0": lambda mask, x: mask < 0,
    "slice": lambda mask, x: mask[:, :, -1:, :3],
    "ellipsis": lambda mask, x: mask[..., :2],
    "to": lambda mask, x: mask.to(torch.float32) + x,
    "to device": lambda mask, x: mask.to("cpu") * 1,
    "detach": lambda mask, x: mask.detach().contiguous() * 1,
    "bool": lambda mask, x: mask.bool(),
    "expand": lambda mask, x: mask.expand(-1, 4, -1, -1) * 1,
    "where": lambda mask, x: torch.where(mask < 0, x, 1.0),
    "add": lambda mask, x: torch.add(x, mask),
    "cat": lambda mask, x: torch.cat([x[:, :1], mask], dim=-1),
    "sdpa": lambda mask, x: F.scaled_dot_product_attention(x, x, x, attn_mask=mask),
    "masked_fill_": lambda mask, x: mask.masked_fill_(mask < 0, -1.0),
    "setitem": lambda mask, x: (mask.__setitem__((Ellipsis, 0), 7.0), mask * 1)[1],
    "write to a slice": lambda mask, x: (mask[:, :, 0].fill_(3.0), mask * 1)[1],
    "shape": lambda mask, x: x.new_ones(mask.shape) * mask.size(2) * mask.ndim * mask.dim(),
    "dtype": lambda mask, x: x.to(mask.dtype).to(mask.device),
}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("compute", [pytest.param(compute, id=name) for name, compute in ARITHMETIC.items()])
def test_whoever_computes_with_a_traced_mask_gets_its_values(compute: Callable, padded: bool) -> None:
    attention_mask = MASK if padded else None
    x = torch.rand(2, 1, 5, 5)
    expected = compute(mask_of(attention_mask), x.clone())
    compiled = torch.compile(lambda x: compute(mask_of(attention_mask), x), fullgraph=True, backend="aot_eager")
    result = compiled(x.clone())
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected)


class Layer(torch.nn.Module):
    """An attention layer of a decoder, as far as our function looks at it."""

    is_causal = True
    config = CONFIG

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> None: ...


LAYER = Layer()
QUERIES = torch.randn(2, 4, 5, 16)


def attend(mask: Any) -> torch.Tensor:
    return integration.attention_forward(LAYER, QUERIES, QUERIES, QUERIES, mask)[0]


def use_whole(mask: Any) -> Any:
    return mask


def cross_a_break(mask: Any) -> Any:
    torch._dynamo.graph_break()
    return mask


def write(mask: Any) -> Any:
    mask[:, :, :, 1] = torch.finfo(torch.float32).min
    return mask


def write_to_a_view(mask: Any) -> Any:
    mask[:, :, 3:].fill_(0.0)
    return mask


def read_across_a_break(mask: Any) -> Any:
    mask.add_(torch.rand(5, generator=torch.Generator().manual_seed(0)))
    torch._dynamo.graph_break()
    return mask


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("change", [use_whole, cross_a_break, write, write_to_a_view, read_across_a_break])
@torch.no_grad()
def test_a_mask_means_what_the_model_made_of_it(change: Callable, padded: bool) -> None:
    attention_mask = MASK if padded else None
    expected = attend(change(mask_of(attention_mask)))
    result = torch.compile(lambda: attend(change(mask_of(attention_mask))), backend="eager")()
    valid = MASK.bool() if padded else slice(None)
    assert_close(result[valid], expected[valid])


@torch.no_grad()
def test_a_mask_that_is_no_band_breaks_the_graph() -> None:
    config = copy.deepcopy(CONFIG)
    config.attention_chunk_size = 8

    def forward() -> torch.Tensor:
        return attend(
            create_chunked_causal_mask(config=config, inputs_embeds=EMBEDDED, attention_mask=None, past_key_values=None)
        )

    expected = forward()
    assert_close(torch.compile(forward, backend="eager")(), expected)
    torch.compiler.reset()
    with pytest.raises(Unsupported, match="lazy_mask"):
        torch.compile(forward, backend="eager", fullgraph=True)()


def test_a_mask_of_the_users_own_breaks_the_graph() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        mask = create_causal_mask(
            config=CONFIG,
            inputs_embeds=EMBEDDED,
            attention_mask=MASK,
            past_key_values=None,
            or_mask_function=lambda b, h, q, k: k < 2,
        )
        return x + mask

    x = torch.zeros(2, 1, 5, 5)
    torch.testing.assert_close(torch.compile(forward, backend="eager")(x), forward(x))
    torch.compiler.reset()
    with pytest.raises(Unsupported, match="lazy_mask"):
        torch.compile(forward, backend="eager", fullgraph=True)(x)


def test_a_graph_mask_is_no_tensor_and_hides_nothing() -> None:
    mask = GraphMask(None, (2, 3, 5), None, 0, torch.float32, torch.device("cpu"))
    assert mask.shape == (2, 1, 3, 5)
    assert not hasattr(mask, "__tensor_flatten__")
    torch.testing.assert_close(mask.dense(), mask.lazy().dense())
    window = GraphMask(None, (2, 3, 5), 1, 0, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(window.dense(), window.lazy().dense())
    assert not torch.equal(window.dense(), mask.dense())


# --- the ops ---


def test_the_ops_are_good_citizens() -> None:
    ops = torch.ops.hf_flashinfer_attn
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    padding, sequences = MASK.bool(), torch.tensor([[0, 0, 1, 1, 1]])
    handle = ops.mask_handle(padding, None, None, None, 2, 5, 5, 0, 0, None, 0, torch.float32)
    packed_tokens = [torch.randn(1, 6, heads, 8) for heads in (4, 2, 2)]
    rows = [torch.randn(2, 5, heads, 8) for heads in (4, 2, 2)]
    calls = [
        (ops.ragged_attention, (*packed_tokens, None, offsets, offsets, None, 0, None, 0.3, None)),
        (ops.ragged_attention, (*rows, None, None, None, 2, 2, None, 0.3, 0.5)),
        (ops.mask_handle, (padding, None, None, None, 2, 5, 5, 0, 0, 3, 3, torch.float16)),
        (ops.mask_handle, (None, sequences, None, None, 1, 5, 5, 0, 0, None, 0, torch.float32)),
    ]
    for op, arguments in calls:
        checks = torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(checks.values()) == {"SUCCESS"}
    # Those checks copy their arguments, and a copied handle is refused.
    with_handle = [
        (ops.ragged_attention, (*rows, handle, None, None, None, 0, "kept", 0.3, None)),
        (ops.mask_values, (handle, 2, 5, 5, torch.float64)),
    ]
    for op, arguments in with_handle:
        real = op(*arguments)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(part) if isinstance(part, torch.Tensor) else part for part in arguments))
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
        assert fake.stride() == real.stride()


def test_a_mask_handle_keeps_nothing_of_its_inputs() -> None:
    """Generated code uses their memory again."""
    padding = MASK.bool()
    handle = torch.ops.hf_flashinfer_attn.mask_handle(
        padding, None, None, None, 2, 5, 5, 0, 0, None, None, torch.float32
    )
    tokens = torch.randn(2, 5, 1, 8)
    arguments = (tokens, tokens, tokens, handle, None, None, None, None, None, 0.3, None)
    expected = torch.ops.hf_flashinfer_attn.ragged_attention(*arguments)
    fresh = torch.ops.hf_flashinfer_attn.mask_handle(
        padding, None, None, None, 2, 5, 5, 0, 0, None, None, torch.float32
    )
    padding.zero_()
    result = torch.ops.hf_flashinfer_attn.ragged_attention(*arguments[:3], fresh, *arguments[4:])
    torch.testing.assert_close(result, expected)


def test_offsets_that_changed_unseen_are_read_again() -> None:
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    tokens = torch.randn(1, 6, 1, 8)
    run = torch.ops.hf_flashinfer_attn.ragged_attention
    first = run(tokens, tokens, tokens, None, offsets, offsets, None, 0, None, 0.3, None)
    version = offsets._version
    # As generated code writes: past the version counter.
    offsets.numpy()[1] = 4
    assert offsets._version == version
    second = run(tokens, tokens, tokens, None, offsets, offsets, None, 0, None, 0.3, None)
    fresh = torch.tensor([0, 4, 6], dtype=torch.int32)
    torch.testing.assert_close(second, run(tokens, tokens, tokens, None, fresh, fresh, None, 0, None, 0.3, None))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("sequences", "positions"), [([0, 0, 1, 1], [0, 1, 0, 5]), ([0, 0, 1, 1], [0, 1, 1, 1]), ([0, 1, 0, 1], None)]
)
def test_what_is_no_packing_is_refused(sequences: list[int], positions: list[int] | None) -> None:
    counted = None if positions is None else torch.tensor([positions])
    with pytest.raises(RuntimeError, match="not one after another"):
        torch.ops.hf_flashinfer_attn.mask_handle(
            None, torch.tensor([sequences]), counted, None, 1, 4, 4, 0, 0, None, 0, torch.float32
        )


def test_a_copied_handle_is_refused() -> None:
    tokens = torch.randn(2, 5, 1, 8)
    with pytest.raises(RuntimeError, match="a copy of its mask"):
        torch.ops.hf_flashinfer_attn.ragged_attention(
            tokens, tokens, tokens, torch.empty(0, dtype=torch.uint8), None, None, None, 0, None, 0.3, None
        )


def test_offsets_with_padding_are_refused() -> None:
    handle = torch.ops.hf_flashinfer_attn.mask_handle(
        MASK.bool(), None, None, None, 2, 5, 5, 0, 0, None, 0, torch.float32
    )
    tokens, offsets = torch.randn(2, 5, 1, 8), torch.tensor([0, 5, 10], dtype=torch.int32)
    with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match="together with a padding mask"):
        torch.ops.hf_flashinfer_attn.ragged_attention(
            tokens, tokens, tokens, handle, offsets, offsets, None, 0, None, 0.3, None
        )


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_is_cast_as_for_flash_kernels_in_a_graph(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer norms kept in float32 hand float32 to attention in a half-precision model."""
    monkeypatch.setattr(integration, "is_cast_as_flash", lambda query: query.dtype == torch.float32)
    layer = torch.nn.Linear(4, 4, dtype=torch.float32 if autocast else torch.bfloat16)

    def forward(query: torch.Tensor) -> torch.Tensor:
        return integration.attention_forward(layer, query, query, query, None)[0]

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.compile(forward, fullgraph=True, backend="eager")(QUERIES).dtype == torch.bfloat16


class _BothWays(torch.nn.Module):
    """A layer that calls itself causal, under a mask that is not."""

    is_causal = True

    def __init__(self) -> None:
        super().__init__()
        self.config = LlamaConfig(**DECODER)
        self.config._attn_implementation = "flashinfer"

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        mask = create_bidirectional_mask(self.config, hidden, attention_mask=None, allow_is_bidirectional_skip=False)
        heads = hidden.unflatten(-1, (4, 16)).transpose(1, 2)
        return integration.attention_forward(self, heads, heads, heads, mask)[0]


@torch.no_grad()
def test_a_mask_that_hides_nothing_is_not_taken_for_causality() -> None:
    layer, hidden = _BothWays(), torch.randn(2, 6, 64)
    heads = hidden.unflatten(-1, (4, 16)).transpose(1, 2)
    expected = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2)
    try:
        uncompiled = layer(hidden)
    except TypeError:
        pytest.skip("this version of transformers cannot be told to keep such a mask")
    torch.testing.assert_close(uncompiled, expected)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(hidden), expected)
