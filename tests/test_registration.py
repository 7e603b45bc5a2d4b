"""What importing the package registers with transformers, and which models take the name, and which are refused."""

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
import transformers
from paired_models import assert_near, build_model, decoder_config
from transformers import AttentionInterface, AutoModel, BertConfig, BertModel, MPNetConfig, PreTrainedConfig
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.gptj import modeling_gptj

import hf_flashinfer_attn
from hf_flashinfer_attn import UnsupportedAttentionError
from hf_flashinfer_attn.integration.functions import attention_forward, attention_mask
from hf_flashinfer_attn.integration.transformers_patches import weights_are_collected
from model_families import FAMILIES, find_class

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONFIG = BertConfig(**TINY, vocab_size=50)
IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, 4:] = 0


def bert(implementation: str | None = "flashinfer") -> BertModel:
    return BertModel._from_config(copy.deepcopy(CONFIG), attn_implementation=implementation).eval()


@torch.no_grad()
def hidden_of(model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    return model(IDS, **inputs).last_hidden_state


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


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
    model_class, vision = transformers.GitModel, {**TINY, "image_size": 32, "patch_size": 16}
    config = transformers.GitConfig(**TINY, vocab_size=50, vision_config=vision)
    for refused in (model_class, type("Derived", (model_class,), {"__module__": __name__})):
        with pytest.raises(UnsupportedAttentionError, match=r"^git, .* classes of their own for 'eager'"):
            refused._from_config(config, attn_implementation="flashinfer")
    model = model_class._from_config(config, attn_implementation={"": "eager", "vision_config": "flashinfer"})
    assert model.config._attn_implementation == "eager"
    with hf_flashinfer_attn.trace() as trace:
        hidden_of(model, pixel_values=torch.randn(2, 3, 32, 32))
    assert len(trace.calls) == 2  # of the vision tower


def test_set_attn_implementation() -> None:
    model = bert(None)
    expected = hidden_of(model)
    model.set_attn_implementation("flashinfer")
    with hf_flashinfer_attn.trace() as trace:
        result = hidden_of(model)
    model.set_attn_implementation("eager")
    with hf_flashinfer_attn.trace() as untouched:
        hidden_of(model)
    assert (len(trace.calls), len(untouched.calls)) == (2, 0)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_one_sub_config_alone() -> None:
    config = transformers.CLIPConfig(
        text_config={**TINY, "vocab_size": 50, "max_position_embeddings": 16}, projection_dim=8,
        vision_config={**TINY, "image_size": 8, "patch_size": 4},
    )  # fmt: skip
    model = transformers.CLIPModel._from_config(config, attn_implementation={"vision_config": "flashinfer"}).eval()
    assert model.config.vision_config._attn_implementation == "flashinfer"
    assert model.config.text_config._attn_implementation != "flashinfer"
    with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
        model.get_image_features(pixel_values=torch.randn(1, 3, 8, 8))
        model.get_text_features(input_ids=IDS)
    assert len(trace.calls) == 2


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation="flashinfer").eval()
    assert loaded.config._attn_implementation == "flashinfer"
    assert AutoModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    assert torch.equal(hidden_of(loaded), hidden_of(model))


def test_a_model_off_the_interface_is_built_and_unchanged() -> None:
    config = MPNetConfig(**TINY, vocab_size=50)
    models = (build_model(transformers.MPNetModel, config, name) for name in ("eager", "flashinfer"))
    expected, ours = (hidden_of(model, attention_mask=MASK) for model in models)
    assert torch.equal(expected, ours)


@pytest.mark.parametrize("name", ["flashinfer", "paged|flashinfer"])
def test_paged_attention_is_refused_by_name(name: str) -> None:
    # Continuous batching hands over its paged cache, under a name of its own before 5.23.
    query = torch.ones(1, 2, 3, 8)
    with pytest.raises(UnsupportedAttentionError, match=r"continuous batching.*Use attn_implementation='sdpa'"):
        AttentionInterface()[name](torch.nn.Module(), query, query, query, None, cache=object())


def test_import_needs_neither_flashinfer_nor_triton() -> None:
    program = """
import sys
sys.modules['flashinfer'] = None
import torch, hf_flashinfer_attn
from transformers import BertConfig, BertModel
sys.modules['triton'] = None
config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
model = BertModel._from_config(config, attn_implementation='flashinfer').eval()
mask = torch.tensor([[1, 1, 0]])
with torch.no_grad(): print(model(torch.ones(1, 3, dtype=torch.long), mask).last_hidden_state.shape)
"""
    assert run_python(program) == "torch.Size([1, 3, 64])"


def test_import_loads_neither_flashinfer_nor_triton() -> None:
    program = """
import sys, transformers.modeling_flash_attention_utils, transformers.masking_utils, torch
before = set(sys.modules)
import hf_flashinfer_attn
new = {name.split('.')[0] for name in set(sys.modules) - before}
print(sorted(new & {'flashinfer', 'triton'}))
"""
    assert run_python(program) == "[]"


def test_models_that_list_the_kernels_they_work_with_take_ours() -> None:
    # Otherwise transformers would replace the name by a kernel from a hub, which needs a network.
    model_class = transformers.GptOssModel
    assert "flashinfer" not in (model_class._compatible_flash_implementations or [])
    config = decoder_config(transformers.GptOssConfig, num_local_experts=4, sliding_window=3)
    eager, ours = (build_model(model_class, config, name) for name in ("eager", "flashinfer"))
    with hf_flashinfer_attn.trace() as trace:
        actual = hidden_of(ours, attention_mask=MASK)[MASK.bool()]
    assert trace.kernels == ("torch",)
    assert_near(actual, hidden_of(eager, attention_mask=MASK)[MASK.bool()])


def test_the_collector_of_weights_is_where_the_hook_looks() -> None:
    assert not weights_are_collected()
    seen, model = [], bert()
    model.encoder.layer[0].register_forward_hook(lambda *_: seen.append(weights_are_collected()))
    with torch.no_grad():
        model(IDS)
        model(IDS, output_attentions=True)
    assert seen == [False, True]


FALCON = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BARK = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("model_class", "settings"),
    [
        (transformers.GPTNeoModel, {**BARK, "vocab_size": 50, "attention_types": [[["global"], 2]]}),
        (transformers.BarkSemanticModel, BARK),
        pytest.param(
            transformers.GPTJModel, {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8},
            marks=pytest.mark.skipif(hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS"), reason="is on the interface"),
        ),
        (transformers.FalconModel, FALCON),
    ],
)  # fmt: skip
def test_models_that_call_flash_attn_themselves_are_refused_by_name(model_class, settings) -> None:
    config = model_class.config_class(**settings)
    with pytest.raises(UnsupportedAttentionError, match=rf"^{config.model_type}, ") as caught:
        model_class._from_config(config, attn_implementation="flashinfer")
    others = re.findall(r"'(\w+)'", caught.value.way_out)
    assert "eager" in others
    for other in others:
        assert model_class._from_config(config, attn_implementation=other).config._attn_implementation == other


ITS_OWN = "which computes attention in its own code"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (MPNetConfig(**TINY), f"has no effect on mpnet, {ITS_OWN}; unpad(model) replaces it"),
        (transformers.DebertaV2Config(**TINY), f"has no effect on deberta-v2, {ITS_OWN}"),
        (BertConfig(**TINY), None),
        # Its backbone is another model's.
        (transformers.DPRConfig(**TINY), None),
        (transformers.CLIPConfig(), None),
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
    known = (one for one in FAMILIES if one.kind == "text" and one.is_in_this_transformers and one.takes_any_name)
    for family in known:
        caplog.clear()
        with torch.device("meta"), caplog.at_level(logging.WARNING, logger="hf_flashinfer_attn"):
            find_class(family.model_class)._from_config(family.make_config(), attn_implementation="flashinfer")
        says = "'flashinfer' has no effect" in caplog.text
        assert not (says and family.is_on_the_interface), family.name
        silent += not says and not family.is_on_the_interface
    assert silent <= 6
