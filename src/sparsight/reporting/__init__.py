"""The run log, comparisons of runs, and their HTML report. Imports no torch."""

from sparsight.reporting.card import write_card
from sparsight.reporting.checks import check_table, layer_table, write_analysis, write_check
from sparsight.reporting.comparison import compare, verdict, write_comparison
from sparsight.reporting.curve import write_curve
from sparsight.reporting.inspection import write_inspection
from sparsight.reporting.report import render_table, report, write_report
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
    "write_curve",
    "write_inspection",
    "write_report",
]
