"""Training on tokens only: `transformers.Trainer` gives the losses and predictions of padded sdpa; dropout by row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from paired_models import PAD, VOCAB_SIZE, build_model, decoder_config, right_padded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, Trainer, TrainingArguments

import hf_flashinfer_attn
from hf_flashinfer_attn.integration.functions import attention_forward
from hf_flashinfer_attn.ragged.forward_state import cu_seqlens_of
from hf_flashinfer_attn.ragged.layout import RaggedLayout

STEPS, ROWS = 6, 4
TOLERANCE = 1e-5
_TOKENS = {f"{name}_token_id": index for index, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 32, "max_position_embeddings": 64,
}  # fmt: skip


def bert(dropout: float = 0.0) -> PreTrainedConfig:
    return transformers.BertConfig(
        **_SHAPE, pad_token_id=PAD, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )


def modernbert(dropout: float = 0.0) -> PreTrainedConfig:
    return transformers.ModernBertConfig(
        **_SHAPE, **_TOKENS, layer_types=["full_attention", "sliding_attention"], local_attention=6,
        attention_dropout=dropout, mlp_dropout=dropout, embedding_dropout=dropout, classifier_dropout=dropout,
    )  # fmt: skip


def qwen3(dropout: float = 0.0) -> PreTrainedConfig:
    return decoder_config(transformers.Qwen3Config, attention_dropout=dropout, use_cache=False)


FAMILIES = {"Bert": bert, "ModernBert": modernbert, "Qwen3": qwen3}


class Texts(Dataset[dict[str, Any]]):
    """Random tokens of many lengths; the label says whether most of them are of the vocabulary's upper half."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
        self.texts = [torch.randint(5, VOCAB_SIZE, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        text = self.texts[index]
        return {"input_ids": text, "labels": int((text >= VOCAB_SIZE // 2).float().mean() > 0.5)}


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    texts = [item["input_ids"] for item in items]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(texts, batch_first=True, padding_value=PAD),
        "attention_mask": pad([torch.ones_like(text) for text in texts], batch_first=True),
        "labels": torch.tensor([item["labels"] for item in items]),
    }


@dataclass(frozen=True)
class Run:
    """What is left of a training: the loss of every step, that of the evaluation, and what the model predicts."""

    losses: list[float]
    evaluation: float
    logits: Tensor


def shapes_in_attention(model: Any) -> list[tuple[int, ...]]:
    """Keeps the shapes of what attention layers project."""
    shapes: list[tuple[int, ...]] = []
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ("query", "q_proj", "Wqkv"):
            module.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape[:-1])))
    return shapes


def train(family: str, implementation: str, folder: Path, dropout: float = 0.0, **settings: Any) -> Run:
    """Fine-tunes a random classifier, evaluates it, and predicts in batches of many widths."""
    model_class = getattr(transformers, f"{family}ForSequenceClassification")
    model = build_model(model_class, FAMILIES[family](dropout), implementation)
    shapes = shapes_in_attention(model)
    if implementation == "flashinfer":
        hf_flashinfer_attn.unpad(model)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=ROWS, per_device_eval_batch_size=7,
        learning_rate=5e-3, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        seed=3, **settings,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, data_collator=collate, train_dataset=Texts(64, 0), eval_dataset=Texts(17, 1)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluation, predictions = trainer.evaluate()["eval_loss"], trainer.predict(Texts(17, 1)).predictions
    rows = {shape[0] for shape in shapes}
    assert rows == ({1} if implementation == "flashinfer" else {ROWS, 7, 17 % 7})
    return Run(losses, evaluation, torch.as_tensor(predictions))


CHECKPOINTS = [
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    for reentrant in (True, False)
]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *(pytest.param(family, {}, id=family) for family in FAMILIES),
        pytest.param("Qwen3", CHECKPOINTS[0], id="Qwen3-reentrant"),
        pytest.param("Bert", CHECKPOINTS[0], id="Bert-reentrant"),
        pytest.param("Bert", CHECKPOINTS[1], id="Bert-not-reentrant"),
        pytest.param("ModernBert", {"gradient_accumulation_steps": 3}, id="ModernBert-accumulated"),
    ],
)
def test_trains_as_padded_sdpa(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    expected, actual = (
        train(family, implementation, tmp_path, **settings) for implementation in ("sdpa", "flashinfer")
    )
    assert len(expected.losses) == STEPS
    # The weights move, and so does what is compared.
    assert max(expected.losses) - min(expected.losses) > 0.1
    assert actual.losses == pytest.approx(expected.losses, rel=0, abs=TOLERANCE)
    assert actual.evaluation == pytest.approx(expected.evaluation, rel=0, abs=TOLERANCE)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=TOLERANCE)


def test_trains_in_bfloat16(tmp_path: Path) -> None:
    expected = train("Bert", "sdpa", tmp_path)
    actual = train("Bert", "flashinfer", tmp_path, bf16=True)
    assert actual.losses == pytest.approx(expected.losses, rel=0, abs=3e-2)
    assert actual.losses != expected.losses


@pytest.mark.parametrize("family", ["Bert", "Qwen3"])
def test_trains_with_dropout(family: str, tmp_path: Path) -> None:
    """Other weights are dropped than by sdpa, on no other path: dense attention would cost all tokens squared."""
    with hf_flashinfer_attn.trace() as trace:
        trained = train(family, "flashinfer", tmp_path, dropout=0.2)
    assert trace.kernels == ("torch",)
    assert all(0 < loss < 5 for loss in trained.losses)


# --- dropout on packed tokens ---

LENGTHS = (9, 5, 7, 5, 3)
DROPOUT = 0.3


def config_with_attention_dropout(family: str, probability: float) -> PreTrainedConfig:
    """Drops attention weights, and nothing else."""
    config = FAMILIES[family]()
    setattr(config, "attention_probs_dropout_prob" if family == "Bert" else "attention_dropout", probability)
    return config


def unpadded(family: str, probability: float) -> Any:
    model_class = getattr(transformers, f"{family}Model")
    model = build_model(model_class, config_with_attention_dropout(family, probability), "flashinfer")
    return hf_flashinfer_attn.unpad(model.train())


def batch_of(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    tokens, mask = right_padded(lengths)
    return {"input_ids": tokens, "attention_mask": mask}


class LargestTensor(TorchDispatchMode):
    """Finds the most elements that any operator returns in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, DROPOUT])
def test_memory_does_not_grow_with_all_tokens_squared(family: str, dropout: float) -> None:
    model, batch = unpadded(family, dropout), batch_of((30, 9) * 40)
    tokens = int(batch["attention_mask"].sum())
    with LargestTensor() as largest, hf_flashinfer_attn.trace() as trace:
        model(**batch).last_hidden_state.square().mean().backward()
    assert trace.layouts == 1
    assert trace.kernels == ("torch",)
    # Hidden states of the widest kind, three projections in one or a gated layer's two, padded as they come and go.
    assert tokens * 32 <= largest.elements <= 3 * 32 * batch["input_ids"].numel()
    assert largest.elements < tokens**2 / 4


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_drops_the_same_again(family: str) -> None:
    batch, gradients = batch_of(LENGTHS), []
    for checkpoints in (None, True, False):
        model = unpadded(family, DROPOUT)
        if checkpoints is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpoints})
        torch.manual_seed(5)
        model(**batch).last_hidden_state.square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    assert gradients[0].norm() > 1e-2
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_keeps_the_mean_of_every_row(causal: bool) -> None:
    """Over many draws, packed rows average to what they are without dropout, and spread as dense attention does."""
    draws, heads = 2000, 2
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(LENGTHS), 8, generator=generator) for _ in range(3))
    layer = torch.nn.Module()
    offsets = cu_seqlens_of(RaggedLayout.from_lengths(LENGTHS))

    def attend(dropout: float) -> Tensor:
        output, _ = attention_forward(
            layer, query, key, value, None, dropout=dropout, is_causal=causal, cu_seq_lens_q=offsets,
            cu_seq_lens_k=offsets,
        )  # fmt: skip
        return output

    rows = torch.repeat_interleave(torch.tensor(LENGTHS))
    visible = rows[:, None] == rows
    visible = visible.tril() if causal else visible

    def attend_dense(dropout: float) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, visible, dropout_p=dropout).transpose(1, 2)

    torch.manual_seed(0)
    expected = attend(0.0)
    torch.testing.assert_close(expected, attend_dense(0.0))
    outputs, dense = (torch.stack([function(DROPOUT) for _ in range(draws)]) for function in (attend, attend_dense))
    error = (outputs.mean(0) - expected).abs() / (outputs.std(0) / draws**0.5)
    assert error.max() < 6
    torch.testing.assert_close(outputs.std(0), dense.std(0), rtol=0.15, atol=0)
    # Rows of one length are computed together, and drop weights of their own.
    starts = [sum(LENGTHS[:row]) for row in (1, 3)]
    deviations = [(outputs - expected)[:, 0, start : start + 5, 0, 0] for start in starts]
    correlation = torch.corrcoef(torch.cat([part.T for part in deviations]))[:5, 5:]
    assert correlation.abs().max() < 0.12


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_every_weight(family: str) -> None:
    """Values give nothing then, and neither queries, keys nor values learn anything."""
    model, batch = unpadded(family, 1.0), batch_of(LENGTHS)
    hidden = model(**batch).last_hidden_state
    hidden.square().mean().backward()
    assert hidden.isfinite().all()
    learned = {name: weight.grad.abs().max() for name, weight in model.named_parameters() if weight.grad is not None}
    projections = [
        name for name in learned if name.endswith(("query.weight", "value.weight", "v_proj.weight", "Wqkv.weight"))
    ]
    assert len(projections) >= 2
    assert all(learned[name] == 0 for name in projections)
    assert max(learned.values()) > 1e-3
