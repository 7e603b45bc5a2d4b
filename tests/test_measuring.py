"""Programs that measure: run here on little, so that a GPU's time is not spent on finding out that they do not run."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from simulated_gpu import Module, Wrapper, simulated_gpu  # noqa: F401 - a fixture
from test_jit import Toolkit, needs_flashinfer, toolkit  # noqa: F401 - a fixture
from transformers import BertConfig, BertModel

from benchmarks import measure_compile_time, measure_host_time, profile_forward
from hf_flashinfer_attn import configure, unpad
from hf_flashinfer_attn.attention import select
from hf_flashinfer_attn.kernels import jit
from hf_flashinfer_attn.kernels.modules import cache_directory, compiled_modules
from hf_flashinfer_attn.ragged.triton_tokens import Launch
from hf_flashinfer_attn.tools.bench.workload import shape_config
from hf_flashinfer_attn.unpadding.graphs import GraphedForward, graphs_of
from hf_flashinfer_attn.unpadding.model_state import ModelState

SMALL = ["--layers", "1", "--shapes", "gte-small", "--sets", "single", "--repeats", "2"]
PROGRAMS = sorted(file.stem for file in Path(measure_host_time.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_imports(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")
    # Set by three of them.
    assert select.SMALL_LOGITS > 0


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for name, value in {"DEVICE": cpu, "DTYPE": torch.float32, "PLACES": {"cpu": cpu}}.items():
        monkeypatch.setattr(measure_host_time, name, value)


def test_host_time_is_measured_where_outputs_are_those_of_sdpa(on_the_cpu: None, tmp_path: Path) -> None:
    assert measure_host_time.main(["--json", str(tmp_path / "found.json"), *SMALL]) == 0
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["passed"] is True
    assert [cell["rows"] for cell in report["packing_alone"]] == [8, 64, 256]
    assert [cell["model"] for cell in report["cells"]] == ["sdpa", "graphs", "compiled_graphs"]
    for cell in report["cells"]:
        assert cell["error_against_sdpa"]["cpu"] < 1e-5
        assert min(cell["host_ms"]["cpu"], cell["in_a_row_ms"]["cpu"]) > 0
    parts = report["cells"][1]["parts_us"]["cpu"]
    assert {"packing", "spreading", "pooler", measure_host_time.REST} < set(parts)
    *each, whole = parts.values()
    assert min(each) > 0
    # Medians of two are means.
    assert sum(each) == pytest.approx(whole)


def test_what_is_wrong_is_not_timed_and_what_is_late_is_not_begun(
    on_the_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_host_time, "ERROR_BOUND", 0.0)
    assert measure_host_time.main(["--json", str(tmp_path / "found.json"), *SMALL]) == 1
    report = json.loads((tmp_path / "found.json").read_text())
    assert [cell["passed"] for cell in report["cells"]] == [False] * 3
    assert not any("host_ms" in cell for cell in report["cells"])
    assert measure_host_time.main(["--json", str(tmp_path / "found.json"), *SMALL, "--seconds", "0"]) == 1
    report = json.loads((tmp_path / "found.json").read_text())
    assert (report["cells"], len(report["skipped"])) == ([], 3)


def test_a_graph_is_timed_alone_and_its_model_stays_what_it_is_to_it(
    on_the_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for graphs: what looks at the model and sleeps, and then runs it."""
    config = shape_config("gte-small", 1)
    config._attn_implementation = "flashinfer"
    replayed: list[float] = []

    def forward(self: GraphedForward, **kwargs: Any) -> Any:
        state = self._state = self._state or ModelState(self.module)
        assert state.holds()
        time.sleep(0.01)
        graph = SimpleNamespace(replay=lambda: replayed.append(time.sleep(0.002) or 0.0), reset=lambda: None)
        self._graphs[()] = SimpleNamespace(graph=graph, memory_bytes=0)
        return type(self.module).forward(self.module, **kwargs)

    monkeypatch.setattr(GraphedForward, "__call__", forward)
    with torch.no_grad():
        model = unpad(BertModel(config).eval(), cuda_graphs=True)
        mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
        inputs = {"input_ids": torch.full((3, 9), 7) * mask, "attention_mask": mask}
        expected = model(**inputs).last_hidden_state[mask.bool()].double()
        graphs = graphs_of(model)
        assert graphs is not None
        state = graphs._state
        graphs._drop_all = graphs._graphs.clear  # type: ignore[method-assign]
        found = measure_host_time.measure_cell(model, inputs, expected, 4)
    assert found["passed"]
    assert len(replayed) == 10
    assert found["replay_ms"] >= 2
    parts = found["parts_us"]["cpu"]
    assert parts["graphs: choosing one, copies in and out"] >= 10_000
    assert 0 < parts["is the model the captured one"] < 10_000
    assert graphs._state is state


def test_a_part_is_without_the_parts_inside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(measure_host_time, "time", SimpleNamespace(perf_counter=lambda: now))
    timers = measure_host_time.Timers()
    inner = timers.timed("inner", lambda: sleep(2))

    def fail() -> None:
        sleep(1)
        inner()
        raise KeyError

    with pytest.raises(KeyError):
        timers.timed("outer", fail)()
    timers.timed("outer", inner)()
    assert timers.seconds == {"inner": 4, "outer": 1}


def test_a_profile_has_the_parts_of_this_version_and_leaves_out_launches_alone(
    simulated_gpu: type[Wrapper],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configure(backend="flashinfer")
    launched: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Module, "ragged_run", lambda module, *arguments: launched.append(module))
    config = BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
    model = BertModel._from_config(config, attn_implementation="flashinfer", dtype=torch.float16).eval()
    mask = (torch.arange(6) < torch.tensor([[6], [4], [1]])).long()
    inputs = {"input_ids": mask, "attention_mask": mask}
    with torch.no_grad():
        found = profile_forward.host_time(model, inputs, forwards=2)
        assert set(found) == {
            "attention function", "attention function, first layer", "attention function, launches aside", "the rest",
            *profile_forward.PARTS,
        }  # fmt: skip
        launch, before = Launch.__call__, len(launched)
        with profile_forward.without_launches() as calls:
            model(**inputs)
            assert Launch.__call__ is not launch
        assert calls > 0
        assert len(launched) == before
        model(**inputs)
    assert len(launched) == before + config.num_hidden_layers
    assert Launch.__call__ is launch


@needs_flashinfer
def test_kernels_are_compiled_anew_alone_and_together(
    toolkit: Toolkit,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, *_ = measure_compile_time.KERNELS
    jit.compile_module(first)
    # As if it had come with FlashInfer, too.
    from flashinfer.jit import env

    monkeypatch.setattr(env, "FLASHINFER_AOT_DIR", cache_directory())
    before, count = compiled_modules(), len(toolkit.compiled)
    assert measure_compile_time.main(["--json", str(tmp_path / "found.json"), "--workers", "2"]) == 0
    report = json.loads((tmp_path / "found.json").read_text())
    names = [str(module) for module in measure_compile_time.KERNELS]
    assert [entry["kernel"] for entry in report["alone"]] == names
    together = report["together"]
    assert sorted(entry["kernel"] for entry in together["kernels"]) == sorted(names)
    for entry in [*report["alone"], *together["kernels"]]:
        assert entry["seconds"] > 0
        assert entry["error"] is None
    sources = sum(entry["files"] - 1 for entry in report["alone"])
    assert len(toolkit.compiled) - count == 2 * sources
    assert compiled_modules() == before
    assert jit.is_up_to_date(first)


@needs_flashinfer
def test_what_does_not_compile_is_told_and_what_is_late_is_not_begun(toolkit: Toolkit, tmp_path: Path) -> None:  # noqa: F811
    arguments = ["--json", str(tmp_path / "found.json"), "--kernels", "fa2, bfloat16", "--workers", "1"]
    toolkit.break_for("ragged_kernel_mask_1")
    assert measure_compile_time.main(arguments) == 1
    report = json.loads((tmp_path / "found.json").read_text())
    for entry in (*report["alone"], *report["together"]["kernels"]):
        assert "error: no such thing" in entry["error"]
    toolkit.mend()
    assert measure_compile_time.main([*arguments, "--phases", "together"]) == 0
    assert measure_compile_time.main([*arguments, "--seconds", "0"]) == 1
    report = json.loads((tmp_path / "found.json").read_text())
    assert (report["alone"], report["together"], len(report["skipped"])) == ([], None, 2)


def test_fa3_is_for_hopper_alone() -> None:
    chosen = measure_compile_time.chosen_kernels("", ("8.0", "9.0a"))
    assert {module.kernel for module in chosen} == {"fa2"}
    assert measure_compile_time.chosen_kernels("", ("9.0a",)) == measure_compile_time.KERNELS
