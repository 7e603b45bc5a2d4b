"""Every Python block of the README runs, and its figures are those of the results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import snippets

from hf_flashinfer_attn.kernels import flashinfer
from hf_flashinfer_attn.tools.environment import versions_tested
from hf_flashinfer_attn.unpadding.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BLOCKS = snippets.python_blocks(README)


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
    assert f"Tested with {versions_tested()}." in " ".join(README.read_text(encoding="utf-8").split())


def test_limits_are_those_of_the_code() -> None:
    limits = " ".join(README.read_text().partition("## Limits")[2].split())
    assert f"head_dim up to {flashinfer.MAX_HEAD_DIM}" in limits
    major, minor = min(flashinfer._MIN_CAPABILITY.values())
    assert f"compute capability {major}.{minor} or newer" in limits
    assert f"`unpad` supports {len(FAMILIES)} families" in limits


def test_what_new_shapes_cost_is_what_was_measured() -> None:
    cells = json.loads((ROOT / "benchmarks/results/new_shapes.json").read_text())["forwards"]

    def more(model: str) -> str:
        found = [cell["first_ms"] - cell["second_ms"] for cell in cells if cell["model"] == model]
        return f"{min(found):.0f} to {max(found):.0f} ms"

    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"sdpa pays {more('sdpa')} extra the first time it sees a shape" in text
    assert f'`attn_implementation="flashinfer"` pays {more("flashinfer")}' in text


def test_what_examples_are_said_to_do_is_what_was_measured() -> None:
    text = " ".join((ROOT / "examples/README.md").read_text(encoding="utf-8").split())
    cells = json.loads((ROOT / "benchmarks/results/serving.json").read_text())["cells"]
    assert [cell["attention"] for cell in cells] == ["flashinfer", "sdpa"] * (len(cells) // 2)
    figures = [f"{one['requests_per_second']:,.0f}, {one['p50_ms']:,.0f} ms, {one['p99_ms']:,.0f} ms" for one in cells]
    for at in range(0, len(cells), 2):
        load = f"{cells[at]['clients']}, {cells[at]['texts_per_request']}"
        assert f"| {load} | {figures[at]} | {figures[at + 1]} |" in text
    found = json.loads((ROOT / "benchmarks/results/two_gpus.json").read_text())
    one, two = (run["embedding_seconds"] for run in found["runs"])
    said = f"bge-base took {one:.1f} s for {found['rows']:,} texts on an H200, {two:.1f} s on two ({one / two:.2f}x)"
    assert said in text


def test_what_encode_takes_is_what_was_measured() -> None:
    cells = json.loads((ROOT / "benchmarks/results/encode_h200.json").read_text())["cells"]
    for shape in ("12x768", "6x384"):
        cell = cells[shape]
        rivals = [f"{min(passes[1:]):.2f} ({passes[0]:.1f})"
                  for passes in (cell["sdpa_32_seconds"], cell["sdpa_256_seconds"])]  # fmt: skip
        ours = f"**{min(cell['warm_seconds']):.2f}** ({cell['cold_seconds'][0]:.1f})"
        queries = f"{cell['sdpa_query_ms']:.1f} | **{cell['query_ms']:.1f}** |"
        row = " | ".join([f"| {shape.replace('x', ' x ')}", *rivals, ours, queries])
        assert row in README.read_text(encoding="utf-8")
