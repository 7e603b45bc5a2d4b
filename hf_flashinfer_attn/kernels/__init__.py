"""Kernels of FlashInfer and torch, their compilation, and head-dim padding."""
