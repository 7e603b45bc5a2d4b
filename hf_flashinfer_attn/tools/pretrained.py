"""One-line errors for a model or config that cannot be loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import FlashInferAttentionError, first_line

__all__ = ["UnreadableModelError", "reading"]

_WAY_OUT = "Pass a folder with a config.json, or the id of a model on the hub."


class UnreadableModelError(FlashInferAttentionError):
    """transformers cannot read a model at this path or Hub id."""


@contextmanager
def reading(name: str | os.PathLike[str]) -> Iterator[None]:
    """Converts the errors of loading the model `name` to an `UnreadableModelError`."""
    path = os.fspath(name)
    # Not a valid Hub id, so no request is made.
    if path.startswith(("/", ".", "~")) and not os.path.exists(path):
        raise UnreadableModelError(f"there is no folder {path!r}. {_WAY_OUT}")
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error).rstrip(".:")
        raise UnreadableModelError(f"the model {path!r} cannot be read: {reason}. {_WAY_OUT}") from error
