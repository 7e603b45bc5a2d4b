from __future__ import annotations

import pytest

import hf_flashinfer_attn
from hf_flashinfer_attn.settings import BACKEND_VARIABLE, JIT_VARIABLE, PADDED_QUERIES_VARIABLE, STRICT_VARIABLE


def test_default() -> None:
    assert hf_flashinfer_attn.current_settings() == hf_flashinfer_attn.Settings(
        backend="auto", strict=False, jit="wait", padded_queries="drop"
    )


def test_configure_changes_only_what_is_given() -> None:
    hf_flashinfer_attn.configure(backend="torch")
    assert hf_flashinfer_attn.configure(strict=True) == hf_flashinfer_attn.Settings(backend="torch", strict=True)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "Torch")
    monkeypatch.setenv(STRICT_VARIABLE, "1")
    monkeypatch.setenv(JIT_VARIABLE, " Background")
    monkeypatch.setenv(PADDED_QUERIES_VARIABLE, "Keep")
    expected = hf_flashinfer_attn.Settings(backend="torch", strict=True, jit="background", padded_queries="keep")
    assert hf_flashinfer_attn.current_settings() == expected


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        (BACKEND_VARIABLE, "triton"),
        (STRICT_VARIABLE, "maybe"),
        (JIT_VARIABLE, "later"),
        (PADDED_QUERIES_VARIABLE, "zero"),
    ],
)
def test_bad_environment_is_an_error(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{value}.*expected one of"):
        hf_flashinfer_attn.current_settings()


def test_bad_values_are_errors() -> None:
    with pytest.raises(ValueError, match=r"backend='cuda'.*'auto', 'flashinfer', 'torch'"):
        hf_flashinfer_attn.configure(backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strict='yes'"):
        hf_flashinfer_attn.configure(strict="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"jit='later'.*'wait', 'background', 'never'"):
        hf_flashinfer_attn.configure(jit="later")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"padded_queries='zero'.*'drop', 'keep'"):
        hf_flashinfer_attn.configure(padded_queries="zero")  # type: ignore[arg-type]
