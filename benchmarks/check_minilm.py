"""Embeds 10,000 passages with the real all-MiniLM-L6-v2 in half precision and compares "flashinfer" with sdpa.

    python benchmarks/check_minilm.py --json benchmarks/results/minilm_agreement.json

The bounds are those of the original head-dim padding work in SGLang: `allclose(rtol=1e-2, atol=1e-3)`, a mean absolute
error of at most 1.89e-5 and a maximum of at most 9.77e-4.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

import hf_flashinfer_attn
from hf_flashinfer_attn.tools.demo import embed, load_encoder, load_passages
from hf_flashinfer_attn.tools.environment import describe_environment

MEAN_BOUND = 1.89e-5
MAX_BOUND = 9.77e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--passages", type=int, default=10_000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16")
    options = parser.parse_args()
    dtype: torch.dtype = getattr(torch, options.dtype)
    texts = load_passages(options.passages)
    embeddings = {}
    for name, implementation, weights in (
        ("exact", "sdpa", torch.float32),
        ("sdpa", "sdpa", dtype),
        ("flashinfer", "flashinfer", dtype),
    ):
        model, tokenizer = load_encoder(implementation, options.device, dtype)
        # The weights of both are those of the half-precision checkpoint.
        model.to(weights)
        with hf_flashinfer_attn.trace() as trace:
            embeddings[name] = embed(model, tokenizer, texts, batch_size=64).float()
    ours, reference = embeddings["flashinfer"], embeddings["sdpa"]
    difference = (ours - reference).abs()
    distance = {name: float((embeddings[name] - embeddings["exact"]).abs().mean()) for name in ("sdpa", "flashinfer")}
    report = {
        "passages": len(texts),
        "dtype": options.dtype,
        "kernels": trace.kernels,
        "fallbacks": trace.fallbacks,
        "forwards": trace.layouts,
        "attention_calls": len(trace.calls),
        "host_copies": trace.host_copies,
        "plans": trace.plans,
        "allclose_rtol_1e-2_atol_1e-3": bool(torch.allclose(ours, reference, rtol=1e-2, atol=1e-3)),
        "mean_absolute_error": float(difference.mean()),
        "mean_bound": MEAN_BOUND,
        "max_absolute_error": float(difference.max()),
        "max_bound": MAX_BOUND,
        "mean_absolute_error_against_float32": distance,
        "environment": describe_environment(),
    }
    report["passed"] = (
        report["allclose_rtol_1e-2_atol_1e-3"]
        and report["mean_absolute_error"] <= MEAN_BOUND
        and report["max_absolute_error"] <= MAX_BOUND
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "environment"}))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
