"""The report of a run: one self-contained HTML page with its table, figures and provenance."""

from loki.reporting.html import ReportData, render_report, write_report

__all__ = ["ReportData", "render_report", "write_report"]
