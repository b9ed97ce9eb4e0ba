"""A comparison as a report: one HTML file that needs nothing beside it, Markdown, and the numbers as CSV."""

from multitune.compare.report.api import ReportFiles, write_report

__all__ = ["ReportFiles", "write_report"]
