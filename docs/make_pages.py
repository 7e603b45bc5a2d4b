"""Writes the generated pages: `api.md` from docstrings, `support.md` from the rules of `select` and `unpad`, the table
of `performance.md` from results of benchmarks, and the drawing and tables of `architecture.md` from the imports.

python -m docs.make_pages
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hf_flashinfer_attn
from benchmarks import make_tables
from docs import draw_architecture
from hf_flashinfer_attn.kernels import flashinfer
from hf_flashinfer_attn.tools import support
from hf_flashinfer_attn.tools.bench.workload import REQUEST_SETS

DOCS = Path(__file__).resolve().parent
MADE_BY = "<!-- Made by `python -m docs.make_pages`; change the source, not this page. -->"
PARTS = {
    "Strings to vectors and scores": ("encode", "encode_iter", "predict", "rank"),
    "Switching it on": ("register", "configure", "current_settings", "Settings"),
    "Whole models": ("unpad", "repad", "capture_graphs", "graph_statistics", "GraphOptions", "GraphStatistics"),
    "This machine": ("doctor", "Diagnosis", "warmup", "WarmupReport"),
    "What ran": ("trace", "Trace", "AttentionCall"),
    "Errors": ("FlashInferAttentionError", "BackendUnavailableError", "UnsupportedAttentionError"),
}
SHAPES = ("gte-small", "bge-base")
# Of the two ways to hand inputs over, the one that the page advises.
WAYS = {
    "the string alone": ("flashinfer",),
    "`unpad`": ("unpad_host", "unpad"),
    "graphs": ("graphs_host", "graphs"),
    "graphs, `compile=True`": ("compiled_graphs_host", "compiled_graphs"),
}
MEASURED = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- /measured -->)", re.DOTALL)
ROOMS = re.compile(r"(?<=<!-- rooms -->\n).*?(?=<!-- /rooms -->)", re.DOTALL)
SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Examples):$", re.MULTILINE)
ITEM = re.compile(r"^(\*{0,2}\w+): ", re.MULTILINE)
STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def pages() -> dict[str, str]:
    """Returns the text of each page and drawing by its file name."""
    rooms = draw_architecture.floors()
    return {
        "api.md": _api_page(),
        "support.md": _support_page(),
        "performance.md": MEASURED.sub(lambda _: _measured(), _written("performance.md")),
        "architecture.md": ROOMS.sub(lambda _: f"\n{draw_architecture.tables(rooms)}", _written("architecture.md")),
        "architecture.svg": draw_architecture.drawing(rooms),
    }


def _written(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def _measured() -> str:
    lines = []
    for machine, reports in make_tables.machines().items():
        cells = {(cell["lengths"], cell["shape"]): cell for report in reports for cell in report["cells"]}
        lines += [
            f"Times faster than sdpa on {machine}: {' / '.join(SHAPES)}; inputs on the CPU where that was measured.",
            "",
            f"| requests | {' | '.join(WAYS)} |",
            "|---" * (len(WAYS) + 1) + "|",
        ]
        for lengths in REQUEST_SETS:
            measured = [cells[lengths, shape] for shape in SHAPES if (lengths, shape) in cells]
            if len(measured) == len(SHAPES):
                first = measured[0]
                title = f"{lengths}: batches of {first['batch_size']}, {first['padded_fraction']:.0%} padding"
                columns = (" / ".join(_speedup(cell, names) for cell in measured) for names in WAYS.values())
                lines.append(f"| {title} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def _speedup(cell: dict[str, Any], names: tuple[str, ...]) -> str:
    """Returns how many times faster than sdpa the first of some contenders was that took part."""
    outcomes = {outcome["name"]: outcome for outcome in cell["contenders"]}
    outcome = next((outcomes[name] for name in names if name in outcomes), None)
    if outcome is None:
        return "-"
    ratio = outcome["speedup_over_sdpa"]
    return outcome["status"] if ratio is None else f"{ratio:.2f}x"


def _support_page() -> str:
    capabilities = {str(dtype).removeprefix("torch."): flashinfer._MIN_CAPABILITY[dtype] for dtype in flashinfer.DTYPES}
    needed = ", ".join(f"{dtype} from {major}.{minor} on" for dtype, (major, minor) in capabilities.items())
    sizes = ", ".join(map(str, flashinfer.KERNEL_HEAD_DIMS))
    return f"""{MADE_BY}
# Support

## What runs where

On a GPU that FlashInfer supports. With `backend="torch"`, and on machines without such a GPU, the torch backend
computes the same, and dense attention what needs a materialised mask. Where the table says "logged once",
`configure(strict=True)` raises `UnsupportedAttentionError` instead.

{support.support_table()}

FlashInfer's kernels need a GPU of compute capability: {needed}. They exist for
head_dim {sizes}; other sizes are padded to the next of these.

## What `unpad` supports

These backbones, and models and heads that contain them. Some forwards
[stay padded](unpad.md#what-stays-padded), and some run [without CUDA graphs](unpad.md#cuda-graphs).

{support.unpadding_table()}

## What `unpad` refuses

`unpad` raises an error for any other model, with a list of the known ones. For the models below the error names the
reason. They run without `unpad`: their attention uses "flashinfer" where it goes through transformers' interface, and
otherwise gets the usual mask.

{support.refused_table()}
"""


def _api_page() -> str:
    public = [name for name in hf_flashinfer_attn.__all__ if name != "__version__"]
    parts = {title: [name for name in names if name in public] for title, names in PARTS.items()}
    parts["More"] = [name for name in public if not any(name in names for names in PARTS.values())]
    parts = {title: names for title, names in parts.items() if names}
    anchors = _anchors([name for names in parts.values() for name in names])
    lines = [MADE_BY, "# API reference", "", "Everything here is an attribute of `hf_flashinfer_attn`.", ""]
    for title, names in parts.items():
        lines.append(f"- {title}: " + ", ".join(f"[`{name}`]" for name in names))
    for title, names in parts.items():
        lines += ["", f"## {title}"]
        for name in names:
            lines += ["", *_entry(name, getattr(hf_flashinfer_attn, name))]
    # Only what is an entry: a class of another package in brackets stays as it is.
    text = re.sub(
        r"\[`(\w+)`\](?!\()",
        lambda found: f"[`{found[1]}`](#{anchors[found[1]]})" if found[1] in anchors else found[0],
        "\n".join(lines),
    )
    return text + "\n"


def _anchors(names: Sequence[str]) -> dict[str, str]:
    """Returns the anchors that a page gives to headings: in small letters, counted where two are the same."""
    anchors: dict[str, str] = {}
    for name in names:
        count = sum(name.lower() == other.lower() for other in anchors)
        anchors[name] = f"{name.lower()}-{count}" if count else name.lower()
    return anchors


def _entry(name: str, value: Any) -> Iterator[str]:
    yield from (f"### {name}", "", "```python", _signature(name, value), "```", "")
    yield from _documentation(inspect.getdoc(value) or "")
    if inspect.isclass(value):
        for member_name, member in vars(value).items():
            if member_name.startswith("_") or not (
                isinstance(member, (property, classmethod)) or inspect.isfunction(member)
            ):
                continue
            function: Any = getattr(member, "fget", None) or getattr(member, "__func__", member)
            call = "" if isinstance(member, property) else "()"
            returned = inspect.signature(function).return_annotation
            yield ""
            yield f"- **`{member_name}{call}`** gives `{returned}`: {' '.join((inspect.getdoc(member) or '').split())}"


def _signature(name: str, value: Any) -> str:
    if inspect.isclass(value) and "__init__" not in vars(value):
        return f"{name}(*args)"
    signature = inspect.signature(value)
    parameters, star = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parameters.append("*")
            star = True
        text = f"{STARS.get(parameter.kind, '')}{parameter.name}: {parameter.annotation}"
        if parameter.default is not parameter.empty:
            text += " = ..." if repr(parameter.default).startswith("<") else f" = {parameter.default!r}"
        parameters.append(text)
    returned = "" if inspect.isclass(value) else f" -> {signature.return_annotation}"
    line = f"{name}({', '.join(parameters)}){returned}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {parameter}," for parameter in parameters), f"){returned}"])


def _documentation(text: str) -> Iterator[str]:
    first, *sections = SECTION.split(text)
    yield first.strip()
    for title, body in zip(sections[::2], sections[1::2]):
        body = textwrap.dedent(body.strip("\n"))
        if title == "Examples":
            yield from ("", "```pycon", body.strip(), "```")
        elif title in ("Args", "Raises"):
            yield from ("", "**Arguments**" if title == "Args" else "**Raises**", "")
            _, *items = ITEM.split(body)
            yield from (f"- `{name}`: {' '.join(told.split())}" for name, told in zip(items[::2], items[1::2]))
        else:
            yield from ("", f"**{title}**", "", " ".join(body.split()))


def main() -> int:
    # Without options; but --help must not write.
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
