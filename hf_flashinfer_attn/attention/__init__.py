"""Attention of one layer: from its arguments to a spec, a backend and a plan."""
