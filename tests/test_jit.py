"""Kernels that are not compiled yet: compiled, served around or refused, with real build processes.

The compiler is a stand-in that writes empty files; FlashInfer's build files, ninja, locks and threads are real.
What the kernels compute is a matter of the GPU tests, at the end.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from paired_models import T5_IS_ON_THE_INTERFACE
from transformers import BertConfig, BertModel, Gemma2Config, ModernBertConfig, T5Config

import hf_flashinfer_attn
from hf_flashinfer_attn import BackendUnavailableError, UnsupportedAttentionError, configure
from hf_flashinfer_attn.attention import select
from hf_flashinfer_attn.attention.select import KernelPendingError, compiling_reason
from hf_flashinfer_attn.integration.flash_api import flash_attn_varlen_func
from hf_flashinfer_attn.kernels import flashinfer, jit, modules
from hf_flashinfer_attn.kernels import torch_ragged as reference
from hf_flashinfer_attn.kernels.biased import biased_module_arguments
from hf_flashinfer_attn.kernels.modules import KernelModule, cache_directory
from hf_flashinfer_attn.kernels.wrapper_pool import PlanKey
from hf_flashinfer_attn.ragged.layout import RaggedLayout
from hf_flashinfer_attn.settings import Settings
from hf_flashinfer_attn.tools.kernel_warmup import warmup
from hf_flashinfer_attn.tools.model_plan import modules_of, plan_of_config

Log = Callable[[], list[str]]
needs_flashinfer = pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="FlashInfer's build files come from FlashInfer"
)
PLAIN = KernelModule("fa2", torch.float16, 64, window=False, softcap=False)
MODULES = (
    PLAIN,
    KernelModule("fa2", torch.bfloat16, 128, window=True, softcap=True),
    KernelModule("fa3", torch.float16, 64, window=False, softcap=False),
    KernelModule("fa3", torch.bfloat16, 256, window=True, softcap=False),
    KernelModule("fa2", torch.float16, 64, window=False, softcap=False, biased=True),
)
# head_dim 32
BERT = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50)

_NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0 ;;
  *--list-gpu-arch*) echo compute_90; exit 0 ;;
esac
root="{root}"
while [ -e "$root/closed" ]; do sleep 0.02; done
while [ $# -gt 0 ]; do
  case "$1" in
    -o) output="$2"; shift ;;
    -c) source="$2"; shift ;;
    -MF) depfile="$2"; shift ;;
  esac
  shift
done
case "$source" in
  *"$(cat "$root/broken" 2>/dev/null || echo none)"*) echo "$source(7): error: no such thing"; exit 2 ;;
esac
echo "$source" >> "$root/compiled"
echo "$output: $source" > "$depfile"
: > "$output"
"""
_LINKER = """#!/bin/sh
while [ $# -gt 0 ]; do case "$1" in -o) : > "$2" ;; esac; shift; done
"""


class Toolkit:
    """A CUDA toolkit whose compiler writes empty files, held up and broken as a test wants."""

    def __init__(self, root: Path) -> None:
        self._programs, self._closed, self._broken = root / "cuda" / "bin", root / "closed", root / "broken"
        self.root, self._compiled = root, root / "compiled"
        self._programs.mkdir(parents=True)
        for name, text in (("nvcc", _NVCC.replace("{root}", str(root))), ("c++", _LINKER)):
            (self._programs / name).write_text(text)
            (self._programs / name).chmod(0o755)
        self.environment = {
            "CUDA_HOME": str(root / "cuda"),
            "CXX": str(self._programs / "c++"),
            "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
            "FLASHINFER_WORKSPACE_BASE": str(root),
            # ninja comes with FlashInfer, into the environment's own folder.
            "PATH": os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)]),
        }

    def hold(self) -> None:
        self._closed.touch()

    def release(self) -> None:
        self._closed.unlink(missing_ok=True)

    def break_for(self, part_of_a_path: str) -> None:
        self._broken.write_text(part_of_a_path)

    def mend(self) -> None:
        self._broken.unlink()

    @property
    def compiled(self) -> list[str]:
        return self._compiled.read_text().split() if self._compiled.exists() else []


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toolkit]:
    pytest.importorskip("flashinfer")
    from flashinfer.jit import core, cpp_ext, env

    made = Toolkit(tmp_path)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("FLASHINFER_NVCC", "FLASHINFER_DISABLE_JIT", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    # Read when FlashInfer was imported, for the sake of some other test.
    for name, folder in (("WORKSPACE", ""), ("JIT", "cached_ops"), ("GEN_SRC", "generated")):
        monkeypatch.setattr(env, f"FLASHINFER_{name}_DIR", tmp_path / "kernels" / folder)
    # Nor may kernels be found that came with FlashInfer.
    monkeypatch.setattr(env, "FLASHINFER_AOT_DIR", tmp_path / "nothing")
    monkeypatch.setattr(env, "FLASHINFER_AOT_DIRS", (tmp_path / "nothing",))
    monkeypatch.setattr(env, "FLASHINFER_AOT_PROVIDERS", ())
    monkeypatch.setattr(core.current_compilation_context, "TARGET_CUDA_ARCHS", {(9, "0a")})
    # What this process knows of kernels in other folders, and FlashInfer of other toolkits.
    forget = [known.clear for known in (jit._ready, jit._locks, jit._failed, jit._missing)]
    forget += [cpp_ext.get_cuda_path.cache_clear, cpp_ext.get_cuda_version.cache_clear]
    for forget_one in forget:
        forget_one()
    yield made
    made.release()
    wait_until(lambda: not any(lock.locked() for lock in jit._locks.values()))
    for forget_one in forget:
        forget_one()


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that FlashInfer runs here: its plans are made by nobody, and its kernels are torch's."""

    class Plan:
        order, in_graph = None, False

        def __init__(self, layout: RaggedLayout, key: PlanKey, left: int | None, right: int | None) -> None:
            softcap = key.softcap or None
            self.compute = functools.partial(
                reference.attend, layout=layout, left=left, right=right, sm_scale=key.sm_scale, softcap=softcap
            )

        def run(self, query, key, value, output, bias=None, sinks=None) -> None:
            output.copy_(self.compute(query, key, value))

    monkeypatch.setattr(flashinfer, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(flashinfer, "make_plan", Plan)
    monkeypatch.setattr(select, "SMALL_LOGITS", 0)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    caplog.set_level(logging.WARNING, logger="hf_flashinfer_attn")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "hf_flashinfer_attn"]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def decide(settings: Settings, *, of_graph: bool = False) -> str | None:
    return compiling_reason(PLAIN, settings, in_graph=of_graph)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_is_found_where_flashinfer_builds_it(toolkit: Toolkit, module: KernelModule) -> None:
    assert not modules.is_compiled(module)
    assert not jit.is_up_to_date(module)
    assert jit.compile_module(module) > 0
    assert modules.compiled_modules() == (module.name,)
    assert modules.compiled_library(module) == cache_directory() / module.name / f"{module.name}.so"
    assert jit.is_up_to_date(module)
    spec = module.spec()
    assert (spec.name, spec.is_compiled) == (module.name, True)
    # FlashInfer itself has nothing left to do.
    count = len(toolkit.compiled)
    spec.build()
    assert len(toolkit.compiled) == count == sum(source.suffix == ".cu" for source in spec.sources)
    # What is there may be of another time.
    next((cache_directory() / module.name).glob("*.o")).unlink()
    assert modules.is_compiled(module)
    assert not jit.is_up_to_date(module)


def test_flashinfer_asks_for_the_module_of_that_name(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    import flashinfer.prefill as prefill
    from flashinfer.jit import core

    asked: list[str] = []

    def build_and_load(spec: core.JitSpec) -> None:
        asked.append(spec.name)
        raise InterruptedError

    monkeypatch.setattr(core.JitSpec, "build_and_load", build_and_load)
    for module in MODULES:
        load, arguments = prefill.get_batch_prefill_module, module.arguments
        if module.biased:
            load = prefill.get_customize_batch_prefill_module
            arguments = biased_module_arguments(module.dtype, module.head_dim)
        with pytest.raises(InterruptedError):
            load(module.kernel, *arguments)
    assert asked == [module.name for module in MODULES]


def test_a_spec_without_ninja_is_built_by_flashinfer(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = mock.Mock(spec=["build", "is_compiled", "lock_path"], is_compiled=False, lock_path=toolkit.root / "lock")
    library = cache_directory() / PLAIN.name / f"{PLAIN.name}.so"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(KernelModule, "spec", lambda module: spec)
    assert not jit.is_up_to_date(PLAIN)
    spec.build.return_value = None
    jit.compile_module(PLAIN)
    spec.build.side_effect = RuntimeError("no such toolchain")
    with pytest.raises(BackendUnavailableError, match=r"\(fa2, float16, head_dim 64\) cannot be built: no such toolch"):
        jit.compile_module(PLAIN)


def test_names_say_what_a_module_is() -> None:
    assert [str(module) for module in MODULES] == [
        "fa2, float16, head_dim 64",
        "fa2, bfloat16, head_dim 128, window, softcap",
        "fa3, float16, head_dim 64",
        "fa3, bfloat16, head_dim 256, window",
        "fa2, float16, head_dim 64, bias",
    ]
    with pytest.raises(ValueError, match="a bias with 'fa2' alone"):
        KernelModule("fa3", torch.float16, 64, window=False, softcap=False, biased=True)


@pytest.mark.parametrize(
    ("left", "softcap", "window"), [(None, None, False), (3, None, True), (9, 5.0, False), (8, 5.0, True)]
)
def test_a_window_that_no_row_reaches_needs_no_kernel_of_its_own(
    left: int | None, softcap: float | None, window: bool
) -> None:
    layout, nothing = RaggedLayout.from_lengths([4, 10], [4, 10]), RaggedLayout.from_lengths([0], [0])
    key = PlanKey(
        "fa2", 2, 2, 128, torch.bfloat16, False, -1, 0.1, softcap or 0.0, torch.device("cpu"), 0, False, False
    )
    expected = KernelModule("fa2", torch.bfloat16, 128, window, softcap is not None)
    assert flashinfer.module_of(layout, key, left) == expected
    assert flashinfer.module_of(layout, replace(key, kernel="auto"), left) is None
    assert flashinfer.module_of(nothing, key, left) is None


def test_many_threads_wait_for_one_compiler_and_one_voice_speaks(
    toolkit: Toolkit, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "HEARTBEAT", 0.05)
    toolkit.hold()
    threads = [threading.Thread(target=jit.require, args=(PLAIN,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(log()) >= 3)
    assert not jit.is_ready(PLAIN)
    toolkit.release()
    for thread in threads:
        thread.join(30)
    assert jit.is_ready(PLAIN)
    assert len(toolkit.compiled) == len(set(toolkit.compiled)) == 10
    first, *beats, last = log()
    assert first.startswith("compiling FlashInfer's kernel (fa2, float16, head_dim 64) on its first use")
    assert str(jit.log_of(PLAIN)) in first
    assert beats
    still = "still compiling FlashInfer's kernel (fa2, float16, head_dim 64): 0 s"
    assert all(beat.startswith(still) for beat in beats)
    assert last.startswith("compiled FlashInfer's kernel (fa2, float16, head_dim 64) in ")
    assert last.endswith("11 of 11 files")
    # Nor is it looked for again.
    monkeypatch.setattr(jit, "is_up_to_date", None)
    jit.require(PLAIN)


def test_an_interrupted_compile_can_be_taken_up(toolkit: Toolkit) -> None:
    with mock.patch.object(jit, "compile_module", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        jit.require(PLAIN)
    assert not jit.is_pending(PLAIN)
    jit.require(PLAIN)
    assert len(toolkit.compiled) == 10


def test_what_flashinfer_compiles_by_itself_is_spoken_of(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "HEARTBEAT", 0.02)
    monkeypatch.setattr(jit, "_watched", set())
    with jit.watched("auto, float16"):
        wait_until(lambda: len(log()) >= 2)
    assert all(line.startswith("FlashInfer is still preparing a kernel (auto, float16): 0 s") for line in log())
    count = len(log())
    with jit.watched("auto, float16"):
        time.sleep(0.1)
    assert len(log()) == count
    message = r"\(auto, bfloat16\) cannot be built: Ninja"
    with pytest.raises(BackendUnavailableError, match=message), jit.watched("auto, bfloat16"):
        raise RuntimeError("Ninja build failed. Ninja output: ...")


def test_what_was_compiled_before_is_not_spoken_of(toolkit: Toolkit, log: Log) -> None:
    jit.compile_module(PLAIN)
    jit.require(PLAIN)
    assert log() == []


def test_a_failed_compile_gives_its_log_and_is_tried_again_after_configure(toolkit: Toolkit, log: Log) -> None:
    toolkit.break_for("ragged_kernel_mask_1")
    pattern = rf"\(fa2, float16, head_dim 64\) failed after \d+ s: error: no such thing; the log is {jit.log_of(PLAIN)}"
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match=pattern) as error:
            jit.require(PLAIN)
        count = len(toolkit.compiled)
    assert "hf-flashinfer-attn doctor" in str(error.value)
    assert "configure(backend='torch')" in str(error.value)
    assert "ragged_kernel_mask_1.cu(7): error: no such thing" in jit.log_of(PLAIN).read_text()
    assert [line.partition(" ")[0] for line in log()] == ["compiling"]
    toolkit.mend()
    with pytest.raises(BackendUnavailableError):
        jit.require(PLAIN)
    assert len(toolkit.compiled) == count
    configure()
    jit.require(PLAIN)
    assert len(toolkit.compiled) == 10


# Variables, with {root} for a folder of toolkits, and the nvcc that FlashInfer would run.
NVCC_CASES: dict[str, tuple[dict[str, str], str | None]] = {
    "named": ({"FLASHINFER_NVCC": "{root}/other/bin/nvcc", "CUDA_HOME": "{root}/home"}, "other/bin/nvcc"),
    "named-and-missing": ({"FLASHINFER_NVCC": "/nowhere/nvcc", "CUDA_HOME": "{root}/home"}, None),
    "named-on-path": ({"FLASHINFER_NVCC": "nvcc", "PATH": "{root}/on_path/bin"}, "on_path/bin/nvcc"),
    "home": ({"CUDA_HOME": "{root}/home", "PATH": "{root}/on_path/bin"}, "home/bin/nvcc"),
    "path-variable": ({"CUDA_PATH": "{root}/home", "PATH": "{root}/on_path/bin"}, "home/bin/nvcc"),
    "home-before-path-variable": ({"CUDA_HOME": "{root}/home", "CUDA_PATH": "{root}/other"}, "home/bin/nvcc"),
    "empty-home": ({"CUDA_HOME": "", "CUDA_PATH": "{root}/other"}, "other/bin/nvcc"),
    "home-without": ({"CUDA_HOME": "{root}/empty", "PATH": "{root}/on_path/bin"}, None),
    "path-variable-without": ({"CUDA_PATH": "{root}/empty", "PATH": "{root}/on_path/bin"}, None),
    "home-without-path-variable-with": ({"CUDA_HOME": "{root}/empty", "CUDA_PATH": "{root}/other"}, None),
    "path": ({"PATH": "{root}/on_path/bin"}, "on_path/bin/nvcc"),
    "path-not-in-bin": ({"PATH": "{root}/loose"}, None),
    "default": ({"_DEFAULT_HOME": "{root}/home"}, "home/bin/nvcc"),
    "none": ({}, None),
}


@pytest.fixture
def toolkits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders with and without an nvcc, and an environment that names none of them."""
    for name in ("home/bin", "other/bin", "on_path/bin", "loose"):
        nvcc = tmp_path / name / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text("#!/bin/sh")
        nvcc.chmod(0o755)
    for name in ("empty", "tools"):
        (tmp_path / name).mkdir()
    # FlashInfer calls it, and nothing else may be found beside it.
    if (which := shutil.which("which")) is not None:
        (tmp_path / "tools" / "which").symlink_to(which)
    for name in ("FLASHINFER_NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    monkeypatch.setattr(jit, "_DEFAULT_HOME", str(tmp_path / "empty"))
    return tmp_path


@pytest.mark.parametrize(("variables", "expected"), NVCC_CASES.values(), ids=NVCC_CASES)
def test_nvcc_is_that_of_flashinfer_and_decides_whether_it_is_available(
    variables: dict[str, str], expected: str | None, toolkits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ((name, value.format(root=toolkits)) for name, value in variables.items()):
        if name == "_DEFAULT_HOME":
            monkeypatch.setattr(jit, name, value)
        else:
            monkeypatch.setenv(name, f"{value}{os.pathsep}{toolkits / 'tools'}" if name == "PATH" else value)
    found = jit.nvcc_path()
    assert found == (None if expected is None else toolkits / expected)
    # Where the default is another folder, FlashInfer cannot be asked.
    asks = not {"FLASHINFER_NVCC", "_DEFAULT_HOME"} & variables.keys() and bool(variables)
    if asks and importlib.util.find_spec("flashinfer") is not None and (toolkits / "tools" / "which").exists():
        theirs = Path(f"{importlib.import_module('flashinfer.jit.cpp_ext').get_cuda_path.__wrapped__()}/bin/nvcc")
        assert found == (theirs if theirs.is_file() else None)
    installed = {"flashinfer": object(), "flashinfer_jit_cache": None}
    monkeypatch.setattr(importlib.util, "find_spec", installed.get)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    # Past its cache, which outlives a test.
    reason = flashinfer.unavailable_reason.__wrapped__(torch.device("cuda"))
    assert reason == (None if expected is not None else (jit.NO_NVCC, jit.GET_NVCC))
    installed["flashinfer_jit_cache"] = object()
    assert flashinfer.unavailable_reason.__wrapped__(torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CUDA_HOME", "/nowhere", "no nvcc.*Install the CUDA toolkit"),
        ("PATH", "/nowhere", "no ninja.*pip install ninja"),
        ("FLASHINFER_DISABLE_JIT", "1", "FLASHINFER_DISABLE_JIT forbids.*Unset"),
    ],
)
@pytest.mark.parametrize("mode", ["wait", "background"])
def test_what_is_missing_is_named(
    toolkit: Toolkit, variable: str, value: str, message: str, mode, log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    settings = configure(jit=mode)
    if mode == "wait":
        with pytest.raises(BackendUnavailableError, match=message):
            jit.require(PLAIN)
        return
    assert decide(settings) is not None
    wait_until(lambda: not jit.is_pending(PLAIN))
    assert decide(settings) is not None
    wait_until(lambda: len(log()) == 2)
    assert "attention stays on the torch backend" in log()[1]


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "op"])
def test_in_the_background_torch_serves_and_then_flashinfer(toolkit: Toolkit, log: Log, traced: bool) -> None:
    torch.manual_seed(0)
    model = BertModel._from_config(BERT, attn_implementation="flashinfer", dtype=torch.float16).eval()
    ids, mask = torch.randint(0, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, 5:] = mask[2, 2:] = 0
    configure(jit="background")
    forward = torch.compile(model, backend="eager") if traced else model
    toolkit.hold()
    outputs, traces = [], []
    for _ in range(3):
        with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
            outputs.append(forward(ids, attention_mask=mask).last_hidden_state[mask.bool()])
        traces.append(trace)
        if len(traces) == 2:
            toolkit.release()
            wait_until(lambda: jit.is_ready(PLAIN))
    assert [trace.kernels for trace in traces] == [("torch",), ("torch",), ("flashinfer-fa2",)]
    assert traces[1].fallbacks == ("its kernel (fa2, float16, head_dim 64) is being compiled",)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    wait_until(lambda: len(log()) == 2)
    assert "in the background; attention runs on the torch backend until" in log()[0]
    assert "attention switches to it" in log()[1]
    assert len(toolkit.compiled) == 10


@pytest.mark.usefixtures("a_gpu")
def test_packed_calls_are_served_around_too(toolkit: Toolkit) -> None:
    configure(jit="background")
    toolkit.hold()
    side, cu_seqlens = torch.randn(6, 2, 64, dtype=torch.float16), torch.tensor([0, 4, 6], dtype=torch.int32)
    with hf_flashinfer_attn.trace() as trace:
        first = flash_attn_varlen_func(side, side, side, cu_seqlens, cu_seqlens)
        toolkit.release()
        wait_until(lambda: jit.is_ready(PLAIN))
        second = flash_attn_varlen_func(side, side, side, cu_seqlens, cu_seqlens)
    assert trace.calls[0].kernel == "torch"
    assert "being compiled" in str(trace.calls[0].reason)
    assert trace.calls[-1].kernel == "flashinfer-fa2"
    assert torch.equal(first, second)


def test_a_library_that_cannot_be_checked_is_reported_at_once(
    toolkit: Toolkit, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    jit.compile_module(PLAIN)
    monkeypatch.setenv("PATH", "/nowhere")
    reason = decide(Settings(jit="background"))
    assert reason is not None
    assert "ninja" in reason
    assert not jit.is_pending(PLAIN)
    assert [line for line in log() if "attention stays on the torch backend" in line] == log()[-1:]


def test_nothing_is_kept_from_those_who_must_not_fall_back(toolkit: Toolkit) -> None:
    toolkit.hold()
    for settings in (Settings(backend="flashinfer", jit="background"), Settings(strict=True, jit="background")):
        # Compiled and waited for when the call is planned.
        assert decide(settings) is None
    background = Settings(jit="background")
    with jit.waiting():
        assert decide(background) is None
    assert decide(background) is not None
    with pytest.raises(KernelPendingError, match=r"a captured graph of attention: its kernel .* is being compiled"):
        decide(background, of_graph=True)
    toolkit.release()
    wait_until(lambda: jit.is_ready(PLAIN))
    assert decide(background, of_graph=True) is None


def test_never_compiles_nothing(toolkit: Toolkit, log: Log) -> None:
    reason = "its kernel (fa2, float16, head_dim 64) is not compiled, and jit='never' forbids to compile it"
    settings = configure(jit="never")
    assert [decide(settings) for _ in range(2)] == [reason] * 2
    assert log() == [f"falling back to torch attention: {reason}"]
    with pytest.raises(BackendUnavailableError, match=r"jit='never'.*warmup --model"):
        decide(Settings(backend="flashinfer", jit="never"))
    with pytest.raises(UnsupportedAttentionError, match=r"strict=True forbids.*warmup --model"):
        decide(Settings(strict=True, jit="never"))
    with pytest.raises(BackendUnavailableError, match="jit='never'"):
        jit.require(PLAIN)
    with pytest.raises(UnsupportedAttentionError) as error:
        decide(settings, of_graph=True)
    assert not isinstance(error.value, KernelPendingError)
    assert toolkit.compiled == []
    # By another process, which nobody looks for in every forward.
    jit.compile_module(PLAIN)
    assert decide(settings) is not None
    assert decide(configure()) is None
    jit.require(PLAIN)


def test_a_kernel_known_to_be_ready_costs_one_look(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    jit.compile_module(PLAIN)
    settings = configure(jit="background")
    assert decide(settings) is None
    for name in ("is_up_to_date", "_lock_of", "_missing"):
        monkeypatch.setattr(jit, name, None)
    for mode in ("wait", "background", "never"):
        assert decide(Settings(jit=mode)) is decide(Settings(jit=mode))  # type: ignore[arg-type]


MODERNBERT = ModernBertConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
GEMMA2 = Gemma2Config(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
    head_dim=72, vocab_size=50, sliding_window=3,
)  # fmt: skip
needs_t5 = pytest.mark.skipif(not T5_IS_ON_THE_INTERFACE, reason="T5 computes attention by itself here")
T5 = T5Config(d_model=48, d_kv=24, d_ff=64, num_layers=1, num_heads=2, vocab_size=50, architectures=["T5EncoderModel"])


@pytest.mark.parametrize(
    ("config", "capability", "expected"),
    [
        (BERT, (9, 0), ["fa3, float16, head_dim 64", "fa2, float16, head_dim 64"]),
        (BERT, (8, 0), ["fa2, float16, head_dim 64"]),
        (MODERNBERT, (8, 0), ["fa2, float16, head_dim 64", "fa2, float16, head_dim 64, window"]),
        (GEMMA2, (8, 0), ["fa2, float16, head_dim 128, softcap", "fa2, float16, head_dim 128, window, softcap"]),
        pytest.param(T5, (9, 0), ["fa2, float16, head_dim 64, bias"], marks=needs_t5),
    ],
    ids=["bert-9.0", "bert-8.0", "modernbert-8.0", "gemma2-8.0", "t5-9.0"],
)
def test_modules_of_a_model(config, capability: tuple[int, int], expected: list[str]) -> None:
    assert sorted(map(str, modules_of(plan_of_config(config, capability=capability)))) == sorted(expected)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (BERT, {"arch": "sm90"}, r"arch='sm90'.*'9\.0a'"),
        (BERT, {"arch": "8.0", "dtypes": [torch.float32]}, r"dtypes=\(float32\): expected"),
        (BERT, {"graphs": [(1, 8)]}, "graphs are captured on this machine's GPU"),
        ("some/path", {"graphs": [(8, 1)]}, "at least one token a row"),
        (BERT, {"workers": 0}, "workers=0"),
    ],
)
def test_warmup_refuses_what_it_cannot_do(model, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        warmup(model, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_warmup_without_a_gpu_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHINFER_CUDA_ARCH_LIST", raising=False)
    with pytest.raises(BackendUnavailableError, match=r"no GPU.*--arch 9\.0a"):
        warmup(BERT)


@pytest.mark.parametrize("missing", [("cuda",), ("cudart",), ("cudart", "cuda")], ids="+".join)
def test_every_library_that_the_linker_lacks_has_its_cure(missing: tuple[str, ...], tmp_path: Path) -> None:
    log = tmp_path / "build.log"
    log.write_text("\n".join(f"/usr/bin/ld: cannot find -l{name}: No such file or directory" for name in missing))
    error = jit._failure(PLAIN, log, 3.0)
    assert f": cannot find -l{missing[0]}: No such file" in error.reason
    cured = [name for name in ("cuda", "cudart") if f"The linker found no lib{name}:" in error.way_out]
    assert sorted(cured) == sorted(missing)


def test_warmup_says_once_why_a_kernel_failed(toolkit: Toolkit, capsys: pytest.CaptureFixture[str]) -> None:
    toolkit.break_for("ragged_kernel_mask_1")
    report = warmup(BERT, dtypes=[torch.float16])
    assert not report.passed
    assert str(report).count("failed after") == sum(kernel.error is not None for kernel in report.kernels)
    told = capsys.readouterr().err
    assert ": failed\n" in told
    assert "failed after" not in told


def test_warmup_compiles_what_is_missing(toolkit: Toolkit, capsys: pytest.CaptureFixture[str]) -> None:
    report = warmup(MODERNBERT, dtypes=[torch.float16, torch.bfloat16], workers=3)
    assert report.passed
    assert len(report.kernels) == 6
    assert all(kernel.seconds is not None and kernel.error is None for kernel in report.kernels)
    assert len(toolkit.compiled) == len(set(toolkit.compiled)) == 6 * 10
    assert f"kernels of modernbert for 9.0a in {cache_directory()}" in str(report)
    assert "6 of 6 kernels are ready" in str(report)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "compiling 6 of 6 kernels, with 3 compilers at a time" in captured.err
    again = warmup(MODERNBERT, dtypes=[torch.bfloat16])
    assert [kernel.seconds for kernel in again.kernels] == [None] * 3
    assert len(toolkit.compiled) == 60
    assert capsys.readouterr().err == ""
    for kernel in report.kernels:
        jit.require(kernel.module)
    assert len(toolkit.compiled) == 60


def test_warmup_needs_nvcc_only_for_what_is_missing(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(BackendUnavailableError, match=r"no nvcc.*Install the CUDA toolkit"):
        warmup(BERT, progress=False)


def run_warmup(root: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs the command for BERT in a process of its own."""
    BERT.save_pretrained(root / "model")
    command = [sys.executable, "-m", "hf_flashinfer_attn", "warmup", "--model", str(root / "model"), *arguments]
    return subprocess.run(command, env={**os.environ, **changes}, capture_output=True, text=True, check=False)


@needs_flashinfer
def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_warmup(tmp_path, "--arch", "8.0", "--quiet", FLASHINFER_WORKSPACE_BASE=str(tmp_path / "file"))
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "flashinfer cannot be imported: " in done.stderr
    assert "FLASHINFER_WORKSPACE_BASE" in done.stderr


@needs_flashinfer
def test_the_command_line_for_another_gpu(tmp_path: Path) -> None:
    """Two processes and real programs: what compiles is kept, what does not is told, and the exit status says so."""
    if any(folder.glob("batch_prefill*") for folder in modules.aot_directories()):
        pytest.skip("FlashInfer came with compiled kernels here")
    toolkit = Toolkit(tmp_path)
    toolkit.break_for("dtype_q_bf16")
    arguments = ("--dtype", "float16,bfloat16", "--arch", "8.0", "--workers", "2")
    done = run_warmup(tmp_path, *arguments, **toolkit.environment)
    assert done.returncode == 1, done.stderr
    folder = next((tmp_path / ".cache" / "flashinfer").glob("*/80/cached_ops"))
    title, first, second, end = done.stdout.splitlines()
    assert title == f"kernels of bert for 8.0 in {folder}"
    assert first.startswith("  fa2, float16, head_dim 64: compiled in ")
    assert second.startswith("  fa2, bfloat16, head_dim 64: failed, compiling its kernel")
    (log,) = (path for path in folder.glob("*/build.log") if str(path) in second)
    assert "arch=compute_80" in log.read_text()
    assert end.startswith("1 of 2 kernels are ready")
    assert len(list(folder.glob("*/*.so"))) == 1
    assert "s] compiling 2 of 2 kernels" in done.stderr


@needs_flashinfer
@pytest.mark.skipif(
    shutil.which("nvcc") is None or "HF_FLASHINFER_ATTN_SLOW_TESTS" not in os.environ,
    reason="needs nvcc and minutes: HF_FLASHINFER_ATTN_SLOW_TESTS=1",
)
def test_a_real_compiler(tmp_path: Path) -> None:
    (tmp_path / "stub.c").touch()
    stub = ["cc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so", "stub.c"]
    subprocess.run(stub, cwd=tmp_path, check=True)
    flags = f"-L{tmp_path} -L/usr/local/cuda/lib64"
    folders = {"FLASHINFER_WORKSPACE_BASE": str(tmp_path), "FLASHINFER_EXTRA_LDFLAGS": flags}
    done = run_warmup(tmp_path, "--arch", "8.0", **folders)
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = tmp_path.glob(".cache/flashinfer/*/80/cached_ops/*/*.so")
    assert library.stat().st_size > 100_000


# Run in a process of its own, whose FlashInfer looks nowhere but in an empty folder.
_ON_A_GPU = """
import copy, logging, pathlib, sys, time
import torch
import flashinfer.jit.env
from transformers import BertConfig, BertModel
import hf_flashinfer_attn
from hf_flashinfer_attn.attention import select
from hf_flashinfer_attn.kernels import jit

flashinfer.jit.env.FLASHINFER_AOT_DIR = pathlib.Path(sys.argv[1]) / "nothing"
flashinfer.jit.env.FLASHINFER_AOT_PROVIDERS = ()
flashinfer.jit.env.FLASHINFER_AOT_DIRS = (flashinfer.jit.env.FLASHINFER_AOT_DIR,)
select.SMALL_LOGITS = 0
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("hf_flashinfer_attn").addHandler(handler)

config = BertConfig(hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=128, vocab_size=100)
torch.manual_seed(0)
eager = BertModel._from_config(copy.deepcopy(config), attn_implementation="eager").eval().cuda()
ours = BertModel._from_config(copy.deepcopy(config), attn_implementation="flashinfer", dtype=torch.float16)
ours = ours.eval().cuda()
ours.load_state_dict(eager.state_dict())
graphed = hf_flashinfer_attn.unpad(copy.deepcopy(ours), cuda_graphs=True)
traced = torch.compile(copy.deepcopy(ours))
ids, mask = torch.randint(0, 100, (4, 60), device="cuda"), torch.ones(4, 60, dtype=torch.long, device="cuda")
mask[0, 20:] = mask[3, 7:] = 0
with torch.no_grad():
    expected = eager(ids, attention_mask=mask).last_hidden_state[mask.bool()]

def check(model):
    with torch.no_grad(), hf_flashinfer_attn.trace() as trace:
        hidden = model(ids, attention_mask=mask).last_hidden_state[mask.bool()].float()
    torch.testing.assert_close(hidden, expected, rtol=0, atol=2e-2)
    return trace

hf_flashinfer_attn.configure(jit="background")
start = time.perf_counter()
first = check(ours)
waited = time.perf_counter() - start
"""
_SWITCHES = """
assert first.kernels == ("torch",) and "being compiled" in first.fallbacks[0], first
assert waited < 15, waited
assert check(graphed).kernels == check(traced).kernels == ("torch",)
assert hf_flashinfer_attn.graph_statistics(graphed).captured == 0
while check(ours).kernels == ("torch",):
    time.sleep(0.2)
switched = time.perf_counter() - start
assert set(check(ours).kernels) == set(check(traced).kernels) == {"flashinfer-fa2"}
for _ in range(2):
    assert check(graphed).kernels == ("flashinfer-fa2",)
statistics = hf_flashinfer_attn.graph_statistics(graphed)
assert (statistics.captured, statistics.replayed) == (1, 2), statistics
assert len([line for line in said if "in the background" in line]) == 1, said
assert len([line for line in said if "switches to it" in line]) == 1, said
assert not any("no CUDA graphs" in line for line in said), said
print(f"torch served at once, {waited:.1f} s; FlashInfer after {switched:.1f} s")
"""
_STAYS = """
while any(lock.locked() for lock in jit._locks.values()):
    time.sleep(0.05)
for _ in range(2):
    assert check(ours).kernels == check(graphed).kernels == check(traced).kernels == ("torch",)
assert hf_flashinfer_attn.graph_statistics(graphed).captured == 0
stays = [line for line in said if "stays on the torch backend" in line]
assert len(stays) == 1 and "build.log" in stays[0] and "failed after" in stays[0], said
assert len([line for line in said if "no CUDA graphs" in line]) == 1, said
hf_flashinfer_attn.configure(jit="wait")
try:
    check(ours)
except hf_flashinfer_attn.BackendUnavailableError as error:
    assert "build.log" in str(error) and "configure(backend='torch')" in str(error), error
else:
    raise AssertionError("expected an error")
print("failed as it should")
"""


def run_on_gpu(tmp_path: Path, script: str, **changes: str) -> str:
    environment = {**os.environ, "FLASHINFER_WORKSPACE_BASE": str(tmp_path), **changes}
    command = [sys.executable, "-c", _ON_A_GPU + script, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.gpu
def test_torch_serves_on_a_gpu_until_the_kernel_is_there(tmp_path: Path) -> None:
    assert "torch served at once" in run_on_gpu(tmp_path, _SWITCHES)


@pytest.mark.gpu
def test_torch_stays_on_a_gpu_where_the_kernel_cannot_be_compiled(tmp_path: Path) -> None:
    assert "failed as it should" in run_on_gpu(tmp_path, _STAYS, FLASHINFER_NVCC="false")


@pytest.mark.gpu
def test_warmup_of_this_machine_with_graphs(tmp_path: Path) -> None:
    BertModel._from_config(BERT).save_pretrained(tmp_path / "model")
    done = run_warmup(tmp_path, "--dtype", "float16", "--graphs", "8x400,2x16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "graphs: 2 captured in" in done.stdout
    again = warmup(BERT, dtypes=[torch.float16])
    assert again.passed
    assert all(kernel.seconds is None for kernel in again.kernels)
