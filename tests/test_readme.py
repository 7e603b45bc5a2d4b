"""Every Python block of the README runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_flashinfer_attn.backends import flashinfer
from hf_flashinfer_attn.demo import model_path
from hf_flashinfer_attn.unpadding.families import FAMILIES

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


def test_limits_are_those_of_the_code() -> None:
    limits = " ".join(README.read_text().partition("## Limits")[2].split())
    assert f"head_dim up to {flashinfer.MAX_HEAD_DIM}" in limits
    major, minor = min(flashinfer._MIN_CAPABILITY.values())
    assert f"compute capability {major}.{minor} or newer" in limits
    assert f"`unpad` knows {len(FAMILIES)} families" in limits
