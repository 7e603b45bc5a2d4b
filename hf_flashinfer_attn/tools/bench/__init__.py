"""`bench`: whole models against sdpa, on the user's texts or a preset workload; outputs are verified first."""

from .measure import run_bench
from .plan import Plan
from .plot import draw_chart, require_matplotlib
from .progress import Progress
from .report import (
    COLUMNS_EXPLAINED,
    BenchReport,
    Cell,
    Outcome,
    format_cell,
    format_html,
    load_reports,
    report_figures,
)  # fmt: skip
from .workload import BenchError, RequestSet, parse_request_set

__all__ = [
    "COLUMNS_EXPLAINED", "BenchError", "BenchReport", "Cell", "Outcome", "Plan", "Progress", "RequestSet",
    "draw_chart", "format_cell", "format_html", "load_reports", "parse_request_set", "report_figures",
    "require_matplotlib", "run_bench",
]  # fmt: skip
