"""The run log, comparisons of runs, and their HTML report. Imports no torch."""

from sparsight.reporting.analysis_page import layer_table, write_analysis
from sparsight.reporting.card import write_card
from sparsight.reporting.check_page import check_table, write_check
from sparsight.reporting.comparison import compare, render_table, verdict, write_comparison
from sparsight.reporting.html import report, write_report
from sparsight.reporting.inspection import write_inspection
from sparsight.reporting.runlog import Run, RunLog, StageRun, environment, read_run, read_runs
from sparsight.reporting.watch import watch

__all__ = [
    "Run",
    "RunLog",
    "StageRun",
    "check_table",
    "compare",
    "environment",
    "layer_table",
    "read_run",
    "read_runs",
    "render_table",
    "report",
    "verdict",
    "watch",
    "write_analysis",
    "write_card",
    "write_check",
    "write_comparison",
    "write_inspection",
    "write_report",
]
