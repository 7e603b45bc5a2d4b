"""One place for the `gpu` marker and for state that no test may leak into another."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

from hf_flashinfer_attn import settings
from hf_flashinfer_attn.log import logged

# A first call may compile or load something, on a machine of any speed.
hypothesis.settings.register_profile("any-machine", deadline=None, print_blob=True)
hypothesis.settings.load_profile("any-machine")

# Models this small lose more to threads than they gain.
torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Read when a kernel is defined: before anything imports ours.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (
        settings.BACKEND_VARIABLE, settings.STRICT_VARIABLE, settings.JIT_VARIABLE, settings.PADDED_QUERIES_VARIABLE,
    ):  # fmt: skip
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(settings, "_settings", None)


@pytest.fixture(autouse=True)
def _nothing_logged_yet() -> None:
    logged.clear()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(torch.seed() % 2**31)
