"""One line for what goes wrong when a model or its config is read by path or id."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import FlashInferAttentionError, first_line

__all__ = ["UnreadableModelError", "reading"]

_WAY_OUT = "Pass a folder with a config.json, or the id of a model on the hub."


class UnreadableModelError(FlashInferAttentionError):
    """No model, or none that transformers can read, is where the caller said."""


@contextmanager
def reading(name: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what transformers raises while it reads a model into an error of one line.

    Args:
        name: Path or id of the model.

    Raises:
        UnreadableModelError: If there is no such folder, or what transformers raised is about it.
    """
    path = os.fspath(name)
    # What can be no id is not asked of the hub.
    if path.startswith(("/", ".", "~")) and not os.path.exists(path):
        raise UnreadableModelError(f"there is no folder {path!r}. {_WAY_OUT}")
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        said = first_line(error).rstrip(".:")
        raise UnreadableModelError(f"the model {path!r} cannot be read: {said}. {_WAY_OUT}") from error
