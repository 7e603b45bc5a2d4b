"""The benchmark on tiny models: what it runs, what it checks before it times, and what it writes."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import make_tables
from hf_flashinfer_attn.kernels import torch_ragged as reference
from hf_flashinfer_attn.ragged.layout import RaggedLayout
from hf_flashinfer_attn.tools import bench, cli
from hf_flashinfer_attn.tools.bench import contenders, floors, measure, verify, workload
from hf_flashinfer_attn.tools.bench.contenders import CONTENDERS, twin
from hf_flashinfer_attn.tools.bench.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
WORDS = ["attention", "padding", "a", "short", "text", "batch", "of", "tokens", "row", "long"]
TINY = BertConfig(
    vocab_size=5 + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=40, initializer_range=0.2,
)  # fmt: skip
GTE = ["--shape", "gte-small"]
SMALL = ["--layers", "1", "--device", "cpu", "--requests", "8", "--batch-size", "4"]
Command = Callable[..., tuple[dict[str, Any], str, str]]


@pytest.fixture(autouse=True)
def _quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine reaches is not under test, and takes most of a second to measure."""
    monkeypatch.setattr(measure, "measure_rates", functools.partial(floors.measure_rates, seconds=0.01))


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `bench`, and returns the figures, stdout and stderr."""

    def run(*arguments: object, status: int = 0) -> tuple[dict[str, Any], str, str]:
        file = tmp_path / "out.json"
        assert cli.main(["bench", *map(str, arguments), "--json", str(file)]) == status
        return json.loads(file.read_text()), *capsys.readouterr()

    return run


def small_plan(lengths: str = "4+9", **changes: Any) -> bench.Plan:
    sets = tuple(map(workload.parse_request_set, lengths.split(",")))
    small = {"shapes": ("gte-small",), "layers": 1, "request_sets": sets, "requests": 8, "device": "cpu", "repeats": 1}
    return bench.Plan(**(small | changes))


def small_cell(lengths: str = "4+9", **changes: Any) -> bench.Cell:
    (cell,) = bench.run_bench(small_plan(lengths, **changes)).cells
    return cell


def changed(monkeypatch: pytest.MonkeyPatch, like: str, **changes: Any) -> None:
    """Puts a contender like another one, but for some changes, in place of it or under another name."""
    contender = dataclasses.replace(CONTENDERS[like], **changes)
    monkeypatch.setitem(CONTENDERS, contender.name, contender)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    BertModel(TINY).save_pretrained(folder)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = {word: at for at, word in enumerate([*special.values(), "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    rows = [" ".join(WORDS[(row + at) % len(WORDS)] for at in range(1 + row * 7 % 60)) for row in range(13)]
    file.write_text("\n\n".join(rows) + "\n")
    return file


def shape_model(shape: str, layers: int = 3) -> PreTrainedModel:
    narrow: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    if shape == "roberta":
        config = AutoConfig.for_model("roberta", num_hidden_layers=layers, **narrow)
    else:
        config = workload.shape_config(shape, layers)
        if hasattr(config, "head_dim"):
            narrow |= {"head_dim": 32, "num_key_value_heads": 1}
        config = type(config)(**{**config.to_dict(), **narrow})
    return AutoModel.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize(
    ("name", "requests", "padding"),
    [("chat", 10_000, 0.81), ("bulk", 10_000, 0.84), ("sorted", 10_000, 0.08), ("single", 2_000, 0.64),
     ("uniform", 2_500, 0.50), ("full", 1_280, 0.0), ("long", 160, 0.46)],
)  # fmt: skip
def test_named_request_sets(name: str, requests: int, padding: float) -> None:
    chosen = workload.REQUEST_SETS[name]
    lengths = chosen.lengths()
    assert len(lengths) == requests
    assert max(lengths) <= chosen.longest
    batches = [lengths[start : start + chosen.batch_size] for start in range(0, requests, chosen.batch_size)]
    positions = sum(max(rows) * len(rows) for rows in batches)
    assert 1 - sum(lengths) / positions == pytest.approx(padding, abs=0.01)
    assert chosen.lengths(20) == (lengths[:20] if name != "sorted" else sorted(chosen.lengths(20), reverse=True))


@pytest.mark.parametrize("text", ["chats", "0", "16+", "1.5", "uniform:9:4", "uniform:4", "normal:1:4", "uniform:0:4"])
def test_no_request_set(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no request set; expected one of \['chat'"):
        workload.parse_request_set(text)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    {
        "gte-small": (12, 384, 12, 1536),
        "bge-base": (12, 768, 12, 3072),
        "bge-large": (24, 1024, 16, 4096),
        "reranker-base": (12, 768, 12, 3072),
        "modernbert-base": (22, 768, 12, 1152),
        "qwen3-embedding": (28, 1024, 16, 3072),
    }.items(),
)
def test_shapes(shape: str, sizes: tuple[int, ...]) -> None:
    config = workload.shape_config(shape)
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    assert tuple(getattr(config, name) for name in names) == (*sizes, 30_522)
    assert workload.shape_config(shape, 3).num_hidden_layers == 3


def test_batches_hold_the_lengths_and_no_padding_inside() -> None:
    lengths = [3, 7, 1, 5, 2]
    batches = workload.synthetic_batches(lengths, 2, TINY, CPU)
    assert [length for batch in batches for length in batch.lengths] == lengths
    assert [tuple(batch.padding.shape) for batch in batches] == [(2, 7, 1), (2, 5, 1), (1, 2, 1)]
    for batch in batches:
        assert torch.equal(batch.inputs["input_ids"] == TINY.pad_token_id, batch.padding[:, :, 0])
        assert torch.equal(batch.inputs["attention_mask"] == 0, batch.padding[:, :, 0])


@pytest.mark.parametrize("band", [(None, None), (None, 0), (3, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("length", [1, 2, 7, 20])
def test_pairs_of_a_band(length: int, band: tuple[int | None, int | None]) -> None:
    left, right = (length if side is None else side for side in band)
    distance = torch.arange(length) - torch.arange(length)[:, None]
    assert floors.count_pairs(length, *band) == int(((distance >= -left) & (distance <= right)).sum())


def test_work_of_bert() -> None:
    model = BertModel(TINY)
    lengths = [3, 7, 1]
    work = floors.count_work(model, workload.synthetic_batches(lengths, 2, TINY, CPU))
    embedding_norm = 2 * 32
    layer = 4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 4 * 32
    weights = embedding_norm + 2 * layer
    assert work == (2 * weights * 11 + 4 * 32 * (9 + 49 + 1) * 2, 2 * 4 * weights + 11 * 32 * 4)
    assert floors.MachineRates(work[0] / 2, work[1] / 3).floor_seconds(*work) == pytest.approx(3)


def test_windows_and_causality_count() -> None:
    assert floors.bands_of(shape_model("modernbert-base").config, 3, False) == [(None, None), (64, 64), (64, 64)]
    assert floors.bands_of(shape_model("qwen3-embedding").config, 3, True) == [(None, 0)] * 3


def test_twin_shares_weights_and_wider_one_does_not() -> None:
    model = shape_model("modernbert-base").half()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    same, wide = twin(model, "flashinfer"), twin(model, "eager", torch.float32)
    assert (same.config._attn_implementation, wide.config._attn_implementation) == ("flashinfer", "eager")
    for name, parameter in model.named_parameters():
        assert same.get_parameter(name) is parameter
        assert wide.get_parameter(name).dtype == torch.float32
        assert torch.equal(parameter, before[name])
        assert torch.equal(wide.get_parameter(name), before[name].float())


def test_pooling_ignores_padding() -> None:
    batch = workload.synthetic_batches([3, 5], 2, TINY, CPU)[0]
    hidden = torch.randn(2, 5, 4)
    hidden[0, 3:] = float("nan")
    expected = torch.stack([hidden[0, :3].mean(0), hidden[1].mean(0)])
    torch.testing.assert_close(contenders.pool_padded(hidden, batch), expected)


def varlen_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    assert int(cu_seq_q.diff().max()) == max_q
    assert enable_gqa == (query.shape[1] != key.shape[1])
    layout = RaggedLayout.from_cu_seqlens(cu_seq_q, cu_seq_k, (1, len(query)), (1, len(key)))
    left, right = (None if side < 0 else side for side in window_size)
    return reference.attend(query, key, value, layout, left=left, right=right, sm_scale=scale)


@pytest.mark.parametrize("shape", ["bge-base", "modernbert-base", "qwen3-embedding", "roberta"])
def test_packed_input_gives_the_padded_numbers(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", varlen_stand_in)
    model = shape_model(shape)
    batch = workload.synthetic_batches([30, 200, 1, 77], 4, model.config, CPU)[0]
    pooled = []
    for contender in (CONTENDERS["sdpa"], CONTENDERS["varlen"]):
        prepared = contender.prepare_batch(batch, model)
        with torch.no_grad():
            pooled.append(contender.pool(contender.run(contender.prepare_model(model), prepared), prepared))
    torch.testing.assert_close(*pooled, rtol=1e-4, atol=1e-5)


def test_model_and_texts(model_folder: Path, texts_file: Path, tmp_path: Path, command: Command) -> None:
    pytest.importorskip("matplotlib")
    chart = tmp_path / "out.png"
    figures, out, err = command(
        "--model", model_folder, "--texts", texts_file, "--batch-size", 4, "--device", "cpu", "--against", "eager",
        "--repeats", 2, "--plot", chart,
    )  # fmt: skip
    assert chart.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "13 requests in batches of 4" in out
    assert out.endswith(bench.COLUMNS_EXPLAINED + "\n\n")
    assert "{" not in out
    assert max(map(len, [*out.splitlines(), *err.splitlines()])) <= 100
    assert str(model_folder.parent) not in err
    assert "warm-up and check" in err
    assert figures["passed"] is True
    keys = ["format", "environment", "device", "dtype", "repeats", "rates", "passed", "cells", "skipped"]
    assert sorted(figures) == sorted(keys)
    assert (figures["device"], figures["dtype"], figures["environment"]["gpu"]) == ("cpu", "float32", None)
    assert min(figures["rates"].values()) > 0
    (cell,) = figures["cells"]
    assert set(cell) == {field.name for field in dataclasses.fields(bench.Cell)}
    # Tokens of each text with [CLS] and [SEP], cut at the 40 positions that the model has.
    assert cell["tokens"] == sum(min(1 + row * 7 % 60 + 2, 40) for row in range(13))
    assert (cell["lengths"], cell["requests"], cell["batches"], cell["layers"]) == ("texts", 13, 4, 2)
    assert 0 < cell["padded_fraction"] < 1
    assert [outcome["name"] for outcome in cell["contenders"]] == ["sdpa", "eager", "flashinfer", "unpad"]
    for outcome in cell["contenders"]:
        assert set(outcome) == {field.name for field in dataclasses.fields(bench.Outcome)}
        assert (outcome["status"], outcome["verified"], outcome["reason"]) == ("measured", True, None)
        assert outcome["best_seconds"] == min(outcome["passes_seconds"]) > 0
        assert len(outcome["passes_seconds"]) == 2
        assert outcome["tokens_per_second"] == pytest.approx(cell["tokens"] / outcome["best_seconds"])
        assert 0 < outcome["error"] < 1e-5
        assert outcome["peak_memory_bytes"] is None
    assert cell["contenders"][0]["speedup_over_sdpa"] == 1
    assert cell["contenders"][2]["kernels"] == ["torch"]


def test_sorted_texts_have_less_padding(model_folder: Path, texts_file: Path) -> None:
    texts = tuple(line for line in texts_file.read_text().splitlines() if line)
    plan = small_plan(shapes=(), layers=None, request_sets=(), requests=None, model=str(model_folder), texts=texts)
    plans = [dataclasses.replace(plan, batch_size=4, sort=sort) for sort in (False, True)]
    unsorted, ordered = (bench.run_bench(plan).cells[0] for plan in plans)
    assert unsorted.tokens == ordered.tokens
    assert ordered.padded_fraction < unsorted.padded_fraction


def test_named_shapes(command: Command) -> None:
    # transformers 5.5 makes no ModernBERT without a local layer.
    figures, _, _ = command(
        "--shape", "gte-small,modernbert-base", "--shape", "qwen3-embedding", "--lengths", "4+20,uniform:3:9",
        *SMALL, "--layers", 2, "--requests", 4,
    )  # fmt: skip
    expected = itertools.product(("gte-small", "modernbert-base", "qwen3-embedding"), ("4+20", "uniform:3:9"))
    assert [(cell["shape"], cell["lengths"]) for cell in figures["cells"]] == list(expected)
    assert {cell["layers"] for cell in figures["cells"]} == {2}
    assert {outcome["status"] for cell in figures["cells"] for outcome in cell["contenders"]} == {"measured"}


def test_what_a_model_is_too_short_for_is_skipped(command: Command) -> None:
    figures, _, err = command(*GTE, "--lengths", "4,513", *SMALL)
    reason = "513 has requests of 513 tokens, gte-small takes 512"
    assert f"skipped: {reason}\n" in err
    assert figures["skipped"] == [reason]
    assert [cell["lengths"] for cell in figures["cells"]] == ["4"]


WRONG_OUTPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "no-mask": ({"run": lambda model, batch: model(batch.inputs["input_ids"]).last_hidden_state}, "where sdpa"),
    "rows-swapped": ({"pool": lambda *given: contenders.pool_padded(*given)[[*range(14), 15, 14]]}, "where sdpa"),
    "nan": ({"pool": lambda *given: contenders.pool_padded(*given).log()}, "not finite"),
    "bfloat16": ({"prepare_model": lambda model: twin(model, "sdpa").bfloat16()}, "expected at most"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_OUTPUTS.values(), ids=WRONG_OUTPUTS)
def test_wrong_outputs_are_not_timed(
    changes: dict[str, Any], message: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(monkeypatch, "eager", name="wrong", ours=True, **changes)
    larger = ["--requests", 64, "--batch-size", 16]
    figures, out, _ = command(*GTE, "--lengths", "30+4+9+17", *SMALL, *larger, status=1)
    assert re.search(rf"  wrong +wrong: .*{message}", " ".join(out.split("\n")))
    assert figures["passed"] is False
    outcomes = {outcome["name"]: outcome for outcome in figures["cells"][0]["contenders"]}
    assert (outcomes["wrong"]["status"], outcomes["wrong"]["best_seconds"]) == ("wrong", None)
    assert outcomes["flashinfer"]["best_seconds"] > 0


# Outside of the sample are the other requests, or one of them.
SPOILT: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "right": (lambda output: output, "None"),
    "sample": (lambda output: output * 1.003, "error 3"),
    "others": (lambda output: torch.cat([output[:50], output[50:] * 1.003]), "from sdpa over all requests"),
    "one": (lambda output: torch.cat([output[:-1], output[-1:] * 1.02]), "request 399 is"),
}


@pytest.mark.parametrize(("spoil", "reason"), SPOILT.values(), ids=SPOILT)
def test_judgement(spoil: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(400, 64, generator=generator, dtype=torch.float64)
    sdpa, output = (exact * (1 + 1e-3 * torch.randn(exact.shape, generator=generator)) for _ in range(2))
    sample = torch.arange(0, 50, 2)
    judged = verify.Reference("", sample, exact[sample], sdpa[sample])
    verdict = verify.judge(spoil(output), sdpa, judged, torch.float16)
    assert verdict.sdpa_error == pytest.approx(1e-3, rel=0.1)
    assert reason in str(verdict.reason)


def test_logits_next_to_zero_are_judged_beside_those_of_other_requests() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(4_000, 1, generator=generator, dtype=torch.float64)
    exact[7] = 1e-5
    sdpa, output = (exact + 1e-3 * torch.randn(exact.shape, generator=generator) for _ in range(2))
    sample = torch.arange(1, 4_000, 2)
    judged = verify.Reference("", sample, exact[sample], sdpa[sample])
    assert verify.judge(output, sdpa, judged, torch.float16).reason is None
    output[8] += 0.06
    assert "request 8 is" in str(verify.judge(output, sdpa, judged, torch.float16).reason)


FAILURES = {
    "memory": (torch.OutOfMemoryError("CUDA out of memory"), "out of memory", True),
    "failure": (RuntimeError("no kernel\nfor this"), "failed", False),
}


@pytest.mark.parametrize(("error", "status", "passed"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_failure_is_a_value(
    name: str, error: Exception, status: str, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(monkeypatch, name, run=Mock(side_effect=error))
    cell = small_cell(against=("eager",))
    assert cell.passed is passed
    outcomes = {outcome.name: outcome for outcome in cell.contenders}
    assert (outcomes[name].status, outcomes[name].best_seconds, outcomes[name].verified) == (status, None, None)
    assert outcomes["flashinfer"].verified
    assert (outcomes["flashinfer"].speedup_over_sdpa is None) == (name == "sdpa")
    assert status in bench.format_cell(cell)


def test_compiled_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without inductor, which takes half a minute on a CPU.
    changed(monkeypatch, "compile", prepare_model=functools.partial(contenders.compiled, backend="eager"))
    assert small_cell(batch_size=3, against=("compile",)).contenders[1].status == "measured"


def test_soft_budget_ends_after_a_whole_round() -> None:
    cell = small_cell("4", requests=4, repeats=5, seconds=1e-9)
    assert [len(outcome.passes_seconds) for outcome in cell.contenders] == [1, 1, 1]


def test_fallbacks_are_told() -> None:
    outcome = bench.Outcome("flashinfer", True, "failed", "no kernel", fallbacks=("position_bias",))
    cell = bench.Cell("t5", "4", 1, 1, 1, 1, 4, 0.0, None, None, None, "", None, (outcome,))
    assert bench.format_cell(cell).splitlines()[2:] == [
        "  flashinfer  failed: no kernel",
        "  flashinfer fell back: position_bias",
    ]
    assert "flashinfer fell back: position_bias" in bench.format_html(cell)


@pytest.mark.parametrize("rate", [1.0, 1e15], ids=["too-slow", "fast"])
def test_a_floor_that_was_beaten_is_none(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_rates", lambda device, dtype: floors.MachineRates(rate, 1e15))
    cell = small_cell("4", requests=4)
    best = cell.contenders[0]
    if rate == 1.0:
        assert (cell.floor_seconds, best.floor_fraction) == (None, None)
        assert "no floor" in bench.format_cell(cell)
    else:
        assert cell.floor_seconds == cell.flops / rate
        assert best.floor_fraction == cell.floor_seconds / best.best_seconds


NOT_MEASURED = {
    "texts": ([*GTE, "--texts", "{texts}"], "texts go with a model of yours"),
    "no-folder": (["--model", "{texts}/none"], "there is no folder"),
    "no-config": (["--model", "{folder}"], "cannot be read"),
    "layers": (["--model", "x", "--layers", "1"], "layers are for named shapes"),
    "sort": ([*GTE, "--sort"], "sorting and cutting are for texts"),
    "max-length": ([*GTE, "--max-length", "9"], "sorting and cutting are for texts"),
    "too-long": (
        [*GTE, "--layers", "1", "--lengths", "long"],
        "nothing was measured: long has requests of 8192 tokens",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), NOT_MEASURED.values(), ids=NOT_MEASURED)
def test_what_cannot_be_measured(
    arguments: list[str], message: str, texts_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(texts=texts_file, folder=texts_file.parent) for argument in arguments]
    assert cli.main(["bench", "--device", "cpu", *filled]) == 1
    assert message in capsys.readouterr().err


def test_what_cannot_run_here_is_a_line_of_the_table(command: Command) -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    figures, out, _ = command(*GTE, "--lengths", "4+9", *SMALL, "--against", "varlen", "--ours", "unpad,graphs")
    assert re.search(r"^  varlen +unsupported: torch's varlen_attn runs on CUDA only, not on cpu$", out, re.MULTILINE)
    assert re.search(r"^  graphs +unsupported: CUDA graphs need a GPU, not cpu$", out, re.MULTILINE)
    statuses = {outcome["name"]: outcome["status"] for outcome in figures["cells"][0]["contenders"]}
    assert statuses == {"sdpa": "measured", "varlen": "unsupported", "unpad": "measured", "graphs": "unsupported"}


def test_table_is_no_wider_than_100_columns() -> None:
    measured = bench.Outcome(
        "compiled_graphs_host", True, "measured", None, True, 1.234e-3, 1e-3, (0.0123,) * 3, 0.0123, 0.0123, 1.0,
        12_345_678.0, 12.34, 1.0, 123 << 30,
    )  # fmt: skip
    reason = "RuntimeError: " + "a long message " * 20
    outcomes = (measured, bench.Outcome("sdpa", False, "failed", reason, fallbacks=(reason,)))
    cell = bench.Cell(
        "/a/folder/" + "long-name" * 5, "chat", 1, 64, 10_000, 157, 812_345, 0.81, 1, 1, None, "", None, outcomes
    )
    shown = bench.format_cell(cell)
    assert max(map(len, shown.splitlines())) <= 100
    assert max(map(len, bench.COLUMNS_EXPLAINED.splitlines())) <= 100
    assert " ".join(reason.split()) in " ".join(shown.split())
    header = next(line for line in shown.splitlines() if "vs sdpa" in line)
    explained = [line[:12].strip() for line in bench.COLUMNS_EXPLAINED.splitlines()]
    assert re.split(r" {2,}", header.strip()) == [name for names in explained for name in names.split(", ")]


def test_steps_tell_how_far_they_are() -> None:
    steps: dict[str, list[str]] = {}
    plan = small_plan(batch_size=3, ours=("unpad",), repeats=2)
    bench.run_bench(plan, on_step=lambda step, detail: steps.setdefault(step, []).append(detail))
    assert steps["gte-small, 4+9: reference"][0] == "request 1 of 4"
    assert steps["gte-small, 4+9: unpad, warm-up and check"] == [f"batch {at} of 3" for at in (1, 2, 3)]
    passes = itertools.product((1, 2), ("sdpa", "unpad"), (1, 2, 3))
    timed = [f"{name}, pass {turn} of 2, batch {at} of 3" for turn, name, at in passes]
    assert steps["gte-small, 4+9: timing"] == timed


def test_names_on_the_command_line_are_those_of_the_benchmark() -> None:
    assert list(workload.SHAPES) == [*cli._SHAPES]
    assert list(workload.REQUEST_SETS) == [*cli._REQUEST_SETS]
    assert {*cli._OURS, *cli._RIVALS} == set(CONTENDERS)
    assert {name for name in cli._OURS if CONTENDERS[name].ours} == set(cli._OURS)


def test_names_that_the_benchmark_does_not_know() -> None:
    with pytest.raises(bench.BenchError, match="'bert-huge' is no shape"):
        bench.run_bench(small_plan(shapes=("bert-huge",)))
    with pytest.raises(bench.BenchError, match="'flash' is no contender"):
        bench.run_bench(small_plan(against=("flash",)))


WRONG_USAGE = {
    "nothing": ([], "one of the arguments --model --shape is required"),
    "shape": (["--shape", "bert-huge"], "'bert-huge' is not known; expected some of gte-small,bge-base"),
    "contender": ([*GTE, "--against", "sdpa,flash"], "'flash' is not known; expected some of sdpa,eager"),
    "no-names": ([*GTE, "--ours"], "no name given; expected some of flashinfer,unpad"),
    "empty-names": ([*GTE, "--ours", ""], "no name given; expected some of flashinfer,unpad"),
    "plot": ([*GTE, "--plot", "out.foo"], "'out.foo' does not end in .png"),
    "both": ([*GTE, "--model", "x"], "not allowed with"),
    "lengths": ([*GTE, "--lengths", "chats"], "'chats' is no request set"),
    "texts": (["--model", "x", "--texts", "no/such/file"], "cannot be read"),
    "latin": (["--model", "x", "--texts", "{latin}"], "cannot be read: it is not UTF-8"),
    "json": ([*GTE, "--json", "no/such/folder/x.json"], "existing folder"),
    "unwritable": ([*GTE, "--json", "/proc/x.json"], "cannot be written"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_USAGE.values(), ids=WRONG_USAGE)
def test_wrong_usage(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("f\u00fcr".encode("latin-1"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", *(argument.format(latin=latin) for argument in arguments)])
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_missing_matplotlib_is_known_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # None in sys.modules is how Python itself says that a module cannot be imported.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", "--shape", "gte-small", "--plot", str(tmp_path / "x.png")]) == 1
    error = capsys.readouterr().err
    assert "pip install matplotlib" in error
    assert "loading" not in error


@pytest.mark.parametrize("bar", [True, False])
def test_progress(bar: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(bar) as progress:
        progress.step("loading")
        progress.step("timing", "batch 1 of 3")
        progress.step("timing", "batch 2 of 3")
        monkeypatch.setattr(progress, "_shown", 0.0)
        progress.step("timing", "batch 3 of 3")
        progress.print("a table")
    captured = capsys.readouterr()
    assert captured.out == "a table\n"
    assert all(shown in captured.err for shown in ("loading", "timing, batch 1 of 3", "timing, batch 3 of 3"))
    assert "batch 2" not in captured.err
    assert ("\r" in captured.err) == bar


def test_readme_has_the_results() -> None:
    grouped = make_tables.machines()
    found = make_tables.BLOCK.findall((ROOT / "README.md").read_text())
    assert found == [make_tables.block(grouped)]
    for machine, reports in grouped.items():
        assert make_tables.digest(reports).encode() in make_tables.chart_file(machine).read_bytes()


def test_readme_commands_are_understood() -> None:
    commands = re.findall(r"^python -m hf_flashinfer_attn (bench .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        arguments = command.replace("FILE.txt", str(ROOT / "README.md")).split()
        assert isinstance(cli._parser().parse_args(arguments), argparse.Namespace)


def test_tables_of_two_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first = bench.report_figures(bench.run_bench(small_plan("4+8,5", requests=4)))
    second = json.loads(json.dumps(first))
    second["environment"]["date_utc"] = "9999-01-01T00:00:00+00:00"
    second["cells"][0]["shape"] = "bge-base"
    second["cells"][1]["padded_fraction"] = 0.123
    for name, figures in (("bench_b.json", first), ("bench_a.json", second)):
        (tmp_path / name).write_text(json.dumps(figures))
    assert make_tables.block(make_tables.machines(tmp_path / "empty")) == "No results yet.\n"
    ((machine, reports),) = make_tables.machines(tmp_path).items()
    assert machine.endswith(", float32")
    table = make_tables.block({machine: reports})
    assert "| requests | gte-small | bge-base |" in table
    assert table.count("\n| 4+8: 4 in batches of 64, 25% padding |") == 1
    # The later run of a cell replaces the earlier one.
    assert table.count("\n| 5: 4 in batches of 64,") == 1
    assert "12% padding" in table
    sdpa, *others = first["cells"][0]["contenders"]
    ratios = ", ".join(f"{one['speedup_over_sdpa']:.2f}x" for one in others)
    assert f"| {sdpa['best_seconds']:.3g} s, {ratios}" in table
    chart = tmp_path / "chart.png"
    bench.draw_chart(reports, chart, description=make_tables.digest(reports))
    assert make_tables.digest(reports).encode() in chart.read_bytes()


def test_no_report(tmp_path: Path) -> None:
    file = tmp_path / "bench_x.json"
    file.write_text("[]")
    with pytest.raises(bench.BenchError, match=r"is no report of hf_flashinfer_attn\.bench/1"):
        bench.load_reports([file])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["gte-small", "modernbert-base", "qwen3-embedding"])
def test_every_contender_on_a_gpu(shape: str) -> None:
    rivals = tuple(name for name, contender in CONTENDERS.items() if not contender.ours)
    cell = small_cell("chat", shapes=(shape,), layers=4, requests=256, against=rivals, device="auto")
    assert {outcome.name: outcome.reason for outcome in cell.contenders if outcome.reason} == {}
    assert all(outcome.peak_memory_bytes > 0 for outcome in cell.contenders)
