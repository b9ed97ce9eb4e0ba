"""A comparison as a report: one HTML file that needs nothing beside it, Markdown, and the numbers as CSV."""

from multitune.comparing.recommend import Recommendation, recommend
from multitune.comparing.report.api import ReportFiles, write_report

__all__ = ["Recommendation", "ReportFiles", "recommend", "write_report"]
