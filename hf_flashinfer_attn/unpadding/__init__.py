"""Whole models without padding: hooks, packing and CUDA graphs."""

from .graph_options import GraphOptions, GraphStatistics
from .model import capture_graphs, graph_statistics, repad, unpad

__all__ = ["GraphOptions", "GraphStatistics", "capture_graphs", "graph_statistics", "repad", "unpad"]
