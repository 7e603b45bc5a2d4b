"""Times whole models, ours beside others, on the user's texts or on named workloads; outputs are checked first."""

from .contenders import CONTENDERS, Contender
from .errors import BenchError
from .measure import BenchReport, Cell, Outcome, Plan, run_bench
from .plot import draw_chart, require_matplotlib
from .progress import Progress
from .report import COLUMNS_EXPLAINED, format_cell, format_html, load_reports, report_figures
from .workload import RequestSet, parse_request_set

__all__ = [
    "COLUMNS_EXPLAINED",
    "CONTENDERS",
    "BenchError",
    "BenchReport",
    "Cell",
    "Contender",
    "Outcome",
    "Plan",
    "Progress",
    "RequestSet",
    "draw_chart",
    "format_cell",
    "format_html",
    "load_reports",
    "parse_request_set",
    "report_figures",
    "require_matplotlib",
    "run_bench",
]
