"""The doctor: the real command on this machine, on machines that lack something, and what it shows."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from paired_models import decoder_config

import hf_flashinfer_attn
from hf_flashinfer_attn import settings
from hf_flashinfer_attn.html_table import html_table
from hf_flashinfer_attn.kernels import flashinfer as flashinfer_backend
from hf_flashinfer_attn.kernels.modules import KernelModule
from hf_flashinfer_attn.tools import cli, environment, probes
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
    return subprocess.run(
        [sys.executable, "-m", "hf_flashinfer_attn", "doctor", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        timeout=300,
    )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = decoder_config(
        transformers.Gemma2Config, num_hidden_layers=4, sliding_window=5, attn_logit_softcapping=2.0, head_dim=32,
        query_pre_attn_scalar=32,
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


def named(found: tuple[Probe, ...], name: str) -> Probe:
    (probe,) = (probe for probe in found if probe.name == name)
    return probe


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
    ("arguments", "message"),
    [
        (["--model", "/no/such/folder"], "there is no folder '/no/such/folder'"),
        (["--model", str(ROOT / "docs")], "cannot be read"),
    ],
    ids=["no-folder", "no-config"],
)
def test_model_that_cannot_be_read(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["doctor", *arguments]) == 1
    output = capsys.readouterr()
    assert message in output.err
    assert "config.json" in output.err
    assert output.out == ""


@pytest.mark.parametrize("arguments", [["--arch", "9.0"], ["--dtype", "float16"]], ids=["arch", "dtype"])
def test_what_to_plan_for_without_a_model(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["doctor", *arguments])
    assert exit_.value.code == 2
    assert f"argument {arguments[0]}: needs a model to plan for; add --model PATH_OR_ID" in capsys.readouterr().err
    with pytest.raises(ValueError, match="pass the model as well"):
        hf_flashinfer_attn.doctor(dtype=torch.float16)


@pytest.mark.parametrize("arch", ["hopper", "9", "9.x", ""])
def test_unknown_capability(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["doctor", "--arch", arch])
    assert exit_.value.code == 2
    assert "not a compute capability such as" in capsys.readouterr().err


# Machines that lack something. Whatever it is, every other line is there.


@without_gpu
def test_command_where_nothing_is_installed_and_the_cache_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    empty = tmp_path / "empty"
    empty.mkdir()
    ran = run_doctor(PATH=str(empty), FLASHINFER_WORKSPACE_BASE=str(file), CUDA_HOME=str(empty), CC="", CXX="")
    assert (ran.returncode, "Traceback" in ran.stderr) == (1, False)
    problems = [line[2:].partition(" ")[0] for line in ran.stdout.splitlines() if line.startswith("! ")]
    assert {"nvcc", "ninja", "C++", "C", "folder"} <= set(problems)
    assert (str(file) if HAS_FLASHINFER else "not installed") in ran.stdout
    assert TORCH in ran.stdout


def program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_broken_nvcc_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    nvcc = program(folder, "nvcc", "echo 'libfoo.so: cannot open shared object file' >&2; exit 127")
    ninja = program(folder, "ninja", "echo 1.12.1")
    program(folder, "c++", "echo 'c++ (Debian 12.2.0-14) 12.2.0'")
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CUDA_HOME", "CUDA_PATH", "FLASHINFER_NVCC", "CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    found = probe_compilers()
    assert named(found, "nvcc") == Probe(
        "nvcc", None, f"{nvcc} --version fails with status 127: libfoo.so: cannot open shared object file", True
    )
    assert named(found, "ninja") == Probe("ninja", {"path": str(ninja), "version": "1.12.1"}, f"1.12.1, {ninja}")
    assert named(found, "C++").value == {"path": str(folder / "c++"), "version": "12.2.0"}
    assert named(found, "C").is_problem


def test_nvcc_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder, "nvcc", "").write_bytes(b"\x7fELF of another machine")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_HOME", "CUDA_PATH", "FLASHINFER_NVCC"):
        monkeypatch.delenv(name, raising=False)
    nvcc = named(probe_compilers(), "nvcc")
    assert nvcc.is_problem
    assert "does not run" in nvcc.shown or "fails with status" in nvcc.shown


def test_compiler_of_many_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clang = program(tmp_path, "clang++", "echo 'Debian clang version 14.0.6'")
    monkeypatch.setenv("CXX", str(clang))
    assert named(probe_compilers(), "C++").value == {"path": str(clang), "version": "14.0.6"}


def test_versions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = probes.importlib.metadata.version
    wrong = {"torch": "2.1.0", "transformers": "6.0.0", "triton": None, "flashinfer-python": "not a version"}

    def version(distribution: str) -> str:
        if distribution in wrong and wrong[distribution] is None:
            raise probes.importlib.metadata.PackageNotFoundError(distribution)
        return wrong.get(distribution) or real(distribution)

    monkeypatch.setattr(probes.importlib.metadata, "version", version)
    asked = ["torch>=2.8", "transformers>=5.5,<6", "flashinfer-python<0.8,>=0.7.2; sys_platform == 'linux'"]
    monkeypatch.setattr(probes.importlib.metadata, "requires", lambda distribution: asked)
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


def test_newer_versions_stop_nothing(gpu: dict[str, Probe]) -> None:
    gpu["versions.transformers"] = Probe("transformers", "6", "6, newer than 5, the newest tested", True)
    diagnosis = hf_flashinfer_attn.doctor()
    assert (diagnosis.ready, diagnosis.obstacles) == (True, ())
    assert diagnosis.to_dict()["problems"] == {"versions.transformers": "6, newer than 5, the newest tested"}
    assert "! transformers" in str(diagnosis)


def test_driver_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 9010).\nPlease update it.")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    said = "none: The NVIDIA driver on your system is too old (found version 9010)."
    assert probe_gpus() == (Probe("cuda", None, said, True),)


@pytest.mark.parametrize("script", ["exit 9", "true", "sleep 0; echo; exit 0"], ids=["fails", "silent", "empty"])
def test_broken_nvidia_smi(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", script)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if not Path("/proc/driver/nvidia/version").exists():
        driver = named(probe_versions(), "driver")
        assert driver.is_problem
        assert "nvidia-smi" in driver.shown


# The kernel cache.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two modules of ours in the cache, and one that is not."""
    pytest.importorskip("flashinfer")
    folder = tmp_path / "cached_ops"
    modules = [
        KernelModule("fa3", torch.float16, 64, True, False),
        KernelModule("fa2", torch.bfloat16, 128, False, True),
    ]
    for name in (*(module.name for module in modules), "norm"):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}.so").write_bytes(bytes(1 << 20))
    environment = sys.modules["flashinfer.jit.env"]
    monkeypatch.setattr(environment, "FLASHINFER_JIT_DIR", folder)
    return folder


def test_cache_is_listed(cache: Path) -> None:
    found = probe_cache()
    assert not any(probe.is_problem for probe in found)
    assert named(found, "folder").value == str(cache)
    assert named(found, "size").value == 3 << 20
    assert named(found, "size").shown == "3.0 MiB"
    assert named(found, "kernels").value == {
        "compiled": ["fa2, bfloat16, head_dim 128, softcap", "fa3, float16, head_dim 64, window"],
        "others": ["norm"],
    }
    assert "fa3, float16, head_dim 64 with window" in named(found, "kernels").shown
    assert isinstance(named(found, "free").value, int)


def test_cache_that_cannot_be_listed_is_not_empty(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any = ".") -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    found = probe_cache()
    for name in ("size", "kernels"):
        assert named(found, name).is_problem
        assert "Permission denied" in named(found, name).shown
    assert named(found, "folder").value == str(cache)
    assert named(found, "free").value


def test_little_space_is_a_problem(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_LITTLE_SPACE", 1 << 62)
    free = named(probe_cache(), "free")
    assert free.is_problem
    assert "little" in free.shown


def test_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Path:
        raise RuntimeError("flashinfer-cubin version (0.1) does not match flashinfer version (0.7)")

    monkeypatch.setattr(probes, "cache_directory", broken)
    (folder,) = probe_cache()
    assert folder.is_problem
    assert "does not match" in folder.shown


def test_kernels_of_a_model_in_the_cache(cache: Path, gpu: dict[str, Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_flashinfer_attn.tools.model_plan._capability_here", lambda: (9, 0))
    config = transformers.MistralConfig(
        hidden_size=128, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, sliding_window=512
    )
    diagnosis = hf_flashinfer_attn.doctor(config, dtype=torch.float16)
    compiled = {kernel.name: kernel.compiled for kernel in diagnosis.kernels}
    assert compiled["fa3, float16, head_dim 64, window"] is True
    assert compiled["fa2, float16, head_dim 64"] is False
    for text in (str(diagnosis), diagnosis._repr_html_()):
        assert "3 of 4 not compiled yet" in text
        assert "fa2, float16, head_dim 64, window" in text
    assert diagnosis.to_dict()["model_kernels"] == compiled
    elsewhere = hf_flashinfer_attn.doctor(config, capability=(8, 0))
    assert {kernel.compiled for kernel in elsewhere.kernels} == {None}
    assert "compiled" not in elsewhere._kernels


# What follows from it.


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Probe]:
    """A machine with a GPU and all that FlashInfer wants; tests take away from it."""
    given = {
        "versions.driver": Probe("driver", "580.1", "580.1"),
        "versions.flashinfer": Probe("flashinfer", "0.7.2", "0.7.2"),
        "gpu.cuda:0": Probe("cuda:0", {"name": "GPU"}, "GPU"),
        "compilers.nvcc": Probe("nvcc", {}, "13.0"),
        "compilers.ninja": Probe("ninja", {}, "1.12"),
        "compilers.C++": Probe("C++", {}, "12"),
        "cache.folder": Probe("folder", "/cache", "/cache"),
        "cache.kernels": Probe("kernels", {"compiled": []}, "none"),
    }

    def section(name: str) -> tuple[Probe, ...]:
        return tuple(probe for where, probe in given.items() if where.startswith(f"{name}."))

    module = sys.modules["hf_flashinfer_attn.tools.diagnosis"]
    for name, function in zip(SECTIONS, ("probe_versions", "probe_gpus", "probe_compilers", "probe_cache")):
        monkeypatch.setattr(module, function, lambda name=name: section(name))
    monkeypatch.setattr(module, "_device_here", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(flashinfer_backend, "unavailable_reason", lambda device: None)
    return given


def test_machine_that_lacks_nothing(gpu: dict[str, Probe]) -> None:
    diagnosis = hf_flashinfer_attn.doctor()
    assert (diagnosis.ready, diagnosis.backend, diagnosis.device, diagnosis.obstacles) == (
        True, "flashinfer", "cuda:0", (),
    )  # fmt: skip
    assert "runs FlashInfer's kernels here" in str(diagnosis)
    assert diagnosis.to_dict()["problems"] == {}


@pytest.mark.parametrize("name", ["nvcc", "ninja", "C++"])
def test_what_is_missing_to_compile(gpu: dict[str, Probe], name: str) -> None:
    gpu[f"compilers.{name}"] = Probe(name, None, "it is broken", True)
    diagnosis = hf_flashinfer_attn.doctor()
    assert (diagnosis.ready, diagnosis.obstacles) == (False, (f"{name}: it is broken",))
    gpu["cache.kernels"] = Probe("kernels", {"compiled": ["fa2, float16, head_dim 64"]}, "one")
    assert hf_flashinfer_attn.doctor().ready == (name != "ninja")
    gpu["cache.kernels"] = Probe("kernels", None, "cannot be listed", True)
    assert not hf_flashinfer_attn.doctor().ready
    gpu["versions.flashinfer"] = Probe("flashinfer", "0.7.2", "0.7.2, flashinfer-jit-cache 0.7.2")
    assert hf_flashinfer_attn.doctor().ready


def test_package_that_fails_is_an_obstacle(gpu: dict[str, Probe]) -> None:
    gpu["cache.folder"] = Probe("folder", None, "flashinfer cannot be imported: no", True)
    assert hf_flashinfer_attn.doctor().obstacles == ("flashinfer cannot be imported: no",)


def test_reason_of_the_backend_is_told(gpu: dict[str, Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    reason = ("the GPU has compute capability 7.0, FlashInfer needs 7.5 or newer", "Use another.")
    monkeypatch.setattr(flashinfer_backend, "unavailable_reason", lambda device: reason)
    diagnosis = hf_flashinfer_attn.doctor()
    assert (diagnosis.backend, diagnosis.obstacles) == ("torch", (f"{reason[0]}. {reason[1]}",))
    hf_flashinfer_attn.configure(backend="flashinfer")
    assert hf_flashinfer_attn.doctor().backend is None


def test_settings_are_told(gpu: dict[str, Probe], monkeypatch: pytest.MonkeyPatch) -> None:
    hf_flashinfer_attn.configure(backend="torch")
    diagnosis = hf_flashinfer_attn.doctor()
    assert (diagnosis.ready, diagnosis.backend) == (False, "torch")
    assert "backend='torch' is set" in str(diagnosis)
    monkeypatch.setattr(settings, "_settings", None)
    monkeypatch.setenv(settings.BACKEND_VARIABLE, "cuda")
    diagnosis = hf_flashinfer_attn.doctor()
    assert diagnosis.backend is None
    assert "'cuda' is not known" in str(diagnosis)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: no kernel image"), AssertionError("padded rows")])
def test_kernel_that_fails_its_check(gpu: dict[str, Probe], error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("hf_flashinfer_attn.tools.accuracy.measure_kernel_error", fail)
    steps: list[str] = []
    diagnosis = hf_flashinfer_attn.doctor(check=True, on_step=steps.append)
    assert {check.kernel for check in diagnosis.checks} == {"fa2", "fa3"}
    assert len([step for step in steps if step.startswith("checking")]) == len(diagnosis.checks) == 16
    assert all(check.problem == str(error) for check in diagnosis.checks)
    assert not diagnosis.ready
    assert "FAILED" in str(diagnosis)
    assert str(error) in str(diagnosis)


@pytest.mark.parametrize("excess", [1.3, float("nan")])
@without_gpu
def test_numbers_that_are_wrong(excess: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_flashinfer_attn.kernels import torch_ragged as reference
    from hf_flashinfer_attn.tools import accuracy

    attend = reference.attend

    def inexact(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        output = attend(query, *args, **options)
        return output if query.dtype == torch.float64 else output * (1 + 0.01 * excess)

    monkeypatch.setattr(accuracy.reference, "attend", inexact)
    diagnosis = hf_flashinfer_attn.doctor(check=True)
    assert all("times the error of sdpa" in str(check.problem) for check in diagnosis.checks)


# What is shown.


def test_html_is_escaped(gpu: dict[str, Probe]) -> None:
    gpu["gpu.cuda:0"] = Probe("cuda:0", None, "<script>alert('&')</script>", True)
    bad = KernelCheck("fa2", "float16", 64, "<b>full</b>", None, "<i>failed</i>")
    diagnosis = hf_flashinfer_attn.doctor()
    diagnosis = type(diagnosis)(
        (Section("<u>", diagnosis.sections[1].probes),), "cuda:0", "flashinfer", ("<a href='x'>",), None, (), (bad,)
    )
    html = diagnosis._repr_html_()
    for tag in ("<script", "<b>full", "<i>", "<u>", "<a "):
        assert tag not in html
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in html
    assert "&lt;i&gt;failed" in html


def test_html_of_a_diagnosis_has_everything(model_folder: Path) -> None:
    diagnosis = hf_flashinfer_attn.doctor(model_folder, capability=(9, 0))
    html = diagnosis._repr_html_()
    for fact in ("Gemma2Model", "softcap 2", TORCH, "nvcc", "backend"):
        assert fact in html
    assert html.count("<table") == html.count("</table>") == 3


def test_html_of_a_trace() -> None:
    call = AttentionCall("Layer<0>", "full", "flashinfer-fa2", 32, 64, "a & b")
    html = Trace([call], layouts=1, plans=2)._repr_html_()
    for fact in ("Layer&lt;0&gt;", "32 -&gt; 64", "a &amp; b", "layouts 1, host copies 0, plans 2"):
        assert fact in html
    many = Trace([copy.copy(call) for _ in range(250)])._repr_html_()
    assert many.count("<tr>") == 101
    assert "and 150 more calls" in many


def test_table_without_a_head() -> None:
    assert "<thead>" not in html_table((), [("a",)])
    assert html_table(("x",), [("a",)], title="<t>", note="1\n2").count("<br>") == 1


def test_config_in_place_of_a_path() -> None:
    config = transformers.BertConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
    plan = hf_flashinfer_attn.doctor(config, capability=(8, 0)).plan
    assert plan is not None
    assert plan.layers[0].kernels == ("fa2", "sdpa")
    with pytest.raises(UnreadableModelError, match="there is no folder"):
        hf_flashinfer_attn.doctor("./no/such/folder")


@pytest.mark.gpu
def test_doctor_on_a_gpu() -> None:
    diagnosis = hf_flashinfer_attn.doctor(check=True)
    assert diagnosis.ready, str(diagnosis)
    assert diagnosis.backend == "flashinfer"
    assert {check.problem for check in diagnosis.checks} == {None}
    (plans,) = (section for section in diagnosis.sections if section.name == "plans")
    assert {probe.value for probe in plans.probes} == {"recorded arguments"}
