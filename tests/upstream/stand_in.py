"""The pytest plugin of `run.py`: our attention in the place of "sdpa", in a process of its own.

Whatever asks for "sdpa", or for nothing where sdpa is the default, gets our attention function and our mask function.
Only tests that concern attention stay selected. Each leaves lines of JSON: its outcome, and how often it called us.

`--baseline` leaves transformers as it is, which tells a failure of ours from one that was there before.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import types
import zlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, PreTrainedModel, set_seed
from transformers.masking_utils import AttentionMaskInterface

from hf_flashinfer_attn.integration.functions import attention_forward, attention_mask

REPLACED = "sdpa"

SELECTED = (
    # Of each pair with and without sdpa's fused kernels, the one that sdpa would run by default.
    "test_eager_matches_sdpa_inference_*_sdpa_kernels",
    "test_eager_matches_sdpa_inference_*_output_attentions",
    "test_eager_matches_sdpa_generate",
    "test_sdpa_padding_matches_padding_free_with_position_ids*",
    "test_left_padding_compatibility",
    "test_custom_4d_attention_mask",
    "test_sliding_window_mask",
    "test_attention_outputs",
    "test_attn_implementation_composite_models",
    "test_sdpa_can_dispatch_*composite_models",
    "test_can_set_attention_dynamically*",
    "test_batching_equivalence",
    "test_inputs_embeds_matches_input_ids",
    "test_model",
    "test_model_as_decoder*",
    "test_decoder_model_*past*",
    "test_training",
    "test_training_gradient_checkpointing*",
    "test_retain_grad_hidden_states_attentions",
    "test_greedy_generate",
    "test_beam_search_generate",
    "test_assisted_decoding_matches_greedy_search*",
    "test_prompt_lookup_decoding_matches_greedy_search",
    "test_generate_continue_from_*",
    "test_generate_from_inputs_embeds*",
    "test_generate_with_and_without_position_ids",
    "test_generate_with_static_cache",
    "test_past_key_values_format",
)

# Mixins of other subjects, whose modules import packages that attention has no use for (datasets, exporters); and the
# helpers of distributed tests, which the source distribution of 5.23 imports but does not have.
STUBS = {
    "tests.test_pipeline_mixin": ("PipelineTesterMixin",),
    "tests.exporters.test_export": ("ExportTesterMixin", "ExportGenerateTesterMixin"),
    "tests.distributed_testing_utils": (
        "run_distributed", "_get_distributed_backend", "_get_distributed_device_type", "_get_rank_device",
        "_set_rank_device", "_start_rank_processes",
    ),
}  # fmt: skip


class StandIn:
    """Selects tests, counts the calls of our function, and reports both.

    Args:
        report: The file that gets the lines of JSON.
    """

    def __init__(self, report: Path) -> None:
        self.report = report.open("w")
        self.calls = 0

    def replace_sdpa(self) -> None:
        @functools.wraps(attention_forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return attention_forward(*args, **kwargs)

        # The mappings of the classes, since every instance of an interface reads through to them.
        AttentionInterface._global_mapping[REPLACED] = counted
        AttentionMaskInterface._global_mapping[REPLACED] = attention_mask

    def pytest_sessionstart(self) -> None:
        # In this order: the second imports the first.
        importlib.import_module("tests.test_modeling_common")
        add_packed_test(importlib.import_module("tests.generation.test_utils").GenerationTesterMixin)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        mixin = importlib.import_module("tests.test_modeling_common").ModelTesterMixin
        chosen = [item for item in items if is_of(mixin, item) and any(fnmatch(item.name, name) for name in SELECTED)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen
        if not config.getoption("--baseline"):
            let_ask_for_sdpa(PreTrainedModel)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        # Inputs come from an unseeded generator, and a failure that depends on them must come again.
        seed = zlib.crc32(item.nodeid.encode())
        importlib.import_module("tests.test_modeling_common").global_rng.seed(seed)
        set_seed(seed)
        before = self.calls
        result = yield
        self.write(test=item.nodeid, calls=self.calls - before)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A subtest has a report of its own, of another type; its test fails with it.
        if type(report) is pytest.TestReport and (report.when == "call" or not report.passed):
            self.write(test=report.nodeid, outcome=report.outcome)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="failed")

    def write(self, **line: Any) -> None:
        self.report.write(json.dumps(line) + "\n")
        self.report.flush()


def is_of(mixin: type, item: pytest.Item) -> bool:
    """Whether a test is one of a tiny model with random weights; the others download checkpoints."""
    return issubclass(getattr(item, "cls", None) or object, mixin)


def let_ask_for_sdpa(model_class: type[PreTrainedModel]) -> None:
    """Lets models that take any attention function ask for sdpa, even if sdpa lacks what they need: softcap, sinks."""
    for derived in model_class.__subclasses__():
        if derived._supports_attention_backend and vars(derived).get("_supports_sdpa") is False:
            derived._supports_sdpa = True
        let_ask_for_sdpa(derived)


def add_packed_test(mixin: Any) -> None:
    """Lifts a test of packed sequences with their offsets out of its condition, an installed flash-attn."""

    def test(self: Any) -> None:
        self.attention_mask_padding_matches_padding_free_with_position_ids(REPLACED, fa_kwargs=True)

    mixin.test_sdpa_padding_matches_padding_free_with_position_ids_and_fa_kwargs = test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stand-in-report", type=Path, required=True, help="file that gets the lines of JSON")
    parser.addoption("--baseline", action="store_true", help="leave sdpa as it is")


def pytest_configure(config: pytest.Config) -> None:
    for module, names in STUBS.items():
        stub = types.ModuleType(module)
        for name in names:
            setattr(stub, name, type(name, (), {}))
        sys.modules[module] = stub
    # As the conftest of transformers does, which is left out because it imports more than these tests need.
    torch.backends.cudnn.allow_tf32 = False
    plugin = StandIn(config.getoption("--stand-in-report"))
    config.add_cleanup(plugin.report.close)
    config.pluginmanager.register(plugin, "stand-in")
    if not config.getoption("--baseline"):
        plugin.replace_sdpa()
