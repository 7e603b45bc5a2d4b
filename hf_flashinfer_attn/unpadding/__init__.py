"""Whole models on ragged tokens: padding is dropped before the embeddings and put back before what needs rows."""

from .graph_options import GraphOptions, GraphStatistics
from .model import capture_graphs, graph_statistics, repad, unpad

__all__ = ["GraphOptions", "GraphStatistics", "capture_graphs", "graph_statistics", "repad", "unpad"]
