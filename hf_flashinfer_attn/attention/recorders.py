"""Refusal of torch.export, torch.jit.trace and make_fx: they would bake in the row lengths of the example."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ..errors import UnsupportedAttentionError

__all__ = ["is_exporting", "recorder", "refuse_export", "refuse_recording"]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_exporting() -> bool:
    """Whether torch.export is tracing. In torch 2.11 the function also returns True in torch.compile's traces."""
    return torch.compiler.is_exporting()


def recorder() -> str | None:
    """Returns the tool that records this forward; None without one, or for torch.compile (its ops read lengths)."""
    if is_exporting():
        return "torch.export"
    if torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    return None if get_proxy_mode() is None else "make_fx"


def refuse_recording() -> None:
    """Raises `UnsupportedAttentionError` if a tool records this forward: the recording would silently be wrong."""
    if (tool := recorder()) is not None:
        raise UnsupportedAttentionError(
            f"attention recorded by {tool}, which would repeat the row lengths of its example for any other batch",
            "Record the model after repad(model) and model.set_attn_implementation('eager'), with the same weights.",
        )


# A strict export cannot trace through our error, and shows this reason instead.
refuse_export: Callable[[], None] = torch.compiler.disable(
    refuse_recording, reason="hf_flashinfer_attn reads row lengths on the host; export with attn_implementation='eager'"
)
