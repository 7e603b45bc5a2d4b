"""Strings to vectors and scores."""

from .api import encode, encode_iter, predict, rank

__all__ = ["encode", "encode_iter", "predict", "rank"]
