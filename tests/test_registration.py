from __future__ import annotations

import copy
import inspect
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModel,
    BarkSemanticConfig,
    BarkSemanticModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DebertaV2Config,
    DPRConfig,
    FalconConfig,
    FalconModel,
    GitConfig,
    GitModel,
    GPTJConfig,
    GPTJModel,
    GPTNeoConfig,
    GPTNeoModel,
    GptOssConfig,
    GptOssModel,
    MPNetConfig,
    PreTrainedConfig,
)
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.gptj import modeling_gptj

import hf_flashinfer_attn
from hf_flashinfer_attn.integration.functions import attention_forward, attention_mask
from hf_flashinfer_attn.integration.transformers_patches import weights_are_collected
from model_families import FAMILIES, find_class

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONFIG = BertConfig(**TINY, vocab_size=50)
IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def test_both_functions_are_registered_under_the_name() -> None:
    assert AttentionInterface()["flashinfer"] is attention_forward
    assert AttentionMaskInterface()["flashinfer"] is attention_mask


def test_register_is_idempotent() -> None:
    loader = flash_utils._lazy_imports
    hf_flashinfer_attn.register()
    assert flash_utils._lazy_imports is loader


def test_the_loader_still_answers_for_other_names() -> None:
    with pytest.raises((ImportError, ValueError, OSError), match=r"."):
        flash_utils._lazy_imports("flash_attention_3")


def test_the_loader_has_the_shape_that_the_hook_relies_on() -> None:
    original = inspect.unwrap(flash_utils._lazy_imports)
    assert next(iter(inspect.signature(original).parameters)) == "implementation"
    functions = flash_utils._lazy_imports("flashinfer")
    assert len(functions) == 5
    # transformers reads which features a kernel has from these names.
    assert {"dropout_p", "window_size", "max_seqlen_q"} <= set(inspect.signature(functions[1]).parameters)


def test_an_unknown_loader_is_refused_by_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda name: None)
    with pytest.raises(RuntimeError, match=r"transformers 5\..*takes \['name'\], expected"):
        hf_flashinfer_attn.register()


def test_models_with_classes_of_their_own_are_refused_by_name() -> None:
    config = GitConfig(**TINY, vocab_size=50, vision_config={**TINY, "image_size": 32, "patch_size": 16})
    with pytest.raises(
        hf_flashinfer_attn.UnsupportedAttentionError, match=r"^git, .* classes of their own for 'eager'"
    ):
        GitModel._from_config(config, attn_implementation="flashinfer")
    with pytest.raises(
        hf_flashinfer_attn.UnsupportedAttentionError, match=r"^git, .* classes of their own for 'eager'"
    ):
        type("Derived", (GitModel,), {"__module__": __name__})._from_config(config, attn_implementation="flashinfer")
    model = GitModel._from_config(config, attn_implementation={"": "eager", "vision_config": "flashinfer"})
    assert model.config._attn_implementation == "eager"
    with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
        model(IDS, pixel_values=torch.randn(2, 3, 32, 32))
    assert len(trace.calls) == 2  # of the vision tower


def test_set_attn_implementation() -> None:
    model = BertModel(copy.deepcopy(CONFIG)).eval()
    with torch.no_grad():
        expected = model(IDS).last_hidden_state
        model.set_attn_implementation("flashinfer")
        with hf_flashinfer_attn.trace() as trace:
            result = model(IDS).last_hidden_state
        model.set_attn_implementation("eager")
        with hf_flashinfer_attn.trace() as untouched:
            model(IDS)
    assert len(trace.calls) == 2
    assert len(untouched.calls) == 0
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_one_sub_config_alone() -> None:
    text = {**TINY, "vocab_size": 50, "max_position_embeddings": 16}
    vision = {**TINY, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = CLIPModel._from_config(config, attn_implementation={"vision_config": "flashinfer"}).eval()
    assert model.config.vision_config._attn_implementation == "flashinfer"
    assert model.config.text_config._attn_implementation != "flashinfer"
    with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
        model.get_image_features(pixel_values=torch.randn(1, 3, 8, 8))
        model.get_text_features(input_ids=IDS)
    assert len(trace.calls) == 2


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    model = BertModel._from_config(copy.deepcopy(CONFIG), attn_implementation="flashinfer").eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation="flashinfer").eval()
    plain = AutoModel.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "flashinfer"
    assert plain.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(loaded(IDS).last_hidden_state, model(IDS).last_hidden_state)


def test_a_model_off_the_interface_is_built_and_unchanged() -> None:
    config = MPNetConfig(**TINY, vocab_size=50)
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    outputs = []
    for implementation in ("eager", "flashinfer"):
        torch.manual_seed(0)
        model = AutoModel.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
        with torch.no_grad():
            outputs.append(model(IDS, attention_mask=mask).last_hidden_state)
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("name", ["flashinfer", "paged|flashinfer"])
def test_paged_attention_is_refused_by_name(name: str) -> None:
    # Continuous batching hands over its paged cache, under a name of its own before 5.23.
    query = torch.ones(1, 2, 3, 8)
    with pytest.raises(
        hf_flashinfer_attn.UnsupportedAttentionError, match=r"continuous batching.*Use attn_implementation='sdpa'"
    ):
        AttentionInterface()[name](torch.nn.Module(), query, query, query, None, cache=object())


def test_import_needs_neither_flashinfer_nor_triton() -> None:
    program = (
        "import sys\n"
        "sys.modules['flashinfer'] = None\n"
        "import torch, hf_flashinfer_attn\n"
        "from transformers import BertConfig, BertModel\n"
        "loaded = set(sys.modules)\n"
        "sys.modules['triton'] = None\n"
        "config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)\n"
        "model = BertModel._from_config(config, attn_implementation='flashinfer').eval()\n"
        "mask = torch.tensor([[1, 1, 0]])\n"
        "with torch.no_grad(): print(model(torch.ones(1, 3, dtype=torch.long), mask).last_hidden_state.shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([1, 3, 64])"


def test_import_loads_neither_flashinfer_nor_triton() -> None:
    program = (
        "import sys, transformers.modeling_flash_attention_utils, transformers.masking_utils, torch\n"
        "before = set(sys.modules)\n"
        "import hf_flashinfer_attn\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'flashinfer', 'triton'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_models_that_list_the_kernels_they_work_with_take_ours() -> None:
    # Otherwise transformers would replace the name by a kernel from a hub, which needs a network.
    config = GptOssConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=16, num_local_experts=4, vocab_size=50, sliding_window=3,
    )  # fmt: skip
    assert "flashinfer" not in (GptOssModel._compatible_flash_implementations or [])
    mask = torch.ones_like(IDS)
    mask[0, 4:] = 0
    outputs = []
    for implementation in ("eager", "flashinfer"):
        torch.manual_seed(0)
        model = GptOssModel._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
        assert model.config._attn_implementation == implementation
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=1.0 if "sinks" in name else 0.2)
        with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
            outputs.append(model(IDS, attention_mask=mask).last_hidden_state[mask.bool()])
    assert trace.kernels == ("torch",)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)


def test_the_collector_of_weights_is_where_the_hook_looks() -> None:
    assert not weights_are_collected()
    seen = []
    model = BertModel._from_config(copy.deepcopy(CONFIG), attn_implementation="flashinfer").eval()
    model.encoder.layer[0].register_forward_hook(lambda *_: seen.append(weights_are_collected()))
    with torch.no_grad():
        model(IDS)
        model(IDS, output_attentions=True)
    assert seen == [False, True]


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (
            GPTNeoModel,
            GPTNeoConfig(vocab_size=50, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global"], 2]]),
        ),
        (BarkSemanticModel, BarkSemanticConfig(hidden_size=32, num_layers=2, num_heads=2)),
        pytest.param(
            GPTJModel,
            GPTJConfig(n_embd=32, n_layer=1, n_head=2, rotary_dim=8),
            marks=pytest.mark.skipif(hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS"), reason="is on the interface"),
        ),
        (FalconModel, FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)),
    ],
)
def test_models_that_call_flash_attn_themselves_are_refused_by_name(model_class, config) -> None:
    with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match=rf"^{config.model_type}, ") as caught:
        model_class._from_config(config, attn_implementation="flashinfer")
    others = re.findall(r"'(\w+)'", caught.value.way_out)
    assert "eager" in others
    for other in others:
        assert model_class._from_config(config, attn_implementation=other).config._attn_implementation == other


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            MPNetConfig(**TINY),
            "has no effect on mpnet, which computes attention in its own code; unpad(model) replaces it",
        ),
        (DebertaV2Config(**TINY), "has no effect on deberta-v2, which computes attention in its own code"),
        (BertConfig(**TINY), None),
        # Its backbone is another model's.
        (DPRConfig(**TINY), None),
        (CLIPConfig(), None),
    ],
)
def test_a_model_that_never_calls_us_is_named(
    config: PreTrainedConfig, says: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.device("meta"), caplog.at_level(logging.WARNING, logger="hf_flashinfer_attn"):
        for _ in range(2):
            AutoModel.from_config(copy.deepcopy(config), attn_implementation="flashinfer")
            AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager")
    lines = [record.message for record in caplog.records if "'flashinfer' has no effect" in record.message]
    assert [line.endswith(str(says)) for line in lines] == [True] * (says is not None)


def test_families_on_the_interface_are_not_said_to_have_attention_of_their_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    silent = 0
    for family in FAMILIES:
        if family.kind != "text" or not family.is_in_this_transformers or not family.takes_any_name:
            continue
        caplog.clear()
        with torch.device("meta"), caplog.at_level(logging.WARNING, logger="hf_flashinfer_attn"):
            find_class(family.model_class)._from_config(
                family.make_config(), attn_implementation="flashinfer"
            )
        says = "'flashinfer' has no effect" in caplog.text
        assert not (says and family.is_on_the_interface), family.name
        silent += not says and not family.is_on_the_interface
    assert silent <= 6
