"""The doctor: the real command on this machine, on machines that lack something, and what it shows."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from paired_models import decoder_config

import hf_flashinfer_attn
from hf_flashinfer_attn import settings
from hf_flashinfer_attn.kernels import flashinfer as flashinfer_backend
from hf_flashinfer_attn.kernels.modules import KernelModule
from hf_flashinfer_attn.tables import html_table
from hf_flashinfer_attn.tools import accuracy, cli, diagnosis, environment, probes
from hf_flashinfer_attn.tools.diagnosis import KernelCheck, Section
from hf_flashinfer_attn.tools.pretrained import UnreadableModelError
from hf_flashinfer_attn.tools.probes import Probe, probe_cache, probe_compilers, probe_gpus, probe_versions
from hf_flashinfer_attn.tracing import AttentionCall, Trace

ROOT = Path(__file__).resolve().parents[1]
HAS_FLASHINFER = importlib.util.find_spec("flashinfer") is not None
# torch.__version__ may have a build tag that the metadata lacks.
TORCH = importlib.metadata.version("torch")
SECTIONS = ("versions", "gpu", "compilers", "cache")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def run_doctor(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hf_flashinfer_attn", "doctor", *arguments]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=300)


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    return fail


def named(found: tuple[Probe, ...], name: str) -> Probe:
    (probe,) = (probe for probe in found if probe.name == name)
    return probe


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    decoder_config(
        transformers.Gemma2Config, num_hidden_layers=4, sliding_window=5, attn_logit_softcapping=2.0, head_dim=32,
        query_pre_attn_scalar=32,
    ).save_pretrained(folder)  # fmt: skip
    return folder


# The command.


@without_gpu
def test_command_without_a_gpu() -> None:
    ran = run_doctor()
    assert ran.returncode == 1
    steps = [re.sub(r"^\[ *[\d.]+ s\] ", "", line) for line in ran.stderr.splitlines()]
    assert steps[0] == "importing torch and transformers ..."
    assert [step.partition(" ")[0] for step in steps[1:]] == ["looking"] * 4
    lines = ran.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 45
    for fact in (*SECTIONS, "backend", TORCH, transformers.__version__, '"flashinfer" runs on the torch backend'):
        assert fact in ran.stdout
    for name in ("nvcc", "ninja", "folder", *(("size", "kernels", "free") if HAS_FLASHINFER else ())):
        assert any(line[2:].startswith(name) for line in lines)


@without_gpu
def test_command_prints_one_json_object(model_folder: Path) -> None:
    ran = run_doctor("--json", "--model", str(model_folder), "--arch", "9.0a", "--dtype", "bfloat16")
    assert ran.returncode == 1
    found = json.loads(ran.stdout)
    assert (found["ready"], found["backend"], found["device"]) == (False, "torch", "cpu")
    assert found["obstacles"]
    assert found["versions"]["torch"] == TORCH
    assert found["problems"]["gpu.cuda"]
    assert set(SECTIONS) < set(found)
    window, causal = found["model"]["layers"]
    assert (window["layers"], causal["layers"]) == ("0, 2", "1, 3")
    assert (window["kernels"], causal["kernels"]) == (["fa2"], ["fa3", "fa2"])
    assert (causal["head_dim"], causal["padded_head_dim"], causal["softcap"]) == (32, 64, 2.0)
    assert found["model"]["dtype"] == "bfloat16"
    assert found["checks"] == []


@without_gpu
def test_check_runs_what_would_run_here(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--check", "--json"]) == 1
    output = capsys.readouterr()
    checks = json.loads(output.out)["checks"]
    assert {check["dtype"] for check in checks} == {"float32", "float16", "bfloat16"}
    assert {check["attention"] for check in checks} == {"full", "causal", "window (16 before, 16 after)"}
    for check in checks:
        assert (check["kernel"], check["problem"]) == ("torch", None)
        assert 0 < check["errors"]["error"] <= 1.25 * check["errors"]["fused_sdpa_error"] < 0.02
    assert "torch, bfloat16, head_dim 64, causal" in output.err
    assert cli.main(["doctor", "--check", "--model", str(model_folder)]) == 1
    shown = capsys.readouterr().out
    assert "window (4 before, 0 after), softcap 2" in shown
    assert "ok" in shown
    assert "FAILED" not in shown


@pytest.mark.parametrize(
    ("folder", "message"),
    [("/no/such/folder", "there is no folder '/no/such/folder'"), (str(ROOT / "docs"), "cannot be read")],
    ids=["no-folder", "no-config"],
)
def test_model_that_cannot_be_read(folder: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--model", folder]) == 1
    output = capsys.readouterr()
    assert message in output.err
    assert "config.json" in output.err
    assert output.out == ""


NEEDS_MODEL = "argument {}: needs a model to plan for; add --model PATH_OR_ID"
NO_CAPABILITY = "not a compute capability such as"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--arch", "9.0", NEEDS_MODEL),
        ("--dtype", "float16", NEEDS_MODEL),
        *(("--arch", arch, NO_CAPABILITY) for arch in ("hopper", "9", "9.x", "")),
    ],
)
def test_wrong_usage(option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["doctor", option, value])
    assert exit_.value.code == 2
    assert message.format(option) in capsys.readouterr().err


def test_config_in_place_of_a_path() -> None:
    config = transformers.BertConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
    plan = hf_flashinfer_attn.doctor(config, capability=(8, 0)).plan
    assert plan is not None
    assert plan.layers[0].kernels == ("fa2", "sdpa")
    with pytest.raises(UnreadableModelError, match="there is no folder"):
        hf_flashinfer_attn.doctor("./no/such/folder")
    with pytest.raises(ValueError, match="pass the model as well"):
        hf_flashinfer_attn.doctor(dtype=torch.float16)


# Machines that lack something. Whatever it is, every other line is there.


@without_gpu
def test_command_where_nothing_is_installed_and_the_cache_is_a_file(tmp_path: Path) -> None:
    file, empty = tmp_path / "file", tmp_path / "empty"
    file.touch()
    empty.mkdir()
    ran = run_doctor(PATH=str(empty), FLASHINFER_WORKSPACE_BASE=str(file), CUDA_HOME=str(empty), CC="", CXX="")
    assert (ran.returncode, "Traceback" in ran.stderr) == (1, False)
    problems = [line[2:].partition(" ")[0] for line in ran.stdout.splitlines() if line.startswith("! ")]
    assert {"nvcc", "ninja", "C++", "C", "folder"} <= set(problems)
    assert (str(file) if HAS_FLASHINFER else "not installed") in ran.stdout
    assert TORCH in ran.stdout


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs before all others, without variables that name some."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_HOME", "CUDA_PATH", "FLASHINFER_NVCC", "CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    return folder


def program(folder: Path, name: str, script: str) -> Path:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    file.chmod(0o755)
    return file


def test_broken_nvcc_hides_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = program(path, "nvcc", "echo 'libfoo.so: cannot open shared object file' >&2; exit 127")
    ninja = program(path, "ninja", "echo 1.12.1")
    program(path, "c++", "echo 'c++ (Debian 12.2.0-14) 12.2.0'")
    monkeypatch.setenv("PATH", str(path))
    found = probe_compilers()
    said = f"{nvcc} --version fails with status 127: libfoo.so: cannot open shared object file"
    assert named(found, "nvcc") == Probe("nvcc", None, said, True)
    assert named(found, "ninja") == Probe("ninja", {"path": str(ninja), "version": "1.12.1"}, f"1.12.1, {ninja}")
    assert named(found, "C++").value == {"path": str(path / "c++"), "version": "12.2.0"}
    assert named(found, "C").is_problem


def test_nvcc_that_cannot_be_run(path: Path) -> None:
    program(path, "nvcc", "").write_bytes(b"\x7fELF of another machine")
    nvcc = named(probe_compilers(), "nvcc")
    assert nvcc.is_problem
    assert "does not run" in nvcc.shown or "fails with status" in nvcc.shown


def test_compiler_of_many_words(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clang = program(path, "clang++", "echo 'Debian clang version 14.0.6'")
    monkeypatch.setenv("CXX", str(clang))
    assert named(probe_compilers(), "C++").value == {"path": str(clang), "version": "14.0.6"}


@pytest.mark.parametrize("script", ["exit 9", "true", "sleep 0; echo; exit 0"], ids=["fails", "silent", "empty"])
@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="the kernel module answers")
def test_broken_nvidia_smi(script: str, path: Path) -> None:
    program(path, "nvidia-smi", script)
    driver = named(probe_versions(), "driver")
    assert driver.is_problem
    assert "nvidia-smi" in driver.shown


def test_versions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    wrong = {"torch": "2.1.0", "transformers": "6.0.0", "flashinfer-python": "not a version"}

    def version(distribution: str) -> str:
        if distribution == "triton":
            raise importlib.metadata.PackageNotFoundError(distribution)
        return wrong.get(distribution) or real(distribution)

    asked = ["torch>=2.8", "transformers>=5.5,<6", "flashinfer-python<0.8,>=0.7.2; sys_platform == 'linux'"]
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda distribution: asked)
    found = probe_versions()
    assert named(found, "torch") == Probe("torch", "2.1.0", "2.1.0, expected >=2.8", True)
    assert "expected" in named(found, "transformers").shown
    assert named(found, "flashinfer").is_problem
    assert named(found, "triton") == Probe("triton", None, "not installed", False)


@pytest.mark.parametrize("name", environment.TESTED)
@pytest.mark.parametrize("build", ["", "+cu130"])
def test_version_newer_than_tested_is_marked(name: str, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = environment.TESTED[name][1]
    probe = name.removesuffix("-python")
    monkeypatch.setattr(importlib.metadata, "requires", lambda distribution: [])
    monkeypatch.setattr(importlib.metadata, "version", lambda distribution: newest + build)
    assert not named(probe_versions(), probe).is_problem
    newer = f"{newest}.post9{build}" if "post" not in newest else f"{newest}9{build}"
    monkeypatch.setattr(importlib.metadata, "version", lambda distribution: newer)
    found = named(probe_versions(), probe)
    assert (found.value, found.is_problem) == (newer, True)
    assert f"newer than {newest}, the newest tested" in found.shown


def test_driver_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "The NVIDIA driver on your system is too old (found version 9010)."
    monkeypatch.setattr(torch.cuda, "init", raising(RuntimeError(f"{said}\nPlease update it.")))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert probe_gpus() == (Probe("cuda", None, f"none: {said}", True),)


# The kernel cache.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two modules of ours in the cache, and one that is not."""
    env = pytest.importorskip("flashinfer.jit.env")
    folder = tmp_path / "cached_ops"
    ours = KernelModule("fa3", torch.float16, 64, True, False), KernelModule("fa2", torch.bfloat16, 128, False, True)
    for name in (*(module.name for module in ours), "norm"):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}.so").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(env, "FLASHINFER_JIT_DIR", folder)
    return folder


def test_cache_is_listed(cache: Path) -> None:
    found = probe_cache()
    assert not any(probe.is_problem for probe in found)
    assert named(found, "folder").value == str(cache)
    assert (named(found, "size").value, named(found, "size").shown) == (3 << 20, "3.0 MiB")
    assert named(found, "kernels").value == {
        "compiled": ["fa2, bfloat16, head_dim 128, softcap", "fa3, float16, head_dim 64, window"],
        "others": ["norm"],
    }
    assert "fa3, float16, head_dim 64 with window" in named(found, "kernels").shown
    assert isinstance(named(found, "free").value, int)


def test_cache_that_cannot_be_listed_is_not_empty(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("listdir", "scandir"):
        monkeypatch.setattr(os, function, raising(PermissionError(13, "Permission denied", str(cache))))
    found = probe_cache()
    for name in ("size", "kernels"):
        assert named(found, name).is_problem
        assert "Permission denied" in named(found, name).shown
    assert named(found, "folder").value == str(cache)
    assert named(found, "free").value


def test_little_space_is_a_problem(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "LITTLE_SPACE", 1 << 62)
    free = named(probe_cache(), "free")
    assert free.is_problem
    assert "little" in free.shown


def test_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "flashinfer-cubin version (0.1) does not match flashinfer version (0.7)"
    monkeypatch.setattr(probes, "cache_directory", raising(RuntimeError(said)))
    assert probe_cache() == (Probe("folder", None, f"flashinfer cannot be imported: {said}", True),)


# What follows from it.


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Probe]:
    """A machine with a GPU and all that FlashInfer wants, as torch and the probes see it; tests take away from it."""
    shown = {
        "versions.driver": "580.1", "versions.flashinfer": "0.7.2", "gpu.cuda:0": "GPU", "compilers.nvcc": "13.0",
        "compilers.ninja": "1.12", "compilers.C++": "12", "cache.folder": "/cache", "cache.kernels": "none",
    }  # fmt: skip
    given = {where: Probe(where.partition(".")[2], {}, text) for where, text in shown.items()}

    def section(name: str) -> tuple[Probe, ...]:
        return tuple(probe for where, probe in given.items() if where.startswith(f"{name}."))

    for name, function in zip(SECTIONS, ("probe_versions", "probe_gpus", "probe_compilers", "probe_cache")):
        monkeypatch.setattr(diagnosis, function, lambda name=name: section(name))
    for function, value in {"is_available": True, "current_device": 0, "get_device_capability": (9, 0)}.items():
        monkeypatch.setattr(torch.cuda, function, lambda *args, value=value: value)
    monkeypatch.setattr(flashinfer_backend, "unavailable_reason", lambda device: None)
    return given


BROKEN = "flashinfer cannot be imported: no"


@pytest.mark.parametrize(
    ("problems", "obstacles"),
    [
        ({}, ()),
        ({"versions.transformers": "6, newer than 5, the newest tested"}, ()),
        ({"cache.folder": BROKEN}, (BROKEN,)),
    ],
    ids=["none", "newer-version", "broken-package"],
)
def test_problems_and_obstacles(problems: dict[str, str], obstacles: tuple[str, ...], gpu: dict[str, Probe]) -> None:
    gpu.update({where: Probe(where.partition(".")[2], None, text, True) for where, text in problems.items()})
    found = hf_flashinfer_attn.doctor()
    assert (found.ready, found.backend, found.device) == (not obstacles, "flashinfer", "cuda:0")
    assert (found.obstacles, found.to_dict()["problems"]) == (obstacles, problems)
    assert ("runs FlashInfer's kernels here" in str(found)) == found.ready
    assert all(f"! {where.partition('.')[2]}" in str(found) for where in problems)


@pytest.mark.parametrize("name", ["nvcc", "ninja", "C++"])
def test_what_is_missing_to_compile(gpu: dict[str, Probe], name: str) -> None:
    gpu[f"compilers.{name}"] = Probe(name, None, "it is broken", True)
    found = hf_flashinfer_attn.doctor()
    assert (found.ready, found.obstacles) == (False, (f"{name}: it is broken",))
    gpu["cache.kernels"] = Probe("kernels", {"compiled": ["fa2, float16, head_dim 64"]}, "one")
    assert hf_flashinfer_attn.doctor().ready == (name != "ninja")
    gpu["cache.kernels"] = Probe("kernels", None, "cannot be listed", True)
    assert not hf_flashinfer_attn.doctor().ready
    gpu["versions.flashinfer"] = Probe("flashinfer", "0.7.2", "0.7.2, flashinfer-jit-cache 0.7.2")
    assert hf_flashinfer_attn.doctor().ready


def test_reason_of_the_backend_is_told(gpu: dict[str, Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    reason = ("the GPU has compute capability 7.0, FlashInfer needs 7.5 or newer", "Use another.")
    monkeypatch.setattr(flashinfer_backend, "unavailable_reason", lambda device: reason)
    found = hf_flashinfer_attn.doctor()
    assert (found.backend, found.obstacles) == ("torch", (f"{reason[0]}. {reason[1]}",))
    hf_flashinfer_attn.configure(backend="flashinfer")
    assert hf_flashinfer_attn.doctor().backend is None


def test_settings_are_told(gpu: dict[str, Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    hf_flashinfer_attn.configure(backend="torch")
    found = hf_flashinfer_attn.doctor()
    assert (found.ready, found.backend) == (False, "torch")
    assert "backend='torch' is set" in str(found)
    # As in a new process, which reads the variable.
    monkeypatch.setattr(settings, "_settings", None)
    monkeypatch.setenv(settings.BACKEND_VARIABLE, "cuda")
    found = hf_flashinfer_attn.doctor()
    assert found.backend is None
    assert "'cuda' is not known" in str(found)


def test_kernels_of_a_model_in_the_cache(cache: Path, gpu: dict[str, Probe]) -> None:
    config = transformers.MistralConfig(
        hidden_size=128, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, sliding_window=512
    )
    found = hf_flashinfer_attn.doctor(config, dtype=torch.float16)
    compiled = {kernel.name: kernel.compiled for kernel in found.kernels}
    assert compiled["fa3, float16, head_dim 64, window"] is True
    assert compiled["fa2, float16, head_dim 64"] is False
    for text in (str(found), found._repr_html_()):
        assert "3 of 4 not compiled yet" in text
        assert "fa2, float16, head_dim 64, window" in text
    assert found.to_dict()["model_kernels"] == compiled
    elsewhere = hf_flashinfer_attn.doctor(config, capability=(8, 0))
    assert {kernel.compiled for kernel in elsewhere.kernels} == {None}
    assert "compiled" not in str(elsewhere)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: no kernel image"), AssertionError("padded rows")])
def test_kernel_that_fails_its_check(gpu: dict[str, Probe], error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "measure_kernel_error", raising(error))
    steps: list[str] = []
    found = hf_flashinfer_attn.doctor(check=True, on_step=steps.append)
    assert {check.kernel for check in found.checks} == {"fa2", "fa3"}
    assert len([step for step in steps if step.startswith("checking")]) == len(found.checks) == 16
    assert all(check.problem == str(error) for check in found.checks)
    assert not found.ready
    assert "FAILED" in str(found)
    assert str(error) in str(found)


@pytest.mark.parametrize("excess", [1.3, float("nan")])
@without_gpu
def test_numbers_that_are_wrong(excess: float, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = accuracy.reference.attend

    def inexact(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        output = attend(query, *args, **options)
        return output if query.dtype == torch.float64 else output * (1 + 0.01 * excess)

    monkeypatch.setattr(accuracy.reference, "attend", inexact)
    found = hf_flashinfer_attn.doctor(check=True)
    assert all("times the error of sdpa" in str(check.problem) for check in found.checks)


# What is shown.


def test_html_is_escaped() -> None:
    gpu = Probe("cuda:0", None, "<script>alert('&')</script>", True)
    bad = KernelCheck("fa2", "float16", 64, "<b>full</b>", None, "<i>failed</i>")
    html = diagnosis.Diagnosis(
        (Section("<u>", (gpu,)),), "cuda:0", "flashinfer", ("<a href='x'>",), None, (), (bad,)
    )._repr_html_()
    for tag in ("<script", "<b>full", "<i>", "<u>", "<a "):
        assert tag not in html
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in html
    assert "&lt;i&gt;failed" in html


def test_html_of_a_diagnosis_has_everything(model_folder: Path) -> None:
    html = hf_flashinfer_attn.doctor(model_folder, capability=(9, 0))._repr_html_()
    for fact in ("Gemma2Model", "softcap 2", TORCH, "nvcc", "backend"):
        assert fact in html
    # Four sections, layers, facts about the model, the backend.
    assert html.count("<table") == html.count("</table>") == 7


def test_html_of_a_trace() -> None:
    call = AttentionCall("Layer<0>", "full", "flashinfer-fa2", 32, 64, "a & b")
    html = Trace([call], layouts=1, plans=2)._repr_html_()
    for fact in ("Layer&lt;0&gt;", "32 -&gt; 64", "a &amp; b", "layouts 1, host copies 0, plans 2"):
        assert fact in html
    many = Trace([call] * 250)._repr_html_()
    assert many.count("<tr>") == 101
    assert "and 150 more calls" in many


def test_table_without_a_head() -> None:
    assert "<thead>" not in html_table((), [("a",)])
    assert html_table(("x",), [("a",)], title="<t>", note="1\n2").count("<br>") == 1


@pytest.mark.gpu
def test_doctor_on_a_gpu() -> None:
    found = hf_flashinfer_attn.doctor(check=True)
    assert found.ready, str(found)
    assert found.backend == "flashinfer"
    assert {check.problem for check in found.checks} == {None}
    (plans,) = (section for section in found.sections if section.name == "plans")
    assert {probe.value for probe in plans.probes} == {"recorded arguments"}
