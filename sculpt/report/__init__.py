"""Looking at a run: its directory, tables, plots and the one-file report."""

from sculpt.report.html import Number, Report, render, write_html
from sculpt.report.plots import graph_plot, kept_plot, pareto_plot, reward_plot
from sculpt.report.run_directory import RESULT_FIELDS, RunDirectory, check_result
from sculpt.report.tables import COLUMNS, Row, cells, closing_table

__all__ = [
    "COLUMNS",
    "RESULT_FIELDS",
    "Number",
    "Report",
    "Row",
    "RunDirectory",
    "cells",
    "check_result",
    "closing_table",
    "graph_plot",
    "kept_plot",
    "pareto_plot",
    "render",
    "reward_plot",
    "write_html",
]
