"""Looking at a run: its directory, tables, plots and the one-file report."""

from sculpt.report.html import Number, Report, render, write_html
from sculpt.report.network import frozen_lines, layers_table, sites_table
from sculpt.report.plots import graph_plot, kept_plot, latency_plot, pareto_plot, reward_plot
from sculpt.report.run_directory import RESULT_FIELDS, RunDirectory, check_result
from sculpt.report.tables import COLUMNS, Row, cells, closing_table, latency_table

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
    "frozen_lines",
    "graph_plot",
    "kept_plot",
    "latency_plot",
    "latency_table",
    "layers_table",
    "pareto_plot",
    "render",
    "reward_plot",
    "sites_table",
    "write_html",
]
