"""Every Python block of the README runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_flashinfer_attn.demo import model_path
from hf_flashinfer_attn.support import support_table

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, str(README), "exec"), {"path": str(model_path())})
    assert "layouts 1, host copies" in capsys.readouterr().out


def test_readme_has_its_two_commands_and_fits_two_screens() -> None:
    text = README.read_text()
    assert len(BLOCKS) >= 1
    for name, ending in (("demo", "-m hf_flashinfer_attn demo"), ("tests", "-m pytest")):
        command = re.search(rf"<!-- {name} -->\n```bash\n(.*?)\n```", text)
        assert command is not None
        assert command.group(1).endswith(ending)
    assert len(text.splitlines()) <= 120


def test_support_table_is_that_of_the_dispatcher() -> None:
    assert support_table() in README.read_text()
