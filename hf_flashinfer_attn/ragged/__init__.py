"""Ragged layouts, lazy masks and per-forward state."""
