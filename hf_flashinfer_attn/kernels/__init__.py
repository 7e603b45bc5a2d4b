"""Kernels of FlashInfer and torch, their compilation and plans, and head-dim padding."""
