"""Every message that a user can get from this package is in docs/troubleshooting.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

import hf_flashinfer_attn
from hf_flashinfer_attn.attention.select import RULES
from hf_flashinfer_attn.kernels.jit import NO_NVCC

PACKAGE = Path(hf_flashinfer_attn.__file__).parent
PAGE = Path(__file__).resolve().parents[1] / "docs" / "troubleshooting.md"
# Protocols of Python and checks of our own measurements, which no user sees.
INTERNAL = {("traced_mask.py", "AttributeError"), ("mask_functions.py", "TypeError"), ("accuracy.py", "AssertionError")}
MESSAGE_FIRST = {"log_once", "warning", "error", "exception", "__init__"}
VALUE = "\0"


def _template(node: ast.expr) -> str | None:
    """Returns a message with `VALUE` where a value stands; None for what is not a message."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%(\.\d)?[sdf]", VALUE, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else VALUE
            for part in node.values
        )
    return None


def _returned(node: ast.expr | None) -> Iterator[ast.expr]:
    if isinstance(node, ast.IfExp):
        yield from (*_returned(node.body), *_returned(node.orelse))
    elif isinstance(node, ast.Tuple):
        yield node.elts[0]
    elif node is not None:
        yield node


def _messages_of(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text())):
        found: list[ast.expr] = []
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            # After the name of a backend comes the reason.
            place = 1 if name == "BackendUnavailableError" else 0
            if (name in MESSAGE_FIRST or name.endswith("Error")) and (file.name, name) not in INTERNAL:
                found = node.args[place : place + 1]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "message":
            found = [node.value]
        elif isinstance(node, ast.FunctionDef) and re.search("reason|refus|why", node.name):
            returns = (inner for inner in ast.walk(node) if isinstance(inner, ast.Return))
            found = [value for inner in returns for value in _returned(inner.value)]
        for value in found:
            template = _template(value)
            # Nothing to look for where a message is made of values alone.
            if template is not None and len(re.findall(r"\w+", template.replace(VALUE, ""))) > 1:
                yield node.lineno, template


MESSAGES = [
    pytest.param(message, id=f"{file.relative_to(PACKAGE)}:{line}")
    for file in sorted(PACKAGE.rglob("*.py"))
    for line, message in _messages_of(file)
]


def _quoted(text: str) -> list[str]:
    """Returns what the page sets as code: messages, with `…` for what differs from one to the next."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def _fragment(message: str) -> str:
    """Returns up to six words of a message that are the same each time: the first three or more without a value."""
    pieces = [piece.split() for piece in message.split(VALUE)]
    return " ".join(next((piece for piece in pieces if len(piece) >= 3), max(pieces, key=len))[:6])


def _is_quoted(message: str, quotes: list[str]) -> bool:
    return any(_fragment(message) in quote for quote in quotes)


@pytest.mark.parametrize("message", MESSAGES)
def test_message_is_on_the_page(message: str) -> None:
    assert _is_quoted(message, _quoted(PAGE.read_text())), message.replace(VALUE, "…")


# What the log says, where that is not what the support table calls the feature.
LOGGED = {
    "user 4D masks, additive masks, chunks, image blocks, any mask that is not recognised": "the mask …",
    "dropout in training": "dropout …",
    "float32 and other dtypes than float16 and bfloat16": "dtype … (FlashInfer takes torch.float16 and torch.bfloat16)",
    "head_dim above 256": "head_dim … (FlashInfer's prefill kernels go up to 256)",
}


@pytest.mark.parametrize("feature", [rule.feature for rule in RULES])
def test_reason_of_a_fallback_is_on_the_page(feature: str) -> None:
    assert LOGGED.get(feature, feature) in _quoted(PAGE.read_text())


def test_message_of_transformers_for_an_unknown_name_is_on_the_page() -> None:
    with pytest.raises(ValueError, match="flashinfr") as error:
        BertModel._from_config(BertConfig(num_hidden_layers=0), attn_implementation="flashinfr")
    # The page sets it as code, where there can be no backticks.
    said = str(error.value).replace("`", "").replace("flashinfr", "flashinfer").partition(", ")[0]
    assert any(quote.startswith(said) for quote in _quoted(PAGE.read_text())), said


def test_messages_are_found() -> None:
    assert len(MESSAGES) > 90
    assert not _is_quoted(f"backend {VALUE} went for a walk", _quoted(PAGE.read_text()))


def test_reason_that_modules_share_is_on_the_page() -> None:
    assert NO_NVCC in _quoted(PAGE.read_text())
