"""Ragged layouts, lazy masks and the state of a forward."""
