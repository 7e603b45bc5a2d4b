"""Every Python block of the README runs, and its figures are those of the results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import snippets

from hf_flashinfer_attn.kernels import flashinfer
from hf_flashinfer_attn.tools.environment import versions_tested
from hf_flashinfer_attn.unpadding.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BLOCKS = snippets.python_blocks(README)


def text_of(page: Path) -> str:
    return " ".join(page.read_text(encoding="utf-8").split())


def results_of(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    snippets.run(block)
    # The trace of a forward, or the shape of two embeddings.
    expected = "layouts 1, host copies" if "trace()" in block else "(2, 384)\n"
    assert expected in capsys.readouterr().out


def test_first_block_embeds_with_sentence_transformers() -> None:
    assert "SentenceTransformer(path" in BLOCKS[0]
    assert "hf_flashinfer_attn.encode(model, texts)" in BLOCKS[0]


def test_readme_has_its_two_commands_and_stays_short() -> None:
    text = README.read_text()
    for name, ending in (("demo", "-m hf_flashinfer_attn demo"), ("tests", "-m pytest")):
        command = re.search(rf"<!-- {name} -->\n```bash\n(.*?)\n```", text)
        assert command is not None
        assert command.group(1).endswith(ending)
    assert len(text.splitlines()) <= 170


def test_tested_versions_are_those_of_the_code() -> None:
    assert f"Tested with {versions_tested()}." in text_of(README)


def test_limits_are_those_of_the_code() -> None:
    limits = text_of(README).partition("## Limits")[2]
    assert f"head_dim up to {flashinfer.MAX_HEAD_DIM}" in limits
    major, minor = min(flashinfer._MIN_CAPABILITY.values())
    assert f"compute capability {major}.{minor} or newer" in limits
    assert f"`unpad` supports {len(FAMILIES)} families" in limits


def test_what_new_shapes_cost_is_what_was_measured() -> None:
    cells = results_of("new_shapes")["forwards"]
    said = "sdpa pays {} extra the first time it sees a shape", '`attn_implementation="flashinfer"` pays {}'
    for model, sentence in zip(("sdpa", "flashinfer"), said):
        more = [cell["first_ms"] - cell["second_ms"] for cell in cells if cell["model"] == model]
        assert sentence.format(f"{min(more):.0f} to {max(more):.0f} ms") in text_of(README)


def test_what_examples_are_said_to_do_is_what_was_measured() -> None:
    text, cells = text_of(ROOT / "examples" / "README.md"), results_of("serving")["cells"]
    assert [cell["attention"] for cell in cells] == ["flashinfer", "sdpa"] * (len(cells) // 2)
    figures = [f"{one['requests_per_second']:,.0f}, {one['p50_ms']:,.0f} ms, {one['p99_ms']:,.0f} ms" for one in cells]
    for at in range(0, len(cells), 2):
        load = f"{cells[at]['clients']}, {cells[at]['texts_per_request']}"
        assert f"| {load} | {figures[at]} | {figures[at + 1]} |" in text
    found = results_of("two_gpus")
    one, two = (run["embedding_seconds"] for run in found["runs"])
    said = f"bge-base took {one:.1f} s for {found['rows']:,} texts on an H200, {two:.1f} s on two ({one / two:.2f}x)"
    assert said in text


def test_what_encode_takes_is_what_was_measured() -> None:
    cells = results_of("encode_h200")["cells"]
    for shape in ("12x768", "6x384"):
        cell = cells[shape]
        passes = cell["sdpa_32_seconds"], cell["sdpa_256_seconds"]
        rivals = [f"{min(others):.2f} ({first:.1f})" for first, *others in passes]
        ours = f"**{min(cell['warm_seconds']):.2f}** ({cell['cold_seconds'][0]:.1f})"
        queries = f"{cell['sdpa_query_ms']:.1f} | **{cell['query_ms']:.1f}** |"
        row = " | ".join([f"| {shape.replace('x', ' x ')}", *rivals, ours, queries])
        assert row in README.read_text(encoding="utf-8")
