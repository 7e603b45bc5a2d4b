"""Old name of `html_table` in [`tables`]."""

from .tables import html_table

__all__ = ["html_table"]
