"""The programs in `examples/` in processes of their own, with a tiny model, and killed in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from transformers import AutoModel, AutoTokenizer, BertConfig

import hf_flashinfer_attn
import plan as plans
from embedding import PartEmbedder, embed_parts
from plan import Gatherer, Options, Plan
from random_model import random_texts, save_random_model

ROOT = Path(__file__).resolve().parents[1]
MAX_LENGTH, ROWS = 64, 3_000
# Above rounding of float32, far below what a wrong row would give.
TOLERANCE = 2e-6
LARGE = {"part_megabytes": 1.0, "tokens_per_batch": 4_096}


@dataclass(frozen=True)
class Corpus:
    """A model, an input of two files, and what embeddings of its texts are by transformers' eager attention."""

    model: Path
    input: Path
    texts: list[str]
    expected: np.ndarray

    def options(self, **changes: Any) -> Options:
        own = {"pooling": "mean", "tokens_per_batch": 512, "part_megabytes": 0.01}
        return replace(Options(str(self.model), str(self.input), keep=("id",), **own), **changes)

    def plan(self, output: Path, **changes: Any) -> Plan:
        plan = Plan.make(self.options(**changes), output)
        assert plan is not None
        return plan

    def arguments(self, output: Path) -> list[str]:
        paths = ["--model", self.model, "--input", self.input, "--output", output, "--report", report_of(output)]
        options = ["--keep", "id", "--pooling", "mean", "--tokens-per-batch", "512", "--part-megabytes", "0.01"]
        return [*map(str, paths), *options]


def report_of(output: Path) -> Path:
    return output.with_suffix(".json")


def folder_of(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


def tiny_config() -> BertConfig:
    return BertConfig(
        vocab_size=400, hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        max_position_embeddings=MAX_LENGTH, initializer_range=0.2,
    )  # fmt: skip


@torch.no_grad()
def embed_directly(model: Path, texts: list[str], pooling: str = "mean", max_length: int = MAX_LENGTH) -> np.ndarray:
    network = AutoModel.from_pretrained(model, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for start in range(0, len(texts), 100):
        some = texts[start : start + 100]
        batch = tokenizer(some, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        hidden, valid = network(**batch).last_hidden_state, batch["attention_mask"]
        weights = valid[:, :, None] / valid.sum(1)[:, None, None]
        last = valid.sum(1) - 1
        pooled = {"mean": (hidden * weights).sum(1), "cls": hidden[:, 0], "last": hidden[range(len(last)), last]}
        found.append(torch.nn.functional.normalize(pooled[pooling], dim=-1))
    return torch.cat(found).numpy()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    save_random_model(folder / "model", tiny_config())
    lengths = np.random.default_rng(0).integers(0, 60, ROWS)
    # Long texts come together, an empty one and those that are cut among them.
    lengths[: ROWS // 4].sort()
    texts = list(random_texts(folder / "model", lengths.tolist()))
    (folder / "input").mkdir()
    for name, start, stop in (("a", 0, 1_700), ("b", 1_700, ROWS)):
        table = pa.table({"id": [f"text-{row}" for row in range(start, stop)], "text": texts[start:stop]})
        pq.write_table(table, folder / "input" / f"{name}.parquet", row_group_size=400)
    return Corpus(folder / "model", folder / "input", texts, embed_directly(folder / "model", texts))


def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def start(*command: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, *command], env=environment(), text=True, **pipes)


def launch(corpus: Corpus, output: Path) -> subprocess.Popen[str]:
    """Starts `accelerate launch` with two processes on the CPU."""
    command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    return start(*command, str(ROOT / "examples" / "embed_accelerate.py"), "--cpu", *corpus.arguments(output))


def parts_of(output: Path) -> set[str]:
    return {path.name for path in folder_of(output).glob("part-*.parquet")}


def kill_in_the_middle(
    process: subprocess.Popen[str], output: Path, more_than: int, is_worker: Callable[[psutil.Process], bool]
) -> int:
    """Kills a worker of a running program as soon as so many parts are there; returns which."""
    found: list[psutil.Process] = []
    end = time.monotonic() + 120
    while not found:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)
        if len(parts_of(output)) > more_than:
            found = [one for one in psutil.Process(process.pid).children(recursive=True) if is_worker(one)]
    found[0].send_signal(signal.SIGKILL)
    return int(found[0].pid)


def is_running(process: psutil.Process, *names: str) -> bool:
    try:
        line = " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    return all(name in line for name in names)


def finished(process: subprocess.Popen[str]) -> None:
    log = process.communicate(timeout=120)[0]
    assert process.returncode == 0, log
    assert "100%" in log  # of the progress bar


def check(corpus: Corpus, output: Path, expected: np.ndarray | None = None) -> None:
    """Checks an output against its input and direct calls of the model: all rows, once, in order, and right."""
    table = pq.read_table(output)
    assert table.column_names == ["row", "id", "embedding"]
    assert table["row"].to_pylist() == list(range(ROWS))
    assert table["id"].to_pylist() == [f"text-{row}" for row in range(ROWS)]
    assert table.schema.field("embedding").type.value_type == pa.float32()
    found = np.array(table["embedding"].to_pylist())
    np.testing.assert_allclose(found, corpus.expected if expected is None else expected, atol=TOLERANCE)
    assert not folder_of(output).exists()


def embed_here(corpus: Corpus, output: Path, **changes: Any) -> Plan:
    """Embeds an input in this process."""
    plan = corpus.plan(output, **changes)
    with Gatherer(plan, progress=False):
        reports = embed_parts(PartEmbedder(plan, torch.device("cpu")), plan.parts)
    assert [report.index for report in reports] == [part.index for part in plan.parts]
    assert sum(report.rows for report in reports) == ROWS
    # The second part is read while the model runs on the first.
    assert reports[1].started < reports[0].ended
    return plan


@pytest.fixture(scope="module")
def uninterrupted(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes that one process writes."""
    output = tmp_path_factory.mktemp("whole") / "whole.parquet"
    embed_here(corpus, output)
    check(corpus, output)
    return output.read_bytes()


@pytest.fixture(scope="module")
def killed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave behind of which one was killed."""
    output = tmp_path_factory.mktemp("killed") / "embeddings.parquet"
    process = launch(corpus, output)
    kill_in_the_middle(process, output, 2, lambda child: is_running(child, "embed_accelerate"))
    log = process.communicate(timeout=120)[0]
    assert process.returncode != 0, log
    assert not output.exists()
    return output


@pytest.fixture
def resumed(killed: Path, tmp_path: Path) -> tuple[Path, set[int]]:
    """The output to be of a copy of the killed run, and the parts that are there."""
    output = tmp_path / killed.name
    shutil.copytree(folder_of(killed), folder_of(output))
    done = {int(name.removeprefix("part-").removesuffix(".parquet")) for name in parts_of(output)}
    assert 2 < len(done) < len(Plan.load(folder_of(output) / "plan.json").parts)
    return output, done


def check_resumed(corpus: Corpus, output: Path, done: set[int], uninterrupted: bytes, killed: int = 0) -> None:
    """Checks what two workers wrote, one of which may stand for a killed one: those parts alone that were missing."""
    check(corpus, output)
    assert output.read_bytes() == uninterrupted
    report = json.loads(report_of(output).read_text())
    parts = report["part_reports"]
    assert report["rows"] == ROWS
    assert report["embedded_rows"] == sum(part["rows"] for part in parts)
    seconds = [part["encode_seconds"] for part in parts]
    assert 0 < min(seconds) <= max(seconds) <= report["embedding_seconds"] < report["total_seconds"]
    assert [part["index"] for part in parts] == [part for part in range(report["parts"]) if part not in done]
    # The killed one may or may not have finished a part.
    assert len({part["worker"] for part in parts} - {killed}) == 2


def test_accelerate_goes_on_where_a_worker_was_killed(corpus: Corpus, resumed, uninterrupted: bytes) -> None:
    output, done = resumed
    finished(launch(corpus, output))
    check_resumed(corpus, output, done, uninterrupted)


def test_ray_goes_on_and_replaces_a_killed_actor(corpus: Corpus, resumed, uninterrupted: bytes) -> None:
    output, done = resumed
    process = start(str(ROOT / "examples" / "embed_ray.py"), "--actors", "2", *corpus.arguments(output))
    # One that is at a part: Ray writes the running method to the name of the process.
    actor = kill_in_the_middle(process, output, len(done) + 2, lambda child: is_running(child, "MapWorker", ".submit"))
    finished(process)
    check_resumed(corpus, output, done, uninterrupted, actor)


def test_parts_have_as_many_tokens_each(corpus: Corpus, tmp_path: Path) -> None:
    plan = corpus.plan(tmp_path / "out.parquet")
    # 2, 4 or 8 workers have as many each.
    assert len(plan.parts) % 8 == 0
    tokenizer = AutoTokenizer.from_pretrained(corpus.model)
    tokens = np.array([len(ids) for ids in tokenizer(corpus.texts)["input_ids"]])
    of_parts = np.array([tokens[part.start : part.stop].sum() for part in plan.parts])
    rows = np.array([part.stop - part.start for part in plan.parts])
    assert of_parts.std() / of_parts.mean() < 0.05 < rows.std() / rows.mean()


def test_a_part_has_the_same_bytes_each_time(corpus: Corpus, tmp_path: Path) -> None:
    plan = corpus.plan(tmp_path / "out.parquet")
    parts = [plan.parts[at] for at in np.random.default_rng().choice(len(plan.parts), 6, replace=False)]
    found = []
    for order in (parts, parts[::-1]):
        embed_parts(PartEmbedder(plan, torch.device("cpu")), order)
        found.append([(plan.folder / part.name).read_bytes() for part in parts])
    assert found[0] == found[1]


@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_pooling_and_maximum_length(corpus: Corpus, tmp_path: Path, pooling: plans.Pooling) -> None:
    plan = embed_here(corpus, tmp_path / "out.parquet", pooling=pooling, max_length=24, part_megabytes=1.0)
    check(corpus, plan.output, embed_directly(corpus.model, corpus.texts, pooling, max_length=24))


def test_a_sentence_transformer_has_its_own_modules(corpus: Corpus, tmp_path: Path) -> None:
    layers = [Transformer(str(corpus.model)), Pooling(48, "max"), Dense(48, 20)]
    model = SentenceTransformer(modules=layers, device="cpu")
    model.save(str(tmp_path / "model"))
    own = {"model": str(tmp_path / "model"), "max_length": 24, "part_megabytes": 1.0}
    with pytest.raises(ValueError, match="has its own pooling; leave out --pooling"):
        corpus.plan(tmp_path / "out.parquet", **own)
    plan = embed_here(corpus, tmp_path / "out.parquet", pooling=None, **own)
    model.max_seq_length = 24
    expected = model.encode(corpus.texts, normalize_embeddings=True)
    assert expected.shape == (ROWS, 20)
    check(corpus, plan.output, expected)


def test_a_run_of_other_options_is_not_mixed_in(corpus: Corpus, tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    plan = corpus.plan(output)
    with pytest.raises(ValueError, match=r"tokens_per_batch was 512.*remove the folder"):
        corpus.plan(output, tokens_per_batch=256)
    first = PartEmbedder(plan, torch.device("cpu")).embed(plan.parts[0])
    assert [part.index for part in plan.remaining()] == [part.index for part in plan.parts[1:]]
    assert first.rows == plan.parts[0].stop
    assert corpus.plan(output).parts == plan.parts
    for part in plan.parts[1:]:
        shutil.copy(plan.folder / plan.parts[0].name, plan.folder / part.name)
    with pytest.raises(RuntimeError, match="does not have rows"), Gatherer(plan, progress=False):
        pass
    assert not output.exists()


def test_a_part_that_is_written_again_late_does_no_harm(corpus: Corpus, tmp_path: Path) -> None:
    plan = corpus.plan(tmp_path / "out.parquet", **LARGE)
    with Gatherer(plan, progress=False):
        embed_parts(PartEmbedder(plan, torch.device("cpu")), plan.parts)
        end = time.monotonic() + 60
        while not plan.output.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.1)
        # As by a task that Ray repeats because its worker was killed after it wrote.
        embed_parts(PartEmbedder(plan, torch.device("cpu")), plan.parts[-1:])
    check(corpus, plan.output)


def test_an_output_that_is_there_is_kept(corpus: Corpus, tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    embed_here(corpus, output, **LARGE)
    check(corpus, output)
    assert Plan.make(corpus.options(**LARGE), output) is None
    with pytest.raises(ValueError, match="there already, of another input or other options"):
        corpus.plan(output, pooling="cls")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"column": "words"}, "no column words; expected one of"),
        ({"keep": ("row",)}, "row cannot be kept"),
        ({"input": "nowhere"}, "expected a Parquet file"),
        ({"pooling": None}, "pooling=None.*no modules.json.*one of mean, cls, last"),
        ({"pooling": "max"}, "pooling='max'.*one of mean, cls, last"),
    ],
)
def test_wrong_options_are_errors(corpus: Corpus, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corpus.plan(tmp_path / "out.parquet", **changes)


def test_null_texts_are_errors(corpus: Corpus, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["a text", None]}), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match="1 rows without a text"):
        corpus.plan(tmp_path / "out.parquet", input=str(tmp_path / "in.parquet"))


@pytest.mark.gpu
def test_bulk_embedding_on_a_gpu_replays_graphs(corpus: Corpus, tmp_path: Path) -> None:
    plan = corpus.plan(tmp_path / "out.parquet")
    embedder = PartEmbedder(plan, torch.device("cuda", torch.cuda.device_count() - 1))
    with Gatherer(plan, progress=False):
        embed_parts(embedder, plan.parts)
    found = np.array(pq.read_table(plan.output)["embedding"].to_pylist())
    np.testing.assert_allclose(found, corpus.expected, atol=5e-3)
    assert hf_flashinfer_attn.graph_statistics(embedder.model).replayed > len(plan.parts)
