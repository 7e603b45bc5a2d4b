"""Warnings of this package, each logged once."""

from __future__ import annotations

import logging
import threading

__all__ = ["log_once", "logged", "logger"]

logger = logging.getLogger("hf_flashinfer_attn")

# Keys of the logged warnings.
logged: set[str] = set()
_logged_lock = threading.Lock()


def log_once(message: str, key: str | None = None) -> None:
    """Logs a warning once per `key`, by default once per message."""
    key = message if key is None else key
    if key not in logged:
        with _logged_lock:
            if key in logged:
                return
            logged.add(key)
        logger.warning(message)
