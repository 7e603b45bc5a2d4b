"""unpad against float64 on a GPU: families and heads in half precision, with graphs and without, beside sdpa's error.

    python benchmarks/check_unpad.py --json benchmarks/results/unpad_errors.json

Families and heads are those of tests/test_unpad.py, with wider layers, on right- and left-padded batches of random
lengths. With `--minilm`, the real all-MiniLM-L6-v2 on passages of Python's documentation in place of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import hf_flashinfer_attn
from hf_flashinfer_attn.attention import select
from hf_flashinfer_attn.tools.environment import describe_environment

BUDGET = 1.25
ROWS, SLOTS = 256, 40
# How inputs reach the model, and what runs it.
WAYS = {"unpad": (False, "cuda"), "unpad, inputs on the CPU": (False, "cpu"), "graphs": (True, "cuda")}


def relative(output: torch.Tensor, exact: torch.Tensor) -> float:
    return float((output.double() - exact).norm() / exact.norm())


def check(
    exact: dict[str, torch.Tensor], sdpa: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]
) -> dict[str, dict[str, float]]:
    """Returns the errors of each output; the parts that padding has no say in."""
    return {
        name: {"sdpa": relative(sdpa[name], value), "ours": relative(ours[name], value), "numbers": value.numel()}
        for name, value in exact.items()
    }


@torch.no_grad()
def families(dtypes: list[str], seconds: float) -> tuple[list[dict[str, Any]], list[str]]:
    import test_unpad as cases

    cells, left = [], []
    start = time.perf_counter()
    for family, (_, _, _, heads) in cases.FAMILIES.items():
        widths = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 64, "num_labels": 4}
        if family == "distilbert":
            widths = {"dim": 128, "hidden_dim": 256, "max_position_embeddings": 64, "num_labels": 4}
        if "head_dim" in cases.FAMILIES[family][2]:
            widths["head_dim"] = 32
        for head in ("", *heads):
            if time.perf_counter() - start > seconds or (family.endswith("-mean") and not head):
                left.append(f"{family}-{head or 'base'}")
                continue
            torch.manual_seed(0)
            settings = dict(widths, num_labels=2) if head == "QuestionAnswering" else widths
            first = "sdpa" if family != "mpnet" else "eager"
            try:
                double = cases.build(family, head, first, **settings).double().cuda()
                twin = cases.build(family, head, "flashinfer", **settings).double()
            except BaseException as error:
                if type(error).__name__ != "Skipped":
                    raise
                left.append(f"{family}-{head or 'base'}")
                continue
            twin.load_state_dict(double.state_dict())
            for side in ("right", "left"):
                lengths = torch.randint(1, SLOTS + 1, (ROWS,))
                # Rows whose first slot is a token, on the left too: what is pooled there is compared in them alone.
                lengths[::2] = SLOTS
                mask = (torch.arange(SLOTS) < lengths[:, None]).long()
                mask = mask.flip(1) if side == "left" else mask
                ids = torch.randint(5, cases.VOCAB_SIZE, mask.shape).masked_fill(mask == 0, cases.PAD)
                shape = (ROWS // 2, 2, SLOTS) if head == "MultipleChoice" else (ROWS, SLOTS)
                inputs = {"input_ids": ids.view(shape), "attention_mask": mask.view(shape)}
                for dtype in dtypes:
                    half = getattr(torch, dtype)
                    model = copy.deepcopy(double).to(half)
                    # Rounded weights are the model, not an error of its attention.
                    exact = model.double()(**on(inputs, "cuda"))
                    sdpa = model.to(half)(**on(inputs, "cuda"))
                    flat = [parts(output, inputs, family, head, cases) for output in (exact, sdpa)]
                    for way, (graphs, where) in WAYS.items():
                        unpadded = hf_flashinfer_attn.unpad(copy.deepcopy(twin).to("cuda", half), cuda_graphs=graphs)
                        with hf_flashinfer_attn.trace() as trace:
                            output = unpadded(**on(inputs, where))
                        errors = check(*flat, parts(output, inputs, family, head, cases))
                        replayed = hf_flashinfer_attn.graph_statistics(unpadded).replayed
                        cells.append(
                            {"family": family, "head": head or "base", "padding": side, "dtype": dtype, "way": way,
                             "kernels": trace.kernels, "fallbacks": trace.fallbacks, "replayed": replayed,
                             "errors": errors, "passed": within(errors)}
                        )  # fmt: skip
    return cells, left


def on(inputs: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


def parts(output: Any, inputs: dict[str, torch.Tensor], family: str, head: str, cases: Any) -> dict[str, torch.Tensor]:
    on_gpu = {name: value.cuda() for name, value in inputs.items()}
    return {
        name: cases.comparable(value, name, on_gpu, family, head) for name, value in cases.tensors_of(output).items()
    }


def within(errors: dict[str, dict[str, float]]) -> bool:
    return all(found["ours"] <= BUDGET * found["sdpa"] for found in errors.values())


@torch.no_grad()
def minilm(dtypes: list[str], passages: int) -> list[dict[str, Any]]:
    from hf_flashinfer_attn.tools.demo import load_encoder, load_passages

    cells = []
    for dtype in dtypes:
        half = getattr(torch, dtype)
        models = {name: load_encoder(name, "cuda", half) for name in ("sdpa", "flashinfer")}
        sdpa, tokenizer = models["sdpa"]
        double = copy.deepcopy(sdpa).double()
        texts = load_passages(passages)
        batches = [
            dict(tokenizer(texts[at : at + 64], padding=True, truncation=True, max_length=256, return_tensors="pt"))
            for at in range(0, len(texts), 64)
        ]
        outputs: dict[str, list[torch.Tensor]] = {name: [] for name in ("exact", "sdpa")}
        for batch in batches:
            valid = batch["attention_mask"].bool().cuda()
            for name, model in (("exact", double), ("sdpa", sdpa)):
                outputs[name].append(model(**on(batch, "cuda")).last_hidden_state[valid])
        exact, reference = torch.cat(outputs["exact"]), torch.cat(outputs["sdpa"])
        for way, (graphs, where) in WAYS.items():
            model = hf_flashinfer_attn.unpad(copy.deepcopy(models["flashinfer"][0]), cuda_graphs=graphs)
            found = []
            with hf_flashinfer_attn.trace() as trace:
                for batch in batches:
                    valid = batch["attention_mask"].bool().cuda()
                    found.append(model(**on(batch, where)).last_hidden_state[valid])
            errors = {
                "last_hidden_state": {"sdpa": relative(reference, exact), "ours": relative(torch.cat(found), exact)}
            }
            statistics = hf_flashinfer_attn.graph_statistics(model)
            cells.append(
                {"family": "all-MiniLM-L6-v2", "head": "base", "padding": "right", "dtype": dtype, "way": way,
                 "kernels": trace.kernels, "fallbacks": trace.fallbacks, "passages": len(texts),
                 "host_copies": trace.host_copies, "forwards": len(batches), "replayed": statistics.replayed,
                 "errors": errors, "passed": within(errors)}
            )  # fmt: skip
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dtypes", default="float16,bfloat16")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--minilm", type=int, metavar="PASSAGES", help="the real model on so many passages instead")
    options = parser.parse_args()
    # So that small batches take the kernels too.
    select.SMALL_LOGITS = 0
    dtypes, left = options.dtypes.split(","), []
    if options.minilm:
        cells = minilm(dtypes, options.minilm)
    else:
        cells, left = families(dtypes, options.seconds)
    ratios = [found["ours"] / found["sdpa"] for cell in cells for found in cell["errors"].values() if found["sdpa"]]
    report = {
        "passed": all(cell["passed"] for cell in cells), "checks": len(cells), "worst_ratio": max(ratios),
        "budget": BUDGET, "not_run": left, "environment": describe_environment(), "cells": cells,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    for cell in cells:
        if not cell["passed"]:
            print("FAILED", {name: cell[name] for name in ("family", "head", "padding", "dtype", "way", "errors")})
    print({name: report[name] for name in ("passed", "checks", "worst_ratio", "not_run")})
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
