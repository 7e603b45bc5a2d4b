from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import BertConfig, BertModel, Gemma2Config, Gemma2Model
from transformers.masking_utils import sliding_window_bidirectional_mask_function

import hf_flashinfer_attn
from hf_flashinfer_attn.attention import select as dispatch
from hf_flashinfer_attn.attention.select import AttentionRequest, Path, decide
from hf_flashinfer_attn.kernels import flashinfer
from hf_flashinfer_attn.ragged.band import CAUSAL, FULL, Pattern, dense_pattern, recognise
from hf_flashinfer_attn.settings import Settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WINDOW = dense_pattern("some_overlay")
FALLBACKS = [
    ({"output_attentions": True}, Path.DENSE, "output_attentions=True"),
    ({"biased_packed": True}, Path.DENSE, "position_bias over packed sequences"),
    ({"biased_window": True}, Path.TORCH, "position_bias together with a window"),
    ({"pattern": WINDOW}, Path.DENSE, "the mask some_overlay"),
    ({"mask_holes": True}, Path.DENSE, "padding with holes"),
    ({"window_keeps_padded_queries": True}, Path.DENSE, "keeps padded queries"),
    ({"causal_padding_is_read": True}, Path.DENSE, "the model reads later"),
    ({"padded_queries_need_mask": True}, Path.DENSE, "padded_queries='keep'"),
    ({"mask_shape_differs": True}, Path.DENSE, "another shape"),
    ({"mask_modified": True}, Path.DENSE, "wrote to"),
    ({"needs_grad": True}, Path.TORCH, "gradients"),
    ({"dropout": 0.1}, Path.TORCH, "dropout 0.1"),
    ({"dtype": torch.float32}, Path.TORCH, r"dtype torch.float32"),
    ({"head_dim": 264}, Path.TORCH, r"head_dim 264 .*256"),
]


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that FlashInfer runs on any device, so that the rules can be read without a GPU."""
    monkeypatch.setattr(flashinfer, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def request(**changes: object) -> AttentionRequest:
    return AttentionRequest(**{"pattern": FULL, "device": CUDA, "dtype": torch.float16, "head_dim": 32, **changes})


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("pattern", [FULL, CAUSAL, recognise(sliding_window_bidirectional_mask_function(3))[0]])
@pytest.mark.parametrize("head_dim", [8, 32, 72, 256])
@pytest.mark.parametrize("backend", ["auto", "flashinfer"])
def test_flashinfer_serves_what_it_can(pattern: Pattern, head_dim: int, backend: str) -> None:
    decision = decide(request(pattern=pattern, head_dim=head_dim), Settings(backend=backend, strict=True))
    assert decision == dispatch.Decision(Path.FLASHINFER, None)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(("changes", "path", "reason"), FALLBACKS)
def test_fallbacks_are_named_logged_once_and_can_be_forbidden(
    changes: dict[str, object], path: Path, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_flashinfer_attn"):
        decisions = [decide(request(**changes), Settings()) for _ in range(2)]
    assert [decision.path for decision in decisions] == [path, path]
    assert len(caplog.records) == 1
    assert decisions[0].reason is not None
    assert decisions[0].reason in caplog.text
    for settings, named in ((Settings(strict=True), "strict=True"), (Settings(backend="flashinfer"), "backend=")):
        with pytest.raises(hf_flashinfer_attn.UnsupportedAttentionError, match=rf"{reason}.*{named}.*configure\("):
            decide(request(**changes), settings)
    expected = Path.DENSE if path is Path.DENSE else Path.TORCH
    assert decide(request(**changes), Settings(backend="torch", strict=True)).path is expected


@pytest.mark.usefixtures("a_gpu")
def test_every_rule_is_covered_above() -> None:
    fired = {index for changes, _, _ in FALLBACKS for index, rule in enumerate(dispatch.RULES)
             if rule.reason(request(**changes)) is not None}  # fmt: skip
    assert fired == set(range(len(dispatch.RULES)))


NO_GPU = "the tensors are on 'cpu', not on a CUDA device"


def test_without_a_gpu_torch_serves_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_flashinfer_attn"):
        for _ in range(2):
            assert decide(request(device=CPU), Settings()) == dispatch.Decision(Path.TORCH, NO_GPU)
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
