"""FlashInfer attention for Hugging Face transformers.

Importing this package registers an attention implementation:

    import hf_flashinfer_attn

    model = AutoModel.from_pretrained(path, attn_implementation="flashinfer", dtype=torch.float16, device_map="cuda")
"""

import sys

# The command line prints --help and usage errors before the slow imports below.
# sys.argv[0] is "-m" while Python locates the module of `python -m`.
if (sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == __name__) or (
    sys.argv and sys.argv[0].endswith("hf-flashinfer-attn")
):
    from .tools.cli import check_usage

    check_usage(sys.argv[1:])

from .encoding import encode, encode_iter, predict, rank
from .errors import BackendUnavailableError, FlashInferAttentionError, UnsupportedAttentionError
from .integration.registration import register
from .settings import Settings, configure, current_settings
from .tools.diagnosis import Diagnosis, doctor
from .tools.kernel_warmup import WarmupReport, warmup
from .tracing import AttentionCall, Trace, trace
from .unpadding import GraphOptions, GraphStatistics, capture_graphs, graph_statistics, repad, unpad
from .version import __version__

__all__ = [
    "AttentionCall",
    "BackendUnavailableError",
    "Diagnosis",
    "FlashInferAttentionError",
    "GraphOptions",
    "GraphStatistics",
    "Settings",
    "Trace",
    "UnsupportedAttentionError",
    "WarmupReport",
    "__version__",
    "capture_graphs",
    "configure",
    "current_settings",
    "doctor",
    "encode",
    "encode_iter",
    "graph_statistics",
    "predict",
    "rank",
    "register",
    "repad",
    "trace",
    "unpad",
    "warmup",
]

register()
