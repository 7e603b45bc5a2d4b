"""Python blocks of the documentation, run as a reader pastes them."""

from __future__ import annotations

import re
from pathlib import Path

from hf_flashinfer_attn.tools.demo import model_path


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(block: str) -> None:
    """Runs a block in an empty namespace, with a small local model in place of the one that it names."""
    local = re.sub(r'^path = ".*?"', f"path = {str(model_path())!r}", block, flags=re.MULTILINE)
    exec(compile(local, "snippet", "exec"), {})
