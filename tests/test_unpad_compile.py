"""torch.compile after `unpad`: one graph of the backbone for all lengths, and the numbers of eager attention."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from paired_models import PAD, VOCAB_SIZE, build_model, decoder_config, left_padded, right_padded
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import PreTrainedConfig

import hf_flashinfer_attn
from hf_flashinfer_attn import unpad
from hf_flashinfer_attn.ragged.host_copy import HostCopy
from hf_flashinfer_attn.unpadding.packing import Packing

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "Bert": transformers.BertConfig(**_SIZES),
    "Roberta": transformers.RobertaConfig(**_SIZES),
    "ModernBert": transformers.ModernBertConfig(
        **_SIZES | {"num_hidden_layers": 2},
        cls_token_id=2,
        sep_token_id=3,
        local_attention=6,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "Qwen3": decoder_config(transformers.Qwen3Config, num_hidden_layers=1, use_cache=False),
}
CLASSES = ["BertModel", *(f"{family}ForSequenceClassification" for family in CONFIGS)]
# Other rows, widths and numbers of tokens each time; no batch without padding.
BATCHES = [(9, 4, 6), (3, 12), (7, 7, 1, 2, 5), (5, 20, 11, 2), (4, 3), (10, 2, 2, 9, 1, 8, 3), (2, 17, 30), (6, 1)]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()
    counters.clear()


def build(name: str, implementation: str = "flashinfer") -> Any:
    family = name.split("Model")[0].split("For")[0]
    return build_model(getattr(transformers, name), CONFIGS[family], implementation)


def batch_of(lengths: tuple[int, ...], *, seed: int = 0) -> dict[str, Tensor]:
    tokens, mask = (left_padded if len(lengths) % 3 == 0 else right_padded)(lengths, seed=seed)
    return {"input_ids": tokens, "attention_mask": mask}


def assert_equal_eager(reference: Any, actual: Any, batch: dict[str, Tensor]) -> None:
    expected = reference(**batch)
    assert type(actual) is type(expected)
    mask = batch["attention_mask"].bool()
    name = "logits" if "logits" in expected else "last_hidden_state"
    right, valid = expected[name], mask
    if right.shape[:2] != mask.shape and not type(reference).__name__.startswith("Qwen3"):
        # Heads of encoders read the first slot, which padding on the left leaves undefined.
        valid = mask[:, 0]
    elif right.shape[:2] != mask.shape:
        valid = mask.any(1)
    assert valid.any()
    bound = 1e-5 * max(1.0, right.abs().max().item())
    torch.testing.assert_close(actual[name][valid], right[valid], rtol=0, atol=bound)


def reads_of_lengths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes every read of row lengths: before a graph by packing, and in it by what would make the host wait."""
    reads: list[str] = []
    pack, start = Packing.of, HostCopy.__init__
    monkeypatch.setattr(Packing, "of", lambda *args, **kwargs: (reads.append("packing"), pack(*args, **kwargs))[1])
    monkeypatch.setattr(HostCopy, "__init__", lambda *args: (reads.append("attention"), start(*args))[1])
    return reads


class Graphs(CompileCounterWithBackend):
    """Counts graphs, and those of them that attend."""

    def __init__(self, backend: str = "eager") -> None:
        super().__init__(backend)

    @property
    def attending(self) -> list[int]:
        """How many layers attend in each of the graphs that have any."""
        op = torch.ops.hf_flashinfer_attn.ragged_attention
        counts = [
            sum(str(node.target).startswith(str(op)) for node in module.graph.nodes if node.op == "call_function")
            for module in self.graphs
        ]
        return [count for count in counts if count]


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_one_graph_for_all_lengths(name: str) -> None:
    reference, graphs = build(name, "eager"), Graphs()
    compiled = torch.compile(unpad(build(name)), backend=graphs)
    seen = []
    for index, lengths in enumerate(BATCHES):
        batch = batch_of(lengths, seed=index)
        with hf_flashinfer_attn.trace() as trace:
            actual = compiled(**batch)
        assert_equal_eager(reference, actual, batch)
        assert (len(trace.calls), trace.layouts, trace.host_copies) == (reference.config.num_hidden_layers, 1, 0)
        assert {call.layer for call in trace.calls} == {"compiled"}
        seen.append(graphs.frame_count)
    assert graphs.attending == [reference.config.num_hidden_layers]
    # A backbone's graph is all that there is; what a head does after it is compiled again once sizes are seen to vary.
    assert seen[0] == (1 if name.endswith("Model") else 2)
    assert seen[2:] == [seen[2]] * (len(BATCHES) - 2)
    assert seen[-1] - seen[0] <= 2


@pytest.mark.parametrize("name", ["BertModel", "Qwen3Model"])
@torch.no_grad()
def test_batches_without_padding_have_a_graph_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = reads_of_lengths(monkeypatch)
    reference, graphs = build(name, "eager"), Graphs()
    compiled = torch.compile(unpad(build(name)), backend=graphs)
    batches = [(5, 3), (4, 4, 4), (7, 7), (6, 6, 6, 6), (2, 8, 1)]
    seen = []
    for lengths in batches:
        batch = batch_of(lengths)
        assert_equal_eager(reference, compiled(**batch), batch)
        seen.append(len(graphs.attending))
    # One for tokens, then one for the first batch that is full, unless that serves all other full ones too.
    assert seen[:2] == [1, 2]
    assert seen[2] <= 3
    assert seen[2:] == [seen[2]] * (len(batches) - 2)
    # Where the tokens are is read before the graph; inside of it nobody asks again.
    assert reads == ["packing"] * len(batches)


def compile_then_unpad(model: nn.Module, backend: Any) -> Any:
    return unpad(torch.compile(model, backend=backend))


def unpad_then_compile_in_place(model: nn.Module, backend: Any) -> Any:
    unpad(model).compile(backend=backend)
    return model


def compile_a_copy(model: nn.Module, backend: Any) -> Any:
    return torch.compile(copy.deepcopy(unpad(model)), backend=backend)


def compile_the_backbone(model: nn.Module, backend: Any) -> Any:
    unpad(model).base_model.compile(backend=backend)
    return model


@pytest.mark.parametrize(
    "prepare", [compile_then_unpad, unpad_then_compile_in_place, compile_a_copy, compile_the_backbone]
)
@torch.no_grad()
def test_ways_to_compile(prepare: Callable[[nn.Module, Any], Any]) -> None:
    name = "BertForSequenceClassification" if prepare is compile_the_backbone else "BertModel"
    reference, graphs = build(name, "eager"), Graphs()
    model = prepare(build(name), graphs)
    for lengths in BATCHES[:3]:
        batch = batch_of(lengths)
        assert_equal_eager(reference, model(**batch), batch)
    assert graphs.attending == [reference.config.num_hidden_layers]


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = reads_of_lengths(monkeypatch)
    reference, compiled = build("Qwen3Model", "eager"), torch.compile(unpad(build("Qwen3Model")))
    for lengths in BATCHES[:3]:
        batch = batch_of(lengths)
        reads.clear()
        with torch.inference_mode(), hf_flashinfer_attn.trace() as trace:
            assert_equal_eager(reference, compiled(**batch), batch)
        assert trace.layouts == 1
        # A decoder's mask of packed tokens reaches attention as one that holds no padding.
        assert reads == ["packing"]
    assert counters["stats"]["unique_graphs"] == 1


def test_gradients_equal() -> None:
    gradients = []
    for compiled in (False, True):
        model = unpad(build("BertModel"))
        run = torch.compile(model, backend="eager") if compiled else model
        batch = batch_of(BATCHES[0])
        hidden = run(**batch).last_hidden_state[batch["attention_mask"].bool()]
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        gradients.append({key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None})
    assert len(gradients[0]) > 10
    assert gradients[1].keys() == gradients[0].keys()
    rounding = 1e-5 * max(gradient.abs().max().item() for gradient in gradients[0].values())
    for key, right in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], right, rtol=1e-4, atol=rounding)


@torch.no_grad()
def test_whole_graphs() -> None:
    """Where there is nothing but a backbone, its forward is the graph; a head around it would have to be cut."""
    reference, batch = build("BertModel", "eager"), batch_of(BATCHES[0])
    compiled = torch.compile(unpad(build("BertModel")), backend="eager", fullgraph=True)
    assert_equal_eager(reference, compiled(**batch), batch)
    whole = torch.compile(unpad(build("BertForMaskedLM")), backend="eager", fullgraph=True)
    with pytest.raises(Unsupported, match="reads row lengths on the host"):
        whole(**batch)


@torch.no_grad()
def test_offsets_of_the_user_do_not_silence_a_mask() -> None:
    """Only what `unpad` made is known to hold no padding."""
    offsets = torch.tensor([0, 5, 9], dtype=torch.int32)
    inputs = {
        "input_ids": torch.randint(4, VOCAB_SIZE, (1, 9)),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]),
    }
    inputs |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    compiled = torch.compile(build("Qwen3Model"), backend="eager")
    mask = torch.ones(1, 9, dtype=torch.long)
    torch.testing.assert_close(
        compiled(**inputs, attention_mask=mask).last_hidden_state, build("Qwen3Model")(**inputs).last_hidden_state
    )
    mask[0, 7:] = 0
    with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match="together with a padding mask"):
        compiled(**inputs, attention_mask=mask)
