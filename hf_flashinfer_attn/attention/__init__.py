"""Attention of one layer: parsed arguments (the spec), selection of a backend, plans."""
