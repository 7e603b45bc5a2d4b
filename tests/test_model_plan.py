"""Plans made from a config alone, against what the same model really asks for and runs."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from paired_models import T5_IS_ON_THE_INTERFACE, TRANSFORMERS_VERSION, decoder_config, right_padded, t5_config
from transformers import AutoModel, BertConfig, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_flashinfer_attn
from hf_flashinfer_attn.integration.functions import attention_forward
from hf_flashinfer_attn.tools.model_plan import LayerPlan, plan_of_config
from model_families import FAMILIES

HOPPER, AMPERE, TURING, BLACKWELL = (9, 0), (8, 6), (7, 5), (10, 0)
NAMES = frozenset(
    {
        "albert", "bart", "bert", "bert-causal", "distilbert", "electra", "embedding-gemma", "ernie", "esm-absolute",
        "esm-rotary", "eurobert", "gemma2", "gemma3-text", "gpt2", "jina-v3", "layoutlm", "llama", "mbart",
        "mixtral", "mobilebert", "modernbert", "nomic-bert", "phi3", "qwen3", "roberta", "t5", "t5gemma", "umt5",
        "xlm-roberta",
    }
)  # fmt: skip
assert {family.name for family in FAMILIES} >= NAMES
TEXTS = [family for family in FAMILIES if family.name in NAMES and family.is_in_this_transformers]


def numbers_of(layers: str) -> int:
    """How many layers a label such as "encoder 0-3, 7" speaks of."""
    total = 0
    for word in layers.replace(",", " ").split():
        first, _, last = word.partition("-")
        if first.isdecimal():
            total += int(last or first) - int(first) + 1
    return total


@dataclass(frozen=True)
class Asked:
    """What a real call of the attention function was given."""

    heads: int
    kv_heads: int
    softcap: float | None
    biased: bool
    sinks: bool


def run_really(
    config: PreTrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[Counter[tuple[Any, ...]], Counter[Asked]]:
    """Runs a model with random weights on a padded batch; returns what a trace says, and what layers asked for."""
    asked: list[Asked] = []

    def spy(module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> Any:
        added = [given.get(name) is not None for name in ("position_bias", "s_aux")]
        asked.append(Asked(query.shape[1], key.shape[1], given.get("softcap"), *added))
        return attention_forward(module, query, key, value, mask, **given)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flashinfer", spy)
    model = AutoModel.from_config(copy.deepcopy(config), attn_implementation="flashinfer", dtype=torch.float32).eval()
    tokens, mask = right_padded((9, 5))
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
    # A plan tells once that there is no GPU, not in each layer.
    hf_flashinfer_attn.configure(backend="torch")
    with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
        model(**inputs)
    return Counter((call.pattern, call.kernel, call.head_dim, call.reason, call.note) for call in trace.calls), Counter(
        asked
    )


def expanded(layers: tuple[LayerPlan, ...]) -> tuple[Counter[tuple[Any, ...]], Counter[Asked]]:
    calls: Counter[tuple[Any, ...]] = Counter()
    asked: Counter[Asked] = Counter()
    for layer in layers:
        (kernel,) = layer.kernels
        count = numbers_of(layer.layers)
        calls[layer.pattern, kernel, layer.head_dim, layer.reason, layer.note] += count
        asked[Asked(layer.num_heads, layer.num_kv_heads, layer.softcap, layer.biased, layer.sinks)] += count
    return calls, asked


def gpt_oss_config() -> PreTrainedConfig:
    layer_types = ["sliding_attention", "full_attention"] * 2
    return decoder_config(
        transformers.GptOssConfig, num_hidden_layers=4, layer_types=layer_types, sliding_window=4,
        num_local_experts=2, num_experts_per_tok=1, head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip


def bert_config(**options: Any) -> PreTrainedConfig:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    return BertConfig(**{**sizes, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans for no GPU")
@pytest.mark.parametrize(
    ("make_config", "is_on_the_interface"),
    [
        *(pytest.param(family.make_config, family.is_on_the_interface, id=family.name) for family in TEXTS),
        pytest.param(bert_config, True, id="weights-not-collected"),
        pytest.param(partial(bert_config, output_attentions=True), True, id="weights-collected"),
        pytest.param(gpt_oss_config, True, id="sinks"),
    ],
)
def test_agrees_with_a_real_forward(
    make_config: Callable[[], PreTrainedConfig], is_on_the_interface: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    plan = plan_of_config(config, dtype=torch.float32)
    assert expanded(plan.layers) == run_really(config, monkeypatch)
    if is_on_the_interface:
        assert plan.layers
        assert plan.problem is None
    if config.output_attentions:
        assert [(layer.kernels, layer.reason) for layer in plan.layers] == [(("dense",), "output_attentions=True")]


def test_sinks_and_a_causal_window_on_hopper() -> None:
    window, causal = plan_of_config(gpt_oss_config(), capability=HOPPER).layers
    assert (window.layers, causal.layers) == ("0, 2", "1, 3")
    assert (window.left, window.right, window.kernels, window.sinks) == (3, 0, ("fa2",), True)
    assert (causal.left, causal.right, causal.kernels, causal.sinks) == (None, 0, ("fa3", "fa2"), True)
    assert (window.num_heads, window.num_kv_heads, window.head_dim, window.padded_head_dim) == (4, 2, 64, 64)


@pytest.mark.parametrize(
    ("capability", "dtype", "kernels", "padded", "reason"),
    [
        (HOPPER, torch.float16, ("fa3", "fa2", "sdpa"), 128, None),
        (AMPERE, torch.bfloat16, ("fa2", "sdpa"), 128, None),
        (BLACKWELL, torch.bfloat16, ("auto", "sdpa"), 128, None),
        (TURING, torch.float16, ("fa2", "sdpa"), 128, None),
        (TURING, torch.bfloat16, ("torch",), 96, "older than compute capability 8.0"),
        (HOPPER, torch.float32, ("torch",), 96, "dtype torch.float32"),
        ((7, 0), torch.float16, ("torch",), 96, "FlashInfer needs 7.5 or newer"),
    ],
    ids=["hopper", "ampere", "blackwell", "turing", "turing-bfloat16", "float32", "volta"],
)
def test_kernels_by_gpu_and_dtype(
    capability: tuple[int, int], dtype: torch.dtype, kernels: tuple[str, ...], padded: int, reason: str | None
) -> None:
    config = bert_config(hidden_size=384, num_attention_heads=4, num_hidden_layers=3)
    plan = plan_of_config(config, dtype=dtype, capability=capability)
    (layer,) = plan.layers
    assert (layer.layers, layer.kernels, layer.head_dim, layer.padded_head_dim) == ("0-2", kernels, 96, padded)
    assert (layer.reason is None) if reason is None else (reason in str(layer.reason))
    assert plan.unpad
    assert plan.cuda_graphs == (reason is None and "auto" not in kernels)


def test_settings_are_heeded() -> None:
    config = bert_config()
    hf_flashinfer_attn.configure(backend="flashinfer")
    assert plan_of_config(config, capability=HOPPER).layers[0].kernels == ("fa3", "fa2")
    refused = plan_of_config(config, capability=HOPPER, dtype=torch.float32)
    assert refused.layers[0].kernels == ()
    assert "refused" in str(refused)
    hf_flashinfer_attn.configure(backend="torch")
    assert plan_of_config(config, capability=HOPPER).layers[0].kernels == ("torch",)


@pytest.mark.parametrize("options", [{"strict": True}, {"backend": "flashinfer"}], ids=str)
@pytest.mark.parametrize(
    ("capability", "reason"), [(None, "no GPU that FlashInfer supports"), ((7, 0), "7.5 or newer")]
)
def test_what_no_gpu_computes_is_refused_where_a_fallback_is(
    options: dict[str, Any], capability: tuple[int, int] | None, reason: str
) -> None:
    hf_flashinfer_attn.configure(**options)
    (layer,) = plan_of_config(bert_config(), capability=capability).layers
    assert layer.kernels == ()
    assert reason in str(layer.reason)


def test_windows_that_look_ahead_rule_out_graphs() -> None:
    config = transformers.ModernBertConfig(hidden_size=128, num_attention_heads=2, num_hidden_layers=4)
    plan = plan_of_config(config, capability=HOPPER)
    full, window = plan.layers
    assert (full.layers, full.pattern, full.left, full.right) == ("0, 3", "full", None, None)
    assert (window.layers, window.left, window.right, window.kernels) == ("1-2", 64, 64, ("fa2",))
    assert plan.unpad
    assert not plan.cuda_graphs
    assert "look ahead" in str(plan.cuda_graphs_reason)


@pytest.mark.skipif(not T5_IS_ON_THE_INTERFACE, reason="T5 computes attention by itself")
def test_encoder_decoder_with_a_bias() -> None:
    plan = plan_of_config(t5_config(transformers.T5Config), capability=HOPPER)
    assert [(layer.layers, layer.pattern) for layer in plan.layers] == [
        ("encoder 0-1 SelfAttention", "full"),
        ("decoder 0-1 SelfAttention", "causal"),
        ("decoder 0-1 EncDecAttention", "full"),
    ]
    assert all(layer.biased and layer.kernels == ("fa2",) for layer in plan.layers)
    assert not plan.unpad
    assert "relative position bias" in str(plan.unpad_reason)
    alone = plan_of_config(t5_config(transformers.T5Config, architectures=["T5EncoderModel"]), capability=HOPPER)
    assert alone.class_name == "T5EncoderModel"
    assert [layer.layers for layer in alone.layers] == ["0-1"]


@pytest.mark.skipif(Version("5.15") > TRANSFORMERS_VERSION, reason="MPNet's mask is not ours")
def test_mpnet_is_planned_as_after_unpad() -> None:
    config = transformers.MPNetConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=2, intermediate_size=64)
    plan = plan_of_config(config, capability=HOPPER)
    (layer,) = plan.layers
    assert (layer.layers, layer.biased, layer.kernels) == ("0-1", True, ("fa2",))
    assert "after unpad" in str(layer.reason)
    assert plan.unpad
    assert not plan.cuda_graphs


def test_what_is_not_known_is_said() -> None:
    off_interface = plan_of_config(transformers.RemBertConfig(num_hidden_layers=1), capability=HOPPER)
    assert off_interface.layers == ()
    assert "does not go through" in str(off_interface.problem)
    refused = plan_of_config(transformers.FalconConfig(num_hidden_layers=1), capability=HOPPER)
    assert "flash-attn itself" in str(refused.problem)
    unknown = plan_of_config(PreTrainedConfig(), capability=HOPPER)
    assert "cannot be built" in str(unknown.problem)
    assert "not known" in str(unknown)


def test_answers_that_matter_are_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    config = bert_config()
    forward = transformers.BertModel.forward

    def harmless(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if input_ids.any():
            input_ids = input_ids + 1
        return forward(self, input_ids, **kwargs)

    def harmful(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return forward(self, input_ids, **kwargs) if input_ids.any() else None

    for one in (harmless, harmful):
        one.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(transformers.BertModel, "forward", harmless)
    assert [layer.layers for layer in plan_of_config(config).layers] == ["0-1"]
    monkeypatch.setattr(transformers.BertModel, "forward", harmful)
    plan = plan_of_config(config)
    assert plan.layers == ()
    assert "asks tensors for values" in str(plan.problem)


def test_config_stays_as_it_was() -> None:
    config = bert_config()
    before = config.to_dict()
    plan_of_config(config)
    assert config.to_dict() == before
    assert config._attn_implementation != "flashinfer"


def test_shown_as_text_html_and_plain_values() -> None:
    plan = plan_of_config(gpt_oss_config(), capability=HOPPER, dtype=torch.bfloat16)
    text, html = str(plan), plan._repr_html_()
    for fact in ("GptOssModel", "bfloat16", "9.0", "0, 2", "window (3 before, 0 after)", "4 on 2", "fa3, fa2", "sinks"):
        assert fact in text
        assert fact in html
    assert max(map(len, text.splitlines())) <= 100
    plain = plan.to_dict()
    assert plain["dtype"] == "bfloat16"
    assert plain["layers"][0]["kernels"] == ("fa2",)  # type: ignore[index]
