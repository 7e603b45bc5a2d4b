"""`unpad` of MPNet, whose attention and relative position bias are its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from paired_models import VOCAB_SIZE, build_model, left_padded, right_padded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MPNetConfig, MPNetModel
from transformers.models.mpnet import modeling_mpnet

import hf_flashinfer_attn
from hf_flashinfer_attn import UnsupportedAttentionError, repad, unpad
from hf_flashinfer_attn.ragged.forward_state import cu_seqlens_of
from hf_flashinfer_attn.ragged.layout import RaggedLayout
from hf_flashinfer_attn.unpadding import mpnet

LENGTHS = (9, 5, 7, 3)
TOLERANCE = 1e-5
LAYERS = 2
# Before it made its mask with transformers' helpers, a padded MPNet got none of ours.
HAS_OUR_MASK = "create_bidirectional_mask" in inspect.getsource(modeling_mpnet)


def build(implementation: str = "flashinfer") -> Any:
    config = MPNetConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=520, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return build_model(MPNetModel, config, implementation)


def batch_of(lengths: tuple[int, ...] = LENGTHS, pad: Callable[..., Any] = right_padded) -> dict[str, Tensor]:
    tokens, mask = pad(lengths)
    return {"input_ids": tokens, "attention_mask": mask}


def assert_right(model: Any, batch: dict[str, Tensor], *, is_packed: bool = True) -> None:
    widths: list[tuple[int, ...]] = []
    handle = model.encoder.layer[0].output.register_forward_hook(
        lambda module, args, output: widths.append(tuple(output.shape[:2]))
    )
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        actual = model(**batch).last_hidden_state[valid]
        expected = build("eager")(**batch).last_hidden_state[valid]
    handle.remove()
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * max(1.0, expected.abs().max().item()))
    assert widths == [(1, int(valid.sum())) if is_packed else tuple(valid.shape)]


@pytest.mark.parametrize("pad", [right_padded, left_padded])
def test_the_bias_of_rows_longer_than_its_buckets(pad: Callable[..., Any]) -> None:
    model = unpad(build())
    shapes: list[torch.Size] = []
    model.encoder.relative_attention_bias.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    assert_right(model, batch_of((300, 7, 140, 300), pad))
    assert [shape[:2] for shape in shapes] == [(300, 300)]


@pytest.mark.parametrize("length", [1, 2, 9, 63, 64, 65, 131, 300])
def test_the_bias_is_the_models_own_bit_by_bit(length: int) -> None:
    plain, model = build(), unpad(build())
    hidden = torch.zeros(3, length, 32)
    actual, expected = (encoder.compute_position_bias(hidden) for encoder in (model.encoder, plain.encoder))
    assert actual.shape == (1, *expected.shape[1:])
    assert torch.equal(actual.expand_as(expected), expected)
    positions = torch.randint(0, length, (3, length))
    actual, expected = (
        encoder.relative_position_bucket(positions[:, None] - positions[:, :, None])
        for encoder in (model.encoder, plain.encoder)
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("mask", "is_packed"),
    [
        (torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), True),
        (torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]]), False),
        (torch.ones(2, 4, dtype=torch.long), False),
        (torch.tensor([[1], [1], [0]]), True),
    ],
    ids=["padded", "holes", "full", "one-slot"],
)
def test_attention_is_ours(mask: Tensor, is_packed: bool) -> None:
    batch = {"input_ids": torch.arange(5, 5 + mask.numel()).view(mask.shape), "attention_mask": mask}
    model = unpad(build())
    with hf_flashinfer_attn.trace() as trace, torch.no_grad():
        model(**batch)
    assert [call.kernel for call in trace.calls] == ["torch"] * (LAYERS if is_packed or HAS_OUR_MASK else 0)
    assert_right(model, batch, is_packed=is_packed)


@pytest.mark.parametrize("inner_is_padded", [True, False])
@pytest.mark.parametrize("inner_fails", [None, "before it packs", "after it packed"])
def test_a_forward_inside_another_one(inner_is_padded: bool, inner_fails: str | None) -> None:
    """A hook on embeddings may run another model, such as a teacher, or the same one again."""
    model = unpad(build())
    outer, inner = batch_of(), batch_of((4, 2) if inner_is_padded else (4, 4))
    results: list[Any] = []

    def fail(*args: Any) -> None:
        raise InterruptedError

    def run_inner(*args: Any) -> None:
        if results:
            return
        results.append(None)
        if inner_fails is None:
            results[0] = model(**inner).last_hidden_state
            return
        failing = model.register_forward_pre_hook(fail, prepend=inner_fails == "before it packs")
        with pytest.raises(InterruptedError):
            model(**inner)
        failing.remove()

    model.embeddings.register_forward_hook(run_inner)
    with torch.no_grad():
        results.append(model(**outer).last_hidden_state)
        for batch, actual in zip((inner, outer), results, strict=True):
            valid = batch["attention_mask"].bool()
            if actual is not None:
                expected = build("eager")(**batch).last_hidden_state[valid]
                tolerance = TOLERANCE * expected.abs().max().item()
                torch.testing.assert_close(actual[valid], expected, rtol=0, atol=tolerance)
    assert not mpnet._entered.get()


def hook(model: nn.Module) -> None:
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def unhook(model: nn.Module) -> None:
    for module in model.modules():
        remove_hook_from_module(module)


@pytest.mark.parametrize(
    "steps",
    [(hook, unpad), (unpad, hook), (hook, unhook, unpad), (hook, unpad, unhook), (unpad, hook, unhook)],
    ids=lambda steps: "-".join(step.__name__ for step in steps),
)
def test_hooks_of_accelerate(steps: tuple[Callable[[Any], Any], ...]) -> None:
    """They keep the forward of a module's first class, around hooks and after them."""
    model = build()
    for step in steps:
        step(model)
    assert_right(model, batch_of())
    repad(model)
    assert_right(model, batch_of(), is_packed=False)
    for layer in model.encoder.layer:
        attention = layer.attention.attn
        assert type(attention) is modeling_mpnet.MPNetSelfAttention
        kept = vars(attention).get("_old_forward", vars(attention).get("forward"))
        assert kept == MethodType(modeling_mpnet.MPNetSelfAttention.forward, attention)


def test_layers_that_are_computed_again() -> None:
    gradients = []
    for is_checkpointed in (False, True):
        model = unpad(build())
        if is_checkpointed:
            for layer in model.encoder.layer:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        model(**batch_of()).last_hidden_state.square().sum().backward()
        gradients.append([weight.grad for weight in model.encoder.parameters()])
    for actual, expected in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * max(1.0, expected.abs().max().item()))


def test_an_error_in_a_forward_leaves_nothing_behind() -> None:
    model, batch = unpad(build()), batch_of()
    handle = model.encoder.layer[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    handle.remove()
    assert not mpnet._entered.get()
    assert_right(model, batch)
    assert not mpnet._entered.get()


def test_packed_input_of_the_user() -> None:
    model, plain = unpad(build()), build("eager")
    ids = torch.randint(5, VOCAB_SIZE, (1, 7), generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    with torch.no_grad():
        actual = model(ids, position_ids=torch.tensor([[2, 3, 4, 2, 3, 4, 5]]), cu_seq_lens_q=offsets)
        expected = [plain(part).last_hidden_state for part in (ids[:, :3], ids[:, 3:])]
    torch.testing.assert_close(actual.last_hidden_state, torch.cat(expected, 1), rtol=0, atol=TOLERANCE)


def test_weights_are_the_models_own() -> None:
    model, plain, batch = unpad(build()), build("eager"), batch_of()
    with torch.no_grad():
        actual = model(**batch, output_attentions=True).attentions
        expected = plain(**batch, output_attentions=True).attentions
    assert len(actual) == LAYERS
    valid = batch["attention_mask"].bool()[:, None, :, None].expand_as(expected[0])
    torch.testing.assert_close(actual[1][valid], expected[1][valid], rtol=0, atol=TOLERANCE)


def replace_forward(model: Any) -> None:
    attention = model.encoder.layer[1].attention.attn
    attention.forward = functools.partial(attention.forward)


def replace_attention(model: Any) -> None:
    class Mine(modeling_mpnet.MPNetSelfAttention):
        pass

    model.encoder.layer[1].attention.attn.__class__ = Mine


def replace_encoder(model: Any) -> None:
    class Mine(modeling_mpnet.MPNetEncoder):
        pass

    model.encoder.__class__ = Mine


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_forward, "the forward of its attention was replaced"),
        (replace_attention, "its attention is a Mine"),
        (replace_encoder, "its encoder is a Mine"),
    ],
)
def test_attention_of_the_users_is_left_alone(change: Callable[[Any], None], reason: str) -> None:
    model = build()
    change(model)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedAttentionError, match=f"unpad for MPNetModel: {reason}"):
        unpad(model)
    assert [type(module) for module in model.modules()] == classes
    assert_right(model, batch_of(), is_packed=False)


def test_another_version_of_its_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr(modeling_mpnet.MPNetSelfAttention, "forward", lambda self, hidden_states, mask: hidden_states)
    with pytest.raises(UnsupportedAttentionError, match="in another way in this version of transformers"):
        unpad(model)


def test_the_bias_of_lengths_that_change_is_refused() -> None:
    encoder = unpad(build()).encoder
    offsets = cu_seqlens_of(RaggedLayout.for_graph([2, 3], rows=8, tokens=5, workspace=object()))
    mpnet.enter(offsets)
    try:
        with pytest.raises(UnsupportedAttentionError, match=r"a relative position bias.* in a captured graph"):
            encoder.compute_position_bias(torch.zeros(1, 5, 32))
    finally:
        mpnet.leave(offsets)
