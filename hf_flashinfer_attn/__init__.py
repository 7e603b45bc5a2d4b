"""FlashInfer attention for Hugging Face transformers.

Importing this package registers the attention implementation "flashinfer":

    model = AutoModel.from_pretrained(path, attn_implementation="flashinfer", dtype=torch.float16, device_map="cuda")
"""

from .errors import BackendUnavailableError, FlashInferAttentionError, UnsupportedAttentionError
from .registration import register
from .settings import Settings, configure, current_settings
from .trace import AttentionCall, Trace, trace
from .unpadding import repad, unpad
from .version import __version__

__all__ = [
    "AttentionCall",
    "BackendUnavailableError",
    "FlashInferAttentionError",
    "Settings",
    "Trace",
    "UnsupportedAttentionError",
    "__version__",
    "configure",
    "current_settings",
    "register",
    "repad",
    "trace",
    "unpad",
]

register()
