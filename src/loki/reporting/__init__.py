"""The report of a run or a log: one self-contained HTML page with its tables, figures and provenance."""

from loki.reporting.data import NamedSelection, ReportData
from loki.reporting.html import render_report, write_report

__all__ = ["NamedSelection", "ReportData", "render_report", "write_report"]
