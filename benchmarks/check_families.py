"""Checks whole models of every family on a CUDA GPU: "flashinfer" must be as exact as sdpa in the same dtype.

    python benchmarks/check_families.py --json benchmarks/results/family_errors.json

A family's error is the norm of the difference to float64, over all its padding cases and several random inputs, over
valid positions only. Where sdpa does not compute what the model asks for (softcap in some versions), eager attention in
the same dtype takes its place.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import hf_flashinfer_attn
from hf_flashinfer_attn.attention import select
from hf_flashinfer_attn.tools.environment import describe_environment
from model_families import FAMILIES, Family, Padding, build_model

BUDGET = 1.25
SEEDS = 3


@dataclass(frozen=True)
class FamilyError:
    family: str
    dtype: str
    rival: str
    error: float
    rival_error: float
    ratio: float
    kernels: tuple[str, ...]
    patterns: tuple[str, ...]
    fallbacks: tuple[str, ...]


@torch.no_grad()
def outputs_of(model: torch.nn.Module, family: Family, seed: int) -> list[torch.Tensor]:
    """Every valid output of every padding case, flattened, in float64."""
    parts = []
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    for padding in family.paddings:
        generator = torch.Generator().manual_seed(seed + list(Padding).index(padding))
        example = family.make_inputs(model.config, generator, padding)
        inputs = {
            name: tensor.to(weight.device, weight.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in (example.inputs | example.masks).items()
        }
        result = model(**inputs)
        for name in family.outputs:
            valid = example.valid.get(name)
            output = getattr(result, name, result)
            output = output if valid is None else output[valid.to(weight.device)]
            parts.append(output.double().flatten())
    return parts


def distance(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    # Padding that may hold anything is not compared, so that whatever is not finite is a fault.
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(ours, exact)))


def outputs_in(family: Family, implementation: str, dtype: torch.dtype) -> list[torch.Tensor]:
    model = build_model(family, implementation).to("cuda", dtype)
    return [part for seed in range(SEEDS) for part in outputs_of(model, family, family.seed + 1000 * seed)]


def exact_outputs(family: Family) -> list[torch.Tensor]:
    try:
        exact = outputs_in(family, family.reference, torch.float64)
    except RuntimeError:
        # Some operations, grouped matrix products among them, have no float64.
        return outputs_in(family, family.reference, torch.float32)
    if all(part.isfinite().all() for part in exact):
        return exact
    # Additive masks overflow in float64 where a row sees no key; float32 is exact enough to judge half precision.
    return outputs_in(family, family.reference, torch.float32)


def rival_of(family: Family, exact: list[torch.Tensor], size: float) -> str:
    """Names the implementation to beat: sdpa, or the family's reference where it has no sdpa, or one that is wrong."""
    try:
        sdpa = outputs_in(family, "sdpa", torch.float32)
    except ValueError as reason:
        if "scaled_dot_product_attention" not in str(reason):
            raise
        return family.reference
    return family.reference if distance(sdpa, exact) > 1e-3 * size else "sdpa"


def check(index: int, dtype_name: str) -> FamilyError | str:
    """Compares one family in one dtype; returns why not where it cannot."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    select.SMALL_LOGITS = 0  # so that small models take the kernels too
    family, dtype = FAMILIES[index], getattr(torch, dtype_name)
    try:
        exact = exact_outputs(family)
        size = math.sqrt(sum(float(part.square().sum()) for part in exact))
        rival = rival_of(family, exact, size)
        rival_error = distance(outputs_in(family, rival, dtype), exact) / size
        with hf_flashinfer_attn.trace() as trace:
            error = distance(outputs_in(family, "flashinfer", dtype), exact) / size
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as reason:
        # Many architectures have an operation that half precision lacks.
        return f"{type(reason).__name__}: {str(reason).splitlines()[0][:160]}"
    if not trace.calls:
        return "no attention call"
    if not math.isfinite(rival_error):
        return f"{rival} itself is not finite in {dtype_name}"
    patterns = tuple(dict.fromkeys(call.pattern for call in trace.calls))
    return FamilyError(
        family.name, dtype_name, rival, error, rival_error, error / rival_error, trace.kernels, patterns,
        trace.fallbacks,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dtypes", default="float16,bfloat16")
    parser.add_argument("--workers", type=int, default=8, help="processes that share the GPU")
    parser.add_argument("--seconds", type=float, default=540, help="give up on what has not ended by then")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    errors: list[FamilyError] = []
    not_run: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        jobs = {
            f"{family.name} {dtype}": pool.submit(check, index, dtype)
            for dtype in options.dtypes.split(",")
            for index, family in enumerate(FAMILIES)
            if family.is_in_this_transformers and family.takes_any_name and family.is_on_the_interface
        }
        for key, job in jobs.items():
            try:
                result = job.result(timeout=max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                job.cancel()
                result = "no time left"
            if isinstance(result, str):
                not_run[key] = result
            else:
                errors.append(result)
        for process in list(pool._processes.values()) if time.monotonic() > deadline else []:
            process.terminate()
    above = [error for error in errors if not error.ratio <= BUDGET]
    report = {
        "passed": not above,
        "budget": BUDGET,
        "families": len({error.family for error in errors}),
        "above_budget": [error.family + " " + error.dtype for error in above],
        "not_run": not_run,
        "environment": describe_environment(),
        "errors": [asdict(error) for error in errors],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    for error in above:
        print(error)
    for key, reason in not_run.items():
        print("not run:", key, reason)
    ratios = sorted(error.ratio for error in errors)
    print(
        f"{len(errors)} checks, {report['families']} families, ratio: median {ratios[len(ratios) // 2]:.3f}, ", end=""
    )
    print(f"worst {ratios[-1]:.3f}, above {BUDGET}: {len(above)}; not run: {len(not_run)}")
    return 0 if not above else 1


if __name__ == "__main__":
    sys.exit(main())
