from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, Gemma2Config, Gemma2Model

import hf_flashinfer_attn
from hf_flashinfer_attn.attention.select import RULES, SMALL_LOGITS, Backend, Choice, kernel_for, select, select_kernel
from hf_flashinfer_attn.attention.spec import WHOLE_MASK_FEATURES, AttentionSpec
from hf_flashinfer_attn.kernels import flashinfer
from hf_flashinfer_attn.ragged.band import CAUSAL, FULL, Band, Opaque, Pattern
from hf_flashinfer_attn.ragged.layout import RaggedLayout, uniform_layout
from hf_flashinfer_attn.settings import Settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FALLBACKS: list[tuple[dict[str, Any], Backend, str]] = [
    ({"needs_weights": True}, Backend.DENSE, "output_attentions=True"),
    ({"pattern": Opaque("some_overlay")}, Backend.DENSE, "the mask some_overlay"),
    *(({"whole_mask": feature}, Backend.DENSE, feature) for feature in WHOLE_MASK_FEATURES),
    ({"biased": True, "pattern": Band(3, 3)}, Backend.TORCH, "position_bias together with a window"),
    ({"biased": True, "softcap": 2.0}, Backend.TORCH, "position_bias together with a window or softcap"),
    ({"needs_grad": True}, Backend.TORCH, "gradients"),
    ({"dropout": 0.1}, Backend.TORCH, "dropout 0.1"),
    ({"dtype": torch.float32}, Backend.TORCH, "dtype torch.float32"),
    ({"head_dim": 264}, Backend.TORCH, r"head_dim 264 .*256"),
    ({"value_head_dim": 264}, Backend.TORCH, r"head_dim 264 .*256"),
]
SPEC = AttentionSpec(
    pattern=FULL, device=CUDA, dtype=torch.float16, rows=2, q_length=300, kv_length=300, num_heads=4, num_kv_heads=4,
    head_dim=32, value_head_dim=32, sm_scale=0.2,
)  # fmt: skip


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that FlashInfer runs on any device, so that the rules can be read without a GPU."""
    monkeypatch.setattr(flashinfer, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def spec_with(**changes: Any) -> AttentionSpec:
    """A spec that FlashInfer's kernels support, but for the changes."""
    return dataclasses.replace(SPEC, **changes)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("pattern", [FULL, CAUSAL, Band(3, 3)])
@pytest.mark.parametrize("head_dim", [8, 32, 72, 256])
@pytest.mark.parametrize("backend", ["auto", "flashinfer"])
def test_flashinfer_serves_what_it_can(pattern: Pattern, head_dim: int, backend: Any) -> None:
    choice = select(spec_with(pattern=pattern, head_dim=head_dim), Settings(backend=backend, strict=True))
    assert choice == Choice(Backend.FLASHINFER, None)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(("changes", "backend", "reason"), FALLBACKS)
def test_fallbacks_are_named_logged_once_and_can_be_forbidden(
    changes: dict[str, Any], backend: Backend, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_with(**changes)
    with caplog.at_level(logging.WARNING, logger="hf_flashinfer_attn"):
        choices = [select(spec, Settings()) for _ in range(2)]
    assert [choice.backend for choice in choices] == [backend, backend]
    assert len(caplog.records) == 1
    assert choices[0].reason is not None
    assert choices[0].reason in caplog.text
    for settings, named in ((Settings(strict=True), "strict=True"), (Settings(backend="flashinfer"), "backend=")):
        with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match=rf"{reason}.*{named}.*configure\("):
            select(spec, settings)
    assert select(spec, Settings(backend="torch", strict=True)).backend is backend


@pytest.mark.usefixtures("a_gpu")
def test_every_rule_is_covered_above() -> None:
    fired = {index for changes, _, _ in FALLBACKS for index, rule in enumerate(RULES)
             if rule.reason(spec_with(**changes)) is not None}  # fmt: skip
    assert fired == set(range(len(RULES)))


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("backend", ["auto", "flashinfer"])
@pytest.mark.parametrize(
    ("changes", "small"),
    [({}, True), ({"sees_all_valid": False}, False), ({"num_kv_heads": 2}, False), ({"softcap": 2.0}, False),
     ({"sinks": True}, False), ({"biased": True}, False), ({"head_dim": 12, "value_head_dim": 12}, False),
     ({"value_head_dim": 16}, False), ({"rows": SMALL_LOGITS // (4 * 256 * 300), "q_length": 256}, True),
     ({"rows": -(-SMALL_LOGITS // (4 * 256 * 256)), "q_length": 256, "kv_length": 256}, False)],
)  # fmt: skip
def test_a_small_batch_asks_for_no_lengths(changes: dict[str, Any], small: bool, backend: Any) -> None:
    expected = Backend.SDPA if small and backend == "auto" else Backend.FLASHINFER
    assert select(spec_with(**{"sees_all_valid": True, **changes}), Settings(backend=backend)) == Choice(expected)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("changes", "lengths", "expected"),
    [({}, None, "sdpa"), ({"pattern": CAUSAL}, None, "sdpa"), ({"pattern": Band(3, 0)}, None, "fa2"),
     ({"pattern": CAUSAL, "q_length": 200}, None, "fa3"), ({}, (300, 299), "fa3"), ({}, (200, 20), "fa2"),
     ({"sinks": True}, None, "fa3"), ({"biased": True}, None, "fa2"), ({"softcap": 2.0}, None, "fa3"),
     ({"value_head_dim": 24}, None, "fa3"), ({"head_dim": 64, "value_head_dim": 64}, None, "sdpa"),
     ({"head_dim": 64, "value_head_dim": 64, "q_length": 120}, None, "fa3"),
     ({"head_dim": 64, "value_head_dim": 64, "q_length": 1032}, None, "fa3"),
     ({"head_dim": 256, "value_head_dim": 256}, None, "fa3"),
     ({"head_dim": 12, "value_head_dim": 12}, None, "fa3"), ({"num_kv_heads": 2}, None, "sdpa")],
)  # fmt: skip
def test_the_faster_kernel_by_lengths(changes: dict[str, Any], lengths: tuple[int, ...] | None, expected: str) -> None:
    spec = spec_with(**changes)
    layout = uniform_layout(2, spec.q_length, spec.kv_length) if lengths is None else RaggedLayout.from_lengths(lengths)
    backend, kernel = select_kernel(spec, layout, Settings())
    assert (kernel if backend is Backend.FLASHINFER else backend.value) == expected
    # By name, FlashInfer it is.
    assert select_kernel(spec, layout, Settings(backend="flashinfer"))[0] is Backend.FLASHINFER


@pytest.mark.parametrize(
    ("capability", "head_dim", "keys", "options", "kernel"),
    [((9, 0), 32, 1e3, {}, "fa3"), ((9, 0), 160, 1e3, {}, "fa3"), ((9, 0), 256, 1e3, {}, "fa3"),
     ((8, 0), 64, 1e3, {}, "fa2"), ((7, 5), 64, 1e3, {}, "fa2"), ((10, 0), 128, 1e3, {}, "auto"),
     ((10, 0), 64, 1e3, {}, "fa2"), ((12, 0), 128, 1e3, {}, "fa2"), ((9, 0), 64, 100.0, {}, "fa2"),
     ((9, 0), 64, 300.0, {}, "fa3"), ((9, 0), 64, 1e3, {"biased": True}, "fa2"),
     ((9, 0), 64, 1e3, {"sinks": True}, "fa3"), ((10, 0), 128, 1e3, {"sinks": True}, "fa2")],
)  # fmt: skip
def test_the_kernel_by_gpu(capability: Any, head_dim: int, keys: float, options: dict[str, bool], kernel: str) -> None:
    assert kernel_for(capability, head_dim, keys, **options) == kernel


NO_GPU = "the tensors are on 'cpu', not on a CUDA device"


def test_without_a_gpu_torch_serves_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_flashinfer_attn"):
        for _ in range(2):
            assert select(spec_with(device=CPU), Settings()) == Choice(Backend.TORCH, NO_GPU)
    assert [record.getMessage() for record in caplog.records] == [f"attention runs on the torch backend: {NO_GPU}"]


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_strict_means_flashinfer_or_an_error(compiled: bool) -> None:
    config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model, ids = BertModel._from_config(config, attn_implementation="flashinfer").eval(), torch.ones(1, 3).long()
    if compiled:
        torch._dynamo.reset()
        model = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
        model(ids)
    assert trace.fallbacks == (NO_GPU,)
    hf_flashinfer_attn.configure(strict=True)
    with torch.no_grad(), pytest.raises(hf_flashinfer_attn.BackendUnavailableError, match=f"{NO_GPU}, and strict=True"):
        model(ids)
    # What was asked for by name is no fallback.
    hf_flashinfer_attn.configure(backend="torch")
    with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
        model(ids)
    assert (trace.kernels, trace.fallbacks) == (("torch",), ())


def test_flashinfer_by_name_never_falls_back() -> None:
    config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = BertModel._from_config(config, attn_implementation="flashinfer").eval()
    hf_flashinfer_attn.configure(backend="flashinfer")
    with pytest.raises(hf_flashinfer_attn.BackendUnavailableError, match=r"on 'cpu'.*backend='torch'") as error:
        model(torch.ones(1, 3, dtype=torch.long))
    assert error.value.backend == "flashinfer"


def test_softcap_and_windows_are_right() -> None:
    config = Gemma2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
        head_dim=8, vocab_size=50, sliding_window=3, attn_logit_softcapping=0.5, query_pre_attn_scalar=1,
    )  # fmt: skip
    ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    outputs = []
    for implementation in ("eager", "flashinfer"):
        torch.manual_seed(0)
        model = Gemma2Model._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
        with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
            outputs.append(model(ids, attention_mask=mask).last_hidden_state)
    assert {call.pattern for call in trace.calls} == {"causal", "window (2 before, 0 after)"}
    assert trace.kernels == ("torch",)
    torch.testing.assert_close(outputs[0][mask.bool()], outputs[1][mask.bool()], rtol=0, atol=1e-5)
