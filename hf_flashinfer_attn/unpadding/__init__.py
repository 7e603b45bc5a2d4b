"""Whole models on ragged tokens: padding is dropped before the embeddings and put back before what needs rows."""

from .model import repad, unpad

__all__ = ["repad", "unpad"]
