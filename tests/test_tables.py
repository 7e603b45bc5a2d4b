"""Cells are shown as they are, in text and in HTML."""

from __future__ import annotations

from hf_flashinfer_attn.tables import html_table, text_table

CELLS = ("[red]a[/red] :smile: <b>", "é" * 20, "c & d")


def test_text_is_neither_markup_nor_cut() -> None:
    assert text_table((), [CELLS]) == "  ".join(CELLS)
    assert text_table(("one", "two"), [("1", ""), ("", "22")]) == "one  two\n1\n     22"
    assert text_table(("one",), []) == "one"


def test_longest_column_wraps() -> None:
    text = text_table(("name", "reason"), [("unpad", "word " * 30), ("x", "y")], width=40)
    assert max(map(len, text.splitlines())) <= 40
    assert [line[:7].strip() for line in text.splitlines()] == ["name", "unpad", *[""] * 4, "x"]


def test_html_is_escaped_and_has_only_what_there_is() -> None:
    assert "[red]a[/red] :smile: &lt;b&gt;" in html_table((), [CELLS])
    assert "<thead>" not in html_table((), [CELLS])
    assert html_table(("x",), [("a",)], title="<t>", note="1\n2").count("<br>") == 1
