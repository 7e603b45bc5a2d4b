"""Pages that are made from the source agree with it, Python blocks run, and links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import snippets

import hf_flashinfer_attn
from docs import make_pages
from hf_flashinfer_attn.tools import cli

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(hf_flashinfer_attn.__file__).parent
PAGES = sorted(page for folder in (".", "docs", "benchmarks", "examples") for page in (ROOT / folder).glob("*.md"))
# Made pages hold signatures, not programs; what is in them are the docstrings' examples.
WRITTEN = [page for page in ROOT.glob("docs/*.md") if page.name not in ("api.md", "support.md")]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in sorted(WRITTEN)
    for number, block in enumerate(snippets.python_blocks(page))
]


def _without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "`code`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def _anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, made as GitHub makes them."""
    anchors: set[str] = set()
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        count = sum(
            anchor == known or (known.startswith(f"{anchor}-") and known[len(anchor) + 1 :].isdigit())
            for known in anchors
        )
        anchors.add(f"{anchor}-{count}" if count else anchor)
    return anchors


@pytest.mark.parametrize("name", make_pages.pages())
def test_made_page_is_up_to_date(name: str) -> None:
    page = (make_pages.DOCS / name).read_text()
    assert page == make_pages.pages()[name], "run python -m docs.make_pages"


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block(block: str) -> None:
    snippets.run(block)


def _code_cells(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


SNIPPETS = {
    **{f"{page.stem}-{number}": block for page in PAGES for number, block in enumerate(snippets.python_blocks(page))},
    **{notebook.stem: _code_cells(notebook) for notebook in ROOT.glob("notebooks/*.ipynb")},
    "package": str(hf_flashinfer_attn.__doc__).replace("\n    ", "\n").partition(":\n")[2],
}


@pytest.mark.parametrize("name", [name for name, text in SNIPPETS.items() if '"flashinfer"' in text])
def test_snippet_has_the_import_that_registers_the_name(name: str) -> None:
    before = SNIPPETS[name].partition('"flashinfer"')[0]
    assert re.search(r"^(import|from) hf_flashinfer_attn\b", before, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(page.read_text())):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        assert not anchor or anchor in _anchors(linked), target


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in [*ROOT.glob("docs/*.md"), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "README.md"]:
        assert page.name == "index.md" or f"{page.name})" in index, page.name
    assert "docs/index.md" in (ROOT / "README.md").read_text()


def test_every_command_is_in_the_index(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = re.findall(r"^    (\w+) +\w", capsys.readouterr().out, re.MULTILINE)
    assert "demo" in commands
    index = (ROOT / "docs" / "index.md").read_text()
    for command in commands:
        assert f"| `{command}` |" in index, command


def test_no_command_installs_this_package_from_an_index() -> None:
    texts = [*PAGES, *ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("examples/*.py"), *PACKAGE.rglob("*.py")]
    for file in texts:
        assert not re.search(r"""pip install (-\S+ )*[\\"']*hf[_-]flashinfer""", file.read_text(encoding="utf-8")), file


@pytest.mark.parametrize("name", ["architecture.svg", "padded_batch.svg"])
def test_drawing_is_on_its_page_and_has_a_title(name: str) -> None:
    drawing = ElementTree.parse(ROOT / "docs" / name)
    assert drawing.findtext("{http://www.w3.org/2000/svg}title")
    assert f"]({name})" in (ROOT / "docs" / "architecture.md").read_text()
