"""Errors of reading a model or its config by path or id, as one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import FlashInferAttentionError, first_line

__all__ = ["UnreadableModelError", "reading"]

_WAY_OUT = "Pass a folder with a config.json, or the id of a model on the hub."


class UnreadableModelError(FlashInferAttentionError):
    """There is no model that transformers can read at this path or id."""


@contextmanager
def reading(name: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what transformers raises while it reads the model `name` into an `UnreadableModelError`."""
    path = os.fspath(name)
    # Not a valid id, so the hub is not asked.
    if path.startswith(("/", ".", "~")) and not os.path.exists(path):
        raise UnreadableModelError(f"there is no folder {path!r}. {_WAY_OUT}")
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        said = first_line(error).rstrip(".:")
        raise UnreadableModelError(f"the model {path!r} cannot be read: {said}. {_WAY_OUT}") from error
