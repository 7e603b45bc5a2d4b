"""`encode`, `predict` and `rank`: vectors and scores from strings."""

from .api import encode, encode_iter, predict, rank

__all__ = ["encode", "encode_iter", "predict", "rank"]
