"""Where the time of one forward goes, on the host and on the device: gte-small's shape, a batch of 64 from `chat`.

    python benchmarks/profile_forward.py --json benchmarks/results/profile_forward.json

Host time is that of the attention function, called as transformers' layers call it, 12 times per forward: in all, and
by part, from timers around the functions that exist in this version; and in all once more with the three launches left
out, which is what our own code costs, torch's allocations included. It never waits for the GPU, whose work is little.
The device's time by kernel is torch.profiler's, over one forward.

The program also runs on earlier checkouts, first on PYTHONPATH and named by `--label`; it leaves out what they lack.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

import hf_flashinfer_attn

GTE_SMALL = BertConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536)
PACKAGE = Path(hf_flashinfer_attn.__file__).parent
# Parts of the attention function, by the place where their caller looks them up; those of other versions are left out.
PARTS = {
    "gather": ("kernels.pad_head_dim:GatherQkv.__call__", "movement:Packer.__call__", "layout:RaggedSide.gather"),
    "kernel": (
        "kernels.flashinfer:KernelPlan.run",
        "backends.flashinfer:KernelPlan.run",
        "attention:flashinfer.attend",
    ),
    "scatter": (
        "kernels.pad_head_dim:ScatterOutput.__call__",
        "movement:Unpacker.__call__",
        "layout:RaggedSide.scatter",
    ),
}
# The class whose calls launch Triton's kernels; the class that holds FlashInfer's launch, or its compiled module.
TRITON = ("ragged.triton_tokens:Launch", "kernels:_Launch")
FLASHINFER = ("kernels.wrapper_pool:_Replay", "backends.recorded_calls:CallRecorder", "backends.flashinfer:_Replay")
CHAT_LENGTHS = ("tools.bench.workload:chat_lengths", "bench.workload:chat_lengths")
DESCRIBE_ENVIRONMENT = ("tools.environment:describe_environment", "environment:describe_environment")


def batch_of(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = first_of(CHAT_LENGTHS)(rows, generator)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(1000, 30_000, mask.shape, generator=generator) * mask
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


def model_of(implementation: str) -> BertModel:
    torch.manual_seed(0)
    model = BertModel._from_config(copy.deepcopy(GTE_SMALL), attn_implementation=implementation)
    return model.to("cuda", torch.float16).eval()


def owner_of(path: str) -> tuple[Any, str] | None:
    """Returns the owner and the name of a function or class; None if this version has none of this path."""
    module, _, attributes = path.partition(":")
    file = PACKAGE.joinpath(*module.split("."))
    # Not left to the import: where another checkout is installed, that would supply what this one lacks.
    if not (file.with_suffix(".py").is_file() or (file / "__init__.py").is_file()):
        return None
    owner = importlib.import_module(f"{PACKAGE.name}.{module}")
    *parents, name = attributes.split(".")
    for parent in parents:
        owner = getattr(owner, parent, None)
    return None if owner is None or not hasattr(owner, name) else (owner, name)


def first_of(paths: tuple[str, ...]) -> Any:
    """Returns what the first of some paths names in this version."""
    found = next((found for path in paths if (found := owner_of(path)) is not None), None)
    if found is None:
        raise LookupError(f"none of {paths} in {hf_flashinfer_attn.__file__}")
    return getattr(*found)


@contextmanager
def timers(seconds: dict[str, list[float]]) -> Iterator[None]:
    """Times the parts of the attention function for as long as the block lasts."""
    replaced = []

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[part].append(time.perf_counter() - start)
            return result

        return run

    for part, paths in PARTS.items():
        for path in paths:
            if (found := owner_of(path)) is not None:
                owner, name = found
                original = getattr(owner, name)
                replaced.append((owner, name, original))
                setattr(owner, name, timed(part, original))
    try:
        yield
    finally:
        for owner, name, original in replaced:
            setattr(owner, name, original)


class _Unlaunched:
    """Stands for FlashInfer's compiled module, but for launching its attention."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def ragged_run(self, *arguments: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@contextmanager
def without_launches() -> Iterator[int]:
    """Leaves out the launches of gather, attention and scatter; yields the number of recorded calls of FlashInfer.

    The launch that numbers the tokens in the first layer is left out, too: the others are all that use the numbers.
    """
    triton, flashinfer = first_of(TRITON), first_of(FLASHINFER)
    # Not by `isinstance`, which asks every object for its class.
    holders: list[Any] = [found for found in gc.get_objects() if type(found) is flashinfer]
    name = "launch" if hasattr(flashinfer, "launch") else "module"
    launch, held = triton.__call__, [getattr(holder, name) for holder in holders]
    triton.__call__ = lambda self, *pointers: None
    for holder, value in zip(holders, held):
        setattr(holder, name, _Unlaunched(value) if name == "module" else lambda *arguments: None)
    try:
        yield len(holders)
    finally:
        triton.__call__ = launch
        for holder, value in zip(holders, held):
            setattr(holder, name, value)


def host_time(model: BertModel, inputs: dict[str, torch.Tensor], forwards: int = 30) -> dict[str, float]:
    """Microseconds of host time per layer, medians over forwards: in all, by part, and of what remains.

    The first layer is left out, which plans and waits for the lengths.
    """
    from transformers import AttentionInterface

    function = AttentionInterface()[model.config._attn_implementation]
    seconds: dict[str, list[float]] = defaultdict(list)
    whole: list[float] = []

    def attention(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        whole.append(time.perf_counter() - start)
        return result

    def run() -> None:
        for _ in range(forwards):
            model(**inputs)
            torch.cuda.synchronize()

    name = model.config._attn_implementation
    AttentionInterface.register(name, attention)
    try:
        run()
        whole.clear()
        run()
        layers = model.config.num_hidden_layers
        later = [value for at, value in enumerate(whole) if at % layers]
        found = {"attention function": statistics.median(later) * 1e6,
                 "attention function, first layer": statistics.median(whole[::layers]) * 1e6}  # fmt: skip
        whole.clear()
        with timers(seconds):
            run()
        timed = [value for at, value in enumerate(whole) if at % layers]
        for part, values in seconds.items():
            per_layer = len(values) / (forwards * layers)
            found[part] = statistics.median(values) * per_layer * 1e6
        with without_launches() as calls:
            whole.clear()
            run()
        if calls:
            found["attention function, launches aside"] = (
                statistics.median(value for at, value in enumerate(whole) if at % layers) * 1e6
            )
        found["the rest"] = statistics.median(timed) * 1e6 - sum(found[part] for part in seconds)
    finally:
        AttentionInterface.register(name, function)
    return found


def wall(model: BertModel, inputs: dict[str, torch.Tensor], repeats: int = 30) -> float:
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(**inputs)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def profile(model: BertModel, inputs: dict[str, torch.Tensor]) -> dict[str, object]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        model(**inputs)
        torch.cuda.synchronize()
    device: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            device[event.name[:90]][0] += event.device_time
            device[event.name[:90]][1] += 1
    kernels = sorted(device.items(), key=lambda item: -item[1][0])
    return {
        "device_us": sum(total for total, _ in device.values()),
        "launches": sum(count for _, count in device.values()),
        "kernels": [{"name": name, "us": round(total, 1), "calls": count} for name, (total, count) in kernels[:25]],
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--label", default="this version", help="what to call this version in the report")
    parser.add_argument(
        "--backend", default="auto", help="'flashinfer' keeps the small batch of the host's times from torch's kernel"
    )
    options = parser.parse_args()
    hf_flashinfer_attn.configure(backend=options.backend)
    report: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {"versions": {}}
    inputs = batch_of(64)
    small = {name: tensor[:8].contiguous() for name, tensor in inputs.items()}
    valid = inputs["attention_mask"].bool()
    expected = model_of("sdpa")(**inputs).last_hidden_state[valid]
    entry: dict[str, Any] = {}
    for implementation in ("sdpa", "flashinfer"):
        model = model_of(implementation)
        torch.testing.assert_close(model(**inputs).last_hidden_state[valid], expected, rtol=2e-2, atol=2e-2)
        for _ in range(3):
            model(**inputs)
            model(**small)
        entry[implementation] = {
            "forward_ms": wall(model, inputs),
            "forward_of_8_rows_ms": wall(model, small),
            "host_us_per_layer": host_time(model, small),
            "profile": profile(model, inputs),
        }
        with hf_flashinfer_attn.trace() as trace:
            model(**inputs)
        entry[implementation]["kernels"] = list(trace.kernels)
    report["versions"][options.label] = entry
    report["environment"] = first_of(DESCRIBE_ENVIRONMENT)()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    for implementation, found in entry.items():
        print(
            f"{options.label}, {implementation}: forward {found['forward_ms']:.2f} ms, of 8 rows "
            f"{found['forward_of_8_rows_ms']:.2f} ms, device {found['profile']['device_us'] / 1e3:.2f} ms in "
            f"{found['profile']['launches']} launches"
        )
        for part, value in found["host_us_per_layer"].items():
            print(f"    {part:34s} {value:8.1f} us per layer")


if __name__ == "__main__":
    main()
