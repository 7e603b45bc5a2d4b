"""Support tables of the documentation, generated from the rules of `select` and `unpad`."""

from __future__ import annotations

from collections.abc import Sequence

from ..attention.select import RULES, Backend
from ..unpadding.families import FAMILIES, REFUSED

__all__ = ["refused_table", "support_table", "unpadding_table"]

# Features without a fallback rule.
_NATIVE = (
    "full and causal attention, with a cache or without",
    "sliding windows, causal and two-sided, of any width",
    "padding: right, left, holes, rows of padding only, none",
    "packed sequences (`cu_seq_lens_q` and `cu_seq_lens_k`)",
    "packed sequences by restarting `position_ids` alone, in decoders, without a mask and a cache",
    "cross-attention with its own padding",
    "grouped-query and multi-query heads, values of another head_dim",
    "head_dim up to 256, softcap, any softmax scale",
    "attention sinks (`s_aux`), `position_bias` (T5, and MPNet after `unpad`; compiles a kernel of its own)",
)
# Cases where torch's kernel is faster (benchmarks/NOTES.md); `backend="flashinfer"` disables this choice.
_FASTER_ELSEWHERE = (
    "full or causal attention without padding, of a head_dim that would be padded",
    "padded batches of under 67 million logits per layer, for which planning costs more than it saves",
)
# transformers detects packed sequences only when it makes a causal mask, which includes EmbeddingGemma's.
_NOT_NOTICED = (
    "packed sequences by restarting `position_ids` alone, in encoders and in decoders with `config.is_causal=False`",
)
_REFUSED = (
    "continuous batching with versions of transformers that request `paged\\|flashinfer`, such as 5.17",
    "`torch.export`, `torch.jit.trace` and `make_fx` of attention",
    "planning while a CUDA graph is captured",
    "`cu_seq_lens` together with a padding mask",
)
_RUNS_ON = {Backend.DENSE: "dense attention", Backend.TORCH: "ragged torch backend"}


def support_table() -> str:
    """Returns the backend of each feature on a GPU that FlashInfer supports, as a Markdown table."""
    rows = [
        *((feature, "FlashInfer") for feature in _NATIVE),
        *((feature, "torch's sdpa") for feature in _FASTER_ELSEWHERE),
        *((rule.feature, f"{_RUNS_ON[rule.backend]}, logged once") for rule in RULES),
        *((feature, "one sequence, as in eager attention") for feature in _NOT_NOTICED),
        *((feature, "`UnsupportedAttentionError`") for feature in _REFUSED),
    ]
    return _table(("request", "on a GPU"), rows)


def unpadding_table() -> str:
    """Returns the model families that `unpad` supports, as a Markdown table."""
    rows = []
    for name, family in sorted(FAMILIES.items()):
        remarks = {
            "packed with `use_cache=False`": family.is_causal,
            "embeddings run padded, before packing; no CUDA graphs": family.embeds_rows,
            "its own attention is replaced; no CUDA graphs": family.own_attention is not None,
            "rows with holes stay padded": family.measures_slots,
        }
        shown = "; ".join(text for text, applies in remarks.items() if applies)
        rows.append((f"`{name}`", family.positions.value, shown))
    return _table(("backbone", "position ids", "remarks"), rows)


def refused_table() -> str:
    """Returns the model types that `unpad` refuses, with the reasons, as a Markdown table."""
    return _table(("model type", "why"), [(f"`{model_type}`", reason) for model_type, reason in REFUSED.items()])


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
    return "\n".join([head, "|---" * len(header) + "|", *body])
